"""VAT (Miyato et al., TPAMI 2018, arXiv:1704.03976): do not change your mind for the worst small step.

Cross-entropy with the few labels that are given, plus the divergence of what is said of any image and of the image
moved by the step, of limited length, that changes this most; plus the entropy of what is said (the paper's VAT+EntMin;
``entropy=0`` is VAT alone). Learns from labels: needs --use-labels.

Deviations: the step's length is measured in standard deviations of the images (0.2 is about the paper's 2 on MNIST),
and so is the step at which the divergence is measured first; images are augmented; AdamW.
"""

from dataclasses import dataclass

from torch import Tensor

from deepcluster.losses import conditional_entropy, divergence, few_labels
from deepcluster.model import configured
from deepcluster.networks import Adversary
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class Smoothness:
    """CE(given) + weight * KL(p || p moved) + entropy * H(p); row 0 of the logits is the image, the last it moved."""

    weight: float = 1.0
    entropy: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        image, moved = logits[0], logits[-1]
        loss = few_labels(image, labels) + self.weight * divergence(image.detach(), moved)
        return loss + self.entropy * conditional_entropy(image) if self.entropy else loss


@method
def vat(
    n_clusters: int = 10,
    weight: float = 1.0,
    entropy: float = 1.0,
    radius: float = 0.2,
    ratio: int = 7,
    view: str = "strong",
) -> Recipe:
    """``radius`` is the length of the step; ``ratio`` images of any kind are in a batch for each labelled one."""
    return Recipe(
        heads=(n_clusters,),
        views=(view,),
        network=configured(Adversary, radius=radius),
        objective=Smoothness(weight, entropy),
        supervised=1 / (1 + ratio),
    )
