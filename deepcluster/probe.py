"""What the features are worth to somebody who has labels: the accuracy of two plain classifiers on them.

Half of the literature reports these figures. Nothing of them goes back into training.

Shapes: N images, n of them with a known label, D features.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import faiss
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from deepcluster.recipe import hint

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of the linear probe: the larger, the looser
STEPS = 200  # of the solver at most
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the nearest neighbours, weighted by exp(cosine / temperature)


def probes(
    features: np.ndarray, true: np.ndarray, kinds: Sequence[str] = ("linear", "knn"), seed: int = 0
) -> dict[str, Any]:
    """Accuracy of a linear classifier, and of the nearest neighbours, on a fifth of the images that neither has seen.

    The images with a known label are split at random, every class alike. ``linear`` is a logistic regression on
    standardised features, its C chosen on a fifth of the training part; ``knn`` votes by cosine.

    Args:
        features: (N, D), one row an image.
        true: (N,) int, number of each image's class, -1 where it is unknown.
        kinds: which of "linear" and "knn".
        seed: of the split.

    Returns:
        ``n_train``, ``n_test``, ``n_classes``, ``n_left_out`` (labelled images whose class has no other), ``seed``,
        and for each kind its ``accuracy`` and what was chosen. The test part chooses nothing.

    Raises:
        ValueError: an unknown kind; features that are not finite, or not one row a label; less than two classes that
            have two images.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"no probe is called {kind!r}; {hint(kind, KINDS)}")
    if features.ndim != 2 or true.shape != features.shape[:1]:
        raise ValueError(f"probes need one row of features a label; got {features.shape} and {true.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite; the run is damaged or its training failed")
    sizes = np.bincount(true[true >= 0])
    if (sizes >= 2).sum() < 2:
        raise ValueError(f"a probe needs two classes with two images each; got {(sizes >= 2).sum()} of {len(sizes)}")
    kept = np.flatnonzero((true >= 0) & (sizes[true] >= 2))
    x, y = np.asarray(features[kept], np.float32), true[kept]
    rng = np.random.default_rng(seed)
    train, test = _split(y, rng)
    out: dict[str, Any] = {
        "n_train": len(train),
        "n_test": len(test),
        "n_classes": int((sizes >= 2).sum()),
        "n_left_out": int((true >= 0).sum()) - len(kept),
        "seed": seed,
    }
    for kind in kinds:
        right, chosen = KINDS[kind](x[train], y[train], x[test], y[test], np.random.default_rng(seed))
        out[kind] = {"accuracy": round(float(right.mean()), 6), **chosen}
    return out


def _split(y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of four fifths of every class, and of the rest; at least one image of each class on both sides."""
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    sizes = np.bincount(y)
    rank = np.arange(len(y)) - np.repeat(sizes.cumsum() - sizes, sizes)
    taken = rank < np.repeat(np.maximum(1, np.round(0.2 * sizes)), sizes)
    return np.sort(order[~taken]), np.sort(order[taken])


def _linear(
    x: np.ndarray, y: np.ndarray, new: np.ndarray, true: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Whether each new image is named rightly, and the C chosen on a part of the old ones."""
    scaler = StandardScaler().fit(x)
    x, new = scaler.transform(x), scaler.transform(new)
    c = PENALTIES[1]
    several = np.bincount(y)[y] >= 2
    if len(np.unique(y[several])) >= 2:
        inner, labels = x[several], y[several]
        fit, held = _split(labels, rng)
        scores = [_regression(inner[fit], labels[fit], c).score(inner[held], labels[held]) for c in PENALTIES]
        c = PENALTIES[int(np.argmax(scores))]
    return _regression(x, y, c).predict(new) == true, {"C": c}


def _regression(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough
        return LogisticRegression(C=c, max_iter=STEPS, tol=1e-3).fit(x, y)


def _knn(
    x: np.ndarray, y: np.ndarray, new: np.ndarray, true: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Whether each new image is named rightly by its nearest old ones."""
    k = min(NEIGHBOURS, len(x))
    old, new = (rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12) for rows in (x, new))
    cosine, index = faiss.knn(new, old, k, metric=faiss.METRIC_INNER_PRODUCT)
    votes = np.zeros((len(new), y.max() + 1))
    weight = np.exp((cosine - cosine.max(1, keepdims=True)) / TEMPERATURE)
    np.add.at(votes, (np.arange(len(new))[:, None], y[index]), weight)
    return votes.argmax(1) == true, {"k": k, "temperature": TEMPERATURE}


KINDS: dict[str, Callable] = {"linear": _linear, "knn": _knn}
