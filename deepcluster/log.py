"""What a run says while it trains: metrics.jsonl, train.log and progress bars. Rank 0 only; changes nothing."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deepcluster import atomic, dist, metrics
from deepcluster.batches import Batch
from deepcluster.terminal import Visible
from deepcluster.trainer import Report

logger = logging.getLogger("deepcluster")
PARTS = {"decoding": 5, "features": 60, "trying": 20, "training": 3, "results": 12}  # of a whole run: about its time


class Recording:
    """``with Recording() as record``: remembers what is said; ``record.into(file)`` writes that, and all that follows.

    So the first words of a run are in its train.log, though its directory is touched only when all input is right.
    """

    def __enter__(self) -> "Recording":
        self.memory = MemoryHandler(100_000, flushLevel=logging.CRITICAL + 1)
        self.level = logger.level
        logger.setLevel(logging.DEBUG)  # what reaches the screen is decided by the handler there
        logger.addHandler(self.memory)
        return self

    def into(self, path: Path) -> None:
        """Append to ``path`` from here on."""
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(Visible("%(asctime)s %(message)s"))
        self.memory.setTarget(file)
        self.memory.flush()
        self.memory.capacity = 1  # from now on at once

    def __exit__(self, *error: object) -> None:
        file = self.memory.target
        logger.removeHandler(self.memory)
        logger.setLevel(self.level)
        self.memory.close()
        if file:
            file.close()


def row(report: Report) -> dict[str, Any]:
    """One line of metrics.jsonl: what can be known of an epoch without labels; ``health`` is that of ``examine``."""
    state, clock = report.state, report.clock
    seen = clock.steps * (state.predicted.shape[1] // clock.steps)
    out: dict[str, Any] = {
        "stage": state.stage,
        "epoch": state.epoch,
        "loss": round(report.loss, 6),
        "seconds": round(report.seconds, 3),
        "images_per_second": round(seen / report.seconds, 1) if report.seconds else None,
        "health": {k: round(v, 6) if isinstance(v, float) else v for k, v in report.health.items()},
    }
    return out | ({"rescues": state.rescues} if state.rescues else {})


class Metrics:
    """Hook: appends one JSON object an epoch; with true labels (N,) also acc, nmi, ari of the images that have one.

    A resumed run calls ``rewind`` first and then continues the file without a seam.
    """

    def __init__(self, path: Path, true: np.ndarray | None = None):
        self.path, self.true = path, true

    def rewind(self, stage: int, epoch: int) -> None:
        """Drop what was written after this checkpoint, also a half-written line: those epochs are trained again.

        Nothing before it can be missing, since an epoch is reported before it is saved.
        """
        if not dist.is_main():
            return
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                try:
                    one = json.loads(line)
                    if line.endswith("\n") and (one["stage"], one["epoch"]) <= (stage, epoch):
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s had a damaged line, which is left out", self.path)
        atomic.write(self.path, "".join(kept))

    def __call__(self, report: Report) -> None:
        if not dist.is_main():
            return
        one = row(report)
        if self.true is not None and not report.recipe.pretext:
            predicted = report.state.predicted[report.state.reported(report.recipe.rivals)].cpu().numpy()
            known = (self.true >= 0) & (predicted >= 0)
            if known.any():
                k = report.recipe.heads[0]
                scores = metrics.scores(predicted[known], self.true[known], k)
                one |= {name: round(float(scores[name] or 0), 6) for name in ("acc", "nmi", "ari")}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(one) + "\n")
            f.flush()
            os.fsync(f.fileno())  # the checkpoint that follows must not outlive it


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is said in here: what trials say of themselves is of no use to anybody."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def no_bar(quiet: bool) -> bool:
    """Bars are for people: not for files, not for pipes."""
    return quiet or not dist.is_main() or not sys.stderr.isatty()


_whole: tqdm | None = None  # the bar over a whole run, while there is one


@contextlib.contextmanager
def whole(hide: bool) -> Iterator[None]:
    """One bar, in per cent of ``PARTS``, instead of one for each that is asked for in here, unless ``hide``."""
    global _whole
    if hide:
        yield
        return
    shape = "{desc:<17} {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=sum(PARTS.values()), desc="opening", file=sys.stderr, miniters=0, bar_format=shape) as one:

        def clear(record: logging.LogRecord) -> bool:
            one.clear()  # what is said takes its line; it is drawn again below that
            return True

        logger.addFilter(clear)
        _whole = one
        try:
            yield
            at("results", 1.0, "done")
        finally:
            _whole = None
            logger.removeFilter(clear)


def at(part: str, share: float = 0.0, says: str = "") -> None:
    """Move the bar over the whole run, if there is one, to this share of a part; never back."""
    if _whole is not None:
        names = list(PARTS)
        done = sum(PARTS[name] for name in names[: names.index(part)]) + PARTS[part] * min(share, 1.0)
        _whole.update(max(0.0, done - _whole.n))
        _whole.set_description_str(says or part, refresh=(says or part) != _whole.desc)


class _Part:
    """Used as a bar, it moves the bar over the whole run."""

    def __init__(self, part: str, of: Iterable = (), total: int = 1, initial: int = 0, desc: str = "", **kw: Any):
        self.part, self.of, self.total, self.n = part, of, total, initial
        self.says = part if desc == part else f"{part} {desc}"
        self.update(0)

    def __iter__(self) -> Iterator[Any]:
        for one in self.of:
            yield one
            self.update()

    def update(self, n: int = 1) -> None:
        self.n += n
        at(self.part, self.n / max(1, self.total), self.says)  # nothing to do where all of it is there already

    def set_postfix(self, *shown: Any, **more: Any) -> None:
        """Its figures are left out."""

    def close(self) -> None:
        """The whole goes on."""


def bar(part: str, quiet: bool = False, **kw: Any) -> Any:
    """A bar of tqdm, by its arguments ``kw``, or where there is one over the whole run, that ``part`` of it."""
    if _whole is not None and not quiet:
        return _Part(part, **kw)
    return tqdm(kw.pop("of", None), file=sys.stderr, disable=no_bar(quiet), **kw)


class Bar:
    """A bar for each stage: steps, loss, clusters in use, and agreement with the labels of the epoch before."""

    def __init__(self, name: str, steps: int, done: int = 0, quiet: bool = False):
        self.bar = bar("training", quiet, total=steps, initial=done, desc=name, unit="step")
        self.name = name

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches through, counting."""
        for batch in batches:
            yield batch
            self.bar.update()

    def hook(self, report: Report) -> None:
        """Show the figures of an epoch, and log them."""
        health = report.health
        shown = {"epoch": f"{report.clock.epoch + 1}/{report.clock.epochs}", "loss": f"{report.loss:.4f}"}
        if "active" in health:
            shown["active"] = f"{health['active']}/{report.recipe.heads[0]}"
            if health["nmi_previous"] is not None:
                shown["nmi_prev"] = f"{health['nmi_previous']:.3f}"
        self.bar.set_postfix(shown, refresh=True)
        if dist.is_main():  # for train.log, and for the screen where there is no bar
            logger.debug("%s %s", self.name, " ".join(f"{name} {value}" for name, value in shown.items()))

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self.bar.close()
