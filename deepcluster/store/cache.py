"""Decoding a source into the cache: by one process, completely or not at all."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import mmap
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepcluster import checked, decode
from deepcluster.decode import BadImage
from deepcluster.sources import Source

try:
    import fcntl
except ImportError:  # Windows: two builders at once do the work twice
    fcntl = None  # type: ignore[assignment]

RUN = 16  # images one task decodes; few enough that the tasks under way hold a few hundred
Progress = Callable[..., Iterable]


def none_good(source: Source, bad: list[tuple[int, str]]) -> str:
    """The error of a source without a single good image; ``bad``: some of them."""
    row, reason = bad[0]
    text = f"{source.location}: none of {len(source.names)} can be used; for example {source.names[row]}: {reason}"
    return " ".join(text.split())  # a name may have lines


def key(source: Source, shape: tuple[int, ...]) -> str:
    """Name of the store of this content at this shape."""
    return hashlib.sha1(f"{source.signature} {shape} {decode.VERSION}".encode()).hexdigest()


class Block(NamedTuple):
    """Some images in a row."""

    images: np.ndarray  # (B, C, H, W) uint8, black where bad
    sha1: np.ndarray  # (B, 20) uint8
    bad: list[tuple[int, str]]  # (row, reason)


@dataclass(frozen=True)
class Work:
    """All that decoding a source needs."""

    source: Source
    shape: tuple[int, int, int, int]  # (M, C, H, W)
    workers: int
    progress: Progress

    def __post_init__(self) -> None:
        if self.shape[1] not in (1, 3):  # before memory is taken for them
            raise ValueError(f"images have 1 or 3 channels; got {self.shape[1]}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape))

    def run(self, write: Callable[[int, np.ndarray], Any], digests: np.ndarray) -> list[tuple[int, str]]:
        """Call ``write(row, block)`` with all images in order, fill ``digests``; returns (row, reason) of bad ones."""
        bad: list[tuple[int, str]] = []
        row = 0
        for block, sums, reasons in self.blocks():
            write(row, block)
            digests[row : row + len(block)] = sums
            bad += reasons
            row += len(block)
        return bad

    def blocks(self, ahead: int = 2) -> Iterator[Block]:
        """All images in order, RUN at a time; ``ahead`` blocks are decoded in advance, besides one a worker.

        Raises:
            ValueError: at the end, if all of them were bad.
        """
        starts = iter(range(0, self.shape[0], RUN))
        ticks = iter(self.progress(range(self.shape[0]), total=self.shape[0], desc="decoding"))
        n_bad = 0
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                todo = deque(
                    pool.submit(self._block, start) for start in itertools.islice(starts, self.workers + ahead)
                )
                while todo:  # a bounded queue: no more is decoded than is about to be used
                    one = todo.popleft().result()
                    todo.extend(pool.submit(self._block, start) for start in itertools.islice(starts, 1))
                    n_bad += len(one.bad)
                    yield one
                    deque(itertools.islice(ticks, len(one.images)), maxlen=0)
            finally:
                pool.shutdown(cancel_futures=True)
        next(ticks, None)  # so that the bar is closed
        if n_bad == self.shape[0]:
            raise ValueError(none_good(self.source, one.bad))

    def _block(self, start: int) -> Block:
        n, channels, size, _ = self.shape
        stop = min(start + RUN, n)
        block = np.zeros((stop - start, channels, size, size), np.uint8)
        sums = np.zeros((stop - start, 20), np.uint8)
        bad: list[tuple[int, str]] = []
        for i in range(start, stop):
            try:
                item = self.source.read(i)
                raw = decode.read_bytes(item) if isinstance(item, os.PathLike) else item
                content = np.ascontiguousarray(raw).data if isinstance(raw, np.ndarray) else raw
                sums[i - start] = np.frombuffer(hashlib.sha1(content).digest(), np.uint8)
                block[i - start] = decode.decode(raw, size, channels)
            except BadImage as error:
                bad.append((i, str(error)))
            except Exception as error:  # a reader of damaged shards raises as freely as a decoder
                bad.append((i, f"cannot read: {' '.join(str(error).split())[:80] or type(error).__name__}"))
        return Block(block, sums, bad)


class NoCacheError(Exception):
    """The cache cannot be written."""


def build(folder: Path, work: Work) -> None:
    """Decode into ``folder`` unless that has been done; one process at a time, the others wait and find it done."""
    if whole(folder, work.shape):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("a")
    except OSError as error:
        raise NoCacheError(f"cannot write the cache {folder.parent}: {str(error.strerror).lower()}") from None
    with lock:
        if fcntl:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        if whole(folder, work.shape):
            return
        for left in folder.parent.glob(f"{folder.name}.tmp*"):  # by a builder that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = folder.with_suffix(f".tmp{os.getpid()}")
        try:
            temporary.mkdir()
            _write(temporary, work)
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been whole
            temporary.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(folder.parent, work.bytes) from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _full(cache: Path, need: int) -> OSError:
    free = shutil.disk_usage(cache).free
    text = f"{need / 1e6:.0f} MB are needed for decoded images in {cache}, {free / 1e6:.0f} MB are free"
    return OSError(errno.ENOSPC, f"{text}; make room or set DEEPCLUSTER_CACHE to a folder on another disk")


def _write(folder: Path, work: Work) -> None:
    head = header(work.shape)
    if shutil.disk_usage(folder).free < work.bytes + (1 << 20):
        raise _full(folder.parent, work.bytes)
    digests = np.zeros((work.shape[0], 20), np.uint8)
    with (folder / "images.npy").open("wb") as file:  # written, not mapped: a full disk then raises and does not kill
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, len(head) + work.bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        file.write(head)
        bad = work.run(lambda _, block: file.write(block.data), digests)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave black images of the right size
    np.save(folder / "sha1.npy", digests)
    (folder / "index.json").write_text(json.dumps({"source": work.source.location, "shape": work.shape, "bad": bad}))


def whole(folder: Path, shape: tuple[int, ...]) -> bool:
    """Whether a finished store lies there, of the right length."""
    try:
        index = json.loads((folder / "index.json").read_text())
        head = header(shape)
        with (folder / "images.npy").open("rb") as file:
            same = file.read(len(head)) == head and os.fstat(file.fileno()).st_size == len(head) + int(np.prod(shape))
        digests = checked.array(folder / "sha1.npy")
        rows = [row for row, reason in index["bad"] if isinstance(reason, str)]
        same &= len(rows) == len(index["bad"]) and all(type(row) is int and 0 <= row < shape[0] for row in rows)
        same &= index["shape"] == list(shape) and digests.dtype == np.uint8
        return same and digests.shape == (shape[0], 20)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def header(shape: tuple[int, ...]) -> bytes:
    """What stands in front of the pixels in images.npy."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The file as a private, writable map: torch warns of arrays that are not, and writing would not reach the file.

    Without MAP_NORESERVE Linux refuses such a map of more than the machine's memory, which is just when it is wanted.
    """
    with path.open("rb") as file:
        if hasattr(mmap, "MAP_PRIVATE"):
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            data = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return np.frombuffer(data, np.uint8, offset=len(header(shape))).reshape(shape)
