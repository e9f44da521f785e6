"""What a run directory says about its images and clusters, as arrays in the order of its assignments.

Shapes: N images, D features, K clusters that have images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepcluster import outputs, results

BLOCK = 8192  # rows of features that are read at a time
NEAREST = 3  # other clusters a card names


@dataclass(frozen=True)
class Found:
    """A finished run. Columns that older versions did not write are empty."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    paths: list[str]  # N
    sha1: pa.ChunkedArray  # N
    cluster: np.ndarray  # (N,) int64 ids, which may have holes
    probability: np.ndarray  # (N,) float32
    confidence: np.ndarray  # (N,) float32, NaN of older versions
    margin: np.ndarray  # (N,) float32
    distance: np.ndarray  # (N,) float32
    outlier: np.ndarray  # (N,) bool
    typical: np.ndarray  # (N,) bool
    reason: list[str]  # N
    copy_of: np.ndarray  # (N,) int64, row of the image this one is a copy of, -1 if of none
    features: np.ndarray  # (N, D), memory-mapped
    clusters: list[dict[str, Any]]  # K rows, largest first, as in clusters.parquet with figures that are made here
    edited: bool
    identity: str  # of the assignments

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def place(self) -> np.ndarray:
        """(N,) int64: where the cluster of an image stands in ``clusters``."""
        return _places(self.cluster, self.clusters)


def read(run: Path) -> Found:
    """Everything but the model and the map.

    Raises:
        ValueError: the run did not finish, or a file is damaged or of another run.
    """
    config, metrics, table, groups = outputs.read_run(run)
    features = outputs.read_features(run)
    if len(features) != len(table) or not len(table):
        raise ValueError(f"{run} has {len(table)} assignments and {len(features)} rows of features; run it anew")
    config["plan"] = config["plan"].to_dict()
    cluster, distance = table["cluster"].to_numpy(), table["distance"].to_numpy()
    clusters = sorted(groups.to_pylist(), key=lambda row: (-row["size"], row["id"]))
    if set(np.unique(cluster).tolist()) != {row["id"] for row in clusters}:
        raise ValueError(f"{run} has assignments to other clusters than clusters.parquet names; run it anew")
    paths = table["path"].to_pylist()
    found = Found(
        folder=run,
        config=config,
        metrics=metrics,
        paths=paths,
        sha1=table["sha1"],
        cluster=cluster,
        probability=table["probability"].to_numpy(),
        confidence=table["confidence"].to_numpy()
        if "confidence" in table.column_names
        else np.full(len(table), np.nan),
        margin=table["margin"].to_numpy(),
        distance=distance,
        outlier=table["is_outlier"].to_numpy(),
        typical=table["is_representative"].to_numpy(),
        reason=[one or "" for one in _column(table, "reason", "")],
        copy_of=_rows(_column(table, "duplicate_of", None), paths),
        features=features,
        clusters=clusters,
        edited=(run / "model" / "edits.safetensors").exists(),
        identity=results.identity(table),
    )
    _describe(found)
    return found


def _column(table: pa.Table, name: str, default: Any) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [default] * len(table)


def _rows(of: list[str | None], paths: list[str]) -> np.ndarray:
    """(N,) int64 rows of these paths, -1 for none."""
    if not any(of):
        return np.full(len(of), -1, np.int64)
    row = {path: i for i, path in enumerate(paths)}
    return np.array([row.get(one, -1) if one else -1 for one in of], np.int64)


def _places(cluster: np.ndarray, clusters: list[dict[str, Any]]) -> np.ndarray:
    ids = np.array([row["id"] for row in clusters])
    order = np.argsort(ids)
    return order[np.searchsorted(ids, cluster, sorter=order)]


def _describe(found: Found) -> None:
    """Add to each cluster: share, probability, outliers, places and distances of the nearest others, is_junk."""
    place, k = found.place, len(found.clusters)
    sizes = np.bincount(place, minlength=k)
    probability, confidence = (np.bincount(place, x, k) / sizes for x in (found.probability, found.confidence))
    outliers = np.bincount(place[found.outlier], minlength=k)
    between = _between(found.features, place, k)
    for i, row in enumerate(found.clusters):
        near = [j for j in np.argsort(between[i], kind="stable")[: NEAREST + 1].tolist() if j != i][:NEAREST]
        row |= {
            "name": row["name"] or "",
            "share": row["size"] / len(found),
            "probability": float(probability[i]),
            "confidence": float(confidence[i]),
            "outliers": int(outliers[i]),
            "nearest": [(j, float(between[i, j])) for j in near],
            "is_junk": bool(row.get("is_junk")),
        }


def _between(features: np.ndarray, place: np.ndarray, k: int) -> np.ndarray:
    """(K, K) cosine distances of the mean unit features of the clusters."""
    total = np.zeros((k, features.shape[1]))
    for start in range(0, len(features), BLOCK):
        rows = features[start : start + BLOCK].astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        own = place[start : start + BLOCK]
        order = np.argsort(own, kind="stable")
        used, first = np.unique(own[order], return_index=True)
        total[used] += np.add.reduceat(rows[order], first)
    unit = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
    return 1 - unit @ unit.T
