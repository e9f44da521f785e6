"""Parquet files and WebDataset tars: read in place, never whole."""
# strings and os.stat, not Path objects: twice as quick over a million files
# ruff: noqa: PTH118, PTH122, PTH123, PTH202

import hashlib
import json
import os
import re
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepcluster import checked
from deepcluster.decode import MAX_BYTES, BadImage
from deepcluster.sources.base import IMAGES, Classes, Item, Skipped, Source, label, line, shown, stamp

BATCH = 256  # rows of Parquet read at a time: row groups may be as long as their file
LONGEST = 4096  # bytes of the name of a member of a tar, as of a path


def _shards(
    location: str, paths: list[str], skipped: Skipped, root: str, kind: str, add: Callable[[str], bytes]
) -> str:
    """``add`` each shard; damaged ones are listed unless all are. Returns the signature, with what ``add`` returns."""
    digest, good = hashlib.sha1(kind.encode()), 0
    for path in paths:
        try:
            named = add(path)
            digest.update(stamp(path, root) + named)
            good += 1
        except Exception as error:  # pyarrow and tarfile raise anything on damaged bytes
            skipped.append((shown(path), f"no readable {kind}: {line(error)}"))
    if not good:
        raise ValueError(f"{shown(location)}: {': '.join(skipped[-1])}")
    return digest.hexdigest()


def parquet_source(location: str, paths: list[str], skipped: Skipped, root: str) -> Source:
    """Rows with an `image` column of bytes, paths or both, and perhaps a `label`."""
    import pyarrow.parquet as pq

    names: list[str] = []
    classes: list[str | None] = []
    groups: list[tuple[str, int, str]] = []  # file, row group, name of the column
    starts: list[int] = []

    def add(path: str) -> bytes:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            rows_of = checked.rows(metadata, os.path.getsize(path))
            column = next((name for name in ("image", "img") if name in schema.names), "")
            if not re.match(
                r"(large_)?(binary|string)|struct<.*(bytes|path): ", str(schema.field(column).type) if column else ""
            ):
                raise ValueError(f"no column 'image' of bytes or paths; its columns are {', '.join(schema.names)}")
            values = file.read(columns=["label"]).column(0).to_pylist() if "label" in schema.names else None
            named = _named(file, column, path, root)
        try:
            known = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        except (TypeError, KeyError, ValueError, RecursionError):
            known = None
        if isinstance(known, list) and values:
            values = [known[v] if isinstance(v, int) and 0 <= v < len(known) else None for v in values]
        row = len(names)
        for group, n in enumerate(rows_of):
            groups.append((path, group, column))
            starts.append(row)
            row += n
        names.extend(f"{shown(path)}#{i}" for i in range(metadata.num_rows))
        classes.extend([None] * metadata.num_rows if values is None else (label(value) for value in values))
        return named

    signature = _shards(location, paths, skipped, root, "parquet", add)
    if not names:
        raise ValueError(f"{shown(location)} has no rows")
    rows = _Rows(groups, starts)
    return Source(location, names, rows.read, signature, skipped, classes if any(classes) else None)


def _named(file: Any, column: str, shard: str, root: str) -> bytes:
    """The stamps of the image files that rows name; nothing for row groups where every row holds its bytes."""
    kind = str(file.schema_arrow.field(column).type)
    leaf = column if re.match(r"(large_)?string", kind) else f"{column}.path" if re.search(r"\bpath: ", kind) else ""
    digest, metadata = hashlib.sha1(), file.metadata
    named = False
    for group in range(metadata.num_row_groups if leaf else 0):
        chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        counts = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{column}.bytes"]
        if counts and counts[0] is not None and counts[0].has_null_count and counts[0].null_count == 0:
            continue
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=[leaf], use_threads=False):
            for value in batch.column(0).to_pylist():
                path = value.get("path") if isinstance(value, dict) else value
                if path:
                    named = True
                    try:
                        digest.update(stamp(str(_place(path, shard)), root))
                    except (BadImage, OSError, ValueError, RuntimeError):  # found again, and told, when it is read
                        digest.update(b"none\n")
    return digest.digest() if named else b""


def _place(value: str, shard: str) -> Path:
    """The file that a row names: from here, else from beside its shard."""
    here = Path(value).expanduser()
    beside = Path(shard).parent / here
    return here if here.exists() or not beside.exists() else beside


class _Rows:
    """Rows of many Parquet files, read forwards batch by batch; the last few are kept for the other threads."""

    def __init__(self, groups: list[tuple[str, int, str]], starts: list[int]) -> None:
        self.groups, self.starts = groups, starts
        self.lock = threading.Lock()
        self.kept: OrderedDict[int, Any] = OrderedDict()  # first row -> batch
        self.batches: Iterator[tuple[int, Any]] = iter(())
        self.group, self.next = -1, 0

    def read(self, i: int) -> Item:
        with self.lock:
            start, batch = next(((s, b) for s, b in self.kept.items() if s <= i < s + len(b)), (0, None))
            if batch is None:
                start, batch = self._forward(i)
        value = batch[i - start].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise BadImage("no image: empty row")
        if isinstance(value, bytes):
            return value
        return _place(value, self.groups[bisect_right(self.starts, i) - 1][0])

    def _forward(self, i: int) -> tuple[int, Any]:
        group = bisect_right(self.starts, i) - 1
        if group != self.group or i < self.next:
            self.group, self.next = group, self.starts[group]
            self.batches = self._stream(*self.groups[group])
        for batch in self.batches:
            start, self.next = self.next, self.next + len(batch)
            if i < self.next:
                self.kept[start] = batch
                if len(self.kept) > 4:
                    self.kept.popitem(last=False)
                return start, batch
        raise BadImage("truncated")

    @staticmethod
    def _stream(path: str, group: int, column: str) -> Iterator[Any]:
        import pyarrow.parquet as pq

        # buffered, and not before it is wanted: or a column chunk would be whole in memory
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column], use_threads=False):
                yield batch.column(0)


def tars_source(location: str, paths: list[str], skipped: Skipped, root: str) -> Source:
    """Members are read where they lie: nothing is extracted."""
    members: dict[str, tuple[str, int, int]] = {}  # name -> tar, offset, bytes
    keys: list[tuple[str, str]] = []
    labels: dict[tuple[str, str], str | None] = {}

    def add(path: str) -> bytes:
        count = len(members)
        end, before = os.path.getsize(path), -1
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps a million of them
                    if member.offset_data <= before or member.size < 0:  # it would lead back, for ever
                        raise tarfile.ReadError("damaged header")
                    before = member.offset_data
                    folder, base = os.path.split(member.name)
                    key, _, extension = base.partition(".")
                    name = f"{shown(path)}/{shown(member.name)}"
                    if not member.isreg() or member.issparse() or base.startswith("."):
                        continue
                    if extension == "cls" and member.size < 1024:
                        with open(path, "rb") as file:
                            file.seek(member.offset_data)
                            text = file.read(member.size).decode("utf-8", "replace").strip()
                        labels[path, os.path.join(folder, key)] = label(text)
                    elif os.path.splitext(base)[1].lower() in IMAGES:
                        if len(name) > LONGEST:
                            skipped.append((name[:80] + "...", "name too long"))
                        elif name in members or member.offset_data + member.size > end:
                            skipped.append((name, "listed twice" if name in members else "truncated"))
                        elif member.size > MAX_BYTES:
                            skipped.append((name, f"too large: {member.size} bytes"))
                        else:
                            members[name] = (path, member.offset_data, member.size)
                            keys.append((path, os.path.join(folder, key)))
                tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end
                if any(tar.fileobj.read(512)):
                    raise tarfile.ReadError("damaged header")
        except Exception as error:  # TarError, or what damaged headers make of themselves, such as MemoryError
            if len(members) == count:
                raise
            skipped.append((shown(path), f"damaged after {len(members) - count} images: {line(error)}"))
        return b""

    signature = _shards(location, paths, skipped, root, "tar", add)
    if not members:
        raise ValueError(f"{shown(location)}: no images in {len(paths)} tars; looked for {' '.join(IMAGES)}")
    places = list(members.values())

    def read(i: int) -> bytes:
        path, offset, size = places[i]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    classes: Classes = [labels.get(key) for key in keys] if labels else None
    return Source(location, list(members), read, signature, skipped, classes)
