"""From what the user asked for to a plan.

``resolve`` turns every "auto" into a number, once, from facts about the data that need no label: how many images,
their size and channels, how many clusters, which device.
"""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepcluster import howmany, pretrained, trust, tuning
from deepcluster.backbones import IDENTITY, LEAST, check_name
from deepcluster.batches import steps
from deepcluster.checked import LARGEST
from deepcluster.doctor import cpu_bf16
from deepcluster.log import logger
from deepcluster.recipe import METHODS, OPTIMISER, PAPER, Recipe, hint, make_recipe
from deepcluster.settings import AUTO, BEST, Settings
from deepcluster.sources import Source
from deepcluster.stages import Plan, Stage, attempt, earlier, kept, run, starting_point
from deepcluster.store import Probe, probe

EPOCHS = 23  # of a stage with passes = 1 on 10,000 images; eight times as many images get half as many
TOGETHER = 2.5  # passes of all stages of a plan together, at most
FEW = "iic+sela+sela"  # the default for few kinds of grey images; see docs/results.md
MANY = "simclr+sela"  # and for all else
FIXED = "spectral"  # for heads on a backbone that stays as it is
OVER = 40  # clusters that features are learnt with where their number is to be found, of 1,600 images or more


def image_size(seen: Probe, device: torch.device) -> int:
    """Pixels a side when the user leaves it to us: what the images have, within what the device can train on."""
    side = min(seen.height, seen.width)
    if seen.channels == 1 and side <= 32:  # characters lose little at 16 px, and a third of 28 px's cost is left
        return 16 if device.type == "cpu" else max(16, side)
    return min(side, 48 if device.type == "cpu" else 128)


def choose_size(settings: Settings, source: Source, device: torch.device) -> tuple[int, int]:
    """Pixels a side and channels to decode to; (1, D) for vectors."""
    if source.features is not None:
        return 1, source.features.shape[1]
    seen = probe(source)
    trained = pretrained.size(settings.backbone, settings.weights)
    if settings.init_from and settings.backbone == AUTO:
        spec = earlier(settings.init_from).spec
        trained = spec.shape[-1] if spec.frozen or pretrained.is_own(spec.backbone) else None
    size = trained or max(image_size(seen, device), LEAST.get(settings.backbone, 1))
    size = size if settings.image_size == AUTO else int(settings.image_size)
    if size > LARGEST:
        raise ValueError(f"image_size must be at most {LARGEST}; got {size}")
    logger.info("%d images, about %d x %d px, %s; used at %d px", len(source.names), seen.width, seen.height,
                "grey" if seen.channels == 1 else "colour", size)  # fmt: skip
    return size, seen.channels


def _stages(
    settings: Settings, grey: bool, n_images: int | None = None, frozen: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Methods and their parameters, in order, checked: the paper's where these are asked for, over them the user's."""
    paper, plan = settings.preset == "paper", settings.method
    if plan == BEST or (plan == AUTO and frozen):
        plan = FIXED
    elif plan == AUTO:  # iic wants a twentieth of k squared images a batch
        most = settings.batch_size if n_images is None else _batch_size(n_images, settings.batch_size)
        plan = FEW if grey and (most == AUTO or int(settings.n_clusters) ** 2 <= 20 * int(most)) else MANY
    stages: list[tuple[str, dict[str, Any]]] = []
    used: set[str] = set()
    for name in plan.split("+"):
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; {hint(name, [*METHODS, AUTO])}")
        known = inspect.signature(METHODS[name]).parameters
        params: dict[str, Any] = {"n_clusters": settings.n_clusters}
        if "view" in known:  # photographs are cropped; a crop of a character is another character
            params["view"] = "strong" if grey else "crop"
        if paper:
            params |= {key: value for key, value in PAPER[name].items() if key in known}
        if settings.overcluster != AUTO and "overcluster" in known:
            params["overcluster"] = settings.overcluster
        for key, value in settings.params.items():
            stage, _, short = key.rpartition(".")
            if short == "n_clusters":
                raise ValueError(f"--set cannot change n_clusters; use --n-clusters {value}")
            if short in known and stage in ("", name):
                params[short] = value
                used.add(key)
        stages.append((name, params))
    if unused := [key for key in settings.params if key not in used]:
        known_all = {p for name, _ in stages for p in inspect.signature(METHODS[name]).parameters}
        raise ValueError(f"{plan} has no parameter {unused[0]!r}; {hint(unused[0].rpartition('.')[2], known_all)}")
    if settings.overcluster not in (AUTO, 1) and not any("overcluster" in params for _, params in stages):
        can = ", ".join(sorted(m for m in METHODS if "overcluster" in inspect.signature(METHODS[m]).parameters))
        raise ValueError(f"{plan} has no overclustering heads; leave --overcluster out, or choose from {can}")
    recipes = [make_recipe(name, **params) for name, params in stages]
    for (name, _), recipe, before in zip(stages, recipes, [None, *recipes], strict=False):
        if recipe.continues and (before is None or before.pretext):
            raise ValueError(
                f"{name} goes on with the clusters of another method; let one come right before it, "
                f"e.g. --method simclr+scan+{name}"
            )
    _check_labels(
        plan, [(name, recipe) for (name, _), recipe in zip(stages, recipes, strict=True)], settings.use_labels
    )
    if recipes[-1].pretext:
        raise ValueError(
            f"{stages[-1][0]} learns features but no clusters; let a clustering method follow, "
            f"e.g. --method {stages[-1][0]}+sela"
        )
    return stages


def _check_labels(plan: str, recipes: list[tuple[str, Recipe]], use_labels: bool) -> None:
    """Labels are learnt from where the user says so and the last method can, and nowhere else."""
    name, last = recipes[-1]
    if use_labels and not last.supervised:
        can = [other for other in METHODS if make_recipe(other).supervised]
        before = plan if last.pretext or not any(recipe.supervised for _, recipe in recipes) else "simclr"
        raise ValueError(
            f"--use-labels: {name}, the last method, learns from no labels; these do: {', '.join(sorted(can))}, "
            f"e.g. --method {before}+fixmatch"
        )
    if not use_labels and (learning := [other for other, recipe in recipes if recipe.supervised]):
        raise ValueError(
            f"{learning[0]} learns from a few known labels; give them with --labels FILE.csv --use-labels "
            "(in Python: use_labels=True and fit(X, y)), or choose another --method"
        )


def check(settings: Settings) -> None:
    """Refuse unknown names of methods, parameters and backbones before a single image is read.

    Raises:
        ValueError: with the nearest right name.
    """
    if settings.undecided and settings.params:
        raise ValueError("the methods that are tried have their own defaults: leave --set out, or give --method")
    asked = settings.method
    if asked != AUTO or settings.use_labels:  # the plan of auto is not known before the images
        _stages(_over(settings, OVER**2), grey=True)
    if settings.backbone != AUTO:
        check_name(settings.backbone, settings.weights)
        pretrained.given(settings.backbone)


def _batch_size(n_images: int, asked: int | str, name: str = "", recipe: Recipe | None = None) -> int:
    """Images a step: as asked, else 256, more of many images and where the recipe's loss needs it.

    Raises:
        ValueError: fewer than the recipe's loss means something for.
    """
    usual = min(256 if n_images < 50_000 else 512, max(2, n_images // 4))
    batch = usual if asked == AUTO else int(asked)
    if recipe and asked == AUTO:
        batch = max(usual, min(recipe.least_batch, n_images // 3))  # three steps an epoch are few enough
    if recipe and batch < recipe.least_batch:
        raise ValueError(
            f"{name} with up to {max(recipe.heads)} clusters a head needs batches of at least {recipe.least_batch} "
            f"images; got {batch} of {n_images}: set --batch-size {recipe.least_batch} if there are as many images, "
            "or ask for fewer clusters with --n-clusters or --overcluster 1"
        )
    return batch


def _unlabelled(run: str) -> None:
    """Refuse a run that learnt from labels: in the next one they would have a say that nobody sees.

    Raises:
        ValueError: it did.
    """
    file = Path(run) / "config.json"
    try:
        learnt = file.exists() and json.loads(file.read_text(encoding="utf-8"))["data"].get("use_labels")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError(f"cannot read {file}: it is damaged; give --init-from another run") from None
    if learnt:
        raise ValueError(
            f"{run} learnt from labels (--use-labels), which would enter this run and its scores unsaid; "
            "give --init-from a run without them"
        )


def _over(settings: Settings, n_images: int) -> Settings:
    """With a number of clusters in any case: where it is to be found, more than are likely, by how many images."""
    return settings if settings.n_clusters != AUTO else replace(settings, n_clusters=min(OVER, round(n_images**0.5)))


def resolve(
    settings: Settings, n_images: int, shape: tuple[int, ...], device: torch.device, trial: bool = False
) -> Plan:
    """Turn every "auto" into a number and say what was chosen; not of a ``trial``, whose backbone works already.

    Raises:
        ValueError: fewer images than clusters, a batch larger than the data, an unknown method or parameter.
    """
    auto_k = settings.n_clusters == AUTO
    if auto_k:
        howmany.check(2, None, n_images)
        settings = _over(settings, n_images)
        logger.info("features are learnt with %d clusters; how many there are is found in them", settings.n_clusters)
    k = int(settings.n_clusters)
    if n_images < k:
        fewer = f"use --n-clusters {max(2, n_images // 5)} or fewer" if n_images > 1 else "give more images"
        raise ValueError(f"{n_images} images cannot make {k} clusters; {fewer}")
    backbone, weights = pretrained.resolve(settings.backbone, settings.weights)
    if settings.init_from:
        _unlabelled(settings.init_from)
        if weights:
            raise ValueError(
                f"--backbone {settings.backbone} brings weights, and so does --init-from; give one of them"
            )
    if backbone == AUTO and settings.init_from:
        backbone = earlier(settings.init_from).spec.backbone
    elif backbone == AUTO:
        backbone = "mlp" if len(shape) == 1 else "convnet" if shape[-1] < 64 else "resnet18"
    frozen = tuning.frozen(settings.frozen, settings.tune_last, backbone, weights, settings.init_from, shape)
    fixed = frozen or backbone == IDENTITY
    lr = settings.lr if settings.lr != AUTO else 2e-3 if fixed or backbone in ("convnet", "mlp") else 1e-3
    bf16 = settings.precision == "bf16" or (
        settings.precision == AUTO and (torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_bf16())
    )
    named = _stages(settings, shape[0] == 1, n_images, fixed)
    share = min(1.0, TOGETHER / sum(make_recipe(name, **params).passes for name, params in named))
    stages = []
    for name, params in named:
        defaults = {p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values()}
        params = {**defaults, **params}  # written out, so that a run goes on the same after a default has changed
        hard = {k: v for k, v in PAPER[name].items() if k in OPTIMISER} if settings.preset == "paper" else {}
        if "batch_size" in hard:
            least = make_recipe(name, **params).least_batch
            hard["batch_size"] = min(max(hard["batch_size"], least), n_images)
        hard |= {k: v for k, v in (("lr", settings.lr), ("batch_size", settings.batch_size)) if v != AUTO}
        size = hard.pop("batch_size", AUTO)
        recipe = make_recipe(name, **params)
        own = settings.overcluster != AUTO or {"overcluster", f"{name}.overcluster"} & settings.params.keys()
        while not own and params.get("overcluster", 1) > 1 and recipe.least_batch > _batch_size(n_images, size):
            params["overcluster"] -= 1  # many clusters, or few images
            recipe = make_recipe(name, **params)
        batch = _batch_size(n_images, size, name, recipe)
        auto = min(200, max(10, round(EPOCHS * recipe.passes * share * (10_000 / n_images) ** (1 / 3))))
        epochs = settings.epochs if settings.epochs != AUTO else auto
        stages.append(Stage(name, params, int(epochs), batch, **{"lr": float(lr) * recipe.pace, **hard}))
    plan = Plan(tuple(stages), k, backbone, weights, settings.init_from, tuple(shape), settings.seed,
                bf16 and device.type != "mps" and not fixed, settings.on_collapse, settings.checkpoint_every, frozen,
                settings.tune_last, auto_k)  # fmt: skip
    for stage in plan.stages:
        steps(n_images, stage.batch_size)
    if trial:
        return plan
    attempt(plan)
    said = " then ".join(f"{s.method} for {s.epochs} epochs" for s in plan.stages)
    logger.info(
        "plan: %s; %s on %s %s, batch %d, lr %g, %s, seed %d",
        said, backbone, "x".join(map(str, shape)), "vectors" if len(shape) == 1 else "px", stages[-1].batch_size,
        stages[-1].lr, "bf16" if plan.bf16 else "fp32", plan.seed,
    )  # fmt: skip
    return plan


def asked(plan: Plan) -> dict[str, Any]:
    """The parameters of ``estimator.DeepCluster`` that lead to a plan, as far as a plan shows them.

    Raises:
        ValueError: its backbone is code that the user never asked for.
    """
    if trust.is_code(plan.backbone):  # once it is a parameter, it counts as given by the user
        trust.check(plan.backbone)
    usually = tuning.frozen(AUTO, plan.tune_last, plan.backbone, plan.weights, plan.init_from, plan.shape)
    same = {name: {getattr(stage, name) for stage in plan.stages} for name in ("epochs", "batch_size", "lr")}
    usual = {"n_clusters": plan.n_clusters, "view": "strong" if plan.shape[0] == 1 else "crop"}
    params: dict[str, Any] = {}
    for stage in plan.stages:
        default = {p.name: p.default for p in inspect.signature(METHODS[stage.method]).parameters.values()} | usual
        params |= {f"{stage.method}.{name}": v for name, v in stage.params.items() if v != default.get(name, v)}
    return {
        **{name: found.pop() if len(found) == 1 else AUTO for name, found in same.items()},
        "n_clusters": AUTO if plan.auto_k else plan.n_clusters,
        "method": "+".join(stage.method for stage in plan.stages),
        "backbone": plan.backbone,
        "weights": plan.weights,
        "init_from": plan.init_from,
        "frozen": AUTO if plan.frozen == usually else plan.frozen,
        "tune_last": plan.tune_last,
        "image_size": plan.shape[-1] if len(plan.shape) == 3 else AUTO,
        "random_state": plan.seed,
        "precision": "bf16" if plan.bf16 else "fp32",
        "on_collapse": plan.on_collapse,
        "checkpoint_every": plan.checkpoint_every,
        "params": params or None,
    }


__all__ = ["Plan", "Settings", "Stage", "asked", "attempt", "check", "choose_size", "image_size", "kept", "resolve",
           "run", "starting_point"]  # fmt: skip
