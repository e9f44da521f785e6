"""DeepCluster-v2 (Caron et al., NeurIPS 2020, arXiv:2006.09882, appendix): the heads are the centroids of k-means.

Spherical k-means of all features every epoch, once a head, each from its own start; its centroids become the head, are
not trained, and every view of an image learns the image's label.

Deviations: features are of clean images in eval mode, one more pass an epoch, not those of the last epoch's random
crops; no projector, so that clusters are of the features themselves; k-means++ instead of random rows; clusters are
renamed to overlap the last ones most; no small crops by default; AdamW instead of LARS, whose rate does not carry over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import dist
from deepcluster.assign import Aligned, centroid_heads, kmeans
from deepcluster.losses import pseudo_label
from deepcluster.model import Centroids, Head, configured
from deepcluster.recipe import Every, Recipe, Targets, method


@dataclass(frozen=True)
class SphericalKMeans:
    """Assigner: one spherical k-means a head, of at most ``iterations``; every head and refresh has its own start."""

    iterations: int = 10

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        unit, labels = F.normalize(features, dim=1), []
        if dist.all_max((~unit.isfinite()).any().float()):  # on any rank, or the others would wait for this one
            raise FloatingPointError("features are not finite; lower lr, or use precision fp32")
        for h, head in enumerate(heads):
            own = (seed + h) % 2**31
            found, _ = kmeans(unit, head.out_features, seed=own, iterations=self.iterations, spherical=True)
            labels.append(dist.all_cat(found.to(torch.int32)))
        return replace(previous, labels=torch.stack(labels).cpu())


@method(n_heads=3, overcluster=1, crops=6, weight_decay=1e-6)
def deepcluster_v2(
    n_clusters: int = 10,
    overcluster: int = 5,
    n_heads: int = 3,
    crops: int = 2,
    temperature: float = 0.1,
    every: int = 1,
    view: str = "strong",
) -> Recipe:
    """``n_heads`` of each width, labelled every ``every`` epochs; of ``crops`` (2 at least) all after two are small."""
    if crops < 2:
        raise ValueError(f"deepcluster_v2: crops must be at least 2; got {crops}")
    widths = (n_clusters, n_clusters * overcluster)[: 2 if overcluster > 1 else 1]
    return Recipe(
        heads=tuple(k for k in widths for _ in range(n_heads)),
        head=configured(Centroids, temperature=temperature),
        assigner=Aligned(SphericalKMeans()),
        refresh=Every(every),
        reassign=centroid_heads,
        views=(view, view) + ("small",) * (crops - 2),
        objective=pseudo_label,
        passes=1.5,
    )
