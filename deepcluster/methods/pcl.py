"""PCL (Li et al., ICLR 2021, arXiv:2005.04966): images near the centroids of k-means, at several granularities.

ProtoNCE is InfoNCE plus, for every granularity, the cross-entropy of cos(v, c) / phi with the image's cluster. phi is
measured for each cluster: small where it is tight, which keeps loose clusters from being left loose.

Deviations: clusters are of the backbone's features, standardised, not of the projected ones: they are the result here;
these come from the model itself in eval mode, and InfoNCE contrasts images of the batch as SimCLR does, without a
teacher and a queue; both views are learned from; all other centroids are negatives, not a sample; phi is limited to
its 10 % and 90 % quantiles over clusters; clusters are renamed to overlap the last ones most; no warm-up
with InfoNCE alone (``simclr+pcl`` has one); phi has the mean 0.2 and InfoNCE the temperature 0.5, where the paper
has 0.1 for both; AdamW by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import dist
from deepcluster.assign import Aligned
from deepcluster.kmeans import sums, tightest
from deepcluster.losses import pseudo_label
from deepcluster.methods.simclr import Contrastive
from deepcluster.model import Head, Projector, ScaledCentroids
from deepcluster.recipe import Clock, Every, Recipe, Targets, method


def directions(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's (n, D) features, standardised over all N and of unit length; (D,) their mean and variance."""
    x = features.double()
    n = dist.all_sum(torch.tensor(float(len(x)), dtype=x.dtype, device=x.device))
    mean = dist.all_sum(x.sum(0)) / n
    variance = dist.all_sum((x - mean).square().sum(0)) / n
    if not bool((mean.isfinite() & variance.isfinite()).all()):  # sums over all ranks: they agree
        raise FloatingPointError("features are not finite; lower lr, or use precision fp32")
    unit = F.normalize(((x - mean) * (variance + 1e-5).rsqrt()).float(), dim=1)
    return unit, mean.float(), variance.float()


@dataclass(frozen=True)
class Spherical:
    """The tightest of ``restarts`` spherical k-means for every head of centroids; others keep their labels."""

    restarts: int = 5

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        unit, labels = directions(features)[0], previous.labels.clone()
        for h, head in enumerate(heads):
            if isinstance(head, ScaledCentroids):
                own = (seed + h * self.restarts) % 2**31
                found, _ = tightest(unit, head.out_features, seed=own, restarts=self.restarts, spherical=True)
                labels[h] = dist.all_cat(found.int()).cpu()
        return replace(previous, labels=labels)


def concentrations(unit: Tensor, labels: Tensor, centroids: Tensor, *, temperature: float, alpha: float) -> Tensor:
    """(K,) phi = sum of |v - c| over a cluster's Z images / (Z ln(Z + alpha)), scaled to the mean ``temperature``.

    A cluster of fewer than two images has no spread to measure and gets the largest phi. Limited to its quantiles of
    10 and 90 %, so that no cluster's logits are far steeper than the others'.
    """
    k = len(centroids)
    distance = (unit - centroids[labels]).norm(dim=1)
    total, size = sums(distance[:, None], labels, k)
    phi = total[:, 0] / (size * (size + alpha).log()).clamp_min(1e-12)
    phi = torch.where(size > 1, phi, phi.max())
    low, high = phi.quantile(0.1), phi.quantile(0.9)
    phi = phi.clamp(low, high).clamp_min(1e-6)
    return (temperature * phi / phi.mean()).float()


@dataclass(frozen=True)
class Concentrate:
    """Head policy: the heads of centroids become the mean directions of their clusters, and phi is measured."""

    temperature: float = 0.2
    alpha: float = 10.0

    @torch.no_grad()
    def __call__(
        self, heads: Sequence[Head], optimizer: torch.optim.Optimizer, features: Tensor, targets: Targets
    ) -> None:
        unit, mean, variance = directions(features)
        lo, hi = dist.shard(targets.labels.shape[1])
        for head, labels in zip(heads, targets.labels, strict=True):
            if isinstance(head, ScaledCentroids):
                mine = labels[lo:hi].long().to(unit.device)
                total, counts = sums(unit, mine, head.out_features)
                head.weight[counts > 0] = F.normalize(total, dim=1).float()[counts > 0]
                found = concentrations(unit, mine, head.weight, temperature=self.temperature, alpha=self.alpha)
                head.phi.copy_(found)
                head.norm.get_buffer("running_mean").copy_(mean)
                head.norm.get_buffer("running_var").copy_(variance)


@dataclass(frozen=True)
class ProtoNCE:
    """Cross-entropy with the image's centroid, one of ``granularities`` terms of equal weight."""

    granularities: int = 2

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        return pseudo_label(logits, labels) / self.granularities


@method(lr=0.03, momentum=0.9, weight_decay=1e-4, batch_size=256, temperature=0.1, contrast=0.1)
def pcl(
    n_clusters: int = 10,
    overcluster: int = 5,
    temperature: float = 0.2,
    contrast: float = 0.5,
    alpha: float = 10.0,
    projection: int = 128,
    every: int = 1,
    view: str = "strong",
) -> Recipe:
    """``temperature`` is the mean of phi, ``contrast`` that of InfoNCE; ``alpha`` smooths phi of small clusters."""
    widths = (n_clusters, n_clusters * overcluster) if overcluster > 1 else (n_clusters,)
    n = len(widths)
    return Recipe(
        heads=(*widths, projection),
        head=(*(ScaledCentroids,) * n, Projector),
        objective=(*(ProtoNCE(n),) * n, Contrastive(contrast)),
        views=(view, view),
        assigner=Aligned(Spherical()),
        refresh=Every(every),
        reassign=Concentrate(temperature, alpha),
    )
