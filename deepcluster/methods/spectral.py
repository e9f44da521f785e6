"""Spectral clustering on fixed features (Ng, Jordan & Weiss, NIPS 2001): groups that are joined by near neighbours.

Explained by von Luxburg (Statistics and Computing 2007, arXiv:0711.0189). The graph joins every image with its nearest
others by cosine; images are placed by the first K eigenvectors of the normalised graph, and k-means there gives the
labels. A head of directions learns these, so that new images can be told.

Deviations: neighbours instead of a Gaussian of all distances; at most ``MOST`` eigenvectors of many clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import Tensor

from deepcluster import dist
from deepcluster.assign import centroid_heads
from deepcluster.kmeans import tightest
from deepcluster.losses import pseudo_label
from deepcluster.model import Head, Prototypes, configured
from deepcluster.neighbors import Neighbors
from deepcluster.recipe import Recipe, Targets, method, once

MOST = 64  # eigenvectors
RESTARTS = 10  # of k-means


def placed(near: np.ndarray, width: int, seed: int) -> np.ndarray:
    """(N, k) ids of the neighbours of each of N -> (N, width) float32 of unit length; near where well connected.

    They are the first eigenvectors of the graph's adjacency A over the root of both degrees, where A joins i and j by 1
    if each is a neighbour of the other, by 1/2 if only one is.
    """
    n, k = near.shape
    one_way = sparse.csr_matrix((np.ones(n * k), near.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    both = (one_way + one_way.T) / 2
    scale = sparse.diags(np.asarray(both.sum(1)).ravel() ** -0.5)
    width = min(width, n - 1)
    start = np.random.default_rng(seed).uniform(size=n)
    vectors = eigsh(scale @ both @ scale, width, which="LA", v0=start)[1] if width < n - 1 else np.eye(n, width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Spectral:
    """Assigner: spectral clustering of the graph of ``neighbours``, by rank 0."""

    neighbours: int = 10

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        n, labels = previous.labels.shape[1], previous.labels.clone().to(features.device)
        near = Neighbors(self.neighbours)(features, heads, previous, seed).partners
        lo, hi = dist.shard(n)
        for h, head in enumerate(heads):
            k, own = head.out_features, (seed + h * RESTARTS) % 2**31
            found = torch.zeros(n, min(k, MOST, n - 1), device=features.device)
            if dist.is_main():
                found.copy_(torch.from_numpy(placed(near.numpy(), found.shape[1], own)))
            mine, _ = tightest(dist.from_main(found)[lo:hi], k, seed=own, restarts=RESTARTS)
            labels[h] = dist.all_cat(mine.int())
        return replace(previous, labels=labels.cpu())


@method
def spectral(n_clusters: int = 10, neighbours: int = 10, temperature: float = 0.1) -> Recipe:
    """``neighbours`` of each image make the graph; ``temperature`` divides the cosines of the head."""
    return Recipe(
        heads=(n_clusters,),
        head=configured(Prototypes, temperature=temperature),
        views=("clean",),
        assigner=Spectral(neighbours),
        refresh=once,
        reassign=centroid_heads,
        objective=pseudo_label,
    )
