"""What the classifier looks at: class-activation heat-maps by gradients (Grad-CAM, Selvaraju et al., ICCV 2017).

Deviation: the head's scores are scaled to unit deviation before the softmax, in which a sure network has no gradient.

Shapes: B images, C channels, K clusters, F maps of h x w.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepcluster.classifier import Classifier


def heat(classifier: Classifier, images: Tensor, cluster: Tensor) -> Tensor:
    """How much each place of an image speaks for a cluster, by the last maps of the network; edits are obeyed.

    Args:
        classifier: of images; it is put into evaluation mode, its weights are left as they are.
        images: (B, C, H, W) uint8, as a store gives them.
        cluster: (B,) int64 ids.

    Returns:
        (B, H, W) float32 in [0, 1] on the CPU; the largest value of an image is 1, or 0 if nothing speaks for it.

    Raises:
        ValueError: there are no images, or the network has no maps.
    """
    if images.ndim != 4:
        raise ValueError(f"heat-maps are of images (B, C, H, W); got {tuple(images.shape)}; vectors have none")
    device = classifier.order.device
    maps: list[Tensor] = []

    def remember(module: nn.Module, given: Any, out: Any) -> Tensor | None:
        if not isinstance(out, Tensor) or out.ndim != 4 or out.shape[2] * out.shape[3] == 1:
            return None
        maps[:] = [out.detach().requires_grad_()]  # what came before is forgotten: as little memory as predicting
        return maps[0].clone()  # which the next layer may change in place

    def soften(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return out / out.detach().std(1, correction=0, keepdim=True).clamp_min(1e-6)

    leaves = [m for m in classifier.backbone.modules() if not list(m.children()) and "Pool" not in type(m).__name__]
    hooks = [leaf.register_forward_hook(remember) for leaf in leaves]
    hooks.append(classifier.head.register_forward_hook(soften))
    classifier.eval()
    try:
        with torch.enable_grad():
            p = classifier(images.to(device).float() / 255)[1]
            score = p.gather(1, cluster.to(device)[:, None]).clamp_min(1e-12).log().sum()
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise ValueError("heat-maps need a network with convolutions; this one has no maps")
    slope = torch.autograd.grad(score, maps[0], allow_unused=True)[0] if score.requires_grad else None
    if slope is None:
        return torch.zeros(len(images), *images.shape[2:])
    found = (slope.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True).detach().relu().float()
    found = F.interpolate(found, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0].cpu()
    most = found.amax((1, 2), keepdim=True)
    return found / torch.where(most > 0, most, 1.0)
