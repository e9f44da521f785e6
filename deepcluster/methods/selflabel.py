"""Self-labelling (SCAN's last step; Van Gansbeke et al., ECCV 2020, arXiv:2005.12320): learn one's own sure labels.

It goes on with the clusters of the stage before (``simclr+scan+selflabel``, or after any clustering method).

Deviations: where few images of a batch are above the threshold, the surest ``least`` of it are taken, or small data
and many clusters would teach nothing (the authors' code stops there); no moving average of the weights; AdamW by
default.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster import dist
from deepcluster.losses import UNLABELLED, balanced_pseudo_label
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class SureLabels:
    """View 1 learns what view 0 is sure of, every pseudo-class with the same weight.

    Attributes:
        threshold: probability above which view 0 is sure.
        least: share of the batch that is used at least, the surest first.
    """

    threshold: float = 0.99
    least: float = 0.1

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        sure, cluster = logits[0].detach().float().softmax(1).max(1)
        everyone = dist.all_cat(sure)
        few = min(round(self.least * len(everyone)), len(everyone))
        limit = everyone.topk(few).values[-1] if few else torch.inf
        taken = (sure > self.threshold) | (sure >= limit)
        return balanced_pseudo_label(logits[1], torch.where(taken, cluster, UNLABELLED))


@method(lr=1e-4, batch_size=1000, least=0.0)
def selflabel(
    n_clusters: int = 10,
    threshold: float = 0.99,
    least: float = 0.1,
    weak: str = "weak",
    view: str = "strong",
) -> Recipe:
    """Of each batch, images whose ``weak`` view is sure of its cluster (above ``threshold``), at least ``least``."""
    return Recipe(
        heads=(n_clusters,),
        views=(weak, view),
        objective=SureLabels(threshold, least),
        continues=True,
        passes=0.5,
    )
