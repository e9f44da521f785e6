"""A merge tree over small clusters: which of them are one group, by how deep the valley of density between them is.

Density is that of the nearest neighbours: an image whose k-th neighbour is at distance r has the density r^-d, d being
the intrinsic dimension. Two groups are joined at the density of the thinnest place that still links them, as in
HDBSCAN (Campello, Moulavi and Sander 2013, "Density-based clustering based on hierarchical density estimates"), and
their valley is how far this lies below the lower one of their peaks (the prominence of ToMATo: Chazal, Guibas, Oudot
and Skraba, JACM 2013). The shallowest valley is filled first.

Deviations: groups start as the small clusters given, not as single images; peak and link are quantiles, not extremes,
so that one image between two groups does not make them one.

Shapes: n images, d features, M small clusters.
"""

from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

NEIGHBOURS = (10, 20)  # that density is estimated by, of few and of many images: a smaller group is not seen
IMAGES = 64  # a neighbour, between these limits
PEAK = 0.9  # quantile of a group's density that is its peak
LINK = 0.1  # links between two groups, as a share of the smaller one, that make a bridge
FEWEST = 3  # and at least so many
TWINS = 0.1  # of the median: distances to the k-th neighbour below that are taken for it, lest copies make a group


@dataclass(frozen=True)
class Tree:
    """Merges of M small clusters, shallowest valley first."""

    merges: tuple[tuple[int, int], ...]  # M - 1 pairs: the second becomes part of the first
    valleys: tuple[float, ...]  # how far density falls between the two, in nats: 0 is no valley, 1.4 is to a quarter

    def groups(self, k: int) -> np.ndarray:
        """(M,) int64: the group, 0 to k - 1, of every small cluster when there are ``k``; 1 <= k <= M."""
        of = np.arange(len(self.merges) + 1)
        for into, gone in self.merges[: len(self.merges) + 1 - k]:
            of[of == of[gone]] = of[into]
        return np.unique(of, return_inverse=True)[1]

    def valley(self, k: int) -> float:
        """Of the merge that makes k - 1 groups of k: the shallowest one there is between k groups; 2 <= k <= M."""
        return self.valleys[len(self.merges) + 1 - k]


def distances(x: np.ndarray) -> np.ndarray:
    """(n, n) float32 Euclidean distances of the rows (n, d); the same on any number of cores."""
    x = x.astype(np.float32)
    x = x - x.mean(0)
    with threadpool_limits(1):
        product = x @ x.T
    square = product.diagonal().copy()
    product *= -2
    product += square[:, None]
    product += square
    np.maximum(product, 0, out=product)
    np.fill_diagonal(product, 0)
    return np.sqrt(product, out=product)


def grow(far: np.ndarray, labels: np.ndarray) -> tuple[Tree, float]:
    """Merge small clusters until there is one: from distances (n, n) and ``labels`` (n,), 0 to M - 1, all in use.

    Also gives the intrinsic dimension.
    """
    core, dim = _density(far)
    linked = np.log(np.maximum(np.maximum(far, core[:, None]), core))  # minus log density, but for the factor dim
    thin = np.log(core)
    order = np.argsort(labels, kind="stable")
    members = dict(enumerate(np.split(order, np.bincount(labels).cumsum()[:-1])))
    merges: list[tuple[int, int]] = []
    valleys: list[float] = []
    kept = FEWEST + int(LINK * len(labels) / 2)
    links = {(a, b): _least(linked[np.ix_(members[a], members[b])].ravel(), kept)
             for a in members for b in members if a < b}  # fmt: skip
    peaks = {a: np.quantile(thin[rows], 1 - PEAK) for a, rows in members.items()}

    def valley(a: int, b: int) -> float:
        found = links[a, b]
        bridge = max(FEWEST, int(LINK * min(len(members[a]), len(members[b]))))
        return float(dim * (found[min(bridge, len(found)) - 1] - max(peaks[a], peaks[b])))

    depth = {pair: valley(*pair) for pair in links}
    while depth:
        a, b = min(depth, key=lambda pair: (depth[pair], pair))
        merges.append((a, b))
        valleys.append(depth.pop((a, b)))
        del links[a, b]
        members[a] = np.concatenate([members[a], members.pop(b)])
        peaks[a] = np.quantile(thin[members[a]], 1 - PEAK)
        for c in members:
            if c != a:
                mine, other = (min(a, c), max(a, c)), (min(b, c), max(b, c))
                links[mine] = _least(np.concatenate([links[mine], links.pop(other)]), kept)
                del depth[other]
                depth[mine] = valley(*mine)
    return Tree(tuple(merges), tuple(valleys)), dim


def _density(far: np.ndarray) -> tuple[np.ndarray, float]:
    """(n,) distance of the k-th neighbour, above 0, and the intrinsic dimension (Levina and Bickel, NIPS 2004)."""
    k = min(max(NEIGHBOURS[0], len(far) // IMAGES), NEIGHBOURS[1], len(far) - 1)
    near = np.sort(np.partition(far, k, axis=1)[:, 1 : k + 1], axis=1).astype(np.float64)
    core = near[:, -1]
    positive = core[core > 0]
    if not len(positive):
        return np.ones(len(far)), 1.0  # all images are the same
    core = np.maximum(core, TWINS * np.median(positive))
    apart = near[near[:, 0] > 0]
    if k < 3 or not len(apart):
        return core, 1.0
    slope = np.log(apart[:, -1:] / apart[:, :-1]).mean() * (k - 1) / (k - 2)
    return core, float(1 / max(slope, 1e-6))


def _least(values: np.ndarray, n: int) -> np.ndarray:
    """The n smallest, sorted."""
    return np.sort(np.partition(values, n - 1)[:n] if len(values) > n else values)
