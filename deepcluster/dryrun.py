"""What a run would need and take: ``deepcluster fit ... --dry-run``.

Some of the images go through the whole run, three epochs of every stage, in a temporary folder; the rest is arithmetic.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepcluster import choosing, decode, dist, doctor, evaluate, log, outputs, runs
from deepcluster import plan as planning
from deepcluster.decode import BadImage
from deepcluster.plan import Plan, Stage
from deepcluster.recipe import Clock, Every, Recipe
from deepcluster.report import write_report
from deepcluster.runs import Job
from deepcluster.settings import Settings
from deepcluster.sources import Source, open_source
from deepcluster.store import Store, memory_budget
from deepcluster.store.cache import key, whole
from deepcluster.trainer import Report

PIXELS = 2**20  # of all images that are tried, unless two batches have more
MOST = 4096  # images that are tried
MAP = 2000  # images up to which the report's map takes longer with each; see landscape.py
WORDS = 500  # bytes an image in memory besides pixels: its name, digest, labels, and a row of each table
FILES = 250  # bytes an image in the tables of the run


@dataclass(frozen=True)
class _Tried(Stage):
    """A stage whose labels, if it makes any, are made in the first epoch and in the third."""

    def recipe(self) -> Recipe:
        recipe = super().recipe()
        return replace(recipe, refresh=Every(2)) if recipe.refresh.due(Clock(0, 1)) else recipe


@dataclass(frozen=True)
class _Found:
    """What trying it took.

    Attributes:
        features: seconds until the features of a frozen backbone were there.
        epochs: seconds of each epoch, by stage.
        ending: seconds of what follows the training, and of the report in that.
        saved: bytes of the checkpoint, and of the files of the run that do not grow with the images.
        dim: of the features.
        kept: numbers of each image that the cache keeps of a frozen backbone, or 0.
    """

    features: float
    epochs: dict[int, list[float]]
    ending: tuple[float, float]
    saved: tuple[int, int]
    dim: int
    kept: int


@dataclass(frozen=True)
class _Watched(Job):
    """In a folder, without bars: notes how many seconds features took."""

    took: list[float] = field(default_factory=list)

    def progress(self, of: Any, **kw: Any) -> Any:
        """From now on to the last of them."""
        began = time.perf_counter()

        def through() -> Iterator[Any]:
            yield from of
            self.took.append(time.perf_counter() - began)

        return through()


def lines(settings: Settings, X: Any, job: Job) -> list[str]:
    """Memory, disk and time of a run, a line each; times are of this machine as it is now.

    Raises:
        ValueError: as the run would.
    """
    with _apart():  # where it is noted, too, that backbones which are code may run
        planning.check(settings)
    if job.out is not None:
        outputs.check(job.out, job.overwrite, runs.reads(settings, X))
    device = dist.setup(settings.device)
    source = open_source(X, data_root=job.data_root)
    evaluate.known_labels(settings, source.names, job.labels)
    size, channels = planning.choose_size(settings, source, device)
    one = (channels, size, size) if source.features is None else (channels,)
    n = len(source.names)
    plan = planning.resolve(settings, n, one, device, trial=settings.undecided)
    least = max(2 * s.batch_size for s in plan.stages), max(max(s.recipe().heads) for s in plan.stages)
    count = min(n, max(min(MOST, PIXELS // int(np.prod(one[-2:]))), *least))
    began = time.perf_counter()
    sample = _sample(source, np.linspace(0, n - 1, count).astype(int), plan.shape, device, job.workers)
    decoding = (time.perf_counter() - began) / count * n
    m, trying = len(sample), 0.0
    with _apart() as folder:
        job = _Watched(folder / "run")
        if settings.undecided:
            began = time.perf_counter()
            settings, _ = choosing.choose(settings, sample, job.progress)
            trying = time.perf_counter() - began - sum(job.took)
            trying *= (min(n, choosing.SAMPLE) / min(m, choosing.SAMPLE)) ** (2 / 3)  # more images, but fewer epochs
            plan = planning.resolve(settings, n, one, device)
        found = _try(plan, sample, job)

    held = int(np.prod(plan.shape)) * sample.data.element_size()
    as_is = source.features is not None or whole(doctor.cache_dir() / key(source, (n, *plan.shape)), (n, *plan.shape))
    where = "taken as they are" if source.features is not None else "in the cache already" if as_is else "to be cached"
    inside = n * held <= memory_budget() and device.type != "cuda"
    more = (n - m) * (WORDS + inside * held)
    peak = doctor.peak_memory() or 0
    disk = next(folder for folder in (doctor.cache_dir(), *doctor.cache_dir().absolute().parents) if folder.exists())
    checkpoint, rest = found.saved
    cached = n * ((0 if as_is else held) + 2 * found.kept)
    run = checkpoint + rest + n * (4 * found.dim + FILES)
    said = [
        f"images       {n} of {'x'.join(map(str, plan.shape))}: {_mb(n * held)} as decoded, {where}",
        f"memory       {_mb(peak + more)} with Python and PyTorch; {_mb(doctor.free_memory() or 0)} free"
        f"{'' if inside else '; images are read from disk'}",
        *([f"GPU memory   {_mb(torch.cuda.max_memory_allocated(device))}"] if device.type == "cuda" else []),
        f"disk         {_mb(cached)} cache + {_mb(run)} run, of it {_mb(checkpoint)} its checkpoint; "
        f"{_mb(shutil.disk_usage(disk).free)} free",
        f"decoding     {_time(0 if as_is else decoding)}",
    ]
    features = found.features * n / m
    said += [f"features     {_time(features)}, unless they are in the cache"] if plan.frozen else []
    said += [f"trying       {_time(trying)} for {len(choosing.TRIED)} methods"] if trying else []
    total = (0 if as_is else decoding) + features + trying
    for number, stage in enumerate(plan.stages):
        seconds = _stage(stage, found.epochs[number], n, m)
        total += seconds
        said.append(f"{stage.method:12} {_time(seconds)} for {stage.epochs} epochs of {n // stage.batch_size} steps")
    finish, report = found.ending
    ending = max(0.0, finish - report) * n / m + report * min(n, MAP) / min(m, MAP)
    said += [f"results      {_time(ending)}", f"together     {_time(total + ending)}"]
    return [*said, "a dry run: nothing was written"]


def _stage(stage: Stage, epochs: list[float], n: int, m: int) -> float:
    """Seconds of a stage, from those of three epochs of ``m`` of the ``n`` images, labels made in the outer two."""
    refresh = stage.recipe().refresh
    labelled = sum(refresh.due(Clock(epoch, stage.epochs)) for epoch in range(stage.epochs))
    first, plain, again = epochs
    step = (plain if labelled else min(plain, again)) / (m // stage.batch_size)
    labels = max(0.0, again - plain) * n / m
    cold = max(labels, (first - plain) * n / m) if labelled else 0.0
    return stage.epochs * (n // stage.batch_size) * step + cold + max(0, labelled - 1) * labels


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
    names = [f"{i:040x}" for i in range(len(data))]
    return Store(data.to(device), np.arange(len(data)), names, names, [], device, "memory")


@contextmanager
def _apart() -> Iterator[Path]:
    """A folder for what is tried in here, with a cache of its own; it is gone afterwards, and nothing is said."""
    before = os.environ.get("DEEPCLUSTER_CACHE")
    with tempfile.TemporaryDirectory(prefix="deepcluster-") as folder, log.silent():
        os.environ["DEEPCLUSTER_CACHE"] = f"{folder}/cache"
        try:
            yield Path(folder)
        finally:
            del os.environ["DEEPCLUSTER_CACHE"]
            if before is not None:
                os.environ["DEEPCLUSTER_CACHE"] = before


def _try(plan: Plan, sample: Store, job: _Watched) -> _Found:
    """The whole run, on some images, for three epochs a stage."""
    short = replace(plan, on_collapse="warn", checkpoint_every="1000000h",
                    stages=tuple(_Tried(**{**vars(stage), "epochs": 3}) for stage in plan.stages))  # fmt: skip
    known = None
    if any(stage.recipe().supervised for stage in plan.stages):  # made up
        kinds = plan.n_clusters
        known = evaluate.Known(np.arange(len(sample)) % kinds, [str(kind) for kind in range(kinds)])
    epochs: dict[int, list[float]] = {}
    last = 0.0

    def clock(report: Report) -> None:
        nonlocal last
        epochs.setdefault(report.state.stage, []).append(report.seconds)
        last = time.perf_counter()

    assert job.out is not None
    outputs.prepare(out := job.out)
    data = {"source": "a sample", "cwd": ".", "data_root": None, "labels": "none", "n_images": len(sample),
            "size": (plan.shape[-1], plan.shape[0]), "content": "", "signature": ""}  # fmt: skip
    runs.describe(out, short, data, sample)
    classifier = runs.train(short, data, sample, job, None, known, hooks=(clock,)).classifier
    ending, began = time.perf_counter() - last, time.perf_counter()
    write_report(out, sample)
    ends = ending, time.perf_counter() - began
    saved = (out / "checkpoints" / "last.pt").stat().st_size
    rest = sum(f.stat().st_size for f in out.rglob("*") if f.suffix in (".safetensors", ".html"))
    kept = classifier.backbone.map_mean.numel() if plan.frozen else 0  # type: ignore[operator]
    return _Found(sum(job.took), epochs, ends, (saved, rest), classifier.dim, kept)


def _mb(n: float) -> str:
    return f"{n / 1e6:.0f} MB" if n < 1e9 else f"{n / 1e9:.1f} GB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
