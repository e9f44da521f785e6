"""The run directory: what is written, under which name, and how it is read back. See the README for the layout."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from deepcluster.classifier import Classifier
from deepcluster.plan import Plan
from deepcluster.sources import Source, open_source
from deepcluster.store import Store

REPRESENTATIVES = 9  # images a cluster is shown by
FILES = ("config.json", "env.json", "metrics.jsonl", "train.log", "assignments.parquet", "features.npy",
         "clusters.parquet", "skipped.csv", "report.html", "checkpoints/last.pt",
         "checkpoints/last.tmp", "model/model.safetensors", "model/config.json", "model/names.json")  # fmt: skip


def within(path: str | os.PathLike, folder: Path) -> bool:
    """Whether there is such a path and it is ``folder`` or something in it, links followed."""
    path = os.path.expanduser(path)  # noqa: PTH111  # Path's fails for an unknown user
    return os.path.exists(path) and Path(path).resolve().is_relative_to(folder.resolve())  # noqa: PTH110


def check_folder(out: Path) -> None:
    """Make sure that the folder ``out`` is there, or can be made, and can be written; changes nothing.

    Raises:
        ValueError: it cannot.
    """
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{out} cannot be made: {above} is a file; give --out another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{above} cannot be written; give --out another place")


def check(out: Path, overwrite: bool, reads: Mapping[str, str | os.PathLike] | None = None) -> None:
    """Make sure that a run can be written to ``out``, before the work begins; changes nothing.

    Raises:
        ValueError: there is a run, there are other files, it cannot be written, or it holds what the run ``reads``.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give --out the name of a folder")
    check_folder(out)
    for name, path in (reads or {}).items() if overwrite else ():
        if within(path, out):
            raise ValueError(f"{name} {path} lies in {out}, which --overwrite replaces; give another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    run = any((out / name).exists() for name in ("env.json", "train.log", "checkpoints/last.pt"))
    if not overwrite:
        or_resume = f", or go on with: deepcluster fit --resume {out}" if run else ""
        raise ValueError(f"{out} is not empty; give another --out, or --overwrite to start anew there{or_resume}")
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not run:
        raise ValueError(f"{out} holds {taken[0]} but no run, so it is not overwritten; give another --out")


def prepare(out: Path) -> None:
    """Make the folder of a run, and remove an earlier run from it, file by file: nothing else there is touched."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
        (out / f"{name}.tmp").unlink(missing_ok=True)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: readers see the old file or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; readable letters unless there is a path that is not valid UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json.

    Raises:
        ValueError: no run there, or a damaged file.
    """
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        if not {"source", "data_root", "labels", "size"} <= set(config["data"]):
            raise ValueError("it is not the config of a run")
        config["plan"] = Plan.from_dict(config["plan"])
    except OSError:
        raise ValueError(f"{run} is not a run directory: it has no readable config.json") from None
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"cannot read {run / 'config.json'}: {reason}") from None
    return config


def reopen(data: dict[str, Any], data_root: str | None = None) -> Source:
    """The source of a run, from the ``data`` of its config.json.

    Raises:
        ValueError: it cannot be found any more; says where the run began.
    """
    try:
        return open_source(data["source"], data_root=data_root or data["data_root"])
    except ValueError as error:
        moved = f"; the run began in {data['cwd']}: go there" if data.get("cwd") != str(Path.cwd()) else ""
        raise ValueError(f"{error}{moved}") from None


def content(store: Store) -> str:
    """A digest of all images in order: the same if and only if they are."""
    return hashlib.sha1("".join(store.sha1).encode()).hexdigest()


def write_skipped(path: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """path, reason; a cell that a spreadsheet would take for a formula gets a leading apostrophe."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["path", "reason"])
        writer.writerows([_cell(name), _cell(reason)] for name, reason in skipped)
    tmp.replace(path)


def _cell(text: str) -> str:
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def representatives(found: dict[str, np.ndarray], n_clusters: int) -> np.ndarray:
    """(N,) bool: the images nearest to the mean of their cluster, at most REPRESENTATIVES of each."""
    chosen = np.zeros(len(found["cluster"]), dtype=bool)
    by_distance = np.argsort(found["distance"], kind="stable")
    for c in range(n_clusters):
        chosen[by_distance[found["cluster"][by_distance] == c][:REPRESENTATIVES]] = True
    return chosen


def predictions(
    found: dict[str, np.ndarray], names: Sequence[str], sha1: Sequence[str], called: Sequence[str]
) -> pa.Table:
    """One row an image, in input order, as in assignments.parquet; ``called``: the names of the clusters."""
    cluster = found["cluster"]
    return pa.table(
        {
            "path": pa.array(list(names), pa.string()),
            "sha1": pa.array(list(sha1), pa.string()),
            "cluster": pa.array(cluster, pa.int64()),
            "name": pa.array([called[c] for c in cluster], pa.string()),
            "probability": pa.array(found["probability"], pa.float32()),
            "second": pa.array(found["second"], pa.int64()),
            "margin": pa.array(found["margin"], pa.float32()),
            "distance": pa.array(found["distance"], pa.float32()),
            "is_outlier": pa.array(found["is_outlier"], pa.bool_()),
        }
    )


def clusters(found: dict[str, np.ndarray], names: Sequence[str], classifier: Classifier) -> pa.Table:
    """One row a cluster that has images: id, name, size, cohesion, separation, representative paths.

    Cohesion is the mean cosine of the members to the cluster's mean, separation the cosine distance of that mean to the
    nearest other one.
    """
    k = classifier.spec.n_clusters
    sizes = np.bincount(found["cluster"], minlength=k)
    used = np.flatnonzero(sizes)
    unit = F.normalize(classifier.centroids.cpu()[torch.from_numpy(used)], dim=1)
    between = 1 - unit @ unit.T
    between.fill_diagonal_(float("inf"))
    shown = representatives(found, k)
    rows = []
    for row, c in enumerate(used.tolist()):
        members = np.flatnonzero(found["cluster"] == c)
        near = members[shown[members]]
        near = near[np.argsort(found["distance"][near], kind="stable")]
        rows.append(
            {
                "id": c,
                "name": classifier.names[c],
                "size": len(members),
                "cohesion": float(1 - found["distance"][members].mean()),
                "separation": float(between[row].min()) if len(used) > 1 else None,
                "representatives": [names[i] for i in near],
            }
        )
    schema = pa.schema(
        [("id", pa.int64()), ("name", pa.string()), ("size", pa.int64()), ("cohesion", pa.float64()),
         ("separation", pa.float64()), ("representatives", pa.list_(pa.string()))]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def write_table(path: Path, table: pa.Table) -> None:
    """Parquet, under a temporary name first."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with tmp.open("wb") as f:  # pyarrow takes no path that is not valid UTF-8
            pq.write_table(table, f)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    tmp.replace(path)


def write_results(
    out: Path, classifier: Classifier, found: dict[str, np.ndarray], names: Sequence[str], sha1: Sequence[str],
    given: np.ndarray | None = None,
) -> None:  # fmt: skip
    """model/, assignments.parquet, clusters.parquet and features.npy of a finished run.

    ``given``: (N,) bool, whether training was given an image's label, for runs that learnt from labels.
    """
    classifier.save(out / "model")
    table = predictions(found, names, sha1, classifier.names)
    shown = representatives(found, classifier.spec.n_clusters)
    table = table.append_column("is_representative", pa.array(shown))
    if given is not None:
        table = table.append_column("given", pa.array(given))
    write_table(out / "assignments.parquet", table)
    write_table(out / "clusters.parquet", clusters(found, names, classifier))
    tmp = out / "features.npy.tmp"
    with tmp.open("wb") as f:
        np.save(f, found["features"], allow_pickle=False)
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(out / "features.npy")


def read_assignments(run: Path) -> pa.Table:
    """RUN/assignments.parquet.

    Raises:
        ValueError: the run has none yet, or it is damaged.
    """
    return _read_table(run, "assignments.parquet")


def learnt(table: pa.Table) -> set[str]:
    """Content (sha1) of the images in assignments.parquet whose label was given to training."""
    return set(table.filter(table["given"])["sha1"].to_pylist()) if "given" in table.column_names else set()


def read_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]], pa.Table, pa.Table]:
    """Config, metrics, assignments and clusters of a finished run; raises as ``read_assignments``."""
    config, table, groups = read_config(run), read_assignments(run), _read_table(run, "clusters.parquet")
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {run / 'metrics.jsonl'}: {error}") from None
    return config, rows, table, groups


def _read_table(run: Path, name: str) -> pa.Table:
    try:
        with (run / name).open("rb") as f:  # pyarrow takes no path that is not UTF-8
            return pq.read_table(f)
    except FileNotFoundError:
        raise ValueError(f"{run} has no {name}; it did not finish: go on with deepcluster fit --resume {run}") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {run / name}: {str(error).splitlines()[0]}") from error
