"""The map, and all the page knows of single images: which of them, in which order, in compact numbers.

Shapes: N images of the run, M of them on the page, k neighbours.
"""

import base64
from typing import Any

import numpy as np
import torch

from deepcluster.landscape import landscape_of
from deepcluster.neighbors import neighbours
from deepcluster.report.found import Found
from deepcluster.report.words import plain

MOST = 60_000  # images on the page; their numbers fit in 16 bits
BLOCK = 8192  # of them whose features are compared at a time
PATHS = 8_000_000  # characters of all their paths together
NONE = 0xFFFF
NEIGHBOURS = 8
COLOURS, SHAPES = 8, 4  # in style.css and map.js


def chosen(paths: list[str], wanted: np.ndarray) -> np.ndarray:
    """(M,) sorted rows: all, if they fit; else those ``wanted`` and an even sample of the others."""
    n = len(paths)
    length = sum(len(path) for path in paths) / n
    most = max(1, min(MOST, int(PATHS / (length + 1))))
    if n <= most:
        return np.arange(n)
    rest = np.setdiff1d(np.arange(n), wanted, assume_unique=True)
    even = rest[np.linspace(0, len(rest) - 1, max(0, most - len(wanted))).astype(np.int64)]
    return np.sort(np.concatenate([wanted, even]))


def arranged(found: Found, rows: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows in the order of the page, near ones together, and the data of the images in that order for the script.

    Without a map (fewer than 3 images) ``xy`` is empty.
    """
    n, mapped = len(found), len(found) >= 3
    land = landscape_of(found.folder) if mapped else None
    if land is not None:
        rows = rows[np.argsort(_morton(land.positions[rows]), kind="stable")]
    rank = np.full(n, NONE, np.int64)
    rank[rows] = np.arange(len(rows))
    if land is None:
        near, far = np.empty((len(rows), 0), np.int64), np.empty((len(rows), 0))
    elif len(rows) == n:
        near, far = rank[land.neighbours[rows]], land.distances[rows]
    else:  # of those on the page
        near, far = _among(found.features, rows)
    paths = [plain(found.paths[i]) for i in rows.tolist()]
    low, high = min(paths), max(paths)  # what these two begin with, all do
    prefix = low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]
    prefix = prefix[: prefix.rfind("/") + 1]
    odd = {r: found.reason[i] for r, i in enumerate(rows.tolist()) if found.reason[i]}
    copies = {r: plain(found.paths[found.copy_of[i]]) for r, i in enumerate(rows.tolist()) if found.copy_of[i] >= 0}
    middles = _middles(land.positions, found.place) if land is not None else np.zeros((len(found.clusters), 2))
    return rows, {
        "n": n,
        "m": len(rows),
        "prefix": prefix,
        "paths": [path[len(prefix) :] for path in paths],
        "xy": _packed(_grid(land.positions[rows]), "<u2") if land is not None else "",
        "cluster": _packed(np.minimum(found.place[rows], NONE), "<u2"),
        "probability": _packed(np.clip(found.probability[rows] * 255, 0, 255), "u1"),
        "confidence": "" if np.isnan(found.confidence).any() else _packed(found.confidence[rows] * 255, "u1"),
        "k": near.shape[1],
        "near": _packed(near, "<u2"),
        "far": _packed(np.clip(far, 0, 2) * 32767, "<u2"),
        "odd": odd,
        "copies": copies,
        "clusters": [
            {"id": row["id"], "name": plain(row["name"]), "size": row["size"], "junk": row["is_junk"], **marks}
            for row, marks in zip(found.clusters, _marks(middles), strict=True)
        ],
    }


def _among(features: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M, k) nearest others among these rows, as numbers on the page, and their cosine distances."""
    unit = torch.empty(len(rows), features.shape[1])
    for own, some in zip(unit.split(BLOCK), np.split(rows, range(BLOCK, len(rows), BLOCK)), strict=True):
        own.copy_(torch.nn.functional.normalize(torch.from_numpy(features[some].astype(np.float32)), dim=1))
    ids = neighbours(unit, min(NEIGHBOURS, len(rows) - 1), exact=False)
    parts = zip(unit.split(BLOCK), ids.split(BLOCK), strict=True)
    far = [torch.stack([1 - (own * unit[column]).sum(1) for column in near.T], 1) for own, near in parts]
    return ids.numpy(), torch.cat(far).numpy()


def _middles(positions: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(K, 2) median position of each cluster."""
    order = np.argsort(place, kind="stable")
    parts = np.split(positions[order], np.bincount(place).cumsum()[:-1])
    return np.stack([np.median(part, axis=0) for part in parts])


def _marks(middles: np.ndarray) -> list[dict[str, int]]:
    """Colour and shape for each cluster (K, 2).

    The colour is that of all whose nearest bearer on the map is farthest away; bearers of one colour differ by shape.
    """
    colour = np.arange(len(middles)) % COLOURS
    for c in range(COLOURS, min(len(middles), 1000)):
        apart = np.linalg.norm(middles[:c] - middles[c], axis=1)
        colour[c] = np.argmax([apart[colour[:c] == one].min() for one in range(COLOURS)])
    shape = [np.count_nonzero(colour[:c] == one) % SHAPES for c, one in enumerate(colour)]
    return [{"colour": int(one), "shape": int(kind)} for one, kind in zip(colour, shape, strict=True)]


def _grid(positions: np.ndarray) -> np.ndarray:
    """(M, 2) in 0..65535, both axes at one scale."""
    low, high = positions.min(0), positions.max(0)
    span = max(float((high - low).max()), 1e-9)
    return np.rint((positions - (low + high) / 2) / span * 65535 + 32767.5)


def _morton(positions: np.ndarray) -> np.ndarray:
    """(M,) along a curve through the plane: near numbers are near points, so that few sprites hold a view."""
    grid = np.clip(_grid(positions), 0, 65535).astype(np.uint64)
    code = np.zeros(len(grid), np.uint64)
    for bit in range(16):
        for axis in range(2):
            code |= ((grid[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return code


def _packed(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.rint(values).astype(kind).tobytes()).decode()
