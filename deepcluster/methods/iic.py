"""IIC (Ji et al., ICCV 2019, arXiv:1807.06653): maximise I(z; z') of an image and its augmentation.

Deviations: over- and final clustering heads are trained together, not in alternation; scores are standardised over
the batch before the softmax, without which one cluster takes all; the sub-head with the lowest loss is
reported, never the one with the best accuracy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.losses import mutual_information
from deepcluster.model import Standardised
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class MutualInformation:
    """Mean over the augmentations of minus the mutual information with the image itself."""

    marginal_weight: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        p = logits.float().softmax(-1)
        losses = [mutual_information(p[0], q, marginal_weight=self.marginal_weight) for q in p[1:]]
        return torch.stack(losses).mean()


@method
def iic(
    n_clusters: int = 10,
    overcluster: int = 5,
    sub_heads: int = 5,
    repeats: int = 1,
    marginal_weight: float = 1.0,
    view: str = "strong",
) -> Recipe:
    """``sub_heads`` of each kind; every image is paired with ``repeats`` augmentations of itself."""
    over = (n_clusters * overcluster,) * sub_heads if overcluster > 1 else ()
    return Recipe(
        heads=(n_clusters,) * sub_heads + over,
        head=Standardised,
        views=("clean",) + (view,) * repeats,
        objective=MutualInformation(marginal_weight),
    )
