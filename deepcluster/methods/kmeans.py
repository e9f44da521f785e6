"""k-means on fixed features: the head's directions are the centroids, and nothing is trained.

What DeepCluster (Caron et al., ECCV 2018, arXiv:1807.05520) does once, on a network that is trained already (--frozen).

Deviations: the network learns nothing from the labels; k-means is spherical (Dhillon & Modha, 2001), so that the
largest cosine of the head is that of the nearest centroid; the tightest of ``restarts`` is taken. The learning rate
that ``lr auto`` gives is next to nothing: with another the centroids learn their labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import dist
from deepcluster.assign import centroid_heads
from deepcluster.kmeans import tightest
from deepcluster.losses import pseudo_label
from deepcluster.model import Head, Prototypes, configured
from deepcluster.recipe import Recipe, Targets, method, once


@dataclass(frozen=True)
class Tightest:
    """Assigner: for every head the tightest of ``restarts`` spherical k-means, with seeds of its own."""

    restarts: int = 10

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        unit, labels = F.normalize(features, dim=1), []
        for h, head in enumerate(heads):
            own = (seed + h * self.restarts) % 2**31
            found, _ = tightest(unit, head.out_features, seed=own, restarts=self.restarts, spherical=True)
            labels.append(dist.all_cat(found.int()))
        return replace(previous, labels=torch.stack(labels).cpu())


@method
def kmeans(n_clusters: int = 10, restarts: int = 10, temperature: float = 0.1) -> Recipe:
    """``temperature`` divides the cosines: how sure probabilities are; it moves no image."""
    return Recipe(
        heads=(n_clusters,),
        head=configured(Prototypes, temperature=temperature),
        views=("clean",),
        assigner=Tightest(restarts),
        refresh=once,
        reassign=centroid_heads,
        objective=pseudo_label,
        passes=0.1,
        pace=1e-6,
    )
