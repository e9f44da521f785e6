"""What a method is: a Recipe, and the few words it is written in.

Shapes: V views, B images of a batch, N images in all, H heads, K clusters, D features, P partners.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepcluster.model import Head, Model
from deepcluster.views import VIEWS


@dataclass(frozen=True)
class Clock:
    """Where training stands. Schedules are pure functions of it, so resuming is free."""

    epoch: int
    epochs: int
    step: int = 0
    steps: int = 1

    @property
    def progress(self) -> float:
        """Fraction of training done: 0 at the first batch, < 1 at the last."""
        return (self.epoch + self.step / self.steps) / self.epochs


@dataclass(frozen=True)
class Every:
    """Due at epochs 0, n, 2n, ..."""

    epochs: int = 1

    def due(self, clock: Clock) -> bool:
        return clock.epoch % self.epochs == 0

    def __str__(self) -> str:
        return {1: "every epoch", sys.maxsize: "once"}.get(self.epochs, f"every {self.epochs} epochs")


@dataclass(frozen=True)
class Never:
    """Not due, ever."""

    def due(self, clock: Clock) -> bool:
        return False

    def __str__(self) -> str:
        return "never"


@dataclass(frozen=True)
class Spread:
    """Due ``times`` times, dense at first: SeLa's schedule, rounded to whole epochs."""

    times: int
    power: float = 2.0

    def due(self, clock: Clock) -> bool:
        return clock.epoch in {int(clock.epochs * (i / self.times) ** self.power) for i in range(self.times)}

    def __str__(self) -> str:
        return f"{self.times} times, most of them early"


once = Every(sys.maxsize)


@dataclass(frozen=True)
class Targets:
    """What the last refresh decided about each of the N training images; the same on every rank.

    Attributes:
        labels: (H, N) int32, pseudo-class of each image under each head; -1 unlabelled.
        partners: (N, P) int64, images that should share a cluster with image i.
            The default, i itself, makes "a partner" mean "another augmentation".
    """

    labels: Tensor
    partners: Tensor

    @classmethod
    def unlabelled(cls, n_heads: int, n_images: int) -> "Targets":
        """No labels yet, and every image its own partner."""
        return cls(torch.full((n_heads, n_images), -1, dtype=torch.int32), torch.arange(n_images)[:, None])


class Assigner(Protocol):
    """Turns the features of the whole training set into targets."""

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        """features: this rank's contiguous shard (n, D) float32 -> targets of all N images, alike on every rank."""
        ...


class Objective(Protocol):
    """Scores one head on one batch. It remembers nothing: a queue or a teacher is in the recipe's network."""

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        """logits: (V, B, K) of one head; labels: (B,) int, -1 unlabelled -> scalar loss."""
        ...


class HeadPolicy(Protocol):
    """What the heads keep when labels were refreshed."""

    def __call__(
        self, heads: Sequence[Head], optimizer: torch.optim.Optimizer, features: Tensor, targets: Targets
    ) -> None: ...


def plain(model: Model) -> nn.Module:
    """The network of methods whose batch goes through the model and nothing else."""
    return model


def keep_targets(features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
    """The assigner of methods that have none."""
    return previous


def keep_heads(heads: Sequence[Head], optimizer: torch.optim.Optimizer, features: Tensor, targets: Targets) -> None:
    """New labels continue the old clusters: leave the heads as they are."""


def reset_heads(heads: Sequence[Head], optimizer: torch.optim.Optimizer, features: Tensor, targets: Targets) -> None:
    """Cluster ids mean nothing across refreshes: forget weights and their momentum."""
    for head in heads:
        for part in head.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        for p in head.parameters():
            optimizer.state.pop(p, None)


@dataclass(frozen=True)
class Recipe:
    """A deep-clustering method, as data.

    Attributes:
        heads: clusters per head. Heads as wide as heads[0] compete to be reported: the one with the
            lowest loss is. Wider heads overcluster.
        objective: loss of one head on one batch; a tuple has one for each head.
        views: augmentation of each view, names in ``views.VIEWS``; view 0 is the image, others its partner.
        assigner: how targets are made, whenever ``refresh`` is due.
        refresh: how often.
        label_views: views whose mean feature the assigner sees.
        reassign: what happens to the heads after a refresh.
        balanced: draw images uniformly over the pseudo-classes of the last head.
        head: builds one head from (feature dim, clusters); a tuple has one for each head.
        network: what stands around the model while it trains and lives in State: a teacher, a queue, an adversary.
            Called with the views, it returns H tensors (V', B, K): the views' logits first, then its own.
        pretext: learns features only, its heads are no clusters; another recipe has to follow.
        continues: every head starts as a copy of the one the stage before reported, which so has to be there.
        supervised: share of each batch drawn from images the user labelled; other recipes never see these labels.
        least_batch: the smallest global batch that the loss means something for.
        passes: how long ``epochs auto`` trains, relative to other methods.
        pace: the learning rate ``lr auto`` gives, relative to other methods.
    """

    heads: tuple[int, ...]
    objective: Objective | tuple[Objective, ...]
    views: tuple[str, ...] = ("strong",)
    assigner: Assigner = keep_targets
    refresh: Every | Never | Spread = field(default_factory=Never)
    label_views: tuple[str, ...] = ("clean",)
    reassign: HeadPolicy = keep_heads
    balanced: bool = False
    head: Callable[[int, int], Head] | tuple[Callable[[int, int], Head], ...] = nn.Linear
    network: Callable[[Model], nn.Module] = plain
    pretext: bool = False
    continues: bool = False
    supervised: float = 0.0
    least_batch: int = 2
    passes: float = 1.0
    pace: float = 1.0

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The loss of each head."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,) * len(self.heads)

    def losses(self, logits: Sequence[Tensor], labels: Tensor, clock: Clock) -> Tensor:
        """(H,) the loss of each head: H tensors (V, B, K), (H, B) labels."""
        terms = zip(self.objectives, logits, labels, strict=True)
        return torch.stack([objective(z, y, clock) for objective, z, y in terms])

    @property
    def head_kinds(self) -> tuple[Callable[[int, int], Head], ...]:
        """What builds each head."""
        return self.head if isinstance(self.head, tuple) else (self.head,) * len(self.heads)

    @property
    def rivals(self) -> list[int]:
        """The heads that compete to be reported: made, as wide and trained as the first."""
        first = (self.heads[0], self.head_kinds[0], self.objectives[0])
        return [
            h for h, own in enumerate(zip(self.heads, self.head_kinds, self.objectives, strict=True)) if own == first
        ]

    def __post_init__(self) -> None:
        for name in ("objective", "head"):
            if isinstance(given := getattr(self, name), tuple) and len(given) != len(self.heads):
                raise ValueError(f"{len(self.heads)} heads need as many entries of {name}; got {len(given)}")
        if not 0 <= self.supervised < 1:
            raise ValueError(f"supervised is a share of the batch, in [0, 1); got {self.supervised}")
        for view in (*self.views, *self.label_views):
            if view not in VIEWS:
                raise ValueError(f"unknown view {view!r}; {hint(view, VIEWS)}")
        if (self.assigner is keep_targets) != isinstance(self.refresh, Never):
            raise ValueError(f"assigner and refresh go together; got {self.assigner} with {self.refresh}")


METHODS: dict[str, Callable[..., Recipe]] = {}
PAPER: dict[str, dict[str, Any]] = {}  # of each method: what ``--preset paper`` changes
DIVIDES = {"temperature", "epsilon", "alpha"}  # parameters that may not be 0
SHARES = {"least", "threshold", "uda_threshold", "begin", "end", "ramp"}  # parameters in [0, 1]
MOST = 10**6  # of anything that is counted: heads, views, clusters are made as often as they are asked for
LARGEST = sys.float_info.max  # an int may be larger, and is no float then
OPTIMISER = ("lr", "momentum", "weight_decay", "batch_size")  # what a paper may fix besides a method's own parameters


def method(fn: Callable[..., Recipe] | None = None, /, **paper: Any) -> Any:
    """Register ``fn`` under its own name: ``@method``, or ``@method(lr=0.05, heads="reset")``.

    The function's keyword arguments are its configuration. ``paper`` is what ``--preset paper`` sets instead of the
    defaults: some of these, and some of ``OPTIMISER`` (a momentum means SGD).
    """
    if fn is None:
        return partial(method, **paper)
    name, known = fn.__name__, {*inspect.signature(fn).parameters, *OPTIMISER}
    if name in METHODS:
        raise ValueError(f"method {name!r} is already registered by {METHODS[name].__module__}")
    if wrong := sorted(set(paper) - known):
        raise ValueError(f"{name} has no parameter {wrong[0]!r} for its paper's preset; {hint(wrong[0], known)}")
    METHODS[name], PAPER[name] = fn, paper
    return fn


def make_recipe(name: str, /, **kwargs: object) -> Recipe:
    """Look a method up by name and check its arguments before calling it.

    Raises:
        ValueError: unknown method or parameter, answered with the nearest right one; a value of the wrong type, or
            below 1 (counts; 2 for n_clusters) or 0 (other numbers).
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {hint(name, METHODS)}")
    known = inspect.signature(METHODS[name]).parameters
    for key, value in kwargs.items():
        if key not in known:
            raise ValueError(f"{name} has no parameter {key!r}; {hint(key, known)}")
        kind = type(known[key].default)
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"{name}: {key} must be {kind.__name__} (default {known[key].default!r}); got {value!r}")
        if (key in DIVIDES and value == 0) or (key in SHARES and value > 1):  # type: ignore[operator]
            allowed = "above 0" if key in DIVIDES else "at most 1"
            raise ValueError(f"{name}: {key} must be {allowed} (default {known[key].default!r}); got {value!r}")
        least, high = {int: 2 if key == "n_clusters" else 1, float: 0}.get(kind), MOST if kind is int else LARGEST
        if least is not None and not least <= value <= high:  # type: ignore[operator]
            most = f" and at most {MOST}" if kind is int and value > MOST else ""  # type: ignore[operator]
            raise ValueError(
                f"{name}: {key} must be at least {least}{most} (default {known[key].default!r}); got {value!r}"
            )
    return METHODS[name](**kwargs)


def hint(word: str, options: Iterable[str]) -> str:
    """What a misspelt ``word`` was probably meant to be, or else all there is."""
    options = sorted(options)
    close = get_close_matches(word, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(options)}"
