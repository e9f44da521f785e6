"""Does something else than what images show explain the clusters: light, colour, sharpness, the file, its folder?

Image factors are taken from the stored pixels, file factors from headers only, both of a sample. What is measured is
kept in RUN/factors.parquet, so that the answer follows the clusters when these are edited.

Effect sizes, both without the part that chance has in them: of numbers epsilon squared (Kelley, 1935), the share of
their variance that lies between clusters; of words Cramer's V (bias-corrected, Bergsma, 2013), squared. For a single
cluster: the standardised difference to all other images (Cohen's d), of words Cohen's h of the most telling word.
Numbers are first cut at their 1st and 99th percentile, so that no single image decides.

Shapes: n images of the sample, K clusters.
"""

import contextlib
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import atomic, decode
from deepcluster.decode import BadImage
from deepcluster.store import Store

RUNS, LENGTH = 64, 64  # images of the sample: evenly spaced runs, since shards are read quickest in order
FEWEST = 5  # images of a cluster, or of a word, that something is said of
LEAST = 50  # images; of fewer nothing is said
WORDS = 50  # most frequent words of a factor; the others are one
BLOCK = 256  # images whose pixels are looked at at a time
EXPLAINED = 0.6  # share of a factor that must lie between clusters for a warning; see scripts/nuisance.py
FOLLOWS = ("file size",)  # from what an image shows: told, but no cause
FACTORS = {  # name: columns, and what to do
    "brightness": (("brightness",), "train with stronger changes of brightness, or equalise the images first"),
    "contrast": (("contrast",), "equalise the contrast of the images first"),
    "saturation": (("saturation",), "train on grey images, or with stronger changes of colour"),
    "hue": (("hue_x", "hue_y"), "train on grey images, or with stronger changes of colour"),
    "sharpness": (("sharpness",), "bring all images to the size of the smallest ones, or blur the sharp ones"),
    "width": (("width",), "bring all images to one size before clustering"),
    "height": (("height",), "bring all images to one size before clustering"),
    "aspect": (("aspect",), "crop all images to one shape before clustering"),
    "file size": (("bytes",), "save all images alike (size, format, quality), or cluster them apart"),
    "file type": (("type",), "save all images in one format, or cluster each format by itself"),
    "folder": (("folder",), "cluster each folder by itself"),
    "subfolder": (("subfolder",), "cluster each subfolder by itself"),
    "camera": (("camera",), "cluster the images of each camera by themselves, or change colours more strongly"),
    "date": (("date",), "cluster the images of each period by themselves"),
}


@dataclass(frozen=True)
class Effect:
    """What one factor has to do with the clusters."""

    factor: str
    size: float  # 0: nothing, 1: everything; the share of the factor that the clusters account for
    each: dict[int, float]  # standardised difference of each cluster that has FEWEST images
    word: dict[int, str]  # of factors that are words: what stands out in the cluster
    n_words: int  # different ones; 0 of numbers

    @property
    def advice(self) -> str:
        """What to do if it explains the clusters."""
        return FACTORS[self.factor][1]


def sample(n: int) -> np.ndarray:
    """Sorted rows of at most RUNS * LENGTH images: evenly spaced runs of neighbours."""
    if n <= RUNS * LENGTH:
        return np.arange(n)
    starts = np.linspace(0, n - LENGTH, RUNS).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(LENGTH))


def measure(store: Store) -> pa.Table:
    """The factors of a sample of the images of a store: ``row`` and a column for each; none of features."""
    rows = sample(len(store)) if len(store.shape) == 3 else np.empty(0, np.int64)
    columns: dict[str, pa.Array] = {"row": pa.array(rows, pa.int64())}
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    parts = [_pixels(store.take(torch.from_numpy(block))) for block in blocks]
    for name in parts[0] if parts else ():
        columns[name] = pa.array(np.concatenate([part[name] for part in parts]), pa.float64())
    facts = [_file(store, int(i)) for i in rows] if store.source is not None else []
    for name in ("width", "height", "aspect", "bytes", "date"):
        columns[name] = pa.array([one.get(name) for one in facts] or [None] * len(rows), pa.float64())
    for name in ("type", "camera"):
        columns[name] = pa.array([one.get(name) for one in facts] or [None] * len(rows), pa.string())
    for name, found in zip(("folder", "subfolder"), _folders([store.names[i] for i in rows.tolist()]), strict=True):
        columns[name] = pa.array(found, pa.string())
    return pa.table(columns)


def _pixels(images: Tensor) -> dict[str, np.ndarray]:
    """Of images (B, C, H, W) uint8: what can be read from their pixels, (B,) each."""
    x = images.float().cpu() / 255
    grey = x.mean(1)
    contrast = grey.flatten(1).std(1, correction=0)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    edges = F.conv2d(grey[:, None], kernel).flatten(1).abs().mean(1) if min(grey.shape[1:]) > 2 else 0 * contrast
    found = {"brightness": grey.flatten(1).mean(1), "contrast": contrast, "sharpness": edges / (contrast + 0.01)}
    if x.shape[1] == 3:
        red, green, blue = x.flatten(2).unbind(1)
        found["saturation"] = (x.amax(1) - x.amin(1)).flatten(1).mean(1)
        found |= {"hue_x": (red - (green + blue) / 2).mean(1), "hue_y": ((green - blue) * math.sqrt(0.75)).mean(1)}
    return {name: values.double().numpy() for name, values in found.items()}


def _file(store: Store, i: int) -> dict[str, float | str]:
    """What the header of an image's file says; nothing where it cannot be read any more."""
    assert store.source is not None
    try:
        item = store.source.read(int(store.rows[i]))
        if isinstance(item, np.ndarray):
            return {}
        size = len(item) if isinstance(item, bytes) else os.stat(item).st_size  # noqa: PTH116
        width, height, kind, camera, taken = decode.about(item)
    except (BadImage, OSError):
        return {}
    known: dict[str, float | str] = {"type": kind}
    known |= {"camera": camera} if camera else {}
    with contextlib.suppress(ValueError):
        known["date"] = datetime.strptime(f"{taken[:19]} +0000", "%Y:%m:%d %H:%M:%S %z").timestamp() / 86400
    sizes = {"width": width, "height": height, "bytes": max(1, size), "aspect": width / height}
    return known | {name: math.log(value) for name, value in sizes.items()}  # twice as much counts as half as much


def _folders(names: list[str]) -> tuple[list[str | None], list[str | None]]:
    """The first part of each path that is not the same of all, and the part after it; of those that have them."""
    parts = [name.replace("\\", "/").split("/")[:-1] for name in names]
    level = 0
    while parts and len({part[level] if level < len(part) else None for part in parts}) == 1 and level < len(parts[0]):
        level += 1
    first, second = ([part[at] if at < len(part) else None for part in parts] for at in (level, level + 1))
    return first, second


def effects(table: pa.Table, cluster: np.ndarray) -> list[Effect]:
    """What each factor has to do with the clusters (N,) of all images, the strongest first.

    Factors that are unknown of most images or the same of almost all are left out; of fewer than LEAST images all are.
    """
    own, found = cluster[table["row"].to_numpy()], list[Effect]()
    if len(own) < LEAST:
        return []
    for factor, (columns, _) in FACTORS.items():
        if any(name not in table.column_names for name in columns):
            continue
        columns_of = [table[name] for name in columns]
        known = np.flatnonzero(columns_of[0].is_valid().to_numpy())
        if len(known) < max(2 * FEWEST, len(own) // 2):
            continue
        words = pa.types.is_string(columns_of[0].type)
        values = [column.to_numpy(zero_copy_only=False)[known] for column in columns_of]
        effect = _of_words(factor, values[0], own[known]) if words else _of_numbers(factor, values, own[known])
        found += [effect] if effect else []
    return sorted(found, key=lambda effect: -effect.size)


def _of_numbers(factor: str, values: list[np.ndarray], cluster: np.ndarray) -> Effect | None:
    x = np.stack(values, 1).astype(np.float64)
    x = np.clip(x, *np.quantile(x, [0.01, 0.99], axis=0))
    ids, place, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    n, k = len(x), len(ids)
    x -= x.mean(0)
    total = float((x**2).sum())
    if total <= 1e-12 * n or k < 2 or n <= k:
        return None
    means = np.stack([np.bincount(place, column, k) for column in x.T], 1) / sizes[:, None]
    within = total - float((sizes[:, None] * means**2).sum())
    size = 1 - (within / (n - k)) / (total / (n - 1))
    each = {}
    for c, mean, m in zip(ids.tolist(), means, sizes.tolist(), strict=True):
        if FEWEST <= m <= n - FEWEST:  # all others have the mean -m / (n - m) of this one's
            away = mean * n / (n - m)
            spread = total / n - m * (n - m) / n**2 * float((away**2).sum())
            sign = np.sign(away[0]) if len(away) == 1 else 1.0
            each[c] = float(sign * np.linalg.norm(away) / math.sqrt(max(spread, 1e-4 * total / n)))
    return Effect(factor, max(0.0, size), each, {}, 0)


def _of_words(factor: str, values: np.ndarray, cluster: np.ndarray) -> Effect | None:
    counts = Counter(values.tolist())
    if len(counts) > len(values) / FEWEST:  # nearly each image has its own
        return None
    kept = {word for word, m in counts.most_common(WORDS) if m >= FEWEST}
    if len(kept) < 2:
        return None
    words, code = np.unique([word if word in kept else "" for word in values], return_inverse=True)
    ids, place, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    n, r, k = len(code), len(words), len(ids)
    if k < 2 or n <= k:
        return None
    table = np.zeros((k, r))
    np.add.at(table, (place, code), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0) / n
    phi = max(0.0, float(((table - expected) ** 2 / expected).sum()) / n - (k - 1) * (r - 1) / (n - 1))
    size = phi / max(1e-9, min(k - (k - 1) ** 2 / (n - 1), r - (r - 1) ** 2 / (n - 1)) - 1)
    each, word = {}, {}
    for i, (c, m) in enumerate(zip(ids.tolist(), sizes.tolist(), strict=True)):
        if FEWEST <= m <= n - FEWEST:
            angle = [2 * np.arcsin(np.sqrt(share)) for share in (table[i] / m, (table.sum(0) - table[i]) / (n - m))]
            best = int((angle[0] - angle[1]).argmax())
            each[c], word[c] = float(angle[0][best] - angle[1][best]), str(words[best])
    return Effect(factor, min(1.0, size), each, word, r)


def explaining(found: list[Effect], n_clusters: int, folders_are_kinds: bool) -> list[Effect]:
    """Those that explain the clusters.

    Folders may be the kinds themselves, if the user took them for labels, and clusters that follow them are what is
    wanted then; but not where there are fewer folders than clusters, each in one of them only.
    """
    strong = [effect for effect in found if effect.size >= EXPLAINED and effect.factor not in FOLLOWS]
    fine = folders_are_kinds
    return [one for one in strong if one.factor != "folder" or not fine or one.n_words < n_clusters]


def said(effect: Effect) -> str:
    """A warning in one line."""
    return (
        f"{effect.factor} may explain the clusters: {100 * effect.size:.0f} % of its variation lies between them; your "
        f"kinds may differ in it themselves; if not, {effect.advice}"
    )


def look(run: Path, store: Store, cluster: np.ndarray, folders_are_kinds: bool) -> None:
    """Measure the factors of a finished run, keep them in RUN/factors.parquet, and warn of those that explain it."""
    table = measure(store)
    with atomic.replacing(run / "factors.parquet") as file:
        pq.write_table(table, file)
    for effect in explaining(effects(table, cluster), len(np.unique(cluster)), folders_are_kinds):
        logging.getLogger("deepcluster").warning("%s", said(effect))


def read(run: Path) -> pa.Table | None:
    """What ``look`` wrote; None where an older version, or nobody, did, or where it is damaged."""
    try:
        with (run / "factors.parquet").open("rb") as file:  # paths of other bytes than UTF-8 are no paths to pyarrow
            table = pq.read_table(file)
        return table if pa.types.is_int64(table["row"].type) else None
    except (OSError, KeyError, pa.ArrowException):
        return None
