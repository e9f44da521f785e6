"""How far confidences were right: bins, expected calibration error (Naeini et al., 2015) and the curve, as SVG.

An image counts as right if its cluster's kind is its own under the best one-to-one naming, as in ``metrics.accuracy``.
An image in no cluster (-1), because a prediction abstained, is left out.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from deepcluster import atomic
from deepcluster.metrics import contingency

BINS = 15  # of equal width, as in Guo et al. (2017, arXiv:1706.04599)


def reliability(confidence: np.ndarray, cluster: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Expected calibration error, and the bins it is made of.

    Args:
        confidence: (N,) in [0, 1], NaN where unknown.
        cluster: (N,) ids, -1 for none.
        true: (N,) kinds, -1 where unknown.

    Returns:
        ``ece``: mean distance of confidence and accuracy over the bins, weighted by their images; ``reliability``: for
        each bin that has images their number ``n``, mean ``confidence`` and ``accuracy``. {} without any such image.
    """
    known = (true >= 0) & (cluster >= 0) & ~np.isnan(confidence)
    if not known.any():
        return {}
    confidence, cluster, true = (np.asarray(x)[known] for x in (confidence, cluster, true))
    ids, place = np.unique(cluster, return_inverse=True)
    _, code = np.unique(true, return_inverse=True)
    name = np.full(len(ids), -1)
    rows, columns = linear_sum_assignment(contingency(place, code), maximize=True)
    name[rows] = columns
    right = name[place] == code
    own = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    found, apart = [], 0.0
    for one in np.unique(own).tolist():
        inside = own == one
        said, was, n = float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())
        apart += n * abs(said - was) / len(own)
        found.append({"n": n, "confidence": round(said, 6), "accuracy": round(was, 6)})
    return {"ece": round(apart, 6), "reliability": found}


def draw(run: Path, confidence: np.ndarray, cluster: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """``reliability``, and its curve in RUN/reliability.svg, where the run can be written."""
    found = reliability(confidence, cluster, true)
    if found:
        with contextlib.suppress(OSError):
            atomic.write(run / "reliability.svg", curve(found))
    return found


def curve(found: dict[str, Any]) -> str:
    """An SVG element of what ``reliability`` found: on the diagonal, confidence is what it says."""
    most = max(one["n"] for one in found["reliability"])
    x, y = lambda v: 40 + 200 * v, lambda v: 210 - 200 * v
    bars, dots = [], []
    for one in found["reliability"]:
        at, high = x(one["confidence"]), y(one["accuracy"])
        height = 40 * one["n"] / most
        told = f"{one['n']:,} images: confidence {one['confidence']:.3f}, accuracy {one['accuracy']:.3f}"
        bars.append(f'<rect x="{at - 4:.1f}" y="{210 - height:.1f}" width="8" height="{height:.1f}" opacity=".2"/>')
        dots.append(f'<circle cx="{at:.1f}" cy="{high:.1f}" r="3"><title>{told}</title></circle>')
    line = " ".join(f"{x(one['confidence']):.1f},{y(one['accuracy']):.1f}" for one in found["reliability"])
    said = f"Reliability: expected calibration error {found['ece']:.3f}"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" class="reliability" viewBox="0 0 260 250" width="260" \
height="250" fill="currentColor" font-family="sans-serif" font-size="11" role="img" aria-label="{said}">
<g fill="none" stroke="currentColor"><path d="M40 10V210H240" opacity=".5"/><path d="M40 210L240 10" \
stroke-dasharray="3 3" opacity=".5"/><polyline points="{line}"/></g>
{"".join(bars)}{"".join(dots)}
<text x="34" y="16" text-anchor="end">1</text><text x="34" y="213" text-anchor="end">0</text>
<text x="40" y="224">0</text><text x="240" y="224" text-anchor="end">1</text>
<text x="140" y="224" text-anchor="middle">confidence</text>
<text x="28" y="110" text-anchor="middle" transform="rotate(-90 28 110)">accuracy</text>
<text x="140" y="244" text-anchor="middle">{said}</text></svg>"""
