"""Pretrained networks that stay as they are: their features are computed once and kept, and heads are trained on those.

The features of all images are one array in the cache, under a key made of the content and the shape of the images, the
name of the backbone and all its weights. While they are computed they are there in parts, so that who was killed goes
on where it stopped, and every process computes some of the parts.

    <key>/features.npy   (N, D) float16     <key>/part-<row>.npy   PART rows of it, until all are there

Shapes: N images, B of a batch, D features of the network, d of what heads see.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepcluster import atomic, checked, dist, doctor
from deepcluster.batches import eval_batches
from deepcluster.store import Store

try:
    import fcntl
except ImportError:  # Windows: two that compute the same at once do the work twice
    fcntl = None  # type: ignore[assignment]

ROWS = 64  # images that go through the network together; all who predict do as here, so that features come out alike
PART = 8 * ROWS
WIDTH = 64  # d, at most
FITTED = 50_000  # rows that the map is found on
LARGEST = torch.finfo(torch.float16).max
VERSION = 1  # of how features are computed
Progress = Callable[..., Iterable]


class Frozen(nn.Module):
    """A network that is not trained, and a fixed map of its features: (B, C, H, W) images in [0, 1] -> (B, d).

    Features are rounded to float16, as they are kept, then projected and scaled to one length. Features without a
    negative number, as they are after a rectifier, are replaced by their roots before (Perronnin, Sanchez & Mensink,
    ECCV 2010), or few large ones would decide who is near whom. What has one dimension an image, (B, d), has been
    through all this already, and passes as it is: heads are trained on such vectors.
    """

    map_mean: Tensor
    map_weight: Tensor
    map_rooted: Tensor

    def __init__(self, network: nn.Module, dim: int, width: int):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("map_mean", torch.zeros(dim))
        self.register_buffer("map_weight", torch.zeros(width, dim))
        self.register_buffer("map_rooted", torch.zeros((), dtype=torch.bool))

    def _load_from_state_dict(self, state: dict, prefix: str, *more: Any) -> None:
        """Maps of before features were replaced by their roots say nothing of it."""
        state.setdefault(f"{prefix}map_rooted", torch.zeros((), dtype=torch.bool))
        super()._load_from_state_dict(state, prefix, *more)

    def train(self, mode: bool = True) -> "Frozen":
        """Statistics of the network's norms stay as they are."""
        super().train(mode)
        self.network.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D) float16: what is kept."""
        return self.network(images).half()

    def place(self, features: Tensor) -> Tensor:
        """(B, D) float16 -> (B, d) float32 of the length root d, so that linear heads learn at the usual rates."""
        x = features.float()
        x = torch.where(self.map_rooted, x.clamp_min(0).sqrt(), x)  # a new image may be below 0 where none was
        mapped = (x - self.map_mean) @ self.map_weight.T
        return F.normalize(mapped, dim=1) * len(self.map_weight) ** 0.5

    def forward(self, images: Tensor) -> Tensor:
        """Images, or vectors that were made by ``place``."""
        return images if images.ndim == 2 else self.place(self.embed(images))

    @torch.no_grad()
    def fit(self, features: np.ndarray) -> None:
        """Find the map on the features (N, D) of the training images, which every rank has; rank 0's is taken."""
        if dist.is_main():
            rows = np.linspace(0, len(features) - 1, min(FITTED, len(features))).astype(int)
            x = torch.from_numpy(features[rows].astype(np.float32))
            rooted = bool(x.min() >= 0)
            mean, weight = principal(x.sqrt() if rooted else x, len(self.map_weight))
            self.map_rooted.fill_(rooted)
            self.map_mean.copy_(mean)
            self.map_weight[: len(weight)] = weight
        for buffer in (self.map_mean, self.map_weight, self.map_rooted):
            dist.from_main(buffer)


def around(network: nn.Module, dim: int, width: int) -> tuple[nn.Module, int]:
    """The network and its D, or if heads see ``width`` numbers of what it gives, all that is between, and ``width``."""
    return (Frozen(network, dim, width), width) if width else (network, dim)


def principal(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) of the rows x (N, D) and a map (d, D) of what is left without it to their first ``width`` directions.

    The sign of a direction is that of its largest component, so that it does not depend on the library.
    """
    mean = x.mean(0)
    centred = (x - mean).double()
    variance, basis = torch.linalg.eigh(centred.T @ centred / len(x))
    kept = (variance > 1e-6 * variance[-1].clamp_min(1e-12)).nonzero().flatten()[-width:].flip(0)
    chosen = basis[:, kept].T
    sign = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
    return mean, (chosen * sign).float()


def width(dim: int) -> int:
    """d of a network with D features."""
    return min(WIDTH, dim)


def vectors(frozen: Frozen, store: Store, features: np.ndarray) -> Store:
    """A store of what heads see of each image of ``store``, from its features (N, D)."""
    data = torch.empty(len(features), len(frozen.map_weight), device=store.device)
    with torch.no_grad():
        for start in range(0, len(features), ROWS):
            part = torch.from_numpy(np.array(features[start : start + ROWS])).to(store.device)
            data[start : start + ROWS] = frozen.place(part)
    place = "device" if store.device.type == "cuda" else "memory"
    return replace(store, data=data, rows=np.arange(len(store)), place=place)


def extract(frozen: Frozen, store: Store, name: str, progress: Progress = lambda it, **_: it) -> np.ndarray:
    """(N, D) float16 features of all images of a store, on every rank; from the cache if they are there.

    Args:
        frozen: the network, on the store's device.
        store: the images.
        name: of the backbone.
        progress: called as ``progress(iterable, total=, desc=)`` on the images.

    Raises:
        ValueError: features are not finite, or too large for float16.
    """
    shape = (len(store), len(frozen.map_mean))
    folder = doctor.cache_dir() / key(frozen, store, name)
    file = folder / "features.npy"
    if _agreed(_whole(file, shape), store.device):
        return np.load(file, mmap_mode="r")
    kept = True
    with contextlib.ExitStack() as held:
        writer = int(os.environ.get("LOCAL_RANK", 0)) == 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if writer:
                held.enter_context(_alone(folder.with_suffix(".lock")))
        except OSError:
            kept = False
        kept = _agreed(kept, store.device)
        if not kept:  # no cache: in memory, by every rank
            return np.concatenate([part for _, part in _parts(frozen, store, name, progress, [])])
        if not _agreed(_whole(file, shape), store.device):
            starts = range(0, shape[0], PART)
            there = [start for start in starts if _whole(_part(folder, start), _part_shape(shape, start))]
            have = torch.zeros(len(starts), device=store.device)
            have[[start // PART for start in there]] = 1
            done = (1 - dist.all_max(1 - have)).nonzero().flatten().tolist()  # on every machine
            for start, part in _parts(frozen, store, name, progress, [one * PART for one in done]):
                if writer:
                    _save(_part(folder, start), part)
            if writer and not _whole(file, shape):
                with atomic.replacing(file) as out:
                    np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
                    for start in starts:
                        out.write(np.load(_part(folder, start)).tobytes())
                for left in folder.glob("part-*.npy"):
                    left.unlink()
    dist.barrier()
    return np.load(file, mmap_mode="r")


def key(frozen: Frozen, store: Store, name: str) -> str:
    """Name of the features of these images by this network."""
    digest = hashlib.sha1(f"features {VERSION} {name} {store.shape} {len(store)}\n".encode())
    digest.update("".join(store.sha1).encode())
    for what, value in frozen.network.state_dict().items():
        digest.update(f"{what} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _agreed(yes: bool, device: torch.device) -> bool:
    """Whether all ranks say so."""
    return not bool(dist.all_max(torch.tensor(float(not yes), device=device)))


def _whole(file: Path, shape: tuple[int, ...]) -> bool:
    try:
        found = checked.array(file)
    except (OSError, ValueError):
        return False
    return found.shape == shape and found.dtype == np.float16


def _part(folder: Path, start: int) -> Path:
    return folder / f"part-{start:010d}.npy"


def _part_shape(shape: tuple[int, int], start: int) -> tuple[int, int]:
    return min(PART, shape[0] - start), shape[1]


def _save(file: Path, part: np.ndarray) -> None:
    with atomic.replacing(file) as out:
        np.save(out, part)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait and find it done."""
    with lock.open("a") as file:
        if fcntl:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@torch.no_grad()
def _parts(
    frozen: Frozen, store: Store, name: str, progress: Progress, done: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, features) of every part but those that are ``done``, on every rank; each computes its share."""
    starts = [start for start in range(0, len(store), PART) if start not in set(done)]
    total = sum(min(PART, len(store) - start) for start in starts)
    ticks = iter(progress(range(total), total=total, desc="features"))
    for first in range(0, len(starts), dist.world()):
        together = starts[first : first + dist.world()]
        mine = together[dist.rank()] if dist.rank() < len(together) else None
        found = torch.empty(0, len(frozen.map_mean), dtype=torch.float16, device=store.device)
        if mine is not None:
            part = replace(store, rows=store.rows[mine : mine + PART], names=[], sha1=[], skipped=[])
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                batches = []
                for x in eval_batches(part, batch_size=ROWS, shard=False):
                    batches.append(frozen.embed(x))
                    for _ in range(len(x) * len(together)):
                        next(ticks, None)
                found = torch.cat(batches)
        every = dist.all_cat(found).cpu()
        row = 0
        for start in together:
            here = every[row : row + min(PART, len(store) - start)]
            _finite(here, start, store, name)
            yield start, here.numpy()
            row += len(here)
    next(ticks, None)  # so that the bar is closed


def _finite(features: Tensor, start: int, store: Store, name: str) -> None:
    """Raises a ValueError unless all features (B, D) float16 of the images from number ``start`` on are numbers."""
    bad = (~features.isfinite()).any(1).nonzero().flatten()
    if len(bad):
        what = "NaN" if features[bad[0]].isnan().any() else f"larger than {LARGEST:g}"
        raise ValueError(
            f"the backbone {name} gives features that are {what} for {len(bad)} of {len(features)} images, e.g. "
            f"{store.names[start + int(bad[0])]}: its weights are damaged or made for other images; give other "
            "--weights or another --backbone, or train it with --no-frozen"
        )


__all__ = ["ROWS", "WIDTH", "Frozen", "Progress", "extract", "key", "principal", "vectors", "width"]
