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
CACHED = 2**12  # rows at a time on a CPU
SCORES = 2**26  # distances that exist at a time on a GPU
SETTLED = 1e-3  # from given centroids Lloyd stops once inertia falls by less than this part: cold ones fell by more


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) int64 of, and squared distance (n,) to, the nearest of K centroids; never an (n, K) array."""
    if x.device.type == "cpu":
        d2, ids = faiss.knn(x.numpy(), centroids.numpy(), 1)
        return torch.from_numpy(ids[:, 0]), torch.from_numpy(d2[:, 0])
    parts = []
    norms = centroids.square().sum(1)
    for chunk in x.split(max(1, SCORES // len(centroids))):
        best, index = torch.addmm(norms, chunk, centroids.T, alpha=-2).min(1)
        parts.append((index, (best + chunk.square().sum(1)).clamp_min(0)))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def sums(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum (K, d) float64 of the rows of each cluster and their number (K,), over all ranks; -1 is left out."""
    labels = torch.where(labels >= 0, labels, k)  # a row that is dropped; leaving them out, the host would wait
    both = torch.zeros(k + 1, x.shape[1] + 1, dtype=torch.float64, device=x.device)
    for part, which in zip(x.split(2**16), labels.split(2**16), strict=True):  # short sums in float32, long in float64
        both[:, :-1] += torch.zeros(k + 1, x.shape[1], device=x.device).index_add_(0, which, part)
    both[:, -1].index_add_(0, labels, both.new_ones(1).expand(len(labels)))
    both = dist.all_sum(both[:k])
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
        start: (K, d) first centroids, e.g. of the last refresh; rows that are not finite are drawn anew. It then also
            stops when inertia falls by less than ``SETTLED`` of it: what is near a solution needs few iterations.
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

    whole = total <= k * POINTS_PER_CENTROID
    sample = x if whole else rows(order[: k * POINTS_PER_CENTROID].sort().values)
    candidates = order[: 20 * k if k <= PLUS_PLUS else k].sort().values  # sorted: alike however the rows are sharded
    first = dist.all_cat(rows(candidates))  # small: 20 rows a cluster at most, on every rank
    settled = 0.0 if start is None else SETTLED
    start = torch.full((k, x.shape[1]), math.nan) if start is None else start
    usable = start.isfinite().all(1).to(x.device)
    kept = start.to(first)[usable]
    if k <= PLUS_PLUS:
        drawn = plus_plus(first, k - len(kept), rng, kept)
    else:
        drawn = first[torch.arange(k - len(kept)) % len(first)]
    centroids = torch.empty(k, x.shape[1], device=x.device)
    centroids[usable], centroids[~usable] = kept, drawn
    previous, before, rough = None, math.inf, x.device.type == "cuda"
    for _ in range(iterations):
        labels, found = one_pass(sample, centroids, rough)
        moved = found.new_ones(1) if previous is None else (labels != previous).any()[None].double()
        found = dist.all_sum(torch.cat([found, moved]))
        counts = found[:-2].view(k, -1)[:, -1]
        smallest, inertia, any_moved = torch.stack([counts.min(), *found[-2:]]).tolist()  # the one time the host waits
        if not any_moved or (settled and before - inertia < settled * inertia):
            return labels if whole and not rough else nearest(x, centroids)[0], centroids
        fresh = (found[:-2].view(k, -1)[:, :-1] / counts.clamp_min(1)[:, None]).float()
        centroids = fresh if smallest else refill(torch.where(counts[:, None] > 0, fresh, centroids), counts)
        previous, before = labels, inertia if smallest else math.inf  # what a split gains is seen later
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    return nearest(x, centroids)[0], centroids


def one_pass(x: Tensor, centroids: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
    """What an iteration needs of this rank's rows, a block at a time, while the block is in the cache.

    Args:
        x: (n, d) float32.
        centroids: (K, d) float32.
        rough: multiply in TF32, which is several times as fast on a GPU and mistakes near ties only.

    Returns:
        labels (n,) int64, and K (d + 1) + 1 float64: of each cluster the sum of its rows and their number; inertia.
    """
    k, d = centroids.shape
    both = torch.zeros(k, d + 1, dtype=torch.float64, device=x.device)
    labels, inertia = torch.empty(len(x), dtype=torch.int64, device=x.device), both.new_zeros(1)
    block = CACHED if x.device.type == "cpu" else max(1, SCORES // k)
    precision = torch.get_float32_matmul_precision()
    if rough:
        torch.set_float32_matmul_precision("high")
    for long, its_labels in zip(x.split(2**16), labels.split(2**16), strict=True):
        short = torch.zeros(k, d, device=x.device)  # short sums in float32, long in float64
        for part, which in zip(long.split(block), its_labels.split(block), strict=True):
            index, d2 = nearest(part, centroids)
            which.copy_(index)
            short.index_add_(0, index, part)
            inertia += d2.sum(dtype=torch.float64)
        both[:, :-1] += short
    torch.set_float32_matmul_precision(precision)
    both[:, -1].index_add_(0, labels, both.new_ones(1).expand(len(labels)))
    return labels, torch.cat([both.flatten(), inertia])


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
