"""The whole state of a run in one file, written so that a crash cannot corrupt it; and when it is written."""

import copy
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepcluster import checked, dist
from deepcluster.recipe import Targets

logger = logging.getLogger("deepcluster")
T = TypeVar("T")
SHARE = 0.02  # of the time that saving at the end of an epoch may take; quick ones are saved anyway
QUICK = 0.05  # seconds


@dataclass
class State:
    """Everything that changes while training. Nothing else is needed to resume, not even a random state.

    It is the same on every rank, and does not depend on how many there are.

    Attributes:
        model: backbone and heads of the current stage.
        network: the recipe's, around the model: with a teacher, a queue, ...; or the model itself.
        optimizer: of what the network trains.
        targets: labels and partners of the last refresh.
        predicted: (H, N) int32, what each head said of each image when it was last trained on; -1 never.
        head_losses: (H,) mean loss of each head over the last epoch.
        stage: position in the plan.
        epoch: epochs done in this stage.
        step: steps done in the epoch under way.
        seen: (H, N) int32, what each head said of each image in the epoch under way; -1 not yet.
        losses: (H,) float64, sum of each head's loss over the steps of the epoch under way.
        flat_loss: the loss of a network that says the same of all images; NaN before the first step.
        unhealthy: epochs in a row that ended with a symptom, see ``health``.
        rescues: what was changed in this stage after it collapsed: "lr" or "seed", in order.
    """

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    targets: Targets
    predicted: Tensor
    head_losses: Tensor
    stage: int = 0
    epoch: int = 0
    step: int = 0
    seen: Tensor = field(default_factory=lambda: torch.empty(0))
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    flat_loss: float = math.nan
    unhealthy: int = 0
    rescues: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = torch.full_like(self.predicted, -1)
        exact = torch.float32 if self.predicted.device.type == "mps" else torch.float64
        self.losses = torch.zeros(len(self.head_losses), dtype=exact, device=self.predicted.device)

    def step_done(self, ids: Tensor, logits: Sequence[Tensor], losses: Tensor) -> None:
        """Note what heads say of every rank's images (B,) in view 0 of H tensors (V, B, K), and their losses (H,)."""
        said = dist.all_cat(torch.stack([ids, *(z[0].detach().argmax(1) for z in logits)]).T)
        said = said[said[:, 0].argsort(stable=True)].T.contiguous()
        ids = said[0]
        last = torch.searchsorted(ids, ids, right=True) - 1  # of an image that is in the batch twice: alike everywhere
        self.seen[:, ids] = said[1:, last].int()
        self.losses += losses.detach()
        self.step += 1

    def epoch_done(self) -> None:
        """Close the epoch under way."""
        self.predicted = torch.where(self.seen >= 0, self.seen, self.predicted)
        self.head_losses = (dist.all_sum(self.losses) / dist.world() / self.step).float().cpu()
        for buffer in self.network.buffers():
            dist.from_main(buffer)
        self.epoch, self.step = self.epoch + 1, 0
        self.__post_init__()

    def reported(self, rivals: Sequence[int]) -> int:
        """The head to report: of ``recipe.rivals``, the one with the lowest loss. No label is asked."""
        return min(rivals, key=lambda h: float(self.head_losses[h]))


_MODULES = ("network", "optimizer")
_TENSORS = ("predicted", "head_losses", "seen", "losses")
_PLAIN = {"stage": int, "epoch": int, "step": int, "flat_loss": float, "unhealthy": int, "rescues": list}
_KEYS = {*_MODULES, "labels", "partners", *_TENSORS, *_PLAIN}


def save(path: Path, state: State) -> None:
    """Write ``state`` from rank 0; readers see the old file or the new one, never half.

    Raises:
        OSError: no space, or not writable; the old file is as it was.
    """
    if not dist.is_main():
        return
    saved = {name: getattr(state, name).state_dict() for name in _MODULES}
    saved |= {"labels": state.targets.labels, "partners": state.targets.partners}
    saved |= {name: getattr(state, name) for name in (*_TENSORS, *_PLAIN)}
    tmp = path.with_suffix(".tmp")
    try:
        tmp.unlink(missing_ok=True)  # never written through: see atomic.replacing
        with tmp.open("xb") as f:
            torch.save(saved, f)
            f.flush()
            os.fsync(f.fileno())  # the name must not point to data that a power cut can lose
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        tmp.unlink(missing_ok=True)
        free = f"no space left, or a failing disk: {shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free"
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else free
        raise OSError(f"cannot write {path}: {reason}; free some space and go on with --resume") from error
    tmp.replace(path)  # atomic


def read(path: Path) -> dict:
    """The saved dictionary; executes nothing.

    Raises:
        ValueError: the file is damaged or no checkpoint of ours.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or _KEYS - set(saved):
            ours = isinstance(saved, dict) and {"network", "optimizer", "stage", "epoch"} <= set(saved)
            raise ValueError(f"it is not a checkpoint of this {'version of this ' if ours else ''}program")
        if wrong := [name for name, kind in _PLAIN.items() if not isinstance(saved[name], kind)]:
            raise ValueError(f"its {wrong[0]} is {saved[wrong[0]]!r}")
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {path}; the run did not finish its first epoch: start it anew") from None
    except Exception as error:  # the formats inside raise whatever they like on damaged bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the checkpoint {path}: {reason}; start anew") from error
    return saved


def restore(saved: dict, state: State, widths: Sequence[int]) -> None:
    """Fill ``state`` of heads of these ``widths`` in place from what ``read`` returned.

    Raises:
        ValueError: it was written by a run with another plan, or of other images.
    """
    try:
        state.network.load_state_dict(saved["network"])
        state.optimizer.load_state_dict(checked.moments(saved["optimizer"], state.optimizer))
        for name in _TENSORS:
            own, other = getattr(state, name), saved[name]
            if own.shape != other.shape:
                raise ValueError(f"{name} has the shape {tuple(other.shape)} instead of {tuple(own.shape)}")
            setattr(state, name, other.to(own))
        labels, partners = saved["labels"], saved["partners"]
        checked.targets(labels, partners, state.targets.labels, widths)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # what torch says of another shape
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"the checkpoint does not fit config.json: {reason}; start anew with --overwrite") from error
    state.targets = Targets(labels, partners)
    for name in _PLAIN:
        setattr(state, name, saved[name])


def keep(last: Path) -> None:
    """Make the last checkpoint the one that a rescue goes back to: healthy.pt beside it, all or nothing."""
    if dist.is_main():
        tmp = last.with_name("healthy.tmp")
        tmp.unlink(missing_ok=True)
        try:
            os.link(last, tmp)  # it costs nothing, and stays when the other name gets new contents
        except OSError:  # some disks have no links
            shutil.copyfile(last, tmp)
        tmp.replace(last.with_name("healthy.pt"))
        tmp.unlink(missing_ok=True)  # renaming one of two names of a file to the other does nothing


class Saver:
    """Saves a run at the end of epochs, every so often within one, and when it is asked to stop.

    ``with Saver(folder) as saver``: SIGTERM and Ctrl-C then wait for the end of a step while ``during`` yields batches,
    and a second one does not. Where a save takes long (0.3 s for a ResNet-18) not every epoch is saved: it would cost
    more than ``SHARE`` of the time. Ranks save and stop in the same step: they agree on it about once a second.

    Args:
        folder: where last.pt is written; None saves nothing and leaves signals alone.
        every: seconds after which an epoch under way is saved.
        healthy: also keep the last epoch without a symptom, whatever that costs, so that what a rescue goes back to
            does not depend on the clock.
    """

    def __init__(self, folder: Path | None, every: float = 600.0, healthy: bool = False):
        self.path = folder / "last.pt" if folder else None
        self.every, self.healthy = every, healthy
        self.asked = self.waiting = False  # to stop; for the end of a step
        self.saved = self.agreed = time.monotonic()
        self.cost, self.stride = 0.0, 1  # seconds of a save; steps from one agreement to the next
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Saver":
        if self.path and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # ignored, or not Python's to give back
                    self.previous[number] = before
                    signal.signal(number, self._signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.waiting:
            raise KeyboardInterrupt
        self.asked = True

    def during(self, batches: Iterable[T], state: State) -> Iterator[T]:
        """The batches of an epoch; after each step it may save, or save and stop.

        Raises:
            KeyboardInterrupt: the run was asked to stop; it is saved.
        """
        self.waiting = self.path is not None
        left = self.stride
        for batch in batches:
            yield batch
            left -= 1
            if left <= 0 and self.path:
                self._look(state)
                left = self.stride

    def epoch(self, state: State, last: bool) -> None:
        """The end of an epoch: save it, unless that would take too much of the time; the ``last`` is always saved."""
        if not self.path:
            return
        spent = time.monotonic() - self.saved
        good = self.healthy and not state.unhealthy
        due, stop = self._together(last or good or self.cost < max(QUICK, SHARE * spent), self.asked)
        if due or stop:
            self._save(state)
        if good:
            keep(self.path)
        self.waiting = False  # from here on a signal ends the run at once
        if self._together(due, self.asked)[1]:  # it may have come while saving
            if not (due or stop):
                self._save(state)
            raise KeyboardInterrupt

    def _look(self, state: State) -> None:
        now = time.monotonic()
        step = (now - self.agreed) / self.stride
        self.agreed = now
        due, stop = self._together(now - self.saved >= self.every, self.asked)
        if dist.world() > 1:
            self.stride = int(dist.all_max(torch.tensor(min(1000.0, max(1.0, 1 / max(step, 1e-3))))))
        if due or stop:
            self._save(state)
        if stop:
            raise KeyboardInterrupt

    def _together(self, due: bool, stop: bool) -> list[bool]:
        return dist.all_max(torch.tensor([float(due), float(stop)])).bool().tolist()

    def _save(self, state: State) -> None:
        assert self.path
        if not bool(state.losses.isfinite().all()):
            return  # the end of the epoch will say so
        began = time.monotonic()
        whole = copy.copy(state)
        whole.losses = dist.all_sum(state.losses) / dist.world()
        problem = None
        try:
            save(self.path, whole)
        except OSError as error:
            problem = error
        (failed,) = dist.all_max(torch.tensor([float(problem is not None)])).tolist()
        if failed:  # on rank 0; the others must not wait for it
            raise problem or OSError(f"the first process cannot write {self.path}; see what it says")
        self.saved = time.monotonic()
        self.cost = self.saved - began
        if state.step:
            logger.debug("saved in epoch %d, after step %d, in %.2f s", state.epoch + 1, state.step, self.cost)
