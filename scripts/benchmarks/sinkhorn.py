"""Balanced labels of a data set, beside the textbook's Sinkhorn on an (N, K) array of float64."""

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import psutil
import torch
from torch import Tensor, multiprocessing

from benchmarks.common import CPU, Case, finished
from deepcluster import doctor
from deepcluster.assign import Balanced, _logits, hardened

SIZES = ((10_000, 100), (100_000, 1000), (1_000_000, 1000))
D = 64
DECIDED = 8.0  # strength in spreads of the logits: the mean row's entropy is about a tenth of ln K then


def problem(n: int, k: int, device: torch.device = CPU) -> tuple[Tensor, torch.nn.Linear, float]:
    """Rows (n, D) around k centres of unequal size, a head that half knows them, and the strength."""
    rng = torch.Generator().manual_seed(0)
    centres, share = torch.randn(k, D, generator=rng), torch.rand(k, generator=rng).exp()
    x = torch.empty(n, D)
    for part in x.split(2**14):
        which = torch.multinomial(share, len(part), True, generator=rng)
        part.copy_(torch.nn.functional.normalize(centres[which] + torch.randn(len(part), D, generator=rng), dim=1))
    head = torch.nn.Linear(D, k, bias=False)
    known = centres[torch.randint(k, (k,), generator=rng)] + 0.7 * torch.randn(k, D, generator=rng)
    head.weight.data = torch.nn.functional.normalize(known, dim=1)
    some = head(x[:1000]).detach()
    return x.to(device), head.to(device), DECIDED / float((some - some.mean(1, keepdim=True)).std())


def dense(x: Tensor, head: torch.nn.Linear, strength: float) -> tuple[Tensor, Tensor]:
    """Row and column scalings in turns until no column is off by 1 %; labels, and the logarithms of the latter."""
    n, k = len(x), head.out_features
    plan = torch.empty(n, k, dtype=torch.float64, device=x.device)
    for rows, part in zip(x.split(1024), plan.split(1024), strict=True):
        part.copy_(head(rows))
        part.sub_(part.amax(1, keepdim=True)).mul_(strength).exp_()
    r = torch.full((k,), 1 / k, dtype=torch.float64, device=x.device)
    while True:
        c = 1 / (plan @ r) / n
        mass = plan.T @ c
        if float((mass * r * k - 1).abs().max()) < 0.01:
            break
        r = 1 / (k * mass)
    return torch.cat([(part * r).argmax(1) for part in plan.split(1024)]), r.log()


def streaming(x: Tensor, head: torch.nn.Linear, strength: float) -> tuple[Tensor, Tensor]:
    """The same by ``Balanced``."""
    chunks = _logits(x, head)
    strength, scale = Balanced(strength).scales(x, head, chunks)
    return hardened(chunks, strength, scale, len(x)), scale


def off(x: Tensor, head: torch.nn.Linear, strength: float, scale: Tensor) -> float:
    """By how much of its share the mass of a column is off at most."""
    parts = (strength * head(part).double() + scale for part in x.split(1024))
    mass = sum(part.softmax(1).sum(0) for part in parts)
    return float((mass / len(x) * head.out_features - 1).abs().max())


def measured(name: str, n: int, k: int, device: torch.device, answer: Connection | None = None) -> tuple[float, ...]:
    """Seconds, and bytes at most beyond what was there before, of one side in a process of its own; the error."""
    with torch.no_grad():
        x, head, strength = problem(n, k, device)
        run = {"dense": dense, "streaming": streaming}[name]
        run(x[:1000], head, strength)
        finished(device)
        before = psutil.Process().memory_info().rss
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        began = time.perf_counter()
        _, scale = run(x, head, strength)
        finished(device)
        seconds = time.perf_counter() - began
        most = doctor.peak_memory() or 0
        error = off(x, head, strength, scale)
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
    found = (seconds, float(most - before), error)
    if answer:
        answer.send(found)
    return found


def alone(name: str, n: int, k: int, device: torch.device) -> tuple[float, ...]:
    """``measured`` in a process of its own."""
    mine, other = multiprocessing.Pipe()
    context = multiprocessing.spawn(_alone, (name, n, k, device, other), 1, join=False)
    found = mine.recv()
    context.join()
    return found


def _alone(_: int, *given: object) -> None:
    measured(*given)  # type: ignore[arg-type]


def sinkhorns(device: torch.device = CPU) -> Iterator[Case]:
    """Seconds and bytes until no cluster is off by more than 1 % of its share; dense at N = 1e6 is ten times 1e5's."""
    theirs: tuple[float, ...] = ()
    for n, k in SIZES:
        ours = alone("streaming", n, k, device)
        note = ""
        if n < 1_000_000:
            theirs = alone("dense", n, k, device)
        else:
            theirs, note = (theirs[0] * n / 1e5, 8.0 * n * k, theirs[2]), " (dense: 10 x that of 1e5)"
        for what, unit, a, b in (("time", "s", ours[0], theirs[0]), ("memory", "MB", ours[1] / 1e6, theirs[1] / 1e6)):
            yield {"case": f"{what} {n:.0e}, K={k}, off {ours[2]:.1%}{note}", "peer": "dense", "ours": a, "theirs": b,
                   "unit": unit, "ratio": b / a, "n": 1, "low": b / a, "high": b / a}  # fmt: skip
