"""Stages that follow each other, each a recipe, and hand the backbone on.

A ``Plan`` is everything resolved; ``run`` trains it in order.
"""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deepcluster.methods  # noqa: F401  (registers them)
from deepcluster import dist
from deepcluster.backbones import load_weights, make_backbone
from deepcluster.checkpoint import State
from deepcluster.classifier import Classifier
from deepcluster.log import Bar
from deepcluster.model import Model
from deepcluster.recipe import Recipe, make_recipe
from deepcluster.store import Store
from deepcluster.trainer import Hook, Training, fit


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

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Plan":
        """Back from JSON."""
        stages = tuple(Stage(**s) for s in saved["stages"])
        return cls(**{**{f.name: saved[f.name] for f in fields(cls)}, "stages": stages, "shape": tuple(saved["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


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


def run(
    plan: Plan,
    store: Store,
    out: Path | None = None,
    hooks: Sequence[Hook] = (),
    resume: dict | None = None,
    quiet: bool = False,
    known: Tensor | None = None,
) -> tuple[Model, Recipe, State]:
    """Train the stages one after another; each starts from the backbone of the one before.

    Checkpoints go to ``out``. ``resume`` is a checkpoint as read: stages before it are skipped. ``known`` (N,) are
    labels the user gave to some images, -1 elsewhere, for recipes that are ``supervised``.

    Returns:
        The model, the recipe and the state of the last stage.
    """
    torch.manual_seed(dist.epoch_seed(plan.seed, 0))
    start = replace(plan, weights=None, init_from=None) if resume else plan
    backbone, dim = starting_point(start, *store.statistics)
    best: nn.Module = nn.Identity()  # what a stage that continues begins with
    first = resume["stage"] if resume else 0
    if first >= len(plan.stages):
        raise ValueError(f"the checkpoint is of stage {first + 1}, the plan has {len(plan.stages)}; start anew")
    for number, stage in enumerate(plan.stages):
        recipe = stage.recipe()
        seed = dist.epoch_seed(plan.seed, 1_000_000 * (number + 1))
        torch.manual_seed(seed)
        model = Model(backbone, dim, recipe.heads, recipe.head)
        if recipe.continues:
            model.heads = nn.ModuleList(copy.deepcopy(best) for _ in recipe.heads)
        best = model.heads[0]  # kind and shape are right where the stage was trained before the run stopped
        model = model.to(store.device).to(memory_format=torch.channels_last)
        if number < first:
            continue
        training = Training(
            stage.epochs, stage.batch_size, stage.lr, stage.momentum, stage.weight_decay,
            seed=seed, bf16=plan.bf16, stage=number, out=out,
        )  # fmt: skip
        saved = resume if number == first else None
        n_steps = len(store) // stage.batch_size
        done = saved["epoch"] * n_steps if saved else 0
        with contextlib.closing(Bar(stage.method, stage.epochs * n_steps, done, quiet)) as bar:
            state = fit(model, store, recipe, training, [*hooks, bar.hook], bar, saved, known)
            best = model.heads[state.reported(recipe.rivals)]
    return model, recipe, state
