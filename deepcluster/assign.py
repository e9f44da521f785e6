"""Assigners: features of the whole training set in, targets out.

Each sees this rank's contiguous shard (n, D) of the features and returns targets of all N images, alike on
every rank: only sums cross ranks while deciding, and N labels at the end.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import dist
from deepcluster.kmeans import kmeans, nearest, sums, tightest
from deepcluster.model import Head
from deepcluster.recipe import Assigner, Targets
from deepcluster.transport import log_scales, renamed

RESTARTED = 32  # more clusters than this average out what one k-means got wrong
CHUNK = 2**26  # logits of at most so many numbers exist at a time
SAMPLED = 64  # rows a cluster that Sinkhorn looks at before it looks at all


def whiten(x: Tensor, dim: int, *, floor: float = 1e-5) -> Tensor:
    """PCA-whiten features over all ranks and scale rows to unit length (DeepCluster).

    Args:
        x: (n, D) float32, this rank's rows.
        dim: directions kept at most.
        floor: directions with less than this part of the largest variance are dropped; dead features and small N
            have such ones, and dividing by their zero variance would make NaN.

    Returns:
        (n, min(dim, rank)) float32, rows of unit length (zero rows stay zero).

    Raises:
        FloatingPointError: the features are not finite.
    """
    count = dist.place(len(x), x.device)[1]
    parts = x.split(2**16)  # or all rows would be there in float64, and centred, besides
    mean = dist.all_sum(torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0)) / count
    second = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in parts:
        second += (part - mean.float()).T @ (part - mean.float())
    covariance = dist.all_sum(second).cpu() / count
    if not covariance.isfinite().all():
        raise FloatingPointError("features are not finite; lower lr, or use precision fp32")
    variance, basis = torch.linalg.eigh(covariance)
    kept = (variance > floor * variance[-1].clamp_min(1e-12)).nonzero().flatten()[-dim:]
    if len(kept) == 0:  # all rows equal: nothing to tell apart
        return torch.zeros(len(x), 1, device=x.device)
    scale = (basis[:, kept] * variance[kept].rsqrt()).float().to(x.device)
    return torch.cat([F.normalize((part - mean.float()) @ scale, dim=1) for part in parts])


@dataclass(frozen=True)
class KMeans:
    """One k-means per head on whitened features (DeepCluster, arXiv:1807.05520).

    Deviations: with ``warm`` the first centroids are the means of the last labels, so that clusters keep their
    ids and few iterations are needed; otherwise k-means++ instead of random rows while K is small, and the best of
    ``restarts`` where ``RESTARTED`` clusters or fewer are asked for.
    """

    pca_dim: int = 256
    iterations: int = 20
    warm: bool = True
    restarts: int = 1

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        x = whiten(features, self.pca_dim)
        labels = []
        for h, head in enumerate(heads):
            start = self._last_means(x, previous.labels[h], head.out_features) if self.warm else None
            k, own = head.out_features, (seed + h * self.restarts) % 2**31
            if start is None and self.restarts > 1 and k <= RESTARTED:
                found, _ = tightest(x, k, seed=own, restarts=self.restarts)
            else:
                found, _ = kmeans(x, k, seed=own, iterations=self.iterations, start=start)
            labels.append(dist.all_cat(found.to(torch.int32)))
        return replace(previous, labels=torch.stack(labels).cpu())

    @staticmethod
    def _last_means(x: Tensor, labels: Tensor, k: int) -> Tensor | None:
        if not bool((labels >= 0).any()):
            return None
        lo, hi = dist.shard(labels.shape[0])
        total, counts = sums(x, labels[lo:hi].long().to(x.device), k)
        return (total / counts[:, None]).float()  # NaN where empty: drawn anew


@dataclass(frozen=True)
class Balanced:
    """Sinkhorn on each head's own predictions: equal-sized clusters (SeLa, arXiv:1911.05371).

    ``strength`` is the paper's lambda (25 for ImageNet, 10 for CIFAR). Deviation: 0 finds it, doubling from
    1 / the spread of the logits until the plan is decided (mean row entropy < 10 % of ln K), because on the flat
    logits of a young network the paper's value balances the plan but not the labels. Heads without labels start from
    the best of ``restarts`` k-means on the whitened features, each with its own seeds, instead of a random permutation.
    """

    strength: float = 0.0
    iterations: int = 100
    doublings: int = 10
    restarts: int = 5
    pca_dim: int = 24

    @torch.no_grad()
    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        labels = []
        unit = whiten(features, self.pca_dim) if bool((previous.labels < 0).all(1).any()) else features
        scored: Head | _Cosines
        for h, head in enumerate(heads):
            if bool((previous.labels[h] >= 0).any()):
                x, scored = features, head
            else:
                own = seed + h * self.restarts
                _, centroids = tightest(unit, head.out_features, seed=own, restarts=self.restarts, spherical=True)
                x, scored = unit, _Cosines(centroids)
            chunks = _logits(x, scored)
            strength, scale = self.scales(x, scored, chunks)
            labels.append(dist.all_cat(hardened(chunks, strength, scale, len(x))))
        return replace(previous, labels=torch.stack(labels).cpu())

    def scales(
        self, x: Tensor, head: "Head | _Cosines", chunks: Callable[[], Iterator[Tensor]]
    ) -> tuple[float, Tensor]:
        """The strength and the scales (K,) that balance what ``head`` says of the rows x (n, D), its logits in chunks.

        Many rows are looked at after some of them, which tell most of it.
        """
        offset, total = dist.place(len(x), x.device)
        step = total // max(SAMPLED * head.out_features, 2**15)
        strength, scale = self.strength, torch.zeros(head.out_features, device=x.device)
        while step > 1:
            strength, scale = self._solve(_logits(x[-offset % step :: step], head), strength, scale)
            step //= 4
        return self._solve(chunks, strength, scale)

    def _solve(self, chunks: Callable[[], Iterator[Tensor]], strength: float, scale: Tensor) -> tuple[float, Tensor]:
        """A strength, the given one or more unless ``self.strength`` says it, and its scales (K,) float64."""
        strength = strength or 1 / max(_spread(chunks), 1e-6)
        for _ in range(self.doublings):
            scale, entropy = log_scales(chunks, strength, scale, iterations=self.iterations)
            if self.strength or entropy < 0.1 * math.log(len(scale)):
                break
            strength, scale = 2 * strength, 2 * scale  # the same shift of the logits: a warm start
        return strength, scale


@dataclass(frozen=True)
class _Cosines:
    """What stands in for a head that has learnt nothing yet: cosines to the centroids (K, D) of k-means."""

    centroids: Tensor

    @property
    def out_features(self) -> int:
        return len(self.centroids)

    def __call__(self, unit: Tensor) -> Tensor:
        return unit @ self.centroids.T


def _logits(features: Tensor, head: Head | _Cosines) -> Callable[[], Iterator[Tensor]]:
    """This rank's logits in chunks: computed once where they fit, else again on every pass."""
    size = CHUNK if features.device.type == "cuda" else min(CHUNK, 2**20)
    cached = [head(features)] if len(features) * head.out_features <= CHUNK else None
    parts = features.split(max(1, size // head.out_features))
    return lambda: iter(cached) if cached else (head(part) for part in parts)


def hardened(chunks: Callable[[], Iterator[Tensor]], strength: float, scale: Tensor, n: int) -> Tensor:
    """(n,) int32 the balanced labels, from the logits in chunks and the scales (K,)."""
    labels, done = torch.empty(n, dtype=torch.int32, device=scale.device), 0  # small blocks among large ones pin them
    for z in chunks():
        labels[done : (done := done + len(z))] = torch.add(scale.float(), z.float(), alpha=strength).argmax(1)
    return labels


def _spread(chunks: Callable[[], Iterator[Tensor]]) -> float:
    """Standard deviation over rows of a typical cluster's logit, relative to its row's mean."""
    total = torch.zeros(3, dtype=torch.float64)
    for z in chunks():
        z = (z - z.mean(1, keepdim=True)).double()
        total += torch.stack([torch.tensor(float(z.numel())), z.sum().cpu(), z.square().sum().cpu()])
    n, first, second = dist.all_sum(total.to(z.device)).tolist()
    return math.sqrt(max(second / n - (first / n) ** 2, 0.0))


@dataclass(frozen=True)
class Aligned:
    """Rename another assigner's clusters so that they overlap the previous ones most; the heads can then be kept."""

    inner: Assigner

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        new = self.inner(features, heads, previous, seed)
        labels = new.labels.clone()
        for h, head in enumerate(heads):
            if bool((previous.labels[h] >= 0).any()):
                labels[h] = renamed(new.labels[h].long(), previous.labels[h].long(), head.out_features)
        return replace(new, labels=labels)


@dataclass(frozen=True)
class Argmax:
    """Each head's own prediction is the label; empty clusters are refilled (UIC, arXiv:2006.11480).

    Heads without labels get those of ``first``; if that is None balanced random ones, nearly the paper's. Deviation:
    with ``standardised`` each cluster's scores have mean 0 and variance 1 over all images before they are compared, so
    that no cluster can take most of them.
    """

    first: Assigner | None = None
    standardised: bool = False

    @torch.no_grad()
    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        rng, labels = torch.Generator().manual_seed(seed), []
        fresh = [not bool((known >= 0).any()) for known in previous.labels]
        start = self.first(features, heads, previous, seed).labels if self.first and any(fresh) else None
        for h, head in enumerate(heads):
            if not fresh[h]:
                chunks = _logits(features, head)
                mean, std = _moments(chunks) if self.standardised else (0, 1)
                found = dist.all_cat(torch.cat([((z - mean) / std).argmax(1) for z in chunks()])).cpu()
            elif start is not None:
                found = start[h].long()
            else:
                found = torch.randperm(previous.labels.shape[1], generator=rng) % head.out_features
            labels.append(split_empty(found, head.out_features, rng))
        return replace(previous, labels=torch.stack(labels).int())


def _moments(chunks: Callable[[], Iterator[Tensor]]) -> tuple[Tensor, Tensor]:
    """(K,) mean and standard deviation of each cluster's logits over all images of all ranks."""
    rows = [torch.stack([torch.ones_like(z), z, z.square()]).sum(1) for z in (part.double() for part in chunks())]
    n, first, second = dist.all_sum(torch.stack(rows).sum(0))
    mean = first / n
    return mean.float(), (second / n - mean.square()).clamp_min(0).sqrt().clamp_min(1e-6).float()


def split_empty(labels: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Give each empty cluster, in the order of their ids, a random half of what is the largest by then.

    Args:
        labels: (N,) int64 in 0..k-1, on the CPU.
        k: clusters.
        rng: of who goes and who stays.

    Returns:
        (N,) int64; no cluster is empty if N >= k. Of an odd size the larger half goes; the lower id is split first.
    """
    shuffled = torch.randperm(len(labels), generator=rng)
    members = shuffled[labels[shuffled].argsort(stable=True)]  # by cluster, within one in random order
    counts = torch.bincount(labels, minlength=k)
    starts = (counts.cumsum(0) - counts).tolist()
    largest = [(-n, c) for c, n in enumerate(counts.tolist()) if n]
    heapq.heapify(largest)
    out = labels.clone()
    for empty in (counts == 0).nonzero().flatten().tolist():
        n, c = -largest[0][0], largest[0][1]
        if n < 2:  # fewer images than clusters: some have to stay empty
            break
        starts[empty] = starts[c] + n // 2
        out[members[starts[empty] : starts[c] + n]] = empty
        heapq.heapreplace(largest, (-(n // 2), c))
        heapq.heappush(largest, (n // 2 - n, empty))
    return out


def centroid_heads(heads: Sequence[Head], optimizer: torch.optim.Optimizer, features: Tensor, targets: Targets) -> None:
    """Head policy: each head becomes the nearest-centroid classifier of its new labels; empty clusters keep theirs.

    Prototypes compare directions, so they get the mean of the normalised features; a linear head gets the
    centroid c as weight and -|c|^2 / 2 as bias, which orders clusters by distance.
    """
    lo, hi = dist.shard(targets.labels.shape[1])
    for head, labels in zip(heads, targets.labels, strict=True):
        weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"heads can only be set to centroids if they are linear; got {type(head).__name__}")
        x = features if bias is not None else F.normalize(features, dim=1)
        total, counts = sums(x.to(weight.device), labels[lo:hi].long().to(weight.device), head.out_features)
        mean = (total / counts.clamp_min(1)[:, None]).float()
        used = counts > 0
        with torch.no_grad():
            weight[used] = mean[used]
            if bias is not None:
                bias[used] = -mean[used].square().sum(1) / 2
        for p in head.parameters():
            optimizer.state.pop(p, None)


__all__ = ["Aligned", "Argmax", "Balanced", "KMeans", "centroid_heads", "kmeans", "nearest", "split_empty", "whiten"]
