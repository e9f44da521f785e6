"""The records of ``compare.py``, a JSON object a line, and the Markdown tables made of them."""

import json
import shlex
import statistics
import sys
import textwrap
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEY = ("source", "first", "method", "options", "seed", "n_clusters")  # what makes two runs the same
COLUMNS = ("method", "n", "ACC median", "mean", "range", "NMI median", "ARI median", "train s median", "wall s median",
           "memory MB max", "failures")  # fmt: skip


def of(record: Record) -> str:
    """The run it is a record of."""
    return json.dumps([record.get(name) for name in KEY])


def read(files: Iterable[str]) -> list[Record]:
    """All records of some files; a later one replaces an equal earlier one."""
    found = {}
    for file in files:
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                found[of(record)] = record
            except (ValueError, AttributeError):  # cut short when the machine went down
                print(f"compare: {file}, line {number} is no JSON object and is left out", file=sys.stderr)
    return list(found.values())


def row(label: str, records: list[Record]) -> tuple[float, str]:
    """The median ACC, to sort by, and the row of one method."""
    good = [r for r in records if not r["exit"]]
    reasons = sorted({textwrap.shorten(str(r["error"]).replace("|", "/"), 120) for r in records if r["exit"]})
    failures = ": ".join([str(len(records) - len(good)), *filter(None, ["; ".join(reasons)])])

    def median(name: str, form: str) -> str:
        return format(statistics.median(r[name] for r in good), form) if good else "–"

    acc = [r["acc"] for r in good]
    mean, spread = (f"{statistics.mean(acc):.3f}", f"{min(acc):.3f}–{max(acc):.3f}") if acc else ("–", "–")
    memory = f"{max(r['memory_mb'] for r in records):.0f}"
    cells = [label, len(good), median("acc", ".3f"), mean, spread, median("nmi", ".3f"), median("ari", ".3f"),
             median("train_s", ".1f"), median("wall_s", ".1f"), memory, failures]  # fmt: skip
    return statistics.median(acc) if acc else -1.0, "| " + " | ".join(map(str, cells)) + " |"


def tables(records: list[Record]) -> str:
    """Markdown, one table a source; medians, means and ranges are of the runs that ended well, which n counts."""
    groups: dict[tuple, dict[str, list[Record]]] = {}
    for r in records:
        label = shlex.join([r["method"], *r["options"]])
        groups.setdefault((r["source"], r["first"], r["n_clusters"]), {}).setdefault(label, []).append(r)
    out = []
    for (source, first, k), methods in groups.items():
        every = list(chain.from_iterable(methods.values()))
        pixels = sorted({"x".join(map(str, r["shape"])) for r in every if "shape" in r})
        images = sorted({f"{r['n_images']:,}" for r in every if "n_images" in r})
        shown = [f"first {first:,} rows" if first else "", f"{'/'.join(images)} images" if images else "",
                 " and ".join(pixels), f"{k} clusters asked for"]  # fmt: skip
        out += [f"### {source}: {', '.join(filter(None, shown))}", ""]
        out += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        out += [text for _, text in sorted((row(name, rs) for name, rs in methods.items()), key=lambda x: -x[0])]
        ran = sorted({f"{r['commit']}, torch {r['torch']}, {r['threads']} threads a run, {r['jobs']} at once"
                      for r in every})  # fmt: skip
        out += ["", f"Commit {'; commit '.join(ran)}.", ""]
    return "\n".join(out)
