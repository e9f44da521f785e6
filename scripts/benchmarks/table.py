"""docs/benchmarks.md: a section for each benchmark, which says where and when it was measured."""

import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.common import Case
from deepcluster import atomic, doctor

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "faiss-cpu", "kornia", "lightly", "clustpy")
TITLE = """# Benchmarks

How fast the parts are beside what they are measured against: `make bench` runs all, and `python scripts/bench.py NAME
--table docs/benchmarks.md` measures one anew and replaces its section. A ratio is how many times better ours is, below
1 worse; figures are medians of n rounds, and the range is that of the ratio. `python scripts/bench.py --help` says what
each benchmark is.
"""
COLUMNS = ("case", "ours", "peer", "theirs", "unit", "ratio", "range", "n")


def where(load: float) -> str:
    """Machine, versions, commit and date; ``load``: of the machine before the first round."""
    devices = [str(device["name"]) for device in doctor.devices()]
    versions = [f"{name} {version(name)}" for name in PACKAGES if _installed(name)]
    commit = doctor.revision() or "unknown"
    short = re.sub(r"^([0-9a-f]{9})[0-9a-f]+", r"\1", commit)
    machine = f"{' and '.join(devices)}, {doctor.cpu_count()} cores, load {load:.1f} at the start"
    software = f"Python {platform.python_version()}, {', '.join(versions)}"
    return f"Commit {short}, {datetime.now(timezone.utc):%Y-%m-%d}; {machine}; {software}."


def section(bench: str, command: Sequence[str], stamp: str, cases: Iterable[Case]) -> str:
    """One benchmark, in Markdown."""
    rows = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS))]
    for case in cases:
        low, high = (f"{float(case[name]):.2f}" for name in ("low", "high"))
        shown = {**case, **{name: f"{float(case[name]):.4g}" for name in ("ours", "theirs")},
                 "ratio": f"{float(case['ratio']):.2f}", "range": f"{low}–{high}"}  # fmt: skip
        rows.append(" | ".join(str(shown[name]).replace("|", "/") for name in COLUMNS))
    table = "\n".join(f"| {row} |" if "---|" not in row else f"|{row}|" for row in rows)
    return f"## {bench}\n\n`{' '.join(command)}`. {stamp}\n\n{table}\n"


def sections(text: str) -> dict[str, str]:
    """The sections of a file that ``update`` wrote, by benchmark."""
    return {part.split("\n", 1)[0].strip(): f"## {part.rstrip()}\n" for part in re.split(r"^## ", text, flags=re.M)[1:]}


def update(path: Path, bench: str, written: str, order: Sequence[str]) -> None:
    """Put one section in its place among those of ``order``; what is not in ``order`` is left out."""
    before = sections(path.read_text(encoding="utf-8")) if path.exists() else {}
    before[bench] = written
    atomic.write(path, "\n".join([TITLE, *(before[name] for name in order if name in before)]))


def load() -> float:
    """Processes that want to run, a minute's mean."""
    return os.getloadavg()[0]


def command() -> list[str]:
    """What was typed, as it can be typed again."""
    return ["python", "scripts/bench.py", *sys.argv[1:]]


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
