"""How many clusters there are: evidence for every k from features alone, and one to three answers, or none.

Images are put into many small clusters, which a tree (``tree.grow``) merges, the shallowest valley of density first.
Every k is a cut of this tree. The answer is the finest with a valley between any two of its groups in which density
falls by half or more; coarser ones that keep much deeper valleys than the next finer one, and that other samples and
seeds lead to, are further answers. Data without valleys, such as uniform noise or one Gaussian, has no cluster
structure, however stably k-means may cut it.

Shapes: N images, n of a sample, D features, M small clusters.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from deepcluster import metrics
from deepcluster.kmeans import nearest, one_pass, plus_plus
from deepcluster.tree import Tree, distances, grow

SAMPLE = 4096  # images that are looked at: (n, n) distances are 64 MB
FEWEST = 50  # images below which nothing can be told
HIGHEST = 60  # k that is looked for, if nobody asks for more
LLOYD = 10  # iterations of k-means
EACH = 8  # images of a small cluster, at least on average
DEEP = math.log(2)  # nats: between two groups density falls by half or more, seen from the lower peak
BOOTSTRAPS, PART = 8, 0.8  # samples that stability is judged by, and their share of the images
ANSWERS = 3
NOTABLE = 0.3  # support of a further answer, at least


@dataclass(frozen=True)
class Row:
    """What speaks for k clusters."""

    k: int
    stability: float  # ARI with the clusters of other samples and seeds, mean, at most 1
    generalisation: float  # recall of clusters, mean over these, by a linear model that saw other images; in [0, 1]
    separation: float  # simplified silhouette, mean, in [-1, 1]
    gain: float  # nats: depth of the shallowest valley between two of the k, which a merge fills; mean over samples
    support: float  # stability times the share of the gain that is not left after k; 0 where a valley is too shallow
    plateau: int = 0  # 1 for the best answer, 2 and 3 for others, 0 for none


@dataclass(frozen=True)
class Evidence:
    """Of features with ``n_images`` images, ``n_sampled`` of which were looked at."""

    rows: tuple[Row, ...]
    tree: Tree
    centroids: np.ndarray  # (M, D) float32 means of the small clusters
    scale: float  # small clusters are as likely for an image as exp(-scale * squared distance / 2)
    n_images: int
    n_sampled: int
    seed: int

    @property
    def answers(self) -> tuple[int, ...]:
        """One to three k, the best first; none where there is no cluster structure."""
        found = sorted((row.plateau, row.k) for row in self.rows if row.plateau)
        return tuple(k for _, k in found)

    def sentence(self) -> str:
        """The answer in words."""
        looked = f"k = {self.rows[0].k} to {self.rows[-1].k}"
        by_k = {row.k: row for row in self.rows}
        if not self.answers:
            deepest = max(row.gain for row in self.rows)
            falls = f"at most by {1 - math.exp(-max(0.0, deepest)):.0%}" if deepest > 0 else "nowhere"
            return (f"no cluster structure for {looked}: between any two groups density falls {falls}, "
                    f"and {1 - math.exp(-DEEP):.0%} would be a valley")  # fmt: skip
        best = by_k[self.answers[0]]
        others = " or ".join(map(str, self.answers[1:]))
        return (f"{best.k} clusters{f' (or {others})' if others else ''}: between any two of them density falls by "
                f"{1 - math.exp(-best.gain):.0%} or more, other samples agree with an ARI of {best.stability:.2f}"
                )  # fmt: skip

    @property
    def most(self) -> int:
        """Clusters that the tree can be cut into, at most: M."""
        return len(self.centroids)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all but the centroids."""
        return {"answers": list(self.answers), "sentence": self.sentence(), "n_images": self.n_images,
                "n_sampled": self.n_sampled, "seed": self.seed, "scale": self.scale,
                "rows": [asdict(row) for row in self.rows], "tree": asdict(self.tree)}  # fmt: skip

    @classmethod
    def from_dict(cls, saved: dict[str, Any], centroids: np.ndarray) -> "Evidence":
        """Back from JSON; raises KeyError, TypeError or ValueError if it is something else."""
        merges = tuple((int(a), int(b)) for a, b in saved["tree"]["merges"])
        tree = Tree(merges, tuple(float(v) for v in saved["tree"]["valleys"]))
        m, rows = len(centroids), tuple(Row(**row) for row in saved["rows"])
        gone = {gone for into, gone in merges if 0 <= into < m and 0 <= gone < m and into != gone}
        numbers = all(type(value) in (int, float) for row in rows for value in vars(row).values())
        if not len(merges) == len(tree.valleys) == len(gone) == m - 1 or not rows or not numbers:
            raise ValueError("its tree or its rows are no such thing")
        return cls(rows, tree, centroids, float(saved["scale"]),
                   int(saved["n_images"]), int(saved["n_sampled"]), int(saved["seed"]))  # fmt: skip


def check(low: int, high: int | None, n_images: int) -> None:
    """Refuse a range of k that cannot be.

    Raises:
        ValueError: says which can.
    """
    if low < 2 or (high is not None and high < low):
        raise ValueError(f"k goes from --min, at least 2, to --max, not below it; got {low} to {high or HIGHEST}")
    if n_images < FEWEST:
        raise ValueError(f"{n_images} images are too few to tell how many clusters there are; give {FEWEST} or more, "
                         "or say it yourself: --n-clusters K")  # fmt: skip
    most = min(n_images, SAMPLE) // 2
    if max(low, high or 0) > most:
        raise ValueError(f"{n_images} images can show at most {most} clusters; give --max {most} or less, and a --min "
                         "below it")  # fmt: skip


def evidence(
    features: np.ndarray, *, low: int = 2, high: int | None = None, seed: int = 0, cosine: bool = False
) -> Evidence:
    """Look for the number of clusters in features. Takes seconds: at most SAMPLE images are looked at.

    A group is seen if more than 10 to 20 of the images that are looked at belong to it (``tree.NEIGHBOURS``).

    Args:
        features: (N, D) finite floats, which may be memory-mapped.
        low: smallest k.
        high: largest k; by default 60, or as many as N images can show.
        seed: of the sample, of k-means and of the bootstraps: the same one gives the same evidence.
        cosine: only the directions of the features count, as everywhere in a run; else they are taken as they are.

    Raises:
        ValueError: k cannot be in this range, N is below 50, or features are not finite.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (N, D); got {features.shape}")
    check(low, high, len(features))
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(features))[:SAMPLE])
    x = np.array(features[rows], np.float32)
    if not np.isfinite(x).all():
        raise ValueError("features hold NaN or infinite numbers; leave these rows out")
    if cosine:
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    m = min(2 * max(HIGHEST, high or low), max(len(x) // EACH, high or low))  # one tree for all ranges up to 60
    small, centroids = _small(x, m, seed)
    if len(centroids) < (high or low):
        raise ValueError(f"there are {len(centroids)} different images or groups of them, too few for --max "
                         f"{high or low}; give a smaller one")  # fmt: skip
    far = distances(x)
    tree, dim = grow(far, small)
    range_of_k = range(low, (high or max(low, min(HIGHEST, len(centroids)))) + 1)
    cuts = np.stack([tree.groups(k)[small] for k in range_of_k])
    stability, gains = _again(x, far, cuts, low, m, seed, rng)
    recalls = _recalls(x, small, tree, range_of_k, rng)
    found = []
    for i, k in enumerate(range_of_k):
        left = max(0.0, gains[i + 1]) / gains[i] if gains[i] >= DEEP else 1.0
        support = max(0.0, stability[i]) * (1 - left)
        found.append(Row(k, stability[i], recalls[i], _separation(x, cuts[i]), gains[i], support))
    spread = float(((x - centroids[small]) ** 2).sum(1).mean())
    return Evidence(_marked(found), tree, centroids, dim / max(spread, 1e-9), len(features), len(x), seed)


def _marked(rows: list[Row]) -> tuple[Row, ...]:
    """The rows with the answers among them marked: the finest k with valleys throughout, then those that gain most."""
    deep = [row for row in rows if row.gain >= DEEP]
    others = sorted((row for row in deep[:-1] if row.support >= NOTABLE), key=lambda row: (-row.support, -row.k))
    place = {row.k: i + 1 for i, row in enumerate([*deep[-1:], *others][:ANSWERS])}
    return tuple(replace(row, plateau=place.get(row.k, 0)) for row in rows)


def _small(x: np.ndarray, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int64 of m clusters, or fewer where rows are alike, and their centroids (M, D); by k-means in this process.

    ``kmeans.kmeans`` would wait for the other ones of a run, which do not come.
    """
    rows = torch.from_numpy(np.ascontiguousarray(x))
    centroids = plus_plus(rows, m, torch.Generator().manual_seed(seed % 2**31), rows[:0])
    for _ in range(LLOYD):
        _, sums = one_pass(rows, centroids)
        both = sums[:-1].view(m, -1)
        fresh = both[:, :-1] / both[:, -1:].clamp_min(1)
        centroids = torch.where(both[:, -1:] > 0, fresh, centroids).float()
    used, small = np.unique(nearest(rows, centroids)[0].numpy(), return_inverse=True)
    return small.astype(np.int64), centroids.numpy()[used]


def _again(
    x: np.ndarray, far: np.ndarray, cuts: np.ndarray, low: int, m: int, seed: int, rng: np.random.Generator
) -> tuple[list[float], list[float]]:
    """By trees over other samples, with other seeds: the mean ARI of each of the ``cuts`` (n_k, n) with theirs, and the
    mean gain of each k and of the next one.
    """
    agreed, gains = np.zeros(len(cuts)), np.zeros(len(cuts) + 1)
    for number in range(BOOTSTRAPS):
        rows = np.sort(rng.permutation(len(x))[: int(PART * len(x))])
        small, centroids = _small(x[rows], min(m, len(rows)), seed + number + 1)
        other, _ = grow(far[np.ix_(rows, rows)], small)
        agreed += [metrics.ari(other.groups(min(low + i, len(centroids)))[small], cut[rows])
                   for i, cut in enumerate(cuts)]  # fmt: skip
        gains += _gains(other, low, len(cuts) + 1)
    return (agreed / BOOTSTRAPS).tolist(), (gains / BOOTSTRAPS).tolist()


def _gains(tree: Tree, low: int, n: int) -> np.ndarray:
    """(n,) depth of the shallowest valley between k groups, for k = ``low`` and the next ones; 0 beyond M."""
    valleys = np.minimum.accumulate(tree.valleys[::-1])  # of k = 2, 3, ...
    return np.pad(valleys, (0, max(0, low + n)))[low - 2 : low - 2 + n]


def _recalls(x: np.ndarray, small: np.ndarray, tree: Tree, range_of_k: range, rng: np.random.Generator) -> list[float]:
    """For each k: mean recall of its clusters in one half of the images by a linear model that learnt the other half.

    The model (linear discriminant analysis, shrunk) tells the m small clusters apart; the probabilities of those that a
    cut puts together are added up, so that one model serves every k.
    """
    half = rng.permutation(len(x)) % 2 == 0
    mine, other = x[half].astype(np.float64), x[~half].astype(np.float64)
    hot = np.eye(len(tree.merges) + 1)[small[half]]
    sizes = hot.sum(0)
    means = hot.T @ mine / np.maximum(sizes, 1)[:, None]
    inner = mine - means[small[half]]
    spread = inner.T @ inner / len(mine)
    spread += (0.1 * np.trace(spread) / len(spread) + 1e-9) * np.eye(len(spread))
    weights = np.linalg.solve(spread, means.T)
    scores = other @ weights - 0.5 * (means.T * weights).sum(0)
    scores += np.where(sizes > 0, np.log(np.maximum(sizes, 1)), -np.inf)
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    out = []
    for k in range_of_k:
        of = tree.groups(k)
        right = (p @ np.eye(k)[of]).argmax(1) == of[small[~half]]
        n = np.bincount(of[small[~half]], minlength=k)
        out.append(float((np.bincount(of[small[~half]], right, k)[n > 0] / n[n > 0]).mean()))
    return out


def _separation(x: np.ndarray, cut: np.ndarray) -> float:
    """Mean over images of (b - a) / max(a, b): a: distance to the own cluster's mean, b: to the next."""
    n = np.bincount(cut)
    means = np.stack([np.bincount(cut, column) for column in x.T], 1) / np.maximum(n, 1)[:, None]
    square = (x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)
    far = np.sqrt(np.maximum(square, 0))
    far[:, n == 0] = np.inf
    own = far[np.arange(len(x)), cut]
    far[np.arange(len(x)), cut] = np.inf
    other = far.min(1)
    return float(((other - own) / np.maximum(np.maximum(other, own), 1e-12)).mean())
