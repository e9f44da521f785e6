"""What every kind of export is given: the run, read; and the images behind its rows, one at a time."""

import hashlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from deepcluster import decode, outputs
from deepcluster.sources import Source

Item = bytes | np.ndarray | os.PathLike
ROWS = 1024  # at a time


@dataclass
class Images:
    """The images of a run as their source has them."""

    source: Source
    rows: list[int]  # N: place of each image in the source, -1 if it is not there any more
    sha1: list[str]  # N: of its content when the run was made
    lost: int = 0  # how many could not be read

    def item(self, row: int) -> Item | None:
        """The file, bytes or pixels of one image, or None if they are gone or others; quickest in rising order."""
        try:
            if self.rows[row] >= 0:
                item = self.source.read(self.rows[row])
                if isinstance(item, os.PathLike) or self.same(row, item):
                    return item
        except Exception:  # a reader of damaged shards raises as freely as a decoder
            pass
        self.lost += 1
        return None

    def data(self, row: int) -> bytes | None:
        """The bytes of the file; pixels become a PNG."""
        item = self.item(row)
        try:
            data = None if item is None else as_bytes(item)
        except decode.BadImage:
            data = None
        if isinstance(item, os.PathLike) and (data is None or not self.same(row, data)):
            self.lost += 1
            return None
        return data

    def same(self, row: int, content: bytes | np.ndarray) -> bool:
        """Whether an image is still the one that the run was made of."""
        raw = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
        return hashlib.sha1(raw).hexdigest() == self.sha1[row]


def as_bytes(item: Item) -> bytes:
    """An image file. Raises BadImage if it cannot be read."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, os.PathLike):
        return decode.read_bytes(item)
    file = io.BytesIO()
    Image.fromarray(item[:, :, 0] if item.ndim == 3 and item.shape[2] == 1 else item).save(file, "png")
    return file.getvalue()


@dataclass(frozen=True)
class Task:
    """An export under way: N images with D features."""

    run: Path
    new: Path  # where to write: an empty folder, or a file that is not there yet
    out: Path  # where that will be
    data: dict[str, Any]  # of the run's config.json
    table: pa.Table  # assignments.parquet
    features: np.ndarray  # (N, D), memory-mapped
    copy: bool
    data_root: str | None

    @cached_property
    def names(self) -> list[str]:
        """N paths, in row order."""
        return self.table["path"].to_pylist()

    def clusters(self) -> dict[int, str]:
        """Every id that has images, in order, and its name."""
        return dict(sorted(set(zip(self.table["cluster"].to_pylist(), self.table["name"].to_pylist(), strict=True))))

    def blocks(self) -> Iterator[np.ndarray]:
        """The features, (B, D) float32 each, little-endian, in order."""
        for start in range(0, len(self.features), ROWS):
            yield np.ascontiguousarray(self.features[start : start + ROWS], "<f4")

    def images(self) -> Images:
        """The images of the run.

        Raises:
            ValueError: the source is gone, or has none of them any more, or never held images.
        """
        source = outputs.reopen(self.data, self.data_root)
        if source.features is not None:
            raise ValueError(f"{source.location} holds vectors, not images")
        at = {name: i for i, name in enumerate(source.names)}
        found = [at.get(name, -1) for name in self.names]
        if max(found) < 0:
            raise ValueError(f"{source.location} has none of the images of {self.run} any more")
        return Images(source, found, self.table["sha1"].to_pylist())

    def images_if_any(self, without: str) -> Images | None:
        """The images, or None with a warning that ends in ``without``."""
        try:
            return self.images()
        except ValueError as error:
            warn(f"{error}; {without}")
            return None


def warn(text: str) -> None:
    """Tell the user."""
    logging.getLogger("deepcluster").warning("%s", text)
