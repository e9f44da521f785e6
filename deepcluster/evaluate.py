"""True classes, where somebody has them, and scores against them. Training never comes here."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepcluster import metrics
from deepcluster.sources import Source


def encode(classes: Sequence[str | None] | None) -> np.ndarray | None:
    """(N,) int64 numbers of the class names, -1 where unknown; None if no image has a class."""
    if classes is None or all(c is None for c in classes):
        return None
    names = {c: i for i, c in enumerate(sorted({c for c in classes if c is not None}))}
    return np.array([names[c] if c is not None else -1 for c in classes], dtype=np.int64)


def read_labels(file: str, names: Sequence[str]) -> tuple[list[str | None], str]:
    """Classes from a CSV file with columns path and label (a header is optional), in the order of ``names``.

    A path matches an image by its whole name, else by its last parts if only one image has these.

    Returns:
        The class of each image, None where the file has none, and a sentence on what did not match ("" if all did).

    Raises:
        ValueError: no such file, fewer than two columns, or not one image matches.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no label file {file}; give a CSV file with the columns path,label")
    with path.open(newline="", encoding="utf-8", errors="backslashreplace") as f:
        rows = [r for r in csv.reader(f) if r]
    if rows and {"path", "label"} <= {c.strip().lower() for c in rows[0]}:
        header = [c.strip().lower() for c in rows.pop(0)]
        where, what = header.index("path"), header.index("label")
    else:
        where, what = 0, 1
    if not rows or any(len(r) <= max(where, what) for r in rows):
        raise ValueError(f"{file} must have the columns path,label in every row")
    given = {r[where]: r[what] for r in rows}
    suffixes: dict[str, int] = {}
    for i, name in enumerate(names):
        parts = name.replace("\\", "/").split("/")
        for n in range(len(parts)):
            tail = "/".join(parts[n:])
            suffixes[tail] = i if tail not in suffixes else -1
    found: list[str | None] = [None] * len(names)
    unknown = 0
    for name, label in given.items():
        i = suffixes.get(name.replace("\\", "/").removeprefix("./"), -1)
        if i < 0:
            unknown += 1
        else:
            found[i] = label
    missing = sum(c is None for c in found)
    if missing == len(names):
        raise ValueError(
            f"{file} names none of the {len(names)} images; its first path is {rows[0][where]!r}, "
            f"the first image {names[0]!r}"
        )
    said = []
    if missing:
        said.append(f"{missing} of {len(names)} images have no label in {file} and are left out of the scores")
    if unknown:
        said.append(f"{unknown} rows of {file} name no image")
    return found, "; ".join(said)


def scores(cluster: np.ndarray, true: np.ndarray, n_clusters: int) -> dict[str, Any]:
    """ACC, NMI, ARI, AMI, purity, clusters found and asked, images scored; images without a class are left out."""
    known = true >= 0
    out = metrics.scores(cluster[known], true[known], n_clusters)
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in out.items()}


def of_rows(true: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    """Classes of the images that could be read, by their rows; None, with a warning, if none of these has one."""
    if true is None or (true[rows] >= 0).any():
        return None if true is None else true[rows]
    logging.getLogger("deepcluster").warning("no image that has a label can be read, so there are no scores")
    return None


def true_classes(source: Source, labels: str) -> np.ndarray | None:
    """Classes (N,) of all items of a source by ``--labels auto|none|FILE.csv``; warns of what does not match."""
    if labels == "none":
        return None
    if labels == "auto":
        return encode(source.classes)
    found, warning = read_labels(labels, source.names)
    if warning:
        logging.getLogger("deepcluster").warning(warning)
    return encode(found)
