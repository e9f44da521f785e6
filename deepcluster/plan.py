"""From what the user asked for to stages that follow each other and hand the backbone on.

``resolve`` turns every "auto" into a number, once, from facts about the data that need no label: how many images,
their size and channels, how many clusters, which device. ``run`` trains the stages in order.
"""

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deepcluster.methods  # noqa: F401  (registers them)
from deepcluster import dist
from deepcluster.backbones import BACKBONES, load_weights, make_backbone
from deepcluster.batches import steps
from deepcluster.checkpoint import State
from deepcluster.classifier import Classifier
from deepcluster.doctor import cpu_bf16
from deepcluster.log import Bar, logger
from deepcluster.model import Model
from deepcluster.recipe import METHODS, Recipe, hint, make_recipe
from deepcluster.settings import AUTO, Settings
from deepcluster.store import Probe, Store
from deepcluster.trainer import Hook, Training, fit

EPOCHS = 17  # of a stage with passes = 1 on 10,000 images; four times as many images get half as many
PLANS = {True: "iic+sela+sela", False: "simclr+sela"}  # the default for grey and for colour images; see docs/results.md


@dataclass(frozen=True)
class Stage:
    """One recipe and how long it trains."""

    method: str
    params: dict[str, Any]
    epochs: int
    batch_size: int
    lr: float

    def recipe(self) -> Recipe:
        """Built anew from its name and parameters."""
        return make_recipe(self.method, **self.params)


@dataclass(frozen=True)
class Plan:
    """Everything resolved: with the images, enough to repeat the run. Written to config.json."""

    stages: tuple[Stage, ...]
    n_clusters: int
    backbone: str
    weights: str | None
    init_from: str | None
    shape: tuple[int, ...]  # (C, H, W) of images, (D,) of vectors
    seed: int
    bf16: bool

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Plan":
        """Back from JSON."""
        stages = tuple(Stage(**s) for s in saved["stages"])
        return cls(**{**{f.name: saved[f.name] for f in fields(cls)}, "stages": stages, "shape": tuple(saved["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def image_size(seen: Probe, device: torch.device) -> int:
    """Pixels a side when the user leaves it to us: what the images have, within what the device can train on."""
    side = min(seen.height, seen.width)
    if seen.channels == 1 and side <= 32:  # characters lose little at 16 px, and a third of 28 px's cost is left
        return 16 if device.type == "cpu" else max(16, side)
    return min(side, 48 if device.type == "cpu" else 128)


def _stages(settings: Settings, grey: bool) -> list[tuple[str, dict[str, Any]]]:
    """Methods and their parameters, in order, checked."""
    plan = {AUTO: PLANS[grey]}.get(settings.method, settings.method)
    stages: list[tuple[str, dict[str, Any]]] = []
    used: set[str] = set()
    for name in plan.split("+"):
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; {hint(name, [*METHODS, AUTO])}")
        known = inspect.signature(METHODS[name]).parameters
        params: dict[str, Any] = {"n_clusters": settings.n_clusters}
        if settings.overcluster != AUTO and "overcluster" in known:
            params["overcluster"] = settings.overcluster
        if "view" in known:  # photographs are cropped; a crop of a character is another character
            params["view"] = "strong" if grey else "crop"
        for key, value in settings.params.items():
            stage, _, short = key.rpartition(".")
            if short == "n_clusters":
                raise ValueError(f"--set cannot change n_clusters; use --n-clusters {value}")
            if short in known and stage in ("", name):
                params[short] = value
                used.add(key)
        make_recipe(name, **params)
        stages.append((name, params))
    if unused := [key for key in settings.params if key not in used]:
        known_all = {p for name, _ in stages for p in inspect.signature(METHODS[name]).parameters}
        raise ValueError(f"{plan} has no parameter {unused[0]!r}; {hint(unused[0].rpartition('.')[2], known_all)}")
    if make_recipe(stages[-1][0], **stages[-1][1]).pretext:
        raise ValueError(
            f"{stages[-1][0]} learns features but no clusters; let a clustering method follow, "
            f"e.g. --method {stages[-1][0]}+sela"
        )
    return stages


def check(settings: Settings) -> None:
    """Refuse unknown names of methods, parameters and backbones before a single image is read.

    Raises:
        ValueError: with the nearest right name.
    """
    if settings.method not in (AUTO,):
        _stages(settings, grey=True)
    known = [AUTO, *BACKBONES]
    if settings.backbone not in known and settings.backbone.partition(":")[0] not in ("torchvision", "timm"):
        allowed = [*known, "torchvision:NAME", "timm:NAME"]
        raise ValueError(f"unknown backbone {settings.backbone!r}; {hint(settings.backbone, allowed)}")


def starting_point(plan: Plan, mean: Tensor | None = None, std: Tensor | None = None) -> tuple[nn.Module, int]:
    """The backbone before training, and its feature dimension.

    Raises:
        ValueError: the backbone cannot take these images, or the weights to start from do not fit it.
    """
    backbone, dim = make_backbone(plan.backbone, plan.shape, mean, std)
    if plan.weights:
        load_weights(backbone, plan.weights)
    if plan.init_from:
        before = Classifier.load(Path(plan.init_from) / "model", torch.device("cpu"))
        own, other = backbone.state_dict(), before.backbone.state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in other.items()}:
            was, now = ("x".join(map(str, shape)) for shape in (before.spec.shape, plan.shape))
            raise ValueError(
                f"{plan.init_from} holds {before.spec.backbone} for {was} images, this run needs "
                f"{plan.backbone} for {now}; start from a run with the same --backbone and channels"
            )
        kept = ("0.mean", "0.std")  # of the new images
        backbone.load_state_dict({k: own[k] if k in kept else other[k] for k in own})
    return backbone, dim


def _try(plan: Plan) -> None:
    """Refuse a backbone that does not turn these images into one feature vector each, before anything is written."""
    backbone, dim = starting_point(plan)
    try:
        with torch.no_grad():
            out = backbone(torch.zeros(2, *plan.shape))
        if not isinstance(out, Tensor) or out.shape != (2, dim):
            raise TypeError(f"it gives {tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__}")
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:  # whatever its code raises
        shape = "x".join(map(str, plan.shape))
        raise ValueError(
            f"the backbone {plan.backbone} does not work on {shape} images: {str(error).splitlines()[0]}; "
            "try another --image-size or --backbone"
        ) from error


def resolve(settings: Settings, n_images: int, shape: tuple[int, ...], device: torch.device) -> Plan:
    """Turn every "auto" into a number and say what was chosen.

    Raises:
        ValueError: fewer images than clusters, a batch larger than the data, an unknown method or parameter.
    """
    k = settings.n_clusters
    if n_images < k:
        fewer = f"use --n-clusters {max(2, n_images // 5)} or fewer"
        raise ValueError(f"{n_images} images cannot make {k} clusters; {fewer}")
    backbone = settings.backbone
    if backbone == AUTO and settings.init_from:
        backbone = Classifier.load(Path(settings.init_from) / "model", torch.device("cpu")).spec.backbone
    elif backbone == AUTO:
        backbone = "mlp" if len(shape) == 1 else "convnet" if shape[-1] < 64 else "resnet18"
    batch = settings.batch_size
    if batch == AUTO:
        batch = min(256 if n_images < 50_000 else 512, max(2, n_images // 4))
    lr = settings.lr if settings.lr != AUTO else 2e-3 if backbone in ("convnet", "mlp") else 1e-3
    bf16 = settings.precision == "bf16" or (
        settings.precision == AUTO and (torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_bf16())
    )
    stages = []
    for name, params in _stages(settings, grey=shape[0] == 1):
        defaults = {p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values()}
        params = {**defaults, **params}  # written out, so that a run goes on the same after a default has changed
        recipe = make_recipe(name, **params)
        auto = min(200, max(10, round(EPOCHS * recipe.passes * (10_000 / n_images) ** 0.5)))
        epochs = settings.epochs if settings.epochs != AUTO else auto
        stages.append(Stage(name, params, int(epochs), int(batch), float(lr)))
    plan = Plan(tuple(stages), k, backbone, settings.weights, settings.init_from, tuple(shape), settings.seed,
                bf16 and device.type != "mps")  # fmt: skip
    for stage in plan.stages:
        steps(n_images, stage.batch_size)
    _try(plan)
    said = " then ".join(f"{s.method} for {s.epochs} epochs" for s in plan.stages)
    logger.info(
        "plan: %s; %s on %s %s, batch %d, lr %g, %s, seed %d",
        said, backbone, "x".join(map(str, shape)), "vectors" if len(shape) == 1 else "px", batch, lr,
        "bf16" if plan.bf16 else "fp32", plan.seed,
    )  # fmt: skip
    return plan


def run(
    plan: Plan,
    store: Store,
    out: Path | None = None,
    hooks: Sequence[Hook] = (),
    resume: dict | None = None,
    quiet: bool = False,
) -> tuple[Model, Recipe, State]:
    """Train the stages one after another; each starts from the backbone of the one before.

    Checkpoints go to ``out``. ``resume`` is a checkpoint as read: stages before it are skipped.

    Returns:
        The model, the recipe and the state of the last stage.
    """
    torch.manual_seed(dist.epoch_seed(plan.seed, 0))
    start = replace(plan, weights=None, init_from=None) if resume else plan
    backbone, dim = starting_point(start, *store.statistics)
    first = resume["stage"] if resume else 0
    if first >= len(plan.stages):
        raise ValueError(f"the checkpoint is of stage {first + 1}, the plan has {len(plan.stages)}; start anew")
    for number, stage in enumerate(plan.stages):
        recipe = stage.recipe()
        seed = dist.epoch_seed(plan.seed, 1_000_000 * (number + 1))
        torch.manual_seed(seed)
        model = Model(backbone, dim, recipe.heads, recipe.head).to(store.device).to(memory_format=torch.channels_last)
        if number < first:
            continue
        training = Training(stage.epochs, stage.batch_size, stage.lr, seed=seed, bf16=plan.bf16, stage=number, out=out)
        saved = resume if number == first else None
        n_steps = len(store) // stage.batch_size
        done = saved["epoch"] * n_steps if saved else 0
        with contextlib.closing(Bar(stage.method, stage.epochs * n_steps, done, quiet)) as bar:
            state = fit(model, store, recipe, training, [*hooks, bar.hook], bar, saved)
    return model, recipe, state


__all__ = [
    "Plan",
    "Settings",
    "Stage",
    "check",
    "image_size",
    "resolve",
    "run",
    "starting_point",
]
