"""What every kind of source shares: its type, and how names, stamps and classes are written."""
# strings and os.stat, not Path objects: twice as quick over a million files
# ruff: noqa: PTH116

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepcluster.decode import BadImage

IMAGES = (".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KINDS = "a folder, a glob, a .txt or .csv list, .npy, .npz, .parquet, .tar, digits or torchvision:NAME"

Item = bytes | np.ndarray | os.PathLike
Skipped = list[tuple[str, str]]
Classes = list[str | None] | None


@dataclass(frozen=True)
class Source:
    """N named images, or rows of features, and how to read them."""

    location: str  # as the user typed it
    names: list[str]  # N, in input order, unique, valid UTF-8
    read: Callable[[int], Item]  # item i, raw; thread-safe; quick in about rising order; may raise BadImage
    signature: str  # hex; differs when the content may differ
    skipped: Skipped  # (name, reason), found while listing
    classes: Classes  # N true classes if the source knows them, for evaluation only
    features: np.ndarray | None = None  # (N, D) float32: a table of features, no images


def shown(path: str) -> str:
    r"""The path as valid UTF-8: bytes that are not are written \xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def stamp(path: str, root: str = "") -> bytes:
    """What identifies the content of a regular file without reading it. Raises BadImage if it is not one."""
    try:
        status = os.stat(path)
    except ValueError:  # an embedded NUL
        raise BadImage("no such file") from None
    except OSError as error:
        raise BadImage(
            "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror).lower()
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a regular file")
    name = path.removeprefix(root).lstrip(os.sep)
    return b"%s\0%d %d %d\n" % (os.fsencode(name), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def label(value: Any) -> str | None:
    """A class as the source writes it; empty, missing and -1 mean that it is not known."""
    return None if value is None or value != value or str(value) in ("", "-1") else str(value)


def line(error: BaseException) -> str:
    """An error on one line, 120 letters at most."""
    return " ".join(str(error).split())[:120] or type(error).__name__
