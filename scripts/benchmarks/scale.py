"""What an image or a row takes, of N and of 10 N, by one process and by two: the constants of docs/scale.md."""

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.common import Case
from benchmarks.memory import SETTINGS, STEPS
from benchmarks.watch import blobs, space, watched
from deepcluster.kmeans import nearest
from deepcluster.transport import log_scales

N = 3000
PARTS = {"read": "decode from an array", "extract": "features, one layer", "labels": "k-means, 5 heads",
         "features": "features of the end", "copies": "copies", "looks": "looks", "tables": "tables", "map": "map",
         "report": "report, map included"}  # fmt: skip
ROWS, DIMS, CENTROIDS, CLUSTERS = 20_000, 128, 1000, 100


def scale() -> Iterator[Case]:
    """Processor time of one thread, N beside 10 N; then the clock's of two processes beside one, of 10 N."""
    for name, each, work in _kernels():
        few, many = (work(n) / (n * each) for n in (ROWS, 10 * ROWS))
        yield _case(f"{name}, {10 * ROWS} rows", f"{ROWS} rows", many, few)
    with space() as folder:
        found = {}
        for n, processes in ((N, 1), (10 * N, 1), (10 * N, 2)):
            source = folder / f"{n}.npy"
            source = source if source.exists() else blobs(source, n)
            below = folder / f"{n}-{processes}"
            found[n, processes] = watched(source, below, steps=STEPS, processes=processes, **SETTINGS)["parts"]
    for name, said in PARTS.items():
        few, many = (found[n, 1][name]["cpu"] / n for n in (N, 10 * N))
        yield _case(f"{said}, {10 * N}", f"{N}", many, few)
    for name, said in PARTS.items():
        alone, both = (found[10 * N, processes][name]["seconds"] / (10 * N) for processes in (1, 2))
        yield _case(f"{said}, 2 processes", "1 process", both, alone)


def _case(case: str, peer: str, ours: float, theirs: float) -> Case:
    """Seconds of both, as nanoseconds."""
    ratio = theirs / ours
    return {"case": case, "peer": peer, "ours": 1e9 * ours, "unit": "ns each", "theirs": 1e9 * theirs, "ratio": ratio,
            "n": 1, "low": ratio, "high": ratio}  # fmt: skip


def _kernels() -> Iterator[tuple[str, int, Callable[[int], float]]]:
    """A name, what a row is divided by, and the seconds for some rows."""
    torch.set_num_threads(1)
    centroids = torch.randn(CENTROIDS, DIMS)

    def assign(n: int) -> float:
        x = torch.randn(n, DIMS)
        return _least(lambda: nearest(x, centroids))

    def balance(n: int) -> float:
        logits = torch.randn(n, CLUSTERS)
        return _least(lambda: log_scales(lambda: iter([logits]), 1.0, torch.zeros(CLUSTERS), iterations=1))

    yield f"k-means, a row and centroid of {DIMS}", CENTROIDS, assign
    yield "Sinkhorn, a row and cluster of a pass", CLUSTERS, balance


def _least(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)
