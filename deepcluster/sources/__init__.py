"""What the user typed -> named images, read one by one: nothing is decoded and no data set is loaded whole here.

A folder, a glob, a list of paths, an array, Parquet, WebDataset tars, `digits` or `torchvision:NAME`. What cannot be
found is listed, never fatal; what makes the whole source useless is a ValueError of one line. The classes a source may
know (`Source.classes`) are for evaluation only.
"""
# strings and os.stat, not Path objects: twice as quick over a million files
# ruff: noqa: PTH110, PTH111, PTH112, PTH118, PTH122, PTH207, PTH208

import difflib
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from deepcluster.sources.arrays import array_file_source, array_source, torchvision_source
from deepcluster.sources.base import IMAGES, KINDS, Source, shown
from deepcluster.sources.files import files_source, folder_source, list_file_source
from deepcluster.sources.shards import parquet_source, tars_source

__all__ = ["Source", "open_source", "shown"]
LISTS = {".txt": "", ".lst": "", ".csv": ",", ".tsv": "\t"}  # and what separates their columns
MOST = 100_000  # shards that {08..10} may stand for


def open_source(source: str | os.PathLike | np.ndarray | Sequence[str], *, data_root: str | None = None) -> Source:
    """Find out what ``source`` is and list what is in it.

    Args:
        source: a folder, glob, list file, array file, Parquet file, tar, `digits` or `torchvision:NAME[/split]`; or an
            array (N, H, W), (N, C, H, W), (N, H, W, C) of images or (N, D) of features; or a sequence of image paths.
        data_root: where torchvision's data sets are; default ~/.cache/torchvision.

    Raises:
        ValueError: nothing usable is there; the message says what is.
    """
    if isinstance(source, np.ndarray):
        return array_source("array", source, "array/{:06d}")
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source or not all(isinstance(path, str | os.PathLike) for path in source):
            raise ValueError(f"a list must hold image paths; got {str(source)[:40]}; give pixels as one numpy array")
        return files_source("list", [os.fspath(path) for path in source], [])
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"a source is {KINDS}, a numpy array or a list of paths; got {type(source).__name__}")
    location = os.fspath(source)
    if location == "digits":
        if os.path.exists("digits"):
            logging.getLogger("deepcluster").warning("digits are the built-in ones; write ./digits for what lies here")
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        return array_source("digits", pixels, "digits/{:04d}", labels)
    if location.startswith("torchvision:"):
        return torchvision_source(location, data_root)
    path = os.path.expanduser(location)
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return folder_source(location, path, lambda shards, others: _shards_of(location, path, shards, others))
    if suffix in (".npy", ".npz") and os.path.exists(path):
        return array_file_source(location, path, suffix)
    if suffix in LISTS and os.path.exists(path):
        return list_file_source(location, path, LISTS[suffix])
    patterns = [path] if os.path.exists(path) else _braces(path)
    paths = {p for pattern in patterns for p in glob.glob(pattern, recursive=True) or [pattern]}
    if not any(map(os.path.lexists, paths)):
        raise ValueError(f"{shown(location)} does not exist{_nearest(path)}")
    return _pick(location, sorted(filter(os.path.isfile, paths)), sorted(p for p in paths if not os.path.exists(p)))


def _pick(location: str, paths: list[str], missing: list[str], root: str = "") -> Source:
    """Shards, if there are any, else images, among files found by their pattern."""
    suffixes = [os.path.splitext(path)[1].lower() for path in paths]
    for suffix, opener in ((".parquet", parquet_source), (".tar", tars_source)):
        if suffix in suffixes:
            shards = [path for path, its in zip(paths, suffixes, strict=True) if its == suffix]
            return opener(location, shards, [(shown(path), "no such file") for path in missing], root)
    images = [path for path, its in zip(paths, suffixes, strict=True) if its in IMAGES]
    if not images:
        raise ValueError(_no_images(location, Counter(suffixes)))
    return files_source(location, images, [])


def _no_images(location: str, suffixes: Counter[str]) -> str:
    found = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in suffixes.most_common(5)) or "nothing"
    return f"{shown(location)} has no images: looked for {' '.join(IMAGES)}; found {found}. A source is {KINDS}"


def _nearest(path: str) -> str:
    parent, name = os.path.split(path)
    siblings = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    near = difflib.get_close_matches(name, siblings if parent else [*siblings, "digits"], n=1)
    return f"; did you mean {shown(os.path.join(parent, near[0]))}?" if near else f"; a source is {KINDS}"


def _braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    width, first, last = len(match[1]), int(match[1]), int(match[2])
    if last - first >= MOST:
        raise ValueError(f"{shown(pattern)[:60]} stands for {last - first + 1} names; at most {MOST} are tried")
    parts = [f"{pattern[: match.start()]}{i:0{width}}{pattern[match.end() :]}" for i in range(first, last + 1)]
    found: list[str] = []
    for part in parts:
        found += _braces(part)
        if len(found) > MOST:
            raise ValueError(f"{shown(pattern)[:60]} stands for more than {MOST} names; split it")
    return found


def _shards_of(location: str, root: str, shards: list[str], others: Counter[str]) -> Source:
    """What a folder without images is: one of shards, or an error."""
    if shards:
        return _pick(location, shards, [], root)
    raise ValueError(_no_images(location, others) if others else f"{shown(location)} is empty")
