"""What a run found, for other tools: features, the model, images in folders.

    npy          FILE.npy with the features (N, D) float32, and FILE.names.json: N paths in the same order
    parquet      one row an image: all of assignments.parquet, features, map, neighbours, the image itself; what
                 `embedding-atlas FILE --x projection_x --y projection_y --neighbors neighbors --image image` opens
    safetensors  `features` (N, D) float32 and `cluster` (N,) int64; paths and names of clusters in the metadata
    model        RUN/model with its edits, for DeepCluster.from_pretrained
    onnx         images -> features, probabilities, cluster (extra `onnx`)
    folders      the images, by links or as copies, in one folder a cluster
    projector    for `tensorboard --logdir FOLDER`: features, what is known of each image, thumbnails

Everything is written beside its place and renamed, so that an export is there completely or not at all.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepcluster import outputs
from deepcluster.export.links import folders
from deepcluster.export.network import model, onnx
from deepcluster.export.tables import NAMES, npy, parquet, safetensors
from deepcluster.export.task import Task
from deepcluster.export.tensorboard import projector
from deepcluster.recipe import hint

KINDS: dict[str, tuple[Callable[[Task], str], str]] = {  # what writes it, the suffix of a file or "" for a folder
    "npy": (npy, ".npy"),
    "parquet": (parquet, ".parquet"),
    "safetensors": (safetensors, ".safetensors"),
    "model": (model, ""),
    "onnx": (onnx, ".onnx"),
    "folders": (folders, ""),
    "projector": (projector, ""),
}
FORMATS = tuple(KINDS)
MARKER = ".deepcluster-export"  # in every folder made here: only such a one is ever replaced


def export(
    run: Path, kind: str, out: Path, *, copy: bool = False, overwrite: bool = False, data_root: str | None = None
) -> str:
    """Write one of FORMATS to ``out``; edits are obeyed. Returns a line that says what was written.

    Args:
        run: directory of a finished run.
        kind: one of FORMATS.
        out: a file with the suffix of its kind, or a folder for model, folders and projector; outside ``run``.
        copy: folders only: copies of the images, not links to them.
        overwrite: replace the file ``out``, or the folder if it was made by an export; else it must not be there yet.
        data_root: where torchvision's data sets are, if not where they were.

    Raises:
        ValueError: there is no such run or kind, or ``out`` is no place for it; nothing was changed then.
        OSError: the disk is full or cannot be written; ``out`` is what it was before.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown format {kind!r}; {hint(kind, FORMATS)}")
    if copy and kind != "folders":
        raise ValueError(f"--copy is for --format folders; leave it out for {kind}")
    write, suffix = KINDS[kind]
    out = out if out.name.strip(".") else out.resolve()
    config = outputs.read_config(run)
    _check(out, kind, suffix, overwrite)
    _check_place(out, run, config["data"])
    table, features = outputs.read_assignments(run), outputs.read_features(run)
    if len(table) != len(features):
        raise ValueError(f"{run} is damaged: assignments.parquet has {len(table)} rows, features.npy {len(features)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".deepcluster-", dir=out.parent))  # on the same disk
    try:
        (aside / "new").mkdir()
        new = aside / "new" / out.name
        if not suffix:
            new.mkdir()
            (new / MARKER).write_text(f"deepcluster export --format {kind}: may be replaced by --overwrite\n")
        said = write(Task(run, new, out, config["data"], table, features, copy, data_root))
        for made in sorted((aside / "new").iterdir()):
            _put(made, out.with_name(made.name), aside / "old")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{said}: {out}"


def _put(new: Path, place: Path, old: Path) -> None:
    """Rename; what was in this place goes to ``old``, and comes back if that fails."""
    if not place.is_dir():
        new.replace(place)
        return
    place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        old.rename(place)
        raise


def _check(out: Path, kind: str, suffix: str, overwrite: bool) -> None:
    """Whether ``out`` can take what is to be written."""
    if suffix and out.suffix != suffix:
        raise ValueError(f"--out must name a {suffix} file for --format {kind}; got {out}")
    if suffix and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give --out the name of a {suffix} file")
    if not suffix and os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give --out the name of a folder for --format {kind}")
    if Path.cwd().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out} is where you are; give --out a folder of its own")
    outputs.check_folder(out.absolute().parent)
    for file in (out, out.with_suffix(NAMES)) if suffix else ():
        if os.path.lexists(file) and (file == out or kind == "npy") and (file.is_dir() or not overwrite):
            raise ValueError(f"{file} is there already; give another --out, or --overwrite to replace it")
    if not suffix and out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ValueError(f"{out} is not empty and no earlier export, so it is left alone; give another --out")
        if not overwrite:
            raise ValueError(f"{out} is there already; give another --out, or --overwrite to replace it")


def _check_place(out: Path, run: Path, data: dict[str, Any]) -> None:
    """Whether ``out`` is apart from the run, and from the images it was made of."""
    place = out.resolve()
    if place.is_relative_to(run.resolve()):
        raise ValueError(f"--out {out} lies in the run {run}; give --out a place outside it")
    if run.resolve().is_relative_to(place):
        raise ValueError(f"the run {run} lies in --out {out}; give another --out")
    if data["source"] in ("digits", "array", "list") or data["source"].startswith("torchvision:"):
        return
    for base in {Path(data.get("cwd", ".")), Path.cwd()}:
        source = base / os.path.expanduser(data["source"])  # noqa: PTH111  # Path's fails for an unknown user
        parts = [i for i, part in enumerate(source.parts[:-1]) if any(letter in part for letter in "*?[")]
        if parts and not source.exists():  # of a glob over folders, the folder that is searched
            source = Path(*source.parts[: parts[0]])
        if source.exists() and (place.is_relative_to(source.resolve()) or source.resolve().is_relative_to(place)):
            raise ValueError(f"--out {out} lies in the source {data['source']}, or that in it; give another --out")
