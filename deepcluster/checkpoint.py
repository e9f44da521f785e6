"""The whole state of a run in one file, written so that a crash cannot corrupt it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deepcluster import dist
from deepcluster.recipe import Targets


@dataclass
class State:
    """Everything that changes while training. Nothing else is needed to resume, not even a random state.

    Attributes:
        model: backbone and heads of the current stage.
        network: the recipe's, around the model: with a teacher, a queue, ...; or the model itself.
        optimizer: of what the network trains.
        targets: labels and partners of the last refresh.
        predicted: (H, N) int32, what each head said of each image when it was last trained on; -1 never.
        head_losses: (H,) mean loss of each head over the last epoch.
        stage: position in the plan.
        epoch: epochs done in this stage.
    """

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    targets: Targets
    predicted: Tensor
    head_losses: Tensor
    stage: int = 0
    epoch: int = 0

    def reported(self, rivals: Sequence[int]) -> int:
        """The head to report: of ``recipe.rivals``, the one with the lowest loss. No label is asked."""
        return min(rivals, key=lambda h: float(self.head_losses[h]))


_MODULES = ("network", "optimizer")
_KEYS = {*_MODULES, "labels", "partners", "predicted", "head_losses", "stage", "epoch"}


def save(path: Path, state: State) -> None:
    """Write ``state`` from rank 0; readers see the old file or the new one, never half.

    Raises:
        OSError: no space, or not writable; the old file is as it was.
    """
    if not dist.is_main():
        return
    saved = {name: getattr(state, name).state_dict() for name in _MODULES}
    saved |= {"labels": state.targets.labels, "partners": state.targets.partners, "predicted": state.predicted}
    saved |= {"head_losses": state.head_losses, "stage": state.stage, "epoch": state.epoch}
    tmp = path.with_suffix(".tmp")
    try:
        with tmp.open("wb") as f:
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
            raise ValueError("it is not a checkpoint of this program")
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {path}; the run did not finish its first epoch: start it anew") from None
    except Exception as error:  # the formats inside raise whatever they like on damaged bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the checkpoint {path}: {reason}; start anew") from error
    return saved


def restore(saved: dict, state: State) -> None:
    """Fill ``state`` in place from what ``read`` returned.

    Raises:
        ValueError: it was written by a run with another plan.
    """
    try:
        for name in _MODULES:
            getattr(state, name).load_state_dict(saved[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # what torch says of another shape
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"the checkpoint does not fit config.json: {reason}; start anew with --overwrite") from error
    state.targets = Targets(saved["labels"], saved["partners"])
    state.predicted, state.head_losses = saved["predicted"].to(state.predicted.device), saved["head_losses"]
    state.stage, state.epoch = saved["stage"], saved["epoch"]
