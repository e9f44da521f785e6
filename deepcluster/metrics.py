"""How well two labelings of the same images agree: numbers only, no images, no training.

``pred`` (N,) names each image's cluster, ``true`` (N,) its class; both may hold any labels (ints, strings, objects).
A ``pred`` of -1 means unassigned: such images are wrong in the accuracy, one more group in every other score.
Everything starts from one contingency table, O(N + K C): a million images in a thousand clusters take 0.1 s.
N images, K clusters, C classes.
"""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

AMI_LIMIT = 20_000_000  # sum of min(cluster, class) over all pairs: about a second of scikit-learn's expected MI


def _codes(labels: Any) -> tuple[np.ndarray, int | None]:
    """(N,) int64 codes 0..n-1 of any labels, in sorted order, and the code that -1 got, if it occurs."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must be one-dimensional; got shape {labels.shape}")
    if labels.dtype == object:  # may not be sortable: number them as they come
        seen: dict[Any, int] = {}
        return np.array([seen.setdefault(x, len(seen)) for x in labels], dtype=np.int64), seen.get(-1)
    names, codes = np.unique(labels, return_inverse=True)
    noise = np.flatnonzero(names == -1) if names.dtype.kind in "if" else np.array([])
    return codes.astype(np.int64, copy=False), int(noise[0]) if len(noise) else None


def _table(pred: Any, true: Any) -> tuple[np.ndarray, int | None]:
    """(K, C) int64 counts and the row of unassigned images, if there is one."""
    (rows, noise), (columns, _) = _codes(pred), _codes(true)
    if len(rows) != len(columns):
        raise ValueError(f"pred and true must name the same images; got {len(rows)} and {len(columns)} labels")
    if not len(rows):
        raise ValueError("pred and true are empty; there is nothing to score")
    shape = int(rows.max()) + 1, int(columns.max()) + 1
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape), noise


def contingency(pred: Any, true: Any) -> np.ndarray:
    """(K, C) int64: images in the k-th cluster with the c-th class, both in sorted order of the labels that occur.

    Unassigned images (-1) are the first row. Labels of dtype object keep the order of their first appearance.
    """
    return _table(pred, true)[0]


def accuracy(pred: Any, true: Any) -> float:
    """Share of images right under the best one-to-one naming of clusters by classes, in [0, 1].

    K and C may differ: clusters left without a class are wrong, as is every unassigned image.
    """
    return _accuracy(*_table(pred, true))


def _accuracy(table: np.ndarray, noise: int | None) -> float:
    named = table if noise is None else np.delete(table, noise, axis=0)
    return float(named[linear_sum_assignment(named, maximize=True)].sum() / table.sum())


def purity(pred: Any, true: Any) -> float:
    """Share of images right when every cluster takes its majority class (many-to-one), in (0, 1].

    For overclustered heads. It grows to 1 as K nears N, so compare it at equal K only.
    """
    return _purity(contingency(pred, true))


def _purity(table: np.ndarray) -> float:
    return float(table.max(1).sum() / table.sum())


def _same(table: np.ndarray) -> bool:
    """Whether both labelings part the images alike, names aside; where the ratios below would be 0 / 0 or 1 - 1e-16."""
    return len(table) == table.shape[1] == np.count_nonzero(table)


def nmi(pred: Any, true: Any, average: str = "arithmetic") -> float:
    """Mutual information over the mean of both entropies, in [0, 1].

    Args:
        pred: (N,) clusters. A constant one scores 0, unless ``true`` is constant too: then 1.
        true: (N,) classes.
        average: "arithmetic" (scikit-learn since 0.22) or "geometric" (before, and in papers of that time). Equal for
            equal entropies, else the geometric mean is the smaller and its NMI the larger.
    """
    return _nmi(contingency(pred, true), average)


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of (n,) counts; 0 for no counts at all."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum()) if len(share) > 1 else 0.0


def _information(table: np.ndarray) -> tuple[float, float, float]:
    """Mutual information and the entropies of clusters and classes, in nats."""
    return float(mutual_info_score(None, None, contingency=table)), _entropy(table.sum(1)), _entropy(table.sum(0))


def _nmi(table: np.ndarray, average: str) -> float:
    if average not in ("arithmetic", "geometric"):
        raise ValueError(f"average must be 'arithmetic' or 'geometric'; got {average!r}")
    if _same(table):
        return 1.0
    shared, a, b = _information(table)
    mean = (a + b) / 2 if average == "arithmetic" else (a * b) ** 0.5
    return min(max(shared / mean, 0.0), 1.0) if mean else 0.0  # a constant labeling tells nothing


def ari(pred: Any, true: Any) -> float:
    """Adjusted Rand index: pairs of images on which both labelings agree, 0 by chance, 1 if equal; at least -0.5."""
    return _ari(contingency(pred, true))


def _ari(table: np.ndarray) -> float:
    if _same(table):
        return 1.0

    def pairs(counts: np.ndarray) -> int:  # a Python int: the products below pass 2**63 from N = 1e5 on
        return int((counts * (counts - 1) // 2).sum())

    both, a, b, everything = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum(keepdims=True))
    return 2 * (both * everything - a * b) / ((a + b) * everything - 2 * a * b)


def ami(pred: Any, true: Any) -> float:
    """Mutual information adjusted for chance (arithmetic mean): 0 by chance, 1 if equal; may be below 0.

    Slow for many clusters: the expected information costs the sum of min(cluster size, class size) over all K C pairs,
    half a minute for a million images in a thousand clusters and classes. ``scores`` leaves it out there.
    """
    return _ami(contingency(pred, true))


def _ami(table: np.ndarray) -> float:
    if _same(table):
        return 1.0
    shared, a, b = _information(table)
    expected = float(expected_mutual_information(table, int(table.sum())))
    return (shared - expected) / ((a + b) / 2 - expected)


def sizes(labels: Any, n_clusters: int | None = None) -> np.ndarray:
    """(K,) int64 images in clusters 0..K-1 without unassigned ones (-1); K is ``n_clusters`` or the largest id + 1."""
    labels = np.asarray(labels).astype(np.int64, copy=False)
    if n_clusters is not None and labels.size and labels.max() >= n_clusters:
        raise ValueError(f"labels must be below n_clusters={n_clusters}; got {labels.max()}")
    return np.bincount(labels[labels >= 0], minlength=n_clusters or 0)


def scores(pred: Any, true: Any, n_clusters: int) -> dict[str, float | int | None]:
    """Every score of one clustering, together, from one table.

    Returns:
        acc, nmi (arithmetic), nmi_geometric, ari, ami, purity; n_found: clusters that hold an image; n_clusters: as
        asked; n_images. ami is None where it would take more than about a second (see ``ami``).
    """
    table, noise = _table(pred, true)
    cheap = np.minimum.outer(table.sum(1), table.sum(0)).sum() <= AMI_LIMIT
    return {
        "acc": _accuracy(table, noise),
        "nmi": _nmi(table, "arithmetic"),
        "nmi_geometric": _nmi(table, "geometric"),
        "ari": _ari(table),
        "ami": _ami(table) if cheap else None,
        "purity": _purity(table),
        "n_found": len(table) - (noise is not None),
        "n_clusters": n_clusters,
        "n_images": int(table.sum()),
    }


def agreement(new: Any, old: Any) -> float:
    """NMI between two labelings of the same images, in [0, 1]: stability, not quality.

    1.0 says that nothing moved: converged *or* collapsed, so show it beside ``health``.
    """
    return nmi(new, old)


def stability(new: np.ndarray, old: np.ndarray, k: int) -> tuple[float, float]:
    """NMI and ARI of two labelings (N,) with ids below ``k``, as ``nmi`` and ``ari``, for any number of clusters.

    Only pairs that occur are counted: memory is that of N, not of K x K, and time that of sorting N numbers.
    """
    n = len(new)
    pairs, counts = np.unique(new.astype(np.int64) * k + old, return_counts=True)
    a, b = np.bincount(new, minlength=k), np.bincount(old, minlength=k)
    if len(pairs) == np.count_nonzero(a) == np.count_nonzero(b):
        return 1.0, 1.0
    ratio = counts * (n / a[pairs // k] / b[pairs % k])
    mean = (_entropy(a) + _entropy(b)) / 2
    shared = float((counts / n * np.log(ratio)).sum())
    both, one, other = (float((c * (c - 1.0) / 2).sum()) for c in (counts, a, b))
    everything = n * (n - 1.0) / 2
    rand = 2 * (both * everything - one * other) / ((one + other) * everything - 2 * one * other)
    return min(max(shared / mean, 0.0), 1.0) if mean else 0.0, rand


def health(labels: Any, n_clusters: int) -> dict[str, float | int]:
    """Whether a clustering is collapsing, judged without true labels and over assigned images only.

    Returns:
        active: clusters that hold an image; largest_share: of the largest one, in [0, 1]; entropy: of the sizes, nats,
        log(n_clusters) when balanced; effective: exp(entropy), how many equal clusters would be as spread out.
    """
    counts = sizes(labels, n_clusters)
    entropy = _entropy(counts)
    return {
        "active": int((counts > 0).sum()),
        "largest_share": float(counts.max(initial=0) / max(counts.sum(), 1)),
        "entropy": entropy,
        "effective": float(np.exp(entropy)) if counts.any() else 0.0,
    }


def silhouettes(features: np.ndarray, cluster: np.ndarray, means: np.ndarray) -> np.ndarray:
    """(N,) simplified silhouettes, in [-1, 1]: how much nearer an image is to its own cluster's mean than to another's.

    With a the cosine distance of a row of ``features`` (N, D) to the mean of its own ``cluster`` (N,), b to the nearest
    other one of ``means`` (K, D), where rows of zeros are clusters without images: (b - a) / max(a, b).
    """
    used = (means != 0).any(1)
    unit, means = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (features, means))
    far, rows = (1 - unit @ means.T).clip(min=0), np.arange(len(unit))
    own = far[rows, cluster]
    far[:, ~used] = far[rows, cluster] = np.inf
    other = far.min(1)
    other = np.where(np.isfinite(other), other, own)
    return (other - own) / np.maximum(np.maximum(other, own), 1e-12)


def fences(values: np.ndarray, cluster: np.ndarray, n_clusters: int) -> np.ndarray:
    """(n_clusters,) float32: the value (N,) beyond which a member of a cluster is far out, infinite for empty clusters.

    Tukey's: 1.5 interquartile ranges above the upper quartile.
    """
    reach = np.full(n_clusters, np.inf, np.float32)
    counts = np.bincount(cluster, minlength=n_clusters)
    ordered = values[np.argsort(cluster, kind="stable")]
    for c, inside in enumerate(np.split(ordered, counts.cumsum()[:-1])):
        if len(inside):
            low, high = np.quantile(inside, [0.25, 0.75])
            reach[c] = high + 1.5 * (high - low)
    return reach
