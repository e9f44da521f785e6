"""True classes, where somebody has them, and scores against them. Training never comes here.

It gets labels in one case only: where the user says so, ``Known`` holds the few that a method may learn from. Images
whose labels were given so are left out of all scores.
"""

import csv
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepcluster import metrics
from deepcluster.settings import Settings
from deepcluster.sources import Source
from deepcluster.sources.base import label as as_label

DEEP = 64  # last parts of a path that a row of labels may name it by: together they take the square of their number


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
    rows = _rows(file)
    place = _places(names)
    found: list[str | None] = [None] * len(names)
    unknown = 0
    for name, label in dict(rows).items():
        i = place(name)
        if i < 0:
            unknown += 1
        else:
            found[i] = label
    missing = sum(c is None for c in found)
    if missing == len(names):
        raise ValueError(
            f"{file} names none of the {len(names)} images; its first path is {rows[0][0]!r}, "
            f"the first image {names[0]!r}"
        )
    said = []
    if missing:
        said.append(f"{missing} of {len(names)} images have no label in {file} and are left out of the scores")
    if unknown:
        said.append(f"{unknown} rows of {file} name no image")
    return found, "; ".join(said)


def _rows(file: str) -> list[tuple[str, str]]:
    """Path and label of each row."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no label file {file}; give a CSV file with the columns path,label")
    try:
        with path.open(newline="", encoding="utf-8", errors="backslashreplace") as f:
            rows = [r for r in csv.reader(f) if r]
    except csv.Error as error:
        raise ValueError(f"{file} is no readable table: {error}") from None
    if rows and {"path", "label"} <= {c.strip().lower() for c in rows[0]}:
        header = [c.strip().lower() for c in rows.pop(0)]
        where, what = header.index("path"), header.index("label")
    else:
        where, what = 0, 1
    if not rows or any(len(r) <= max(where, what) for r in rows):
        raise ValueError(f"{file} must have the columns path,label in every row")
    return [(r[where], r[what]) for r in rows]


def _places(names: Sequence[str]) -> Callable[[str], int]:
    """Which image a path is: by its whole name, else by its last parts; -1 for none, or more than one."""
    suffixes: dict[str, int] = {}
    for i, name in enumerate(names):
        parts = name.replace("\\", "/").split("/")
        for n in range(max(0, len(parts) - DEEP), len(parts)):
            tail = "/".join(parts[n:])
            suffixes[tail] = i if tail not in suffixes else -1
    suffixes |= {name.replace("\\", "/"): i for i, name in enumerate(names)}
    return lambda path: suffixes.get(path.replace("\\", "/").removeprefix("./"), -1)


@dataclass(frozen=True)
class Known:
    """Labels of some images that training may learn from, because the user said so; of all others it sees none.

    Attributes:
        labels: (N,) int64, number of each image's label in ``names``; -1 not given.
        names: of the labels, sorted.
    """

    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return int(self.given.sum())

    @property
    def given(self) -> np.ndarray:
        """(N,) bool, whether an image's label is there."""
        return self.labels >= 0

    @property
    def facts(self) -> dict[str, Any]:
        """For config.json; the digest is the same if and only if the names and the labels of all images are."""
        digest = hashlib.sha1(repr(self.names).encode() + self.labels.astype("<i8").tobytes()).hexdigest()
        return {"use_labels": True, "n_labelled": len(self), "labels_sha1": digest}

    def of_rows(self, rows: np.ndarray) -> "Known":
        """Of the images that could be read, by their rows.

        Raises:
            ValueError: no image of some label could be.
        """
        kept = replace(self, labels=self.labels[rows])
        if lost := set(range(len(self.names))) - set(kept.labels.tolist()):
            raise ValueError(f"no image with the label {self.names[min(lost)]!r} can be read; label another one")
        if len(kept) < len(self):
            logging.getLogger("deepcluster").warning("%d labelled images cannot be read", len(self) - len(kept))
        return kept

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError(f"learning from labels needs at least 2 different ones; got {self.names}")


def label_names(file: str) -> list[str]:
    """The different labels in a CSV file with columns path and label; an empty one, or -1, means unknown.

    Raises:
        ValueError: no such file, fewer than two columns, or fewer than two labels.
    """
    kinds = {found for _, text in _rows(file) if (found := as_label(text.strip())) is not None}
    return Known(np.empty(0, np.int64), sorted(kinds)).names


def known_labels(settings: Settings, names: Sequence[str], given: str | Iterable[Any]) -> Known | None:
    """What the user gave for training: a CSV file with columns path and label, or a value for each image in order.

    None, NaN, -1 and "" mean unknown. None unless the settings say that labels are used.

    Raises:
        ValueError: a row names no image, or an image has two labels: learning from a wrong file would be silent harm;
            there is not one value an image; the number of labels is not ``n_clusters``.
    """
    return _known(given, names, int(settings.n_clusters)) if settings.use_labels else None


def _known(given: str | Iterable[Any], names: Sequence[str], n_clusters: int) -> Known:
    if isinstance(given, str):
        found, origin = _of_file(given, names), given
    else:
        origin, values = "y", np.asarray(given)
        if values.ndim != 1 or len(values) != len(names):
            raise ValueError(f"y must have a label for each of the {len(names)} images, -1 where it is unknown; "
                             f"got shape {values.shape}")  # fmt: skip
        whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values.tolist()]
        found = [as_label(v) for v in whole]
    kinds = sorted({c for c in found if c is not None})
    numbers = {c: i for i, c in enumerate(kinds)}
    known = Known(np.array([-1 if c is None else numbers[c] for c in found], np.int64), kinds)
    if len(kinds) != n_clusters:
        raise ValueError(f"{origin} has {len(kinds)} different labels, so there are as many clusters, not "
                         f"{n_clusters}; set n_clusters (--n-clusters) to {len(kinds)}")  # fmt: skip
    return known


def _of_file(file: str, names: Sequence[str]) -> list[str | None]:
    """The label of each image, None where it has none."""
    place, rows = _places(names), _rows(file)
    found: list[str | None] = [None] * len(names)
    lost = []
    for path, text in rows:
        i, label = place(path), as_label(text.strip())
        if i < 0:
            lost.append(path)
        elif label is not None:
            if found[i] not in (None, label):
                raise ValueError(f"{file} gives {names[i]} the labels {found[i]!r} and {label!r}; keep one of them")
            found[i] = label
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(rows)} rows of {file} name no image, or more than one; the first is {lost[0]!r}, "
            f"the first image {names[0]!r}; training would learn from them, so correct or remove these rows"
        )
    return found


def known_again(
    data: dict[str, Any], names: Sequence[str], rows: np.ndarray, n_clusters: int, file: str | None
) -> Known | None:
    """The labels a run that goes on was given when it began: ``data`` of its config.json; None if it was given none.

    They may have moved to another ``file``.

    Raises:
        ValueError: they are not the same any more.
    """
    if not data.get("use_labels"):
        return None
    file = file or data["labels"]
    if file == "none":
        raise ValueError("this run was given its labels as y in Python; write them to a file and add --labels FILE.csv")
    known = _known(file, names, n_clusters).of_rows(rows)
    if known.facts["labels_sha1"] != data["labels_sha1"]:
        raise ValueError(f"{file} has other labels than the {data['n_labelled']} that this run began with; put it "
                         "back as it was, or start anew with --overwrite")  # fmt: skip
    return known


def for_scores(data: dict[str, Any], asked: str | None = None) -> str:
    """What ``--labels`` a run is scored by: as asked, else as it began; the source's own if it learnt from a file."""
    return "auto" if data.get("use_labels") else asked or data["labels"]


def unseen(true: np.ndarray | None, sha1: Sequence[str], learnt: set[str]) -> np.ndarray | None:
    """Classes (N,) without those of images whose content is in ``learnt``: training was given their labels."""
    if true is None or not learnt:
        return true
    left = np.where([one in learnt for one in sha1], -1, true)
    return left if (left >= 0).any() else None


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
