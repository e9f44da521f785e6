"""IIC (Ji et al., ICCV 2019, arXiv:1807.06653): maximise I(z; z') of an image and its augmentation.

Deviations: over- and final clustering heads are trained together, not in alternation (``alternate`` does that, AdamW's
momentum still moves the heads whose turn it is not); scores are standardised over the batch before the softmax,
without which one cluster takes all (``linear`` leaves that out); the image itself goes through the network once, not
once a repeat; no crop of it is taken and no Sobel filter is applied; the sub-head with the lowest loss is reported,
never the one with the best accuracy.

The paper's IIC+ (semi-supervised: one over-clustering head, each cluster given the most frequent class in it) is
``--n-clusters 140 --overcluster 1 --set sub_heads=1``; its accuracy is what is reported as purity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepcluster.losses import mutual_information
from deepcluster.model import Standardised
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class MutualInformation:
    """Mean over the augmentations of minus the mutual information with the image itself.

    ``turn``: 0 learns in epochs 0, 2, ..., 1 in the others, None in all; the value is the same in every epoch.
    """

    marginal_weight: float = 1.0
    turn: int | None = None

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        p = logits.float().softmax(-1)
        losses = [mutual_information(p[0], q, marginal_weight=self.marginal_weight) for q in p[1:]]
        loss = torch.stack(losses).mean()
        resting = self.turn is not None and clock.epoch % 2 != self.turn
        return loss.detach() + 0 * loss if resting else loss  # a gradient of 0, as several processes want one


@method(overcluster=7, repeats=5, linear=True, alternate=True, batch_size=700, lr=1e-4, weight_decay=0)
def iic(
    n_clusters: int = 10,
    overcluster: int = 5,
    sub_heads: int = 5,
    repeats: int = 1,
    marginal_weight: float = 1.0,
    linear: bool = False,
    alternate: bool = False,
    view: str = "strong",
) -> Recipe:
    """``sub_heads`` of each kind; every image is paired with ``repeats`` augmentations of itself.

    A batch has to hold a twentieth of the square of the widest head's clusters: with fewer, independent random labels
    already share information.
    """
    final = (n_clusters,) * sub_heads
    over = (n_clusters * overcluster,) * sub_heads if overcluster > 1 else ()
    turns = (1, 0) if alternate and over else (None, None)
    losses = [MutualInformation(marginal_weight, turn) for turn in turns]
    return Recipe(
        heads=final + over,
        head=nn.Linear if linear else Standardised,
        views=("clean",) + (view,) * repeats,
        objective=(losses[0],) * len(final) + (losses[1],) * len(over),
        least_batch=max(2, math.ceil(max(final + over) ** 2 / 20)),
        passes=1.5,
    )
