"""Networks that turn images into features: our small convnet, the papers' networks, torchvision's and timm's.

Every one takes (B, C, H, W) images in [0, 1] and gives (B, D) features.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepcluster import foreign, pretrained, trust
from deepcluster.recipe import hint
from deepcluster.weights import check_file, load_weights

LEAST = {"alexnet": 64, "vgg16": 32}  # pixels a side
IDENTITY = "identity"  # of vectors that are features already
SMALL = 64  # below this many pixels a side, networks made for photographs get a stem without stride


def convnet(channels: int, size: int) -> tuple[nn.Module, int]:
    """Three 3x3 convolutions with BN, 32, 64 and 128 channels, for small images on CPUs; D = 512.

    The last map is pooled to 2 x 2, not to 1: where things are tells characters apart.
    """
    widths = (32, 64, 128)
    pools = max(0, min(2, size.bit_length() - 2))
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        inputs = channels if i == 0 else widths[i - 1]
        pool = [nn.MaxPool2d(2)] if i < pools else []  # before the norm, which then has a quarter to do
        conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        layers += [conv, *pool, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 4 * widths[-1]


class Sobel(nn.Module):
    """Grey, then its horizontal and vertical gradient: (B, C, H, W) -> (B, 2, H, W), no parameters.

    As in DeepCluster: the network cannot cluster by colour.
    """

    def __init__(self) -> None:
        super().__init__()
        dx = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        self.register_buffer("filters", torch.stack([dx, dx.T])[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images.mean(1, keepdim=True), self.get_buffer("filters"), padding=1)


def alexnet(channels: int, size: int) -> tuple[nn.Module, int]:
    """DeepCluster's AlexNet: Sobel, five ungrouped convolutions with BN, two dense layers; D = 4096."""
    _at_least(size, "alexnet")
    layers: list[nn.Module] = [Sobel()]
    spec = ((2, 96, 11, 4, 2, 1), (96, 256, 5, 1, 2, 1), (256, 384, 3, 1, 1, 0), (384, 384, 3, 1, 1, 0))
    for inputs, width, kernel, stride, padding, pool in (*spec, (384, 256, 3, 1, 1, 1)):
        layers += [nn.Conv2d(inputs, width, kernel, stride, padding), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2, ceil_mode=True)] * pool
    return nn.Sequential(*layers, *_dense(256, 6)), 4096


def vgg16(channels: int, size: int) -> tuple[nn.Module, int]:
    """DeepCluster's VGG-16 with BN behind Sobel; D = 4096."""
    from torchvision.models import vgg16_bn

    _at_least(size, "vgg16")
    features = vgg16_bn(weights=None).features
    features[0] = nn.Conv2d(2, 64, 3, padding=1)
    return nn.Sequential(Sobel(), features, *_dense(512, 7)), 4096


def _dense(inputs: int, side: int) -> list[nn.Module]:
    """The papers' two dense layers; features are taken before the last ReLU."""
    first, second = nn.Linear(inputs * side * side, 4096), nn.Linear(4096, 4096)
    return [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Dropout(0.5), first, nn.ReLU(), nn.Dropout(0.5), second]


def _at_least(size: int, name: str) -> None:
    if size < LEAST[name]:
        raise ValueError(f"{name} needs images of at least {LEAST[name]} px, got {size}; use --image-size or convnet")


def _resnet(name: str) -> Callable[[int, int], tuple[nn.Module, int]]:
    def build(channels: int, size: int) -> tuple[nn.Module, int]:
        return torchvision_backbone(name, channels, size)

    build.__doc__ = f"torchvision's {name}; below 64 px a 3x3 stem without stride and pooling."
    return build


def torchvision_backbone(name: str, channels: int, size: int) -> tuple[nn.Module, int]:
    """A torchvision classification network without its last layer, its first one fitted to ``channels``."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no model {name!r}; {hint(name, models.list_models(module=models))}")
    net = models.get_model(name, weights=None)
    linear = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"torchvision's {name} does not end in a linear layer; choose another, such as resnet18")
    last, layer = linear[-1]
    _replace(net, last, nn.Identity())
    if channels != 3:
        first, conv = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
        _replace(net, first, _conv_like(conv, channels))
    if name.startswith("resnet") and size < SMALL:
        net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net, layer.in_features


def _conv_like(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    shape = (conv.kernel_size, conv.stride, conv.padding)
    return nn.Conv2d(channels, conv.out_channels, *shape, bias=conv.bias is not None)  # type: ignore[arg-type]


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)


def timm_backbone(name: str, channels: int, size: int) -> tuple[nn.Module, int]:
    """A timm network without its classifier (extra ``timm``)."""
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed; pip install 'deepcluster[timm]'") from None
    if name.partition(".")[0] not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}; {hint(name, timm.list_models())}")
    net = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    return net, foreign.width(net, (channels, size, size), f"timm:{name}")


def mlp(channels: int, size: int) -> tuple[nn.Module, int]:
    """For feature vectors of ``channels`` numbers: two dense layers, D = 256."""
    layers = [nn.Linear(channels, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()), 256


class Lifted(nn.Module):
    """(B, D) vectors of about unit deviation -> (B, D + 1): a last number that is the same for all.

    Heads and neighbours compare directions; with it two vectors of one direction and different lengths are apart, too.
    """

    def forward(self, vectors: Tensor) -> Tensor:
        return F.pad(vectors, (0, 1), value=vectors.shape[1] ** 0.5)


def identity(channels: int, size: int) -> tuple[nn.Module, int]:
    """For vectors of ``channels`` numbers that are features already: as they are, ``Lifted``; nothing to train."""
    return Lifted(), channels + 1


BACKBONES: dict[str, Callable[[int, int], tuple[nn.Module, int]]] = {
    "convnet": convnet,
    "resnet18": _resnet("resnet18"),
    "resnet34": _resnet("resnet34"),
    "resnet50": _resnet("resnet50"),
    "vgg16": vgg16,
    "alexnet": alexnet,
    "mlp": mlp,
    IDENTITY: identity,
}
_SPACES = {"torchvision": torchvision_backbone, "timm": timm_backbone}


class Normalise(nn.Module):
    """Subtract a mean and divide by a deviation per channel; both travel with the model."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        shape = (-1, *[1] * (images.ndim - 2))
        return (images - self.get_buffer("mean").view(shape)) / self.get_buffer("std").view(shape)


def make_backbone(
    name: str,
    shape: tuple[int, ...],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    follows: bool = False,
) -> tuple[nn.Module, int]:
    """Build a backbone for images of ``shape`` (C, H, W) or vectors (D,); returns it with its feature dimension.

    Args:
        name: a key of BACKBONES, ``torchvision:NAME``, ``timm:NAME``, or one of ``pretrained``.
        shape: of one image or vector.
        mean: (C,) of the images in [0, 1]; default 0.5, or what a pretrained backbone comes with. Longer than one for
            grey images: the network sees them as colour.
        std: (C,) of the images in [0, 1]; default 0.25, or as the mean.
        follows: weights are loaded into it afterwards, so that it need not bring its own.

    Raises:
        ValueError: unknown name, images too small for it, or code that a file named and nobody trusts.
    """
    name, weights = pretrained.resolve(name)
    space, _, rest = name.partition(":")
    named, own = bool(rest) and space in _SPACES, pretrained.is_own(name)
    if (named or own or name in BACKBONES) and (len(shape) == 1) != (name in ("mlp", IDENTITY)):
        raise ValueError(f"{name} takes {'images' if len(shape) == 1 else 'vectors'}; the data has shape {shape}")
    if trust.is_code(name) and not trust.origin(name):
        raise unknown(name)
    if not (follows and mean is not None) and (found := pretrained.normalisation(name, weights, shape)):
        mean, std = found
    inputs = shape[0] if mean is None else len(mean)
    if named:
        net, dim = _SPACES[space](rest, inputs, shape[-1])
    elif own:
        net, dim = foreign.build(name, (inputs, *shape[1:]), follows)
    elif name in BACKBONES:
        net, dim = BACKBONES[name](inputs, shape[-1])
    else:
        raise unknown(name)
    mean = torch.full((inputs,), 0.5) if mean is None else mean
    std = torch.full((inputs,), 0.25) if std is None else std
    if name == IDENTITY:  # distances stay as they are: one scale; 1 stands for columns that are constant
        varying = std[std != 1]
        std = (varying.square().mean().sqrt() if len(varying) else std.new_ones(())).expand_as(std).clone()
    backbone = nn.Sequential(Normalise(mean, std), net)
    if weights:
        load_weights(backbone, weights, name)
    return backbone, dim


def unknown(name: str) -> ValueError:
    """The error of a backbone that there is not, with the nearest right name."""
    forms = ["file.onnx", "file.safetensors", "hub:REPO_OR_DIR/NAME", "package.module:function", "timm:NAME"]
    return ValueError(
        f"unknown backbone {name!r}; {hint(name, [*BACKBONES, foreign.LITE, *forms, 'torchvision:NAME'])}"
    )


def check_name(name: str, weights: str | None = None) -> None:
    """Refuse a backbone that there is not, or a weight file, before a single image is read. Runs and imports nothing.

    Raises:
        ValueError: with the nearest right name, or where to get the file.
    """
    space, _, rest = name.partition(":")
    known = name in BACKBONES or pretrained.is_own(name) or (rest and space in _SPACES)
    if not known or (trust.is_code(name) and not trust.origin(name)):
        raise unknown(name)
    pretrained.resolve(name, weights)
    if weights:
        check_file(Path(weights), name)
