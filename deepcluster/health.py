"""What can be known of training without labels: how an epoch went, and in plain words what is wrong with it.

Deep clustering fails in silence: all images end up in one cluster, or all features become one, while the loss looks
fine. Accuracy hides it, too: one cluster of everything scores 0.6 where one kind of image makes up 60 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepcluster import dist, metrics
from deepcluster.batches import seen
from deepcluster.checkpoint import State
from deepcluster.model import Model
from deepcluster.recipe import Clock, Recipe
from deepcluster.store import Store

LOOKED_AT = 128  # images whose features are measured: some milliseconds an epoch
SAME = 1e-10  # a variance below this part of the mean square is rounding
ONE = 0.95  # share of the images in one cluster that is too much
STUCK = 0.98  # of the loss of a network that tells no image from another
BEGUN = 100  # steps after which, and half of a stage, a loss has to be below that
FEW = 10  # images a cluster that are to be expected
CLUSTERS = ("active", "largest_share", "entropy", "effective", "nmi_previous", "ari_previous")

Health = dict[str, Any]


@dataclass(frozen=True)
class Symptom:
    """What is wrong, what to do about it, and which change might help: "lr" (lower), "seed" (begin differently)."""

    what: str
    advice: str
    change: str | None = None


def examine(
    model: Model, store: Store, recipe: Recipe, state: State, clock: Clock, before: Tensor, loss: float, bf16: bool
) -> Health:
    """How the epoch went; counts in ``state.unhealthy`` how many in a row had a symptom. Nothing else is changed.

    Predictions are those the reported head made while it was trained, so they cost nothing and lag a little behind.

    Returns:
        rank: effective number of directions (Roy & Vetterli 2007) in which the features of some images differ, 0 if
        they are all the same; flat_loss: the loss of a network that says the same of all images (ln K for
        pseudo-labels, ln(2B - 1) for SimCLR, 0 for IIC); symptom: what is wrong, or None. Unless the recipe is a
        pretext, whose heads have no clusters, also what ``metrics.health`` has, and nmi_previous and ari_previous:
        agreement with what was predicted in the epoch ``before`` (H, N), None after the first.
    """
    names = ("rank", "flat_loss") + (() if recipe.pretext else CLUSTERS)
    figures = torch.full((len(names),), math.nan, dtype=torch.float64)
    if dist.is_main():  # the others are told: they might round differently, and then do something else
        measured = {"rank": effective_rank(_features(model, store, bf16)), "flat_loss": state.flat_loss}
        if not recipe.pretext:
            head = state.reported(recipe.rivals)
            measured |= _clusters(state.predicted[head].cpu(), before[head].cpu(), recipe.heads[head])
        figures = torch.tensor([measured[name] for name in names], dtype=torch.float64)
    found: Health = dict(zip(names, dist.from_main(figures).tolist(), strict=True))
    found |= {name: int(found[name]) for name in ("active",) if name in found}
    found |= {name: None for name, value in found.items() if math.isnan(value)}
    wrong = symptom(found, loss, recipe.heads[0], state.predicted.shape[1], clock)
    found["symptom"] = wrong.what if wrong else None
    state.unhealthy = state.unhealthy + 1 if wrong else 0
    return found


def _clusters(now: Tensor, before: Tensor, k: int) -> dict[str, float]:
    """CLUSTERS of predictions (N,), and of those an epoch before; NaN where there are none."""
    known, both = now[now >= 0].numpy(), (now >= 0) & (before >= 0)
    nmi, ari = metrics.stability(now[both].numpy(), before[both].numpy(), k) if both.any() else (math.nan, math.nan)
    return {**metrics.health(known, k), "nmi_previous": nmi, "ari_previous": ari}


def symptom(health: Health, loss: float, k: int, n: int, clock: Clock) -> Symptom | None:
    """The worst of what is wrong after an epoch, if anything, with a head of ``k`` clusters for ``n`` images."""
    if health["rank"] == 0:
        return Symptom(
            "all images have the same features",
            "lower --lr, try another --backbone, or look whether the images differ at all",
            "lr",
        )
    epochs = clock.epoch + 1
    half = epochs >= clock.epochs / 2
    if (active := health.get("active")) is not None:
        share, other = health["largest_share"], "try another --seed or --method, or train longer"
        if active == 1:
            return Symptom("all images are in one cluster", other, "seed")
        if share >= ONE:
            what = f"{share:.0%} of the images are in one cluster"
            return Symptom(what, f"unless they are all alike, {other}", "seed")
        if half and active < min(k, n / FEW) / 2:  # of many clusters some come late
            return Symptom(
                f"only {active} of {k} clusters hold images", f"ask for fewer with --n-clusters, or {other}", "seed"
            )
    flat = health["flat_loss"]
    begun = half and epochs * clock.steps >= BEGUN
    if begun and flat > 0.9 * math.log(2) and loss > STUCK * flat:  # a flat loss of 0 or less need not be the worst
        return Symptom(
            f"the loss is {loss:.3f}, nearly what it is when all images look the same ({flat:.3f})",
            "try a lower or a higher --lr, or train longer",
            "lr",
        )
    return None


def of_images(store: Store, k: int) -> Symptom | None:
    """What is wrong with the images themselves, before any training; of many a sample is looked at."""
    n = min(len(store), max(2000, 2 * k))
    rows = torch.arange(n) * len(store) // n
    different: set[bytes] = set()
    flat = 0
    for part in rows.split(256):
        images = store.take(part).cpu()
        different |= {image.tobytes() for image in images.numpy()}
        if images.ndim == 4:
            flat += int((images.flatten(2).float().std(2) == 0).all(1).sum())
    if len(different) == 1:
        return Symptom(f"all {len(store)} images are the same", "look at the images, and how they were exported")
    if len(different) < k:
        return Symptom(
            f"there are only {len(different)} different images for {k} clusters",
            f"use --n-clusters {len(different)} or fewer, or give more images",
        )
    if flat > 0.9 * n:
        return Symptom(
            f"{flat / n:.0%} of the images have one colour and nothing else in them",
            "look at the images, and how they were exported",
        )
    return None


def effective_rank(features: Tensor) -> float:
    """exp(entropy) of the shares of variance of (n, D) features along their principal directions; 0 without any."""
    x = features.double()
    square = x.square().mean()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    if not (gram.isfinite().all() and x.square().mean() > SAME * square):
        return 0.0
    variance = torch.linalg.eigvalsh(gram.cpu()).clamp_min(0)
    share = variance / variance.sum()
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def flat_loss(state: State, recipe: Recipe, logits: Sequence[Tensor], labels: Tensor, clock: Clock) -> None:
    """Note once in the state what the loss is if the network says the same of all images, from a batch as it is."""
    if math.isnan(state.flat_loss):
        state.flat_loss = recipe.losses([torch.zeros_like(z) for z in logits], labels, clock).mean().item()


@torch.no_grad()
def _features(model: Model, store: Store, bf16: bool) -> Tensor:
    n = min(len(store), LOOKED_AT)
    rows = torch.arange(n) * len(store) // n
    images = seen(store, store.take(rows), "clean", torch.Generator(), (0, n))
    model.eval()
    with torch.autocast(store.device.type, torch.bfloat16, enabled=bf16):
        return model.embed(images)
