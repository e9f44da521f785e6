"""Stages that follow each other, each a recipe, and hand the backbone on.

A ``Plan`` is everything resolved; ``run`` trains it in order.
"""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deepcluster.methods  # noqa: F401  (registers them)
from deepcluster import checkpoint, dist, pretrained, sentinel
from deepcluster.backbones import load_weights, make_backbone
from deepcluster.checkpoint import State
from deepcluster.classifier import Classifier
from deepcluster.frozen import WIDTH, Frozen, Progress, extract, vectors, width
from deepcluster.log import Bar, Metrics, logger
from deepcluster.model import Model
from deepcluster.recipe import Recipe, make_recipe
from deepcluster.sentinel import Collapse
from deepcluster.settings import seconds
from deepcluster.store import Store
from deepcluster.trainer import Hook, Training, fit
from deepcluster.tuning import tuned
from deepcluster.views import VIEWS


@dataclass(frozen=True)
class Stage:
    """One recipe and how long it trains."""

    method: str
    params: dict[str, Any]
    epochs: int
    batch_size: int
    lr: float
    momentum: float | None = None
    weight_decay: float = 1e-4

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
    on_collapse: str = "warn"
    checkpoint_every: str = "10m"
    frozen: bool = False
    tune_last: int = 0
    auto_k: bool = False  # nobody said how many: n_clusters are more than enough, and are cut afterwards

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Plan":
        """Back from JSON."""
        stages = tuple(Stage(**s) for s in saved["stages"])
        known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved or f.default is MISSING}  # or older
        return cls(**{**known, "stages": stages, "shape": tuple(saved["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def earlier(run: str) -> Classifier:
    """The model of a run to start from; raises as ``Classifier.load``."""
    return Classifier.load(Path(run) / "model", torch.device("cpu"))


def starting_point(plan: Plan, mean: Tensor | None = None, std: Tensor | None = None) -> tuple[nn.Module, int]:
    """The backbone before training, and its feature dimension; ``mean`` and ``std`` are of the images.

    Raises:
        ValueError: the backbone cannot take these images, or the weights to start from do not fit it.
    """
    old = earlier(plan.init_from) if plan.init_from else None
    normal = pretrained.normalisation(plan.backbone, plan.weights, plan.shape)
    if old is not None:
        learnt = old.backbone.network if isinstance(old.backbone, Frozen) else old.backbone
        was: Any = learnt[0]  # type: ignore[index]
        normal = (was.mean, was.std) if pretrained.came_with(old.spec.backbone, was.mean) else normal
    mean, std = normal or (mean, std)
    backbone, dim = make_backbone(plan.backbone, plan.shape, mean, std, follows=bool(plan.weights or old))
    if plan.weights:
        load_weights(backbone, plan.weights, plan.backbone)
    if old is not None:
        own, other = backbone.state_dict(), learnt.state_dict()
        shapes = [{k: v.shape for k, v in one.items() if v.dtype != torch.uint8} for one in (own, other)]  # ONNX: bytes
        if shapes[0] != shapes[1]:
            was_of, now = ("x".join(map(str, shape)) for shape in (old.spec.shape, plan.shape))
            raise ValueError(
                f"{plan.init_from} holds {old.spec.backbone} for {was_of} images, this run needs "
                f"{plan.backbone} for {now}; start from a run with the same --backbone and channels"
            )
        kept = ("0.mean", "0.std")  # of the new images
        backbone.load_state_dict({k: own[k] if k in kept else other[k] for k in own})
    return backbone, dim


def _again(plan: Plan, saved: dict, mean: Tensor, std: Tensor) -> tuple[nn.Module, int]:
    """The backbone to load a checkpoint into: what the run started from need not be there any more."""
    network = saved["network"] if isinstance(saved.get("network"), dict) else {}
    own = ("backbone.0.mean", "backbone.network.0.mean")
    seen = next((v for k, v in network.items() if str(k).endswith(own)), mean)
    if isinstance(seen, Tensor) and seen.shape == (3,) and plan.shape[0] == 1:  # grey images, seen as colour
        mean, std = mean.expand(3).clone(), std.expand(3).clone()
    return make_backbone(plan.backbone, plan.shape, mean, std, follows=True)


def _seen(plan: Plan) -> list[Tensor]:
    """Two blank images as they are, and as the views show them: one batch for each shape.

    Raises:
        ValueError: a method has views, such as rotations, that this kind of data cannot be seen through.
    """
    blank = torch.zeros(2, WIDTH) if plan.frozen else torch.zeros(2, *plan.shape)  # a fixed network sees no view
    seen = {blank.shape: blank}
    for stage in plan.stages:
        recipe = stage.recipe()
        for view in dict.fromkeys((*recipe.views, *recipe.label_views)):
            try:
                images = VIEWS[view](blank, torch.Generator())
            except ValueError as error:
                raise ValueError(f"{stage.method}: {error}") from error
            seen[images.shape] = images
    return [torch.zeros(2, *plan.shape)] if plan.frozen else list(seen.values())


def attempt(plan: Plan) -> None:
    """Refuse a backbone that does not turn all views into one feature vector each, before anything is written."""
    views = _seen(plan)
    backbone, dim = starting_point(plan)
    if plan.tune_last:
        tuned(backbone, plan.tune_last)
    try:
        for images in views:
            with torch.no_grad():
                out = backbone(images)
            if not isinstance(out, Tensor) or out.shape != (2, dim):
                raise TypeError(f"it gives {tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__}")
            if not out.isfinite().all():
                raise ValueError("its features are NaN or infinite, so its weights are damaged")
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:  # whatever its code raises
        shape = "x".join(map(str, images.shape[1:]))
        named = plan.weights if plan.backbone.startswith("onnx:") and plan.weights else plan.backbone
        raise ValueError(
            f"the backbone {named} does not work on {shape} images: {str(error).splitlines()[0]}; "
            "try another --image-size or --backbone"
        ) from error


def kept(plan: Plan, store: Store, saved: dict | None, progress: Progress) -> tuple[Frozen, Store]:
    """The pretrained network of a frozen run, and a store of what its heads see of the images of ``store``.

    ``saved``: the checkpoint of a run that is gone on with, whose network and map these are.

    Raises:
        ValueError: the network gives features that are no numbers.
    """
    seen = store.statistics
    network, dim = _again(plan, saved, *seen) if saved else starting_point(plan, *seen)
    frozen = Frozen(network, dim, width(dim))
    if saved:
        state = saved["network"]
        prefix = min((k for k in state if str(k).endswith("backbone.map_mean")), key=len, default="map_mean")[:-8]
        frozen.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    frozen = frozen.to(store.device).to(memory_format=torch.channels_last)
    features = extract(frozen, store, plan.backbone, progress)
    if not saved:
        frozen.fit(features)
    return frozen, vectors(frozen, store, features)


def run(
    plan: Plan,
    store: Store,
    out: Path | None = None,
    hooks: Sequence[Hook] = (),
    resume: dict | None = None,
    quiet: bool = False,
    known: Tensor | None = None,
    frozen: Frozen | None = None,
) -> tuple[Model, Recipe, State]:
    """Train the stages one after another; each starts from the backbone of the one before.

    ``frozen``: the backbone, if it is not trained; ``store`` then holds what it gives.

    Checkpoints go to ``out``. ``resume`` is a checkpoint as read: stages before it are skipped. ``known`` (N,) are
    labels the user gave to some images, -1 elsewhere, for recipes that are ``supervised``. A collapse is rescued by
    going back to the last healthy epoch, with one change more, if the plan says so.

    Returns:
        The model, the recipe and the state of the last stage.
    """
    rescues: dict[int, list[str]] = {resume["stage"]: resume["rescues"]} if resume else {}
    if out and resume and plan.on_collapse != "warn" and _healthy(resume, out):
        checkpoint.keep(out / "last.pt")  # the run was killed before it could, or did not have to until now
    while True:
        number = resume["stage"] if resume else 0
        if number >= len(plan.stages):
            raise ValueError(f"the checkpoint is of stage {number + 1}, the plan has {len(plan.stages)}; start anew")
        try:
            return _run(plan, store, out, hooks, resume, quiet, known, rescues, frozen)
        except _Failed as failed:
            made = rescues.setdefault(failed.stage, [])
            change = sentinel.change(failed.cause, made)
            if plan.on_collapse != "rescue" or out is None or change is None:
                raise failed.cause from None
            made.append(change)
            dist.barrier()  # so that no rank reads while rank 0 writes
            resume = checkpoint.read(out / "healthy.pt") if (out / "healthy.pt").exists() else None
            stage, epoch = (resume["stage"], resume["epoch"]) if resume else (0, 0)
            logger.warning("rescue %d of %d: %s; back to epoch %d of stage %d, and on with %s", len(made),
                           sentinel.RESCUES, failed.cause, epoch, stage + 1, sentinel.CHANGES[change])  # fmt: skip
            for hook in hooks:
                if isinstance(hook, Metrics):
                    hook.rewind(stage if resume else -1, epoch)


def _healthy(resume: dict, out: Path) -> bool:
    """Whether a checkpoint is of the end of a healthy epoch, or of within one where there is no better."""
    return not resume["unhealthy"] and not (resume["step"] and (out / "healthy.pt").exists())


class _Failed(Exception):
    """A stage failed in a way that may be rescued."""

    def __init__(self, stage: int, cause: Collapse | FloatingPointError):
        super().__init__(str(cause))
        self.stage, self.cause = stage, cause


def _run(
    plan: Plan, store: Store, out: Path | None, hooks: Sequence[Hook], resume: dict | None, quiet: bool,
    known: Tensor | None, rescues: dict[int, list[str]], frozen: Frozen | None,
) -> tuple[Model, Recipe, State]:  # fmt: skip
    torch.manual_seed(dist.epoch_seed(plan.seed, 0))
    backbone: nn.Module
    if frozen:
        backbone, dim = frozen, len(frozen.map_weight)
    else:
        seen = store.statistics
        backbone, dim = _again(plan, resume, *seen) if resume else starting_point(plan, *seen)
        backbone = tuned(backbone, plan.tune_last) if plan.tune_last else backbone
    best: nn.Module = nn.Identity()  # what a stage that continues begins with
    first = resume["stage"] if resume else 0
    for number, stage in enumerate(plan.stages):
        recipe, changes = stage.recipe(), rescues.get(number, [])
        seed = dist.epoch_seed(plan.seed, 1_000_000 * (number + 1) + 100_000 * changes.count("seed"))
        torch.manual_seed(seed)
        model = Model(backbone, dim, recipe.heads, recipe.head)
        if recipe.continues:
            model.heads = nn.ModuleList(copy.deepcopy(best) for _ in recipe.heads)
        best = model.heads[0]  # kind and shape are right where the stage was trained before the run stopped
        model = model.to(store.device).to(memory_format=torch.channels_last)
        if number < first:
            continue
        training = Training(
            stage.epochs, stage.batch_size, stage.lr / 10 ** changes.count("lr"), stage.momentum, stage.weight_decay,
            seed=seed, bf16=plan.bf16, stage=number, out=out, checkpoint_every=seconds(plan.checkpoint_every),
            keep_healthy=plan.on_collapse != "warn", rescues=tuple(changes),
        )  # fmt: skip
        saved = resume if number == first else None
        n_steps = len(store) // stage.batch_size
        done = saved["epoch"] * n_steps + saved["step"] if saved else 0
        with contextlib.closing(Bar(stage.method, stage.epochs * n_steps, done, quiet)) as bar:
            try:
                state = fit(model, store, recipe, training, [*hooks, bar.hook], bar, saved, known)
            except (Collapse, FloatingPointError) as error:
                raise _Failed(number, error) from error
            best = model.heads[state.reported(recipe.rivals)]
    return model, recipe, state
