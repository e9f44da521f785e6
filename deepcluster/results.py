"""What came out of a run, as tables: one row an image, one row a cluster."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from deepcluster import atomic, confidence, edits, oddities, outputs
from deepcluster.classifier import Classifier
from deepcluster.edits import Step

logger = logging.getLogger("deepcluster")
BLOCK = 8192  # rows that are strings of Python at a time: a million of them take 100 MB
REPRESENTATIVES = 9  # images a cluster is shown by
EDITS = b"edits"  # a digest of the edits that a table shows: in its schema's metadata


def representatives(found: dict[str, np.ndarray]) -> np.ndarray:
    """(N,) bool: the images nearest to the mean of their cluster, at most REPRESENTATIVES of each."""
    order = np.lexsort((found["distance"], found["cluster"]))
    sizes = np.bincount(found["cluster"])
    rank = np.arange(len(order)) - np.repeat(sizes.cumsum() - sizes, sizes)
    chosen = np.empty(len(order), dtype=bool)
    chosen[order] = rank < REPRESENTATIVES
    return chosen


def images(
    found: dict[str, np.ndarray], names: Sequence[str], sha1: Sequence[str], classifier: Classifier,
    abstain: float = 0.0,
) -> pa.Table:  # fmt: skip
    """One row an image, in input order: what is known of any image, new or old.

    Images with less confidence than ``abstain`` are in cluster -1, which has no name.
    """
    cluster, called = confidence.kept(found["cluster"], found["confidence"], abstain), [*classifier.names, ""]
    return pa.table(
        {
            "path": pa.array(list(names), pa.string()),
            "sha1": pa.array(list(sha1), pa.string()),
            "cluster": pa.array(cluster, pa.int64()),
            "name": pa.array([called[c] for c in cluster.tolist()], pa.string()),
            "probability": pa.array(found["probability"], pa.float32()),
            "confidence": pa.array(found["confidence"], pa.float32()),
            "second": pa.array(found["second"], pa.int64()),
            "margin": pa.array(found["margin"], pa.float32()),
            "distance": pa.array(found["distance"], pa.float32()),
            "is_outlier": pa.array(found["is_outlier"], pa.bool_()),
            "is_junk": pa.array(np.isin(cluster, sorted(classifier.junk)), pa.bool_()),
        }
    )


def clusters(found: dict[str, np.ndarray], names: Sequence[str], classifier: Classifier) -> pa.Table:
    """One row a cluster that has images: id, name, size, cohesion, separation, representatives, is_junk.

    Cohesion is the mean cosine of the members to the cluster's mean, separation the cosine distance of that mean to the
    nearest other one; ``representatives`` are paths, the most typical first.
    """
    order = np.lexsort((found["distance"], found["cluster"]))
    sizes = np.bincount(found["cluster"], minlength=classifier.n_clusters)
    used = np.flatnonzero(sizes)
    unit = F.normalize(classifier.centroids.cpu()[torch.from_numpy(used)], dim=1)
    between = 1 - unit @ unit.T
    between.fill_diagonal_(float("inf"))
    rows = []
    for row, (c, members) in enumerate(zip(used.tolist(), np.split(order, sizes[used].cumsum()[:-1]), strict=True)):
        rows.append(
            {
                "id": c,
                "name": classifier.names[c],
                "size": len(members),
                "cohesion": float(1 - found["distance"][members].mean()),
                "separation": float(between[row].min()) if len(used) > 1 else None,
                "representatives": [names[i] for i in members[:REPRESENTATIVES]],
                "is_junk": c in classifier.junk,
            }
        )
    schema = pa.schema(
        [("id", pa.int64()), ("name", pa.string()), ("size", pa.int64()), ("cohesion", pa.float64()),
         ("separation", pa.float64()), ("representatives", pa.list_(pa.string())), ("is_junk", pa.bool_())]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


class _Column(Sequence[str]):
    """A column of words, each made a string of Python when it is asked for."""

    def __init__(self, words: pa.ChunkedArray):
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: Any) -> Any:
        return self.words[int(i)].as_py()


def write_table(path: Path, table: pa.Table) -> None:
    """Parquet, completely or not at all."""
    with atomic.replacing(path) as f:
        pq.write_table(table, f)


def training_images(
    found: dict[str, np.ndarray], names: Sequence[str], sha1: Sequence[str], classifier: Classifier,
    known: dict[str, Any],
) -> pa.Table:  # fmt: skip
    """``images`` and what is known of training images only: is_representative, and the columns in ``known``."""
    table = images(found, names, sha1, classifier)
    last = table.num_columns - 1
    table = table.add_column(last, "is_representative", pa.array(representatives(found)))
    for name, column in known.items():
        table = table.append_column(name, column)
    return table.replace_schema_metadata({EDITS: _log(classifier.steps)})


def write_features(run: Path, blocks: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """features.npy of a run, (N, D) float32, from blocks of its rows: completely or not at all."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with atomic.replacing(run / "features.npy") as f:
        np.lib.format.write_array_header_1_0(f, header)
        for block in blocks:
            f.write(np.ascontiguousarray(block, "<f4").data)


def write(run: Path, classifier: Classifier, found: dict[str, np.ndarray], table: pa.Table) -> None:
    """model/, assignments.parquet and clusters.parquet of a finished run, and features.npy if ``found`` has them."""
    classifier.save(run / "model")
    if "features" in found:
        write_features(run, [found["features"]], found["features"].shape)
    write_table(run / "clusters.parquet", clusters(found, _Column(table["path"]), classifier))
    write_table(run / "assignments.parquet", table)  # last: a run that has it is finished


def edited(table: pa.Table, classifier: Classifier, found: dict[str, np.ndarray]) -> pa.Table:
    """The assignments of a run whose clusters were changed: the same images, described anew by ``found``."""
    known = {name: table[name] for name in ("look", "reason", "duplicate_of", "given") if name in table.column_names}
    if "look" in known:
        known["reason"] = pa.array(oddities.reasons(known["look"].to_pylist(), found, classifier), pa.string())
    return training_images(found, table["path"].to_pylist(), table["sha1"].to_pylist(), classifier, known)


def rewrite(run: Path, classifier: Classifier, found: dict[str, np.ndarray], table: pa.Table) -> None:
    """The edits of a run, and its tables as they are now: all of them, or none if something goes wrong."""
    tables = {"assignments": table, "clusters": clusters(found, _Column(table["path"]), classifier)}
    with contextlib.ExitStack() as files:  # renamed when all are written, the edits first: see ``mended``
        for name, one in tables.items():
            pq.write_table(one, files.enter_context(atomic.replacing(run / f"{name}.parquet")))
        for name, data in classifier.edit_files().items():
            files.enter_context(atomic.replacing(run / "model" / name)).write(data)


@contextlib.contextmanager
def editing(run: Path, classifier: Classifier) -> Iterator[None]:
    """One at a time may change the clusters of a run, and only if it knows of all edits so far.

    Raises:
        ValueError: somebody else made an edit since the classifier was read.
    """
    with outputs.locked(run, patience=30):
        kept = run / "model" / "edits.safetensors"
        if _log(edits.unpack(kept)[1] if kept.exists() else []) != _log(classifier.steps):
            raise ValueError(f"the clusters of {run} were edited meanwhile; look at them, then do it again")
        yield


def mended(run: Path, table: pa.Table, classifier: Classifier) -> pa.Table:
    """The assignments of a run, made anew if they do not show the edits of its model: one was interrupted."""
    if len(table) and pc.max(table["cluster"]).as_py() >= classifier.n_clusters:
        raise ValueError(f"{run} is damaged: assignments.parquet has clusters that the model in it does not have")
    if (table.schema.metadata or {}).get(EDITS, _log([])) == _log(classifier.steps):
        return table
    found = classifier.describe(outputs.read_features(run))
    table = edited(table, classifier, found)
    try:
        rewrite(run, classifier, found, table)
    except OSError as error:
        logger.warning("an edit of %s was interrupted, and its tables cannot be mended: %s", run, error.strerror)
    return table


def identity(table: pa.Table) -> str:
    """Differs for the assignments of other images, and after an edit."""
    digest = hashlib.sha1((table.schema.metadata or {}).get(EDITS, _log([])))
    for batch in table.select(["sha1"]).to_batches(BLOCK):
        digest.update("".join(batch.column(0).to_pylist()).encode())
    return digest.hexdigest()


def is_predictions(path: Path) -> bool:
    """Whether a file is a table as ``images`` makes it: one that may be made anew."""
    try:
        names = set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        return False
    return {"path", "sha1", "cluster", "probability"} <= names and "image" not in names


def _log(steps: Sequence[Step]) -> bytes:
    return hashlib.sha1(json.dumps([step.words() for step in steps]).encode()).hexdigest().encode()
