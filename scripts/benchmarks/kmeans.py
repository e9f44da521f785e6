"""k-means, beside faiss and scikit-learn on a CPU, and beside flash-kmeans, fastkmeans and faiss on a GPU.

All rows are labelled in the end; faiss and ours iterate 20 times on the same number of rows (256 a cluster at most).
Points are drawn around K centres that overlap, as features do.
"""

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import faiss
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, multiprocessing

from benchmarks.common import CPU, Case, rates, within
from deepcluster.kmeans import kmeans, nearest, one_pass, sums

SIZES = ((100_000, 64, 100, 5), (100_000, 64, 1000, 3), (1_000_000, 64, 100, 5), (1_000_000, 64, 1000, 1))  # and rounds
GOAL_MS = 12  # an iteration on a GPU, 1,000,000 rows of 128 dimensions, 1024 clusters


def points(n: int, d: int, k: int, device: torch.device = CPU) -> Tensor:
    """(n, d) rows of unit length around k centres: nearer to their own than to others, mostly."""
    rng = torch.Generator().manual_seed(0)
    centres, which = torch.randn(k, d, generator=rng) * 0.5, torch.randint(k, (n,), generator=rng)
    return torch.nn.functional.normalize(centres[which] + torch.randn(n, d, generator=rng), dim=1).to(device)


def moved(x: Tensor, part: float = 0.3) -> Tensor:
    """The rows after another epoch: turned by noise of ``part`` of their length."""
    rng = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(x + torch.randn(x.shape, generator=rng) * part / x.shape[1] ** 0.5, dim=1)


def inertia(x: Tensor, centroids: Any) -> float:
    """Mean squared distance of a row to the nearest centroid."""
    return float(nearest(x, torch.as_tensor(centroids, device=x.device))[1].mean(dtype=torch.float64))


def clusterings(device: torch.device = CPU) -> Iterator[Case]:
    """Rows a second, from the first centroids to the label of every row; and the inertia of both sides."""
    if device.type == "cuda":
        yield from on_a_gpu(device)
        return
    faiss.omp_set_num_threads(1)
    with threadpool_limits(1):
        for n, d, k, rounds in SIZES:
            x = points(n, d, k)
            yield from against(f"cold {n:.0e} x {d}, K={k}", "faiss", x, k, of_faiss(x, k), rounds)
        x = points(100_000, 64, 100)
        yield from against("cold 1e+05 x 64, K=100", "sklearn", x, 100, of_sklearn(KMeans, x, 100, max_iter=20), 3)
        yield from against("mini 1e+05 x 64, K=100", "sklearn", x, 100, of_sklearn(MiniBatchKMeans, x, 100), 3)
        yield from warm(100_000, 64, 1000)
    yield from shards(100_000, 64, 200)


def against(
    name: str, peer: str, x: Tensor, k: int, theirs: Callable[[], Any], rounds: int, **options: Any
) -> Iterator[Case]:
    """Both sides in turns; ``theirs`` gives its centroids."""
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = kmeans(x, k, seed=0, **options)[1]

    def other() -> None:
        found["theirs"] = theirs()

    yield rates(name, peer, len(x), ours, other, rounds, device=x.device) | {"unit": "rows/s"}
    a, b = inertia(x, found["ours"]), inertia(x, found["theirs"])
    yield {"case": f"{name}, inertia", "peer": peer, "ours": a, "theirs": b, "unit": "a row", "ratio": b / a, "n": 1,
           "low": b / a, "high": b / a}  # fmt: skip


def of_faiss(x: Tensor, k: int, gpu: bool = False) -> Callable[[], Any]:
    """faiss.Kmeans as it is, and the label of every row."""
    rows = x.cpu().numpy()

    def run() -> Any:
        clusters = faiss.Kmeans(rows.shape[1], k, niter=20, seed=1, gpu=gpu)
        clusters.train(rows)
        clusters.index.search(rows, 1)
        return clusters.centroids

    return run


def of_sklearn(algorithm: Any, x: Tensor, k: int, **options: Any) -> Callable[[], Any]:
    """One start; all rows are labelled by ``fit``."""
    rows = x.numpy()
    return lambda: algorithm(k, n_init=1, random_state=0, **options).fit(rows).cluster_centers_


def warm(n: int, d: int, k: int) -> Iterator[Case]:
    """A refresh from the means of the last labels, as ``KMeans(warm=True)`` makes them, beside one from nothing."""
    x = points(n, d, k)
    labels, _ = kmeans(x, k, seed=0)
    later, found = moved(x), {}

    def ours() -> None:
        total, counts = sums(later, labels, k)
        found["ours"] = kmeans(later, k, seed=1, start=(total / counts[:, None]).float())[1]

    def cold() -> None:
        found["cold"] = kmeans(later, k, seed=1)[1]

    name = f"warm {n:.0e} x {d}, K={k}"
    yield rates(name, "cold", n, ours, cold, 3) | {"unit": "rows/s"}
    a, b = inertia(later, found["ours"]), inertia(later, found["cold"])
    yield {"case": f"{name}, inertia", "peer": "cold", "ours": a, "theirs": b, "unit": "a row", "ratio": b / a, "n": 1,
           "low": b / a, "high": b / a}  # fmt: skip


def shards(n: int, d: int, k: int) -> Iterator[Case]:
    """Two processes with half of the rows each beside one with all: processor time of the slower, one thread each."""
    one, two = (min(taken) for taken in (processes(1, n, d, k), processes(2, n, d, k)))
    yield {"case": f"2 processes {n:.0e}, K={k}", "peer": "1 process", "ours": n / two, "theirs": n / one,
           "unit": "rows/s", "ratio": one / two, "n": 3, "low": one / two, "high": one / two}  # fmt: skip


def processes(world: int, n: int, d: int, k: int) -> list[float]:
    """Seconds of three rounds."""
    mine, other = multiprocessing.Pipe()
    context = multiprocessing.spawn(_process, (world, n, d, k, _port(), other), world, join=False)
    taken = mine.recv()
    context.join()
    return taken


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _process(rank: int, world: int, n: int, d: int, k: int, port: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    x, taken = points(n, d, k)[n * rank // world : n * (rank + 1) // world], []
    for _ in range(3):
        torch.distributed.barrier()
        began = time.process_time()
        kmeans(x, k, seed=0)
        mine = torch.tensor(time.process_time() - began)
        torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
        taken.append(float(mine))
    if rank == 0:
        answer.send(taken)
    torch.distributed.destroy_process_group()


def on_a_gpu(device: torch.device) -> Iterator[Case]:
    """1,000,000 rows of 128 dimensions that are on the device, 1024 clusters, 20 iterations of all rows."""
    n, d, k = 1_000_000, 128, 1024
    x = points(n, d, k, device)
    start = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].to(device)]

    def ours(iterations: int = 20) -> None:
        centroids = start
        for _ in range(iterations):
            both = one_pass(x, centroids, rough=True)[1][:-1].view(k, d + 1)
            centroids = (both[:, :-1] / both[:, -1:].clamp_min(1)).float()

    peers: dict[str, Callable[[], Callable]] = {
        "flash-kmeans": lambda: _flash(x, k),
        "fastkmeans": lambda: _fast(x, k),
        "faiss": lambda: of_faiss(x, k, gpu=True),
    }
    bare = rates("", "", n, ours, lambda: None, 5, device=device)
    yield within("iteration 1e+06 x 128, K=1024", 1000 * n / float(bare["ours"]) / 20, GOAL_MS, "ms", 5)
    for name, make in peers.items():
        try:
            if name == "faiss" and not hasattr(faiss, "StandardGpuResources"):
                raise ImportError("faiss has no GPU here; conda install -c pytorch faiss-gpu")
            theirs = make()
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        yield rates("20 iterations 1e+06 x 128, K=1024", name, n, ours, theirs, 5, device=device) | {"unit": "rows/s"}


def _flash(x: Tensor, k: int) -> Callable[[], Any]:
    module = _peer("flash_kmeans", "flash-kmeans")
    return lambda: module.batch_kmeans_Euclid(x[None], k, max_iters=20, tol=-1.0)


def _fast(x: Tensor, k: int) -> Callable[[], Any]:
    module, rows = _peer("fastkmeans", "fastkmeans"), x.cpu().numpy()
    peer = module.FastKMeans(x.shape[1], k, niter=20, tol=-1, max_points_per_centroid=None, device=str(x.device))
    return lambda: peer.train(rows)


def _peer(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"pip install {package}") from error
