"""Self-labelling (SCAN's last step; Van Gansbeke et al., ECCV 2020, arXiv:2005.12320): learn one's own sure labels.

It goes on with the clusters of the stage before (``simclr+scan+selflabel``, or after any clustering method).

Deviations: where few images of a cluster are above the threshold, the surest ``least`` of it are taken, or small data
and many clusters would teach nothing (the authors' code stops there); of every cluster, or the surest one would take
over the others; no moving average of the weights; AdamW instead of Adam, at a twentieth of the usual learning rate.
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
        least: share of a cluster's images in the batch that is used at least, the surest first.
    """

    threshold: float = 0.99
    least: float = 0.1

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        sure, cluster = logits[0].detach().float().softmax(1).max(1)
        taken = sure > self.threshold
        if self.least:
            taken |= sure >= _limits(sure, cluster, logits.shape[2], self.least)[cluster]
        return balanced_pseudo_label(logits[1], torch.where(taken, cluster, UNLABELLED))


def _limits(sure: Tensor, cluster: Tensor, k: int, share: float) -> Tensor:
    """(K,) how sure the last of the surest ``share`` of each cluster is, one image at least, over all ranks."""
    sure, order = dist.all_cat(sure).sort(descending=True)
    by_cluster = dist.all_cat(cluster)[order]
    counts = torch.bincount(by_cluster, minlength=k)
    last = counts.cumsum(0) - counts + (share * counts).ceil().long().clamp_min(1) - 1
    return sure[by_cluster.argsort(stable=True)][last.clamp_max(len(sure) - 1)]


@method(lr=1e-4, batch_size=1000, least=0.0)
def selflabel(
    n_clusters: int = 10,
    threshold: float = 0.99,
    least: float = 0.1,
    weak: str = "weak",
    view: str = "strong",
) -> Recipe:
    """Of each cluster, images whose ``weak`` view is sure of it (above ``threshold``), at least the share ``least``."""
    return Recipe(
        heads=(n_clusters,),
        views=(weak, view),
        objective=SureLabels(threshold, least),
        continues=True,
        passes=0.5,
        pace=0.05,
    )
