"""Arrays in memory and in .npy or .npz files, and the data sets of torchvision."""
# strings and os.stat, not Path objects: twice as quick over a million files
# ruff: noqa: PTH100, PTH110, PTH111, PTH123, PTH204

import difflib
import hashlib
import inspect
import math
import os
from typing import Any

import numpy as np

from deepcluster import checked, doctor
from deepcluster.decode import BadImage, picture
from deepcluster.sources.base import Classes, Source, label, line, shown, stamp

PICKLED = ("LSUN", "LSUNClass")  # of torchvision's data sets those that read a pickle that nobody has checked


def array_file_source(location: str, path: str, suffix: str) -> Source:
    """The array in a .npy file, memory-mapped, or the images and true classes in a .npz."""
    labels = None
    try:
        if suffix == ".npy":
            images = checked.array(path)
        else:
            with open(path, "rb") as file:  # numpy leaves a damaged one open
                table = np.load(file, allow_pickle=False)
                images = _unpacked(table, next((k for k in ("images", "x", "x_train") if k in table), table.files[0]))
                labels = next((_unpacked(table, key) for key in ("labels", "y", "y_train") if key in table), None)
    except Exception as error:  # numpy, zipfile and zlib each have their own way to say damaged
        raise ValueError(f"{shown(location)} is no readable {suffix} of numbers: {line(error)}") from None
    name = shown(path).replace("{", "{{").replace("}", "}}") + "#{}"
    return array_source(location, images, name, labels, stamp(path))


def _unpacked(table: Any, key: str) -> np.ndarray:
    """One array of a .npz, which numpy makes as large as its header says, before it reads on.

    Raises:
        ValueError: it is no array, its header says more than there is, or memory has no room for it.
    """
    info = table.zip.getinfo(key if key in table.zip.namelist() else f"{key}.npy")
    with table.zip.open(info) as file:
        read = np.lib.format.read_array_header_1_0
        if np.lib.format.read_magic(file) != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    need, free = math.prod(shape) * dtype.itemsize, doctor.free_memory()
    if need > info.file_size:
        raise ValueError(f"{key} is truncated: {info.file_size} bytes for shape {shape} and type {dtype}")
    if free is not None and need > free:
        raise ValueError(f"{key} takes {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; a .npy is read in place")
    return table[key]


def array_source(location: str, x: np.ndarray, name: str, labels: Any = None, stamp: bytes = b"") -> Source:
    """Images (N, H, W), (N, C, H, W), (N, H, W, C) or features (N, D). Content is hashed if there is no ``stamp``."""
    what = f"{shown(location)}: array of shape {x.shape} and type {x.dtype}"
    if x.ndim not in (2, 3, 4) or x.dtype.kind not in "buif" or not x.size:
        raise ValueError(f"{what}; allowed are numbers (N, H, W), (N, C, H, W), (N, H, W, C) or features (N, D)")
    if labels is not None and np.size(labels) != len(x):
        raise ValueError(f"{what} has {np.size(labels)} labels; give one an image")
    classes: Classes = None if labels is None else [label(value) for value in np.ravel(labels).tolist()]
    digest = hashlib.sha1(stamp or f"{x.shape} {x.dtype}".encode())
    parts = [x[i : i + 1024] for i in range(0, len(x), 1024)]
    if not stamp:
        for part in parts:
            digest.update(np.ascontiguousarray(part).data)
    names = [name.format(i) for i in range(len(x))]
    if x.ndim == 2:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is skipped as that
            table = np.asarray(x, np.float32)
        return Source(location, names, lambda i: table[i], digest.hexdigest(), [], classes, table)
    if x.ndim == 4:
        first, last = x.shape[1] in (1, 3, 4), x.shape[3] in (1, 3, 4)
        if not first and not last:
            raise ValueError(f"{what} has no axis of 1, 3 or 4 channels")
        if first and (not last or x.shape[1] != x.shape[2]):  # if either could be, (H, W, C) where that is square
            x = x.transpose(0, 2, 3, 1)
    scale = _scale(what, x.dtype, parts)

    def read(i: int) -> np.ndarray:
        if scale is None:
            return np.ascontiguousarray(x[i])
        pixels = x[i].astype(np.float32)
        if not np.isfinite(pixels).all():
            raise BadImage("not finite: has nan or infinite pixels")
        return (pixels * scale).round().astype(np.uint8)

    return Source(location, names, read, digest.hexdigest(), [], classes)


def _scale(what: str, dtype: np.dtype, parts: list[np.ndarray]) -> float | None:
    """The factor to 0..255, one for the whole array, so that a dark image stays dark; None for bytes as they are."""
    if dtype == np.uint8:
        return None
    if dtype == np.bool_:
        return 255.0
    low, high = 0.0, 0.0
    for part in parts:
        finite = part[np.isfinite(part)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low < 0 or high > 65535:
        raise ValueError(f"{what} holds {low:g}..{high:g}; rescale it to 0..1, 0..255 or 0..65535")
    return 255.0 if high <= 1 and dtype.kind == "f" else 1.0 if high <= 255 else 255 / 65535


def torchvision_source(location: str, data_root: str | None) -> Source:
    """`torchvision:NAME[/split]`, from where it has been downloaded to."""
    from torchvision import datasets

    name, _, split = location.removeprefix("torchvision:").partition("/")
    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, n=1, cutoff=0.4)
        raise ValueError(f"torchvision has no data set {name!r}{f'; did you mean {near[0]}?' if near else ''}")
    if name in PICKLED:
        raise ValueError(
            f"{location}: torchvision reads it by a pickle, which may run any code; give a folder of images"
        )
    kind = getattr(datasets, name)
    takes = inspect.signature(kind).parameters
    root = os.path.expanduser(data_root or "~/.cache/torchvision")
    options: dict[str, Any] = {"root": root} if "root" in takes else {}
    options |= {"loader": picture} if "loader" in takes else {}
    if split and "split" in takes:
        options["split"] = split
    elif split and "train" in takes and split in ("train", "test"):
        options["train"] = split == "train"
    elif split:
        raise ValueError(f"{location}: {name} has {'the splits train and test' if 'train' in takes else 'no splits'}")
    try:
        data = kind(**options)
    except (RuntimeError, OSError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in options.items() if k != "loader")
        get = f"torchvision.datasets.{name}({given}, download=True)"
        raise ValueError(
            f"{location}: not found in {root} ({line(error)}); give another --data-root or run {get}"
        ) from None
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{location}: {line(error)}") from None
    pixels = getattr(data, "data", None)
    folder = f"{len(data)} {os.path.abspath(root)} {os.path.getmtime(root) if os.path.exists(root) else ''}"
    content = np.ascontiguousarray(pixels).data if isinstance(pixels, np.ndarray) or hasattr(pixels, "numpy") else b""
    digest = hashlib.sha1(f"{location} {'' if content else folder}".encode())
    digest.update(content)
    labels = next(
        (x for x in (getattr(data, key, None) for key in ("targets", "labels", "_labels")) if x is not None), None
    )
    known = getattr(data, "classes", None) or []
    classes: Classes = None
    if labels is not None and len(labels) == len(data):
        values = np.asarray(labels).ravel().tolist()
        classes = [str(known[v]) if isinstance(v, int) and 0 <= v < len(known) else label(v) for v in values]

    def read(i: int) -> np.ndarray:
        image = data[i][0]
        return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))

    names = [f"{name}{'/' + split if split else ''}/{i:06d}" for i in range(len(data))]
    return Source(location, names, read, digest.hexdigest(), [], classes)
