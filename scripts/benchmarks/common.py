"""How two sides are measured in turns, and the form of what is found."""

import json
import statistics
import time
from collections.abc import Callable

import torch

Case = dict[str, str | int | float]
CPU = torch.device("cpu")


def show(bench: str, case: Case, as_json: bool) -> None:
    """One line."""
    if as_json:
        print(json.dumps({"bench": bench, **case}), flush=True)
    else:
        print(f"{bench:10} {case['case']:24} ours {case['ours']:10.5g} {case['unit']}   {case['peer']} "
              f"{case['theirs']:10.5g}   ratio {case['ratio']:.3f} ({case['low']:.3f}-{case['high']:.3f}), "
              f"n = {case['n']}", flush=True)  # fmt: skip


def finished(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(
    case: str,
    peer: str,
    n_images: int,
    ours: Callable,
    theirs: Callable,
    rounds: int = 11,
    *,
    threads: int = 1,
    device: torch.device = CPU,
) -> Case:
    """Images a second of both, in turns; the first round of each is not counted.

    On one thread of the CPU its processor time counts, which other work disturbs least; otherwise the clock's.
    """
    torch.set_num_threads(threads)
    now = time.process_time if threads == 1 and device.type == "cpu" else time.perf_counter
    seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds + 1):
        for run, taken in seconds.items():
            finished(device)
            began = now()
            run()
            finished(device)
            taken.append(now() - began)
    a, b = (taken[1:] for taken in seconds.values())
    ratios = [their / our for our, their in zip(a, b, strict=True)]
    return {"case": case, "peer": peer, "ours": n_images / statistics.median(a), "unit": "images/s",
            "theirs": n_images / statistics.median(b), "ratio": statistics.median(ratios), "n": rounds,
            "low": min(ratios), "high": max(ratios)}  # fmt: skip


def within(case: str, ours: float, limit: float, unit: str, n: int = 1) -> Case:
    """One figure, of ``n`` measurements, beside what it may be."""
    ratio = limit / ours
    return {"case": case, "peer": "limit", "ours": ours, "unit": unit, "theirs": limit, "ratio": ratio, "n": n,
            "low": ratio, "high": ratio}  # fmt: skip
