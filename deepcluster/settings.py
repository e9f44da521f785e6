"""What may be asked of a run. Knows nothing of torch, so that ``--help`` is quick."""

import re
import sys
from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
BEST = "best"
BOUNDS = {"n_clusters": (2, 10**6), "overcluster": (1, 10**6), "image_size": (4, 4096), "epochs": (1, 10**9),
          "batch_size": (2, 10**9)}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What may be asked of a run; ``auto`` is derived from the data and printed.

    Attributes:
        method: a name, or a plan such as "simclr+sela"; best: several on frozen features, chosen as ``cluster`` does.
        n_clusters: clusters to report; auto: as many as the features show, told with the evidence.
        preset: default, or paper: every method as its paper has it; epochs stay as they are asked for.
        overcluster: how many times more clusters the extra heads get; auto: the method's own.
        backbone: convnet, resnet18, efficientnet-lite0, torchvision:NAME, a .safetensors or .onnx file; see the README.
        weights: local file to start the backbone from.
        init_from: finished run whose backbone to start from.
        frozen: leave the backbone as it is and train heads on its features; auto: where it is pretrained.
        tune_last: train only the last so many blocks of a pretrained backbone, 0 for none or all.
        image_size: pixels a side.
        epochs: of every stage.
        batch_size: images a step, over all processes.
        lr: highest learning rate.
        seed: of everything random.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16; auto is bf16 where the processor has it.
        on_collapse: warn, stop (exit code 3), or rescue: go back to the last healthy epoch and change one thing.
        checkpoint_every: how often an epoch under way is saved, e.g. 90s, 10m, 2h; epochs are saved at their end, too.
        use_labels: learn from the labels of --labels FILE.csv, by a method that can; n_clusters is their number.
        params: further parameters of the methods, by name, or by stage and name ("sela.n_heads").
    """

    method: str = AUTO
    n_clusters: int | str = 10
    preset: str = "default"
    overcluster: int | str = AUTO
    backbone: str = AUTO
    weights: str | None = None
    init_from: str | None = None
    frozen: bool | str = AUTO
    tune_last: int = 0
    image_size: int | str = AUTO
    epochs: int | str = AUTO
    batch_size: int | str = AUTO
    lr: float | str = AUTO
    seed: int = 0
    device: str = AUTO
    precision: str = AUTO
    on_collapse: str = "warn"
    checkpoint_every: str = "10m"
    use_labels: bool = False
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def undecided(self) -> bool:
        """Whether the method is to be chosen, by trying several."""
        return self.method.split("+") == [BEST]

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            auto = value == AUTO
            if not auto and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name} must be a whole number of at least {low} or auto; got {value!r}")
            if not auto and value > high:
                raise ValueError(f"{name} must be at most {high}; got {value!r}")
        number = isinstance(self.lr, (int, float)) and not isinstance(self.lr, bool)
        if self.lr != AUTO and not (number and 0 < self.lr <= sys.float_info.max):  # type: ignore[operator]
            raise ValueError(f"lr must be a number above 0 or auto; got {self.lr!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1; got {self.seed!r}")
        if self.precision not in (AUTO, "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16; got {self.precision!r}")
        if self.preset not in ("default", "paper"):
            raise ValueError(f"preset must be default or paper; got {self.preset!r}")
        if self.on_collapse not in ("warn", "stop", "rescue"):
            raise ValueError(f"on_collapse must be warn, stop or rescue; got {self.on_collapse!r}")
        seconds(self.checkpoint_every)
        if not (isinstance(self.frozen, bool) or self.frozen == AUTO):
            raise ValueError(f"frozen must be true, false or auto; got {self.frozen!r}")
        if not isinstance(self.tune_last, int) or isinstance(self.tune_last, bool) or self.tune_last < 0:
            raise ValueError(f"tune_last must be a whole number of at least 0; got {self.tune_last!r}")
        if self.frozen is True and self.tune_last:
            raise ValueError("frozen trains no block of the backbone, tune_last some; give one of them")
        for name in ("method", "backbone", "device"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name; got {getattr(self, name)!r}")
        if not isinstance(self.use_labels, bool):
            raise ValueError(f"use_labels must be true or false; got {self.use_labels!r}")
        if self.use_labels and self.n_clusters == AUTO:
            raise ValueError("with use_labels there are as many clusters as labels; set n_clusters to their number")
        if not isinstance(self.params, dict):
            raise ValueError(f"params must be an object of names and values; got {self.params!r}")
        if self.weights and self.init_from:
            raise ValueError("weights and init_from both start the backbone; give one of them")


def seconds(duration: str) -> float:
    """ "90s", "10m", "2h" or "45" -> seconds.

    Raises:
        ValueError: it is no such duration, or not above 0.
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", duration) if isinstance(duration, str) else None
    length = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0
    if length <= 0:
        raise ValueError(f"checkpoint_every must be a time above 0, such as 90s, 10m or 2h; got {duration!r}")
    return length
