"""k-means over rows that may be sharded over ranks: only sums of (K, d) floats are exchanged.

Shapes: n rows of this rank, N rows in all, d dimensions, K clusters.
"""

import math

import faiss
import torch
from torch import Tensor

from deepcluster import dist

POINTS_PER_CENTROID = 256  # Lloyd runs on a sample of this many rows a cluster, as faiss does; then all are assigned
PLUS_PLUS = 256  # k-means++ passes over the sample once a cluster; above this many clusters rows are drawn at random


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) int64 of, and squared distance (n,) to, the nearest of K centroids; never an (n, K) array."""
    if x.device.type == "cpu":
        d2, ids = faiss.knn(x.numpy(), centroids.numpy(), 1)
        return torch.from_numpy(ids[:, 0]), torch.from_numpy(d2[:, 0])
    parts = []
    norms = centroids.square().sum(1)
    for chunk in x.split(max(1, 2**26 // len(centroids))):
        best, index = torch.addmm(norms, chunk, centroids.T, alpha=-2).min(1)
        parts.append((index, (best + chunk.square().sum(1)).clamp_min(0)))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def sums(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum (K, d) float64 of the rows of each cluster and their number (K,), over all ranks; -1 is left out."""
    known = labels >= 0
    if not bool(known.all()):
        x, labels = x[known], labels[known]
    total = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device)
    for part, which in zip(x.split(2**16), labels.split(2**16), strict=True):  # short sums in float32, long in float64
        total += torch.zeros(k, x.shape[1], device=x.device).index_add_(0, which, part).double()
    counts = torch.bincount(labels, minlength=k).double()
    both = dist.all_sum(torch.cat([total, counts[:, None]], 1))
    return both[:, :-1], both[:, -1]


def kmeans(
    x: Tensor, k: int, *, seed: int, iterations: int = 20, start: Tensor | None = None, spherical: bool = False
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm; the same centroids for any number of ranks, up to rounding.

    Args:
        x: (n, d) float32, this rank's contiguous rows; n may differ between ranks.
        k: clusters. More than there are distinct rows leaves some empty, and is no error.
        seed: of the first centroids and the sample.
        iterations: at most so many; stops when no row moves.
        start: (K, d) first centroids, e.g. of the last refresh; rows that are not finite are drawn anew.
        spherical: rows and centroids have unit length.

    Returns:
        labels (n,) int64 of this rank's rows, centroids (K, d) float32.

    Raises:
        ValueError: there are no rows on any rank.
    """
    sizes = dist.all_cat(torch.tensor([len(x)], device=x.device)).tolist()
    total, offset = sum(sizes), sum(sizes[: dist.rank()])
    if not total:
        raise ValueError("k-means needs at least one row; got none")
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=rng)

    def rows(ids: Tensor) -> Tensor:
        mine = ids[(ids >= offset) & (ids < offset + len(x))] - offset
        return x[mine.to(x.device)]

    sample = rows(order[: k * POINTS_PER_CENTROID].sort().values)
    candidates = order[: 20 * k if k <= PLUS_PLUS else k].sort().values  # sorted: alike however the rows are sharded
    first = dist.all_cat(rows(candidates))  # small: 20 rows a cluster at most, on every rank
    start = torch.full((k, x.shape[1]), math.nan) if start is None else start
    usable = start.isfinite().all(1).to(x.device)
    kept = start.to(first)[usable]
    if k <= PLUS_PLUS:
        drawn = plus_plus(first, k - len(kept), rng, kept)
    else:
        drawn = first[torch.arange(k - len(kept)) % len(first)]
    centroids = torch.empty(k, x.shape[1], device=x.device)
    centroids[usable], centroids[~usable] = kept, drawn
    previous = None
    for _ in range(iterations):
        labels, _ = nearest(sample, centroids)
        moved = torch.tensor(float(previous is None or not torch.equal(labels, previous)), device=x.device)
        if not dist.all_max(moved):
            break
        previous = labels
        total_sum, counts = sums(sample, labels, k)
        fresh = (total_sum / counts.clamp_min(1)[:, None]).float()
        centroids = refill(torch.where(counts[:, None] > 0, fresh, centroids), counts)
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    return nearest(x, centroids)[0], centroids


def tightest(x: Tensor, k: int, *, seed: int, restarts: int, spherical: bool = False) -> tuple[Tensor, Tensor]:
    """The best of ``restarts`` k-means with seeds of their own: the one with the least inertia over all ranks.

    Returns:
        labels (n,) int64 of this rank's rows, centroids (K, d) float32, as ``kmeans`` does.
    """
    runs = [kmeans(x, k, seed=(seed + i) % 2**31, spherical=spherical) for i in range(restarts)]
    if restarts == 1:
        return runs[0]
    inertia = [float(dist.all_sum(nearest(x, centroids)[1].sum(dtype=torch.float64))) for _, centroids in runs]
    return runs[inertia.index(min(inertia))]


def plus_plus(x: Tensor, k: int, rng: torch.Generator, kept: Tensor) -> Tensor:
    """k-means++ seeding (Arthur & Vassilvitskii 2007): (K, d) rows of x, far from each other and from those kept."""
    chosen = torch.empty(k, x.shape[1], dtype=x.dtype, device=x.device)
    closest = nearest(x, kept)[1].clamp_min(0) if len(kept) else torch.ones(len(x), device=x.device)
    for i, u in enumerate(torch.rand(k, generator=rng, dtype=torch.float64)):
        cumulative = closest.double().cumsum(0)  # all zero when fewer than K rows are distinct: row 0 again
        chosen[i] = x[torch.searchsorted(cumulative, u.to(x.device) * cumulative[-1]).clamp_max(len(x) - 1)]
        distance = (x - chosen[i]).square().sum(1)
        closest = torch.minimum(closest, distance) if i or len(kept) else distance
    return chosen


def refill(centroids: Tensor, counts: Tensor) -> Tensor:
    """Give every empty cluster half of a big one: both are moved apart by 1/1024 of each coordinate.

    The largest clusters are split first and their counts halved; every rank decides alike, from the global counts.

    Args:
        centroids: (K, d).
        counts: (K,) rows of each cluster over all ranks.

    Returns:
        (K, d) centroids, all finite; unchanged where no cluster is empty.
    """
    centroids, counts = centroids.clone(), counts.clone()
    sign = torch.ones(centroids.shape[1], device=centroids.device)
    sign[1::2] = -1
    for empty in torch.nonzero(counts == 0).flatten().tolist():
        donor = int(counts.argmax())
        if counts[donor] < 2:
            break  # as many clusters as rows: nothing left to split
        centroids[empty] = centroids[donor] * (1 + sign / 1024)
        centroids[donor] = centroids[donor] * (1 - sign / 1024)
        counts[empty] = counts[donor] = counts[donor] / 2
    return centroids
