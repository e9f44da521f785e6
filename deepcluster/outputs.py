"""The run directory: what is written, under which name, and how it is read back. See the README for the layout."""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepcluster import atomic, checked
from deepcluster.plan import Plan
from deepcluster.sources import Source, open_source
from deepcluster.store import Store, open_store

try:
    import fcntl
except ImportError:  # Windows: nobody is refused
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # of a run directory
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet takes for the beginning of one
FILES = ("config.json", "env.json", "metrics.jsonl", "train.log", "assignments.parquet", "features.npy",
         "clusters.parquet", "skipped.csv", "report.html", "checkpoints/last.pt", "checkpoints/last.tmp",
         "checkpoints/healthy.pt", "checkpoints/healthy.tmp", "model/model.safetensors", "model/config.json",
         "model/names.json", "model/edits.safetensors", "map.npz", "factors.parquet", "reliability.svg",
         "k.safetensors", "k.html")  # fmt: skip

LOCK = ".lock"
FIRST = {LOCK, "train.log", "env.json", "env.json.tmp", "skipped.csv", "skipped.csv.tmp", "config.json.tmp"}  # what is
# written before config.json, without which there is no run


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


def check(out: Path, overwrite: bool, reads: Mapping[str, str | os.PathLike] | None = None, mine: bool = False) -> None:
    """Make sure that a run can be written to ``out``, before the work begins; changes nothing.

    Raises:
        ValueError: there is a run, there are other files, it cannot be written, it holds what the run ``reads``, or
            another process trains there, unless ``out`` is ``locked`` and so ``mine``.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give --out the name of a folder")
    check_folder(out)
    for name, path in (reads or {}).items() if overwrite else ():
        if within(path, out):
            raise ValueError(f"{name} {path} lies in {out}, which --overwrite replaces; give another --out")
    files = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    if all(path.relative_to(out).as_posix() in FIRST for path in files):
        return  # empty, or of a run that was stopped before it had begun
    run = any((out / name).exists() for name in ("env.json", "train.log", "checkpoints/last.pt"))
    if not overwrite:
        begun = run and (out / "config.json").exists()
        or_resume = f", or go on with: deepcluster fit --resume {out}" if begun else ""
        raise ValueError(f"{out} is not empty; give another --out, or --overwrite to start anew there{or_resume}")
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not run:
        raise ValueError(f"{out} holds {taken[0]} but no run, so it is not overwritten; give another --out")
    if not mine and (out / LOCK).exists():
        with locked(out, shared=True):
            pass


@contextlib.contextmanager
def locked(out: Path, shared: bool = False, patience: float = 0.5) -> Iterator[None]:
    """Only one process at a time may write to a run directory, which is made if need be; ``shared``: look only.

    The lock is the system's: it ends with the process, however that ends.

    Raises:
        ValueError: another process has it, and has not given it back in ``patience`` seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # to write: network disks lock nothing else
    file = os.open(out / LOCK, flags, 0o666)  # never removed: all have to lock the same one
    try:
        until = time.monotonic() + patience
        while fcntl and not _lock(file, shared):
            if time.monotonic() > until:
                raise ValueError(f"another process is at work in {out}; wait for it, or give another --out")
            time.sleep(0.02)
        yield
    finally:
        os.close(file)


def _lock(file: int, shared: bool) -> bool:
    """Whether there is nobody to wait for."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.getLogger("deepcluster").warning("no locks here (%s): let no other process write there", error.strerror)
    return True


def prepare(out: Path) -> None:
    """Make the folder of a run, and remove an earlier run from it, file by file: nothing else there is touched."""
    for name in sorted(FILES, key="train.log".__eq__):  # last of all what shows, if this is killed, that it was a run
        (out / name).unlink(missing_ok=True)
        (out / f"{name}.tmp").unlink(missing_ok=True)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)


def read_skipped(run: Path) -> list[tuple[str, str]]:
    """What RUN/skipped.csv lists, as it was before writing; nothing if it is not there any more.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with (run / "skipped.csv").open(newline="", encoding="utf-8") as file:
            return [(_plain(row[0]), _plain(row[1])) for row in csv.reader(file)][1:]
    except FileNotFoundError:
        return []
    except (OSError, csv.Error, IndexError, ValueError) as error:
        raise ValueError(f"cannot read {run / 'skipped.csv'}: {' '.join(str(error).split())[:120]}") from None


def cell(text: str) -> str:
    """The text with a leading apostrophe where a spreadsheet would take it for a formula, and run it.

    So is text that begins with such an apostrophe, and nothing else: whoever takes one away there, as ``read_skipped``
    does, has the text as it was.
    """
    return "'" + text if text.lstrip("'").startswith(FORMULA) else text


def _plain(text: str) -> str:
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(FORMULA) else text


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json.

    Raises:
        ValueError: no run there, or a damaged file.
    """
    try:
        config = checked.version(json.loads((run / "config.json").read_text(encoding="utf-8")), FORMAT)
        if not {"source", "data_root", "labels", "size"} <= set(config["data"]):
            raise ValueError("it is not the config of a run")
        checked.config(config)
        config["data"] = {"cwd": str(Path.cwd()), "content": "", "n_images": 0, "n_labelled": 0, "labels_sha1": "",
                          **config["data"]}  # fmt: skip
        config["plan"] = Plan.from_dict(config["plan"])
    except OSError:
        raise ValueError(f"{run} is not a run directory: it has no readable config.json") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"cannot read {run / 'config.json'}: {reason}") from None
    if linked := [name for name in checked.LINKED if (run / name).is_symlink()]:
        raise ValueError(f"{run / linked[0]} is a link, and what is written would go elsewhere; put there what it "
                         "leads to")  # fmt: skip
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


def check_unchanged(source: Source, data: dict[str, Any]) -> None:
    """Make sure that a source still holds the images of a run: ``data`` of its config.json.

    Raises:
        ValueError: it holds others.
    """
    if source.signature != data.get("signature"):  # moved, touched or changed
        size, channels = data["size"]
        if content(open_store(source, size=size, channels=channels)) != data["content"]:
            raise ValueError(f"{source.location} has other images than when the run was made; name a SOURCE to predict "
                             "and evaluate what is there now")  # fmt: skip


def write_skipped(path: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """path, reason; no ``cell`` is a formula, and all are quoted, since some countries separate by other signs."""
    text = io.StringIO(newline="")
    text.write("path,reason\r\n")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([cell(name), cell(reason)] for name, reason in skipped)
    atomic.write(path, text.getvalue())


def read_assignments(run: Path) -> pa.Table:
    """RUN/assignments.parquet.

    Raises:
        ValueError: the run has none yet, or it is damaged.
    """
    return _read_table(run, "assignments.parquet", ("path", "sha1", "cluster"))


def read_features(run: Path) -> np.ndarray:
    """(N, D) float32 RUN/features.npy, memory-mapped; raises as ``read_assignments``."""
    try:
        features = checked.array(run / "features.npy")
    except FileNotFoundError:
        raise ValueError(unfinished(run, "features.npy")) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {run / 'features.npy'}: {' '.join(str(error).split())[:120]}") from None
    if features.ndim != 2 or features.dtype.kind != "f":
        raise ValueError(f"cannot read {run / 'features.npy'}: it holds {features.dtype} {features.shape}")
    return features


def unfinished(run: Path, name: str) -> str:
    """The error of a run that lacks a file."""
    return f"{run} has no {name}; it did not finish: go on with deepcluster fit --resume {run}"


def learnt(table: pa.Table) -> set[str]:
    """Content (sha1) of the images in assignments.parquet whose label was given to training."""
    return set(table.filter(table["given"])["sha1"].to_pylist()) if "given" in table.column_names else set()


def read_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]], pa.Table, pa.Table]:
    """Config, metrics, assignments and clusters of a finished run; raises as ``read_assignments``."""
    config, table = read_config(run), read_assignments(run)
    groups = _read_table(run, "clusters.parquet", ("id", "name", "size", "cohesion", "separation"))
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [checked.epoch(json.loads(line)) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {run / 'metrics.jsonl'}: {error}") from None
    return config, rows, table, groups


def _read_table(run: Path, name: str, required: tuple[str, ...]) -> pa.Table:
    try:
        with (run / name).open("rb") as f:  # pyarrow takes no path that is not UTF-8
            file = pq.ParquetFile(f)
            checked.rows(file.metadata, os.fstat(f.fileno()).st_size)
            # its threads may outlive the interpreter, which then aborts
            return checked.table(file.read(use_threads=False), required)
    except FileNotFoundError:
        raise ValueError(unfinished(run, name)) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {run / name}: {str(error).splitlines()[0]}") from error
