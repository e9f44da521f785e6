"""What a run would need and take, measured on a sample: ``deepcluster fit ... --dry-run``. Writes nothing."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from deepcluster import decode, dist, doctor
from deepcluster.batches import train_batches
from deepcluster.decode import BadImage
from deepcluster.model import Model
from deepcluster.plan import Plan, Stage, starting_point
from deepcluster.sources import Source
from deepcluster.store import Store
from deepcluster.store.cache import key, whole
from deepcluster.trainer import Report, Training, fit

SAMPLE = 512  # images, or two batches if that is more


def lines(plan: Plan, source: Source, device: torch.device, workers: int | None = None) -> list[str]:
    """Memory, disk and time of a run of ``plan`` on ``source``, a line each; times are of this machine as it is now."""
    n = len(source.names)
    count = min(
        n, max(SAMPLE, 2 * max(s.batch_size for s in plan.stages), *(max(s.recipe().heads) for s in plan.stages))
    )
    began = time.perf_counter()
    sample = _sample(source, np.linspace(0, n - 1, count).astype(int), plan.shape, device, workers)
    decoding = (time.perf_counter() - began) / count * n
    shape = (n, *plan.shape)
    held = int(np.prod(shape)) * sample.data.element_size()
    cached = source.features is None and whole(doctor.cache_dir() / key(source, shape), shape)
    weights, saved, seconds = 0, 0, []
    for stage in plan.stages:
        numbers, kept, each = _try(plan, stage, sample)
        weights, saved = max(weights, numbers), max(saved, kept)
        seconds.append(each * n / len(sample) * stage.epochs)
    as_is = source.features is not None or cached  # nothing to decode
    where = "taken as they are" if source.features is not None else "in the cache already" if cached else "to be cached"
    on_gpu = device.type == "cuda"
    free = int(torch.cuda.mem_get_info(device)[0]) if on_gpu else doctor.free_memory() or 0
    disk = next(folder for folder in (doctor.cache_dir(), *doctor.cache_dir().absolute().parents) if folder.exists())
    said = [
        f"images       {n} of {'x'.join(map(str, plan.shape))}: {_mb(held)} as decoded, {where}",
        f"{'GPU memory' if on_gpu else 'memory':12} {_mb(held + 4 * weights + saved)} = images {_mb(held)} + model, "
        f"gradients and optimizer {_mb(4 * weights)} + activations {_mb(saved)}; {_mb(free)} free, and images that do "
        "not fit are read from disk",
        f"disk         {_mb(0 if as_is else held)} cache + {_mb(6 * weights)} checkpoint + {_mb(weights)} model; "
        f"{_mb(shutil.disk_usage(disk).free)} free",
        f"decoding     {_time(0 if as_is else decoding)}",
    ]
    for stage, t in zip(plan.stages, seconds, strict=True):
        said.append(f"{stage.method:12} {_time(t)} for {stage.epochs} epochs of {n // stage.batch_size} steps")
    return [*said, "a dry run: nothing was written"]


def _sample(
    source: Source, rows: np.ndarray, shape: tuple[int, ...], device: torch.device, workers: int | None
) -> Store:
    """Some images of a source, decoded but not cached."""
    if source.features is not None:
        data = torch.from_numpy(np.array(source.features[rows], np.float32))
        data = data[data.isfinite().all(1)]
    else:

        def one(i: int) -> np.ndarray | None:
            try:
                return decode.decode(source.read(i), shape[-1], shape[0])
            except BadImage:
                return None

        with ThreadPoolExecutor(workers or doctor.cpu_count()) as pool:
            found = [image for image in pool.map(one, rows.tolist()) if image is not None]
        data = torch.from_numpy(np.stack(found)) if found else torch.empty(0, *shape)
    if len(data) < len(rows) / 2:
        raise ValueError(f"{source.location}: {len(rows) - len(data)} of {len(rows)} images tried cannot be read")
    return Store(data.to(device), np.arange(len(data)), [""] * len(data), [""] * len(data), [], device, "memory")


def _try(plan: Plan, stage: Stage, sample: Store) -> tuple[int, int, float]:
    """Bytes of the weights, bytes kept for the backward pass of a batch, and seconds of an epoch on the sample."""
    recipe = stage.recipe()
    seed = dist.epoch_seed(plan.seed, 0)
    torch.manual_seed(seed)
    backbone, dim = starting_point(replace(plan, weights=None, init_from=None), *sample.statistics)
    model = Model(backbone, dim, recipe.heads, recipe.head).to(sample.device)
    batch = min(stage.batch_size, len(sample))
    kept: dict[int, int] = {}
    seconds: list[float] = []

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def clock(report: Report) -> None:
        seconds.append(report.seconds)

    training = Training(
        2, batch, stage.lr, stage.momentum, stage.weight_decay, seed=seed, bf16=plan.bf16
    )  # the first epoch warms up
    identity: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    state = fit(model, sample, recipe, training, [clock], known=torch.arange(len(sample)) % recipe.heads[0])  # made up
    batches = train_batches(sample, state.targets, recipe, batch, seed)
    half = torch.autocast(sample.device.type, torch.bfloat16, enabled=plan.bf16)
    with half, torch.autograd.graph.saved_tensors_hooks(pack, identity):
        state.network(next(iter(batches)).views)
    weights = sum(p.nbytes for p in state.network.state_dict().values())
    return weights, sum(kept.values()), seconds[-1]


def _mb(n: float) -> str:
    return f"{n / 1e6:.0f} MB" if n < 1e9 else f"{n / 1e9:.1f} GB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
