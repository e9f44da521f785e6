"""Every image decoded once, to uint8, and kept where there is room: on the device, in memory, or memory-mapped.

The decoded images of a source are one array in the cache ($DEEPCLUSTER_CACHE, else $XDG_CACHE_HOME/deepcluster, else
~/.cache/deepcluster), under a key made of the signature of the source, the size and the channels. Row i of that array
is image i of the source, also if that could not be read: rows are left out, never renumbered.

    <key>/images.npy   (M, C, H, W) uint8        <key>/sha1.npy   (M, 20) uint8        <key>/index.json   the bad rows
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepcluster import decode, dist, doctor
from deepcluster.sources import Source
from deepcluster.store.cache import RUN, Block, NoCacheError, Progress, Work, build, key, mapped, none_good, whole


class Probe(NamedTuple):
    """What the images of a source look like, in pixels."""

    height: int
    width: int
    channels: int


@dataclass
class Store:
    """N decoded images, uint8, kept where there is room for them."""

    data: Tensor  # (M, C, H, W) uint8 or (M, D) float32 features; on the device, in memory, or memory-mapped
    rows: np.ndarray  # (N,) int64: image i is data[rows[i]] and item rows[i] of the source
    names: list[str]  # N
    sha1: list[str]  # N hex digests of the raw bytes of the file, or of the array
    skipped: list[tuple[str, str]]  # (name, reason): not found when listing, or not decoded
    device: torch.device
    place: str  # "device" | "memory" | "mmap"
    source: Source | None = None  # whose item rows[i] image i is

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image (C, H, W), or (D,) of one row of features."""
        return tuple(self.data.shape[1:])

    def take(self, ids: Tensor) -> Tensor:
        """(B,) int64 on the CPU, each in [0, N) -> (B, C, H, W) uint8 or (B, D) float32, on the device."""
        rows, cuda = self.rows[ids.numpy()], self.device.type == "cuda"
        if self.place == "device":
            return self.data[torch.from_numpy(rows).to(self.device, non_blocking=True)]
        batch = torch.empty(len(rows), *self.shape, dtype=self.data.dtype, pin_memory=cuda)
        # numpy copies rows on one thread, twice as quick as index_select and a hundred times where processors are busy
        np.take(self.data.numpy(), rows, axis=0, out=batch.numpy(), mode="clip")
        return batch.to(self.device, non_blocking=cuda)

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """(C,) mean and deviation of the images in [0, 1], or (D,) of vectors, from 2,000 evenly spaced ones; > 0."""
        ids = torch.linspace(0, len(self) - 1, min(2000, len(self))).long()
        if self.data.ndim == 4:  # sums of whole numbers are exact, and of few images at a time they take little memory
            sums = torch.zeros(2, self.shape[0], dtype=torch.float64)
            for some in ids.split(64):
                x = self.take(some).cpu().float()
                sums += torch.stack([y.sum((0, 2, 3), dtype=torch.float64) for y in (x, x * x)])
            mean, square = sums / (len(ids) * self.shape[1] * self.shape[2])
            std, mean = (square - mean**2).clamp_min(0).sqrt() / 255, mean / 255
        else:
            x = self.take(ids).cpu().double()
            mean, std = x.mean(0), x.std(0, correction=0)
        constant = std <= 1e-6 * (mean.abs() + std.max())  # nothing to scale
        return mean.float(), torch.where(constant, 1.0, std).float()


def probe(source: Source, limit: int = 256) -> Probe:
    """Median height and width of about ``limit`` images, and 1 channel if all of them are grey, else 3.

    They are taken in 32 evenly spaced runs, since shards are read quickest in order. Unreadable ones are passed over.

    Raises:
        ValueError: none can be read, or the source holds features.
    """
    if source.features is not None:
        raise ValueError(f"{source.location} holds features {source.features.shape}, not images")
    n, runs = len(source.names), min(32, limit)
    wanted = {start + i for start in np.linspace(0, n, runs, endpoint=False).astype(int) for i in range(limit // runs)}
    seen: list[tuple[int, int, int]] = []
    reason = ""
    for i in sorted(wanted if n > limit else range(n)):
        try:
            seen.append(decode.header(source.read(i)))
        except Exception as error:  # as when decoding: one bad image is no reason to stop
            reason = " ".join(f"{source.names[i]}: {error}".split())  # a name may have lines
    if not seen:
        raise ValueError(f"{source.location}: no image can be read; for example {reason}")
    width, height, _ = np.median(seen, axis=0).astype(int).tolist()
    return Probe(height, width, max(channels for _, _, channels in seen))


def memory_budget() -> int:
    """Bytes of memory that images may take: a quarter of what is free."""
    return (doctor.free_memory() or 4 << 30) // 4


def open_store(
    source: Source,
    *,
    size: int,
    channels: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    workers: int | None = None,
    budget: int | None = None,
    progress: Progress = lambda it, **_: it,
) -> Store:
    """The images of ``source``, from the cache if they are there, else decoded into it. Features are taken as they are.

    Args:
        source: what to read.
        size: pixels of a side, > 0.
        channels: 1 or 3.
        device: where take() puts its batches.
        workers: decoding threads; default one a processor this process may use.
        budget: bytes of memory the images may take; default a quarter of what is free.
        progress: called as ``progress(iterable, total=, desc=)`` on the images to decode, such as tqdm.

    Raises:
        ValueError: not a single image can be decoded, or the cache cannot be written and memory does not suffice.
        OSError: the disk of the cache is full; the message says how much is needed.
    """
    budget = memory_budget() if budget is None else budget
    if source.features is not None:
        return _feature_store(source, source.features, device, budget)
    shape = (len(source.names), channels, size, size)
    work = Work(source, shape, workers or doctor.cpu_count(), progress)
    folder = doctor.cache_dir() / key(source, shape)
    place = _place(work.bytes, device, budget)
    try:
        try:
            if dist.is_main():
                build(folder, work)
        finally:  # also when it failed, or the others would wait for ever
            dist.barrier()
        build(folder, work)  # nothing to do but for the first rank of another machine
        index = json.loads((folder / "index.json").read_text())
        digests = np.load(folder / "sha1.npy")
        images = np.load(folder / "images.npy") if place == "memory" else mapped(folder / "images.npy", shape)
    except NoCacheError as error:
        if work.bytes > budget:
            need = f"{work.bytes / 1e6:.0f} MB of images do not fit in {budget / 1e6:.0f} MB of memory"
            raise ValueError(f"{error}, and {need}; set DEEPCLUSTER_CACHE to a folder with room") from None
        images, digests = np.empty(shape, np.uint8), np.empty((len(source.names), 20), np.uint8)
        index = {"bad": work.run(lambda i, block: images.__setitem__(slice(i, i + len(block)), block), digests)}
        place = "device" if place == "device" else "memory"
    return _assemble(source, torch.from_numpy(images), digests, index["bad"], device, place)


def stream(
    source: Source,
    *,
    size: int,
    channels: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    workers: int | None = None,
    rows: int = 4096,
    progress: Progress = lambda it, **_: it,
) -> Iterator[Store]:
    """The images of ``source`` in order, about ``rows`` at a time, each part a store that is forgotten after use.

    For sources of any length that are read once. Parts come from the cache if the source is there; nothing is written.
    Arguments and errors are those of ``open_store``; a part in which all images are bad is empty.
    """
    shape = (len(source.names), channels, size, size)
    if source.features is not None or whole(doctor.cache_dir() / key(source, shape), shape):
        store = open_store(source, size=size, channels=channels, device=device, workers=workers)
        skipped = store.skipped
        for lo in range(0, len(store), rows):
            part = slice(lo, lo + rows)
            yield replace(store, rows=store.rows[part], names=store.names[part], sha1=store.sha1[part], skipped=skipped)
            skipped = []
        return
    rows -= rows % RUN
    blocks: list[Block] = []
    first, listed = 0, source.skipped
    for block in Work(source, shape, workers or doctor.cpu_count(), progress).blocks(ahead=rows // RUN):
        blocks.append(block)
        last = first + sum(len(one.images) for one in blocks)
        if last - first >= rows or last == shape[0]:
            read = lambda i, first=first: source.read(first + i)  # noqa: E731
            here = replace(source, names=source.names[first:last], read=read, skipped=listed)
            images, digests = (np.concatenate([one[i] for one in blocks]) for i in (0, 1))
            bad = [(i - first, reason) for one in blocks for i, reason in one.bad]
            yield _assemble(here, torch.from_numpy(images), digests, bad, device, "memory")
            blocks, first, listed = [], last, []


def _feature_store(source: Source, features: np.ndarray, device: torch.device, budget: int) -> Store:
    features = np.require(features, np.float32, ["C", "W"])  # torch wants arrays it could write to
    digests = np.frombuffer(b"".join(hashlib.sha1(row.data).digest() for row in features), np.uint8).reshape(-1, 20)
    bad = [(int(i), "not finite: has nan or infinite values") for i in np.flatnonzero(~np.isfinite(features).all(1))]
    place = _place(features.nbytes, device, budget)
    place = "device" if place == "device" else "memory"
    if len(bad) == len(features):
        raise ValueError(none_good(source, bad))
    return _assemble(source, torch.from_numpy(features), digests, bad, device, place)


def _assemble(
    source: Source, data: Tensor, digests: np.ndarray, bad: list[tuple[int, str]], device: torch.device, place: str
) -> Store:
    good = np.ones(len(source.names), bool)
    good[[i for i, _ in bad]] = False
    rows = np.flatnonzero(good).astype(np.int64)
    skipped = [*source.skipped, *((source.names[i], reason) for i, reason in bad)]
    digits = digests[rows].tobytes().hex()
    sha1 = [digits[i : i + 40] for i in range(0, len(digits), 40)]
    names = [source.names[i] for i in rows] if bad else source.names
    return Store(data.to(device) if place == "device" else data, rows, names, sha1, skipped, device, place, source)


def _place(size: int, device: torch.device, budget: int) -> str:
    """On the GPU if 40 % of its free memory suffices, in memory if the budget does, else on disk, memory-mapped."""
    if device.type == "cuda" and size <= 0.4 * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "memory" if size <= budget else "mmap"
