"""How far a cluster can be trusted, without labels: the probability that an image is of its cluster's kind.

A kind has one cluster: under the best one-to-one naming of clusters by kinds, as in the accuracy, the confidence of an
image is the estimated probability that its cluster's name is right. A softmax tells how sure the network is of its own
answer, which is more. So it is measured how often two answers agree that err in different ways:

    the head, asked about one random view of an image
    another clustering of the features, of a bootstrap and from other seeds, asked about another view of the same image

Of networks trained independently, agreement estimates accuracy (Jiang et al., ICLR 2022, arXiv:2106.13799). The
confidence of an image is the network's probability to the power of one exponent, over the sum for all clusters, and the
exponent is what makes the mean confidence equal to the agreement: temperature scaling (Guo et al., ICML 2017,
arXiv:1706.04599) without labels. No number in it was fitted to labelled data.

After an edit, clusters are measured anew without images: an image and its nearest neighbour then stand for its views,
and their agreement is reduced by the share that was found when there were both.

What clusters agree on may still be another thing than what somebody calls a kind; only labels could tell.

Shapes: N images, S of a sample, n of views, D features, K clusters.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deepcluster.kmeans import nearest, plus_plus

Judge = Callable[[Tensor], tuple[Tensor, Tensor]]  # features (B, D) -> probabilities (B, K), ids (B,)
VIEW, LOOKED = "strong", 2000  # random view, and images that are looked at through two of them
SAMPLE = 2048  # images, evenly spaced, that are clustered anew
AGAIN, STARTS, ITERATIONS = 6, 4, 20  # other clusterings, the tightest of so many each; and steps
LEAST, MOST = 2.0**-8, 2.0**8  # exponent


def of(p: Tensor, cluster: Tensor, trust: Tensor) -> Tensor:
    """(B,) confidence of images in clusters (B,) with probabilities (B, K); ``trust`` is what ``measure`` gave."""
    return (p.log() * trust[0]).softmax(1).gather(1, cluster[:, None])[:, 0]


def unknown() -> Tensor:
    """What ``measure`` would give where probabilities are right as they are, as in models that were not measured."""
    return torch.ones(2)


def kept(cluster: np.ndarray, confidence: np.ndarray, abstain: float) -> np.ndarray:
    """(N,) the clusters (N,) of images, -1 where confidence is below ``abstain``."""
    return np.where(confidence < abstain, -1, cluster)


def check(abstain: object) -> float:
    """``abstain`` as a number. Raises a ValueError unless it is one in [0, 1]."""
    if isinstance(abstain, bool) or not isinstance(abstain, int | float | np.number) or not 0 <= float(abstain) <= 1:
        raise ValueError(f"abstain must be a confidence between 0 and 1, such as 0.8; got {abstain!r}")
    return float(abstain)


@torch.no_grad()
def measure(judge: Judge, features: np.ndarray, trust: Tensor, looks: Tensor | None = None) -> Tensor:
    """(2,) an exponent, and the share of the agreement of neighbours that two views have.

    No process but the one that calls is needed. The same features give the same.

    Args:
        judge: what gives images with features (B, D) their clusters.
        features: (N, D) of the training images, of which some are taken.
        trust: what was measured before; its share is kept where there are no ``looks``.
        looks: (2, n, D) features of two random views of some images.
    """
    rows = np.linspace(0, len(features) - 1, min(len(features), SAMPLE)).astype(np.int64)
    sample = torch.from_numpy(np.array(features[rows], np.float32)).to(trust.device)
    (p, cluster), unit = judge(sample), F.normalize(sample, dim=1)
    others = list(_others(unit, cluster))
    share, agreed = trust[1].item(), _agreement([(cluster, unit[_neighbour(unit)])], others)
    if looks is not None:
        one, two = looks
        pairs = [(judge(a)[1], F.normalize(b, dim=1)) for a, b in ((one, two), (two, one))]
        share = _agreement(pairs, others) / max(agreed, 1e-6)
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(40):
        middle = (low + high) / 2
        sure = of(p, cluster, trust.new_tensor([math.exp(middle)])).mean().item()
        low, high = (middle, high) if sure < agreed * share else (low, middle)
    return trust.new_tensor([math.exp(low), share])


def _agreement(pairs: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> float:
    """How often ids (n,) are those that other clusterings, means (k, D) and their ids (k,), give unit features (n, D).

    The mean of all pairs of ids and features, and of all other clusterings.
    """
    same = [
        (ids[nearest(unit, means)[0]] == cluster).float().mean() for cluster, unit in pairs for means, ids in others
    ]
    return torch.stack(same).mean().item()


def _neighbour(unit: Tensor) -> Tensor:
    """(S,) row of the nearest other of unit features (S, D); its own if there is no other."""
    near = torch.zeros(len(unit), dtype=torch.int64, device=unit.device)
    for start in range(0, len(unit) if len(unit) > 1 else 0, 512):
        close = unit[start : start + 512] @ unit.T
        rows = torch.arange(len(close), device=unit.device)
        close[rows, start + rows] = -2
        near[start : start + 512] = close.argmax(1)
    return near


def _others(unit: Tensor, cluster: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Means (k, D) of other clusterings, each of a bootstrap of unit features (S, D), and the ids (k,) that fit best.

    Of each the tightest of several k-means is taken, one of which begins with the clusters (S,) themselves: so they are
    not doubted only because k-means went astray, but where the features can be cut better.
    """
    used, place = cluster.unique(return_inverse=True)
    k = len(used)
    own = F.normalize(torch.zeros(k, unit.shape[1], device=unit.device).index_add_(0, place, unit), dim=1)
    for seed in range(AGAIN):
        rng = torch.Generator().manual_seed(seed)
        drawn = unit[torch.randint(len(unit), (len(unit),), generator=rng).to(unit.device)]
        starts = [own, *(plus_plus(drawn, k, rng, drawn[:0]) for _ in range(STARTS - 1))]
        found = [_lloyd(drawn, start) for start in starts]
        means = found[int(torch.tensor([spread for _, spread in found]).argmin())][0]
        pairs = torch.bincount(nearest(unit, means)[0] * k + place, minlength=k * k).view(k, k)
        _, match = linear_sum_assignment(pairs.cpu().numpy(), maximize=True)
        yield means, used[torch.from_numpy(match).to(used.device)]


def _lloyd(unit: Tensor, means: Tensor) -> tuple[Tensor, float]:
    """Spherical k-means from ``means`` (k, D): means, and the mean squared distance to them."""
    before = None
    for _ in range(ITERATIONS):
        place, far = nearest(unit, means)
        if before is not None and torch.equal(place, before):
            break
        sums, before = torch.zeros_like(means).index_add_(0, place, unit), place
        means = torch.where(sums.abs().sum(1, keepdim=True) > 0, F.normalize(sums, dim=1), means)
    return means, float(far.double().mean())
