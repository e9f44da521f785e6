"""A whole ``fit`` in a process of its own: how much memory it has, part by part, and how long each part takes.

Memory is what the kernel could not drop: RssAnon and RssShmem of /proc/PID/status, looked at every 10 ms, less what the
process had with torch and deepcluster imported. Pages of mapped files (the images, and what is put aside on the disk)
are not counted: they are given back whenever somebody else needs them.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).parents[1]
EVERY = 0.01  # seconds from one look to the next
BLOCK = 4096  # images that are made at a time


@contextlib.contextmanager
def space() -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk of $TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="deepcluster-bench-") as folder:
        yield Path(folder)


def blobs(path: Path, n: int, size: int = 64) -> Path:
    """(n, 3, size, size) uint8 in a .npy file: a colour of one of ten kinds, four by four patches, and noise."""
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, size, size))
    for start in range(0, n, BLOCK):
        rng = np.random.default_rng(start)
        count = min(BLOCK, n - start)
        kind = rng.integers(10, size=count)
        colour = np.random.default_rng(0).integers(60, 196, (10, 3))[kind][:, :, None, None]
        coarse = (colour + rng.integers(-50, 50, (count, 3, 4, 4))).repeat(size // 4, 2).repeat(size // 4, 3)
        noise = rng.integers(-8, 8, (1, 3, size, size))
        images[start : start + count] = (coarse + noise).clip(0, 255).astype(np.uint8)
    images.flush()
    del images
    return path


def used(pid: int | str = "self") -> int:
    """Bytes of memory of a process that are on no disk."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def watched(
    source: Path | str, cache: Path, limit: int | None = None, steps: int | None = None, threads: int = 1,
    processes: int = 1, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """One ``fit`` on ``source``, its cache and run in ``cache``; what it took.

    Args:
        source: what to cluster.
        cache: a folder for what it writes.
        limit: bytes of address space the process may have above what it has when all is imported.
        steps: of training at most, an epoch; the rest of it is left out.
        threads: of torch and of faiss.
        processes: that share the work; memory is then not looked at.
        settings: of ``deepcluster.settings.Settings``; ``tiny=True`` replaces the convnet by one layer of its width.

    Returns:
        base, peak: bytes of memory with all imported, and at most; parts: for each part its seconds, processor seconds
        and most memory above the base; disk: bytes of the cache and of the run; seconds in all; n: images.

    Raises:
        RuntimeError: the fit failed.
    """
    env = {**os.environ, "DEEPCLUSTER_CACHE": str(cache / "cache"), "PYTHONPATH": str(SCRIPTS),
           "OMP_NUM_THREADS": str(threads)}  # fmt: skip
    words = json.dumps({"source": str(source), "out": str(cache / "run"), "limit": limit, "steps": steps,
                        "settings": settings})  # fmt: skip
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *several, "benchmarks.watch", words]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        looks: list[tuple[float, int]] = []
        looking = threading.Thread(target=_look, args=(process, looks))
        looking.start()
        said, errors = process.communicate()
        looking.join()
    if process.returncode:
        raise RuntimeError(f"a fit on {source} failed: {errors.strip().splitlines()[-1] if errors else said}")
    found = json.loads(said.splitlines()[-1])
    if processes > 1:
        return found
    for part in found["parts"].values():
        part["peak"] = max((m for t, m in looks if part["began"] <= t <= part["ended"]), default=0) - found["base"]
    found["peak"] = max(m for t, m in looks if t >= found["began"]) - found["base"]
    found["disk"] = {name: _size(cache / name) for name in ("cache", "run")}
    return found


def _look(process: subprocess.Popen, looks: list[tuple[float, int]]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError, KeyError):  # it is going away
            looks.append((time.monotonic(), used(process.pid)))
        time.sleep(EVERY)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _fit(source: str, out: str, limit: int | None, steps: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """In the process of its own."""
    import resource

    import torch
    from torch import nn

    from deepcluster import assign, backbones, ending, oddities, outputs, plan, results, runs, trainer
    from deepcluster.report import points
    from deepcluster.settings import Settings

    class Eighth(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :, ::8, ::8]

    if settings.pop("tiny", False):  # what is measured is what grows with the number of images

        def one_layer(channels: int, size: int) -> tuple[nn.Module, int]:
            return nn.Sequential(Eighth(), nn.Flatten(), nn.Linear(channels * (size // 8) ** 2, 512)), 512

        backbones.BACKBONES["convnet"] = one_layer
        settings["backbone"] = "convnet"
        kept = runs.open_store
        runs.open_store = lambda *args, **kw: kept(*args, budget=0, **kw)  # mapped, however much memory there is
    parts: dict[str, dict[str, float]] = {}

    def timed(name: str, function: Callable) -> Callable:
        def run(*args: Any, **kw: Any) -> Any:
            began, busy = time.monotonic(), time.process_time()
            try:
                return function(*args, **kw)
            finally:
                part = parts.setdefault(name, {"began": began, "seconds": 0.0, "cpu": 0.0})
                part["ended"] = time.monotonic()
                part["seconds"] += part["ended"] - began
                part["cpu"] += time.process_time() - busy

        return run

    if steps is not None:
        batches = trainer.train_batches
        trainer.train_batches = lambda *args: itertools.islice(batches(*args), steps)
    for name, where, attribute in (
        ("list", runs, "open_source"), ("read", runs, "open_store"), ("train", plan, "run"),
        ("extract", trainer, "extract"), ("labels", assign.KMeans, "__call__"),
        ("end", ending, "finish"), ("features", ending, "_features"),
        ("copies", oddities, "duplicates"), ("looks", oddities, "looks"), ("tables", results, "write"),
        ("report", runs, "write_report"), ("map", points, "landscape_of"), ("content", outputs, "content"),
    ):  # fmt: skip
        setattr(where, attribute, timed(name, getattr(where, attribute)))
    base, began = used(), time.monotonic()
    if limit is not None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + limit,) * 2)
    result = runs.begin(Settings(**settings), source, runs.Job(out=Path(out)))
    ended = time.monotonic()
    return {"base": base, "began": began, "seconds": ended - began, "parts": parts, "n": len(result.images)}


def cleared(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    measured = _fit(**json.loads(sys.argv[1]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(measured))
