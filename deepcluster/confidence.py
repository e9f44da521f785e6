"""How far a cluster can be trusted, without labels: the probability that an image is of its cluster's kind.

A kind has one cluster: under the best one-to-one naming of clusters by kinds, as in the accuracy, the confidence of an
image is the estimated probability that its cluster's name is right. A softmax tells how sure the network is of its own
answer, which is more. Here the evidence is how well other ways to look at the same features agree:

    image     its silhouette (simplified: cosine distances to the means of its own and of the next cluster)
    cluster   mean silhouette; share of its images' nearest neighbours that are in it; share of its images that stay
              together when a bootstrap of the features is clustered anew, from other seeds

    confidence = sigmoid(SLOPE * silhouette + offset of the cluster)

The offset is linear in the three means of the cluster. At equal silhouettes neighbours count against it: a network that
was trained long has pulled them together, right or wrong. The offset is all that a model has to keep, so that new
images get the same, and it is measured anew when clusters are edited. The constants are the same for all data: those of
a logistic regression, each kind of data with the same weight, on 44 labelled clusterings of digits, MNIST, flowers,
CIFAR-10 and made groups, good and bad. Labels of the user's images are never asked.

Shapes: N images, S of a sample, D features, K clusters.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deepcluster.kmeans import nearest, plus_plus

SAMPLE = 4096  # images, evenly spaced, that clusters are judged by
NEIGHBOURS = 20
AGAIN, ITERATIONS = 8, 20  # other clusterings, and steps of each
SLOPE = 3.85  # of an image's own silhouette
START, SEPARATE, NEAR, STEADY = -1.75, 3.2, -2.4, 2.2  # of the cluster's mean silhouette, neighbours, clusterings


def silhouettes(unit: Tensor, cluster: Tensor, centroids: Tensor) -> Tensor:
    """(B,) in [0, 1] of unit features (B, D) in clusters (B,); rows of zeros of ``centroids`` (K, D) are not used.

    An image that is nearer to another mean than to its own cluster's has 0: the network has its reasons.
    """
    far = (1 - unit @ F.normalize(centroids, dim=1).T).clamp_min(0)
    own = far.gather(1, cluster[:, None])
    other = far.masked_fill((centroids == 0).all(1), torch.inf).scatter(1, cluster[:, None], torch.inf).amin(1)
    own, other = own[:, 0], torch.where(other.isfinite(), other, own[:, 0])
    return ((other - own) / torch.maximum(own, other).clamp_min(1e-12)).clamp_min(0)


def of(features: Tensor, cluster: Tensor, centroids: Tensor, offset: Tensor) -> Tensor:
    """(B,) confidence of images with features (B, D) in clusters (B,); ``offset`` (K,) is what ``measure`` gave."""
    return torch.sigmoid(offset[cluster] + SLOPE * silhouettes(F.normalize(features, dim=1), cluster, centroids))


def kept(cluster: np.ndarray, confidence: np.ndarray, abstain: float) -> np.ndarray:
    """(N,) the clusters (N,) of images, -1 where confidence is below ``abstain``."""
    return np.where(confidence < abstain, -1, cluster)


def check(abstain: object) -> float:
    """``abstain`` as a number. Raises a ValueError unless it is one in [0, 1]."""
    if isinstance(abstain, bool) or not isinstance(abstain, int | float | np.number) or not 0 <= float(abstain) <= 1:
        raise ValueError(f"abstain must be a confidence between 0 and 1, such as 0.8; got {abstain!r}")
    return float(abstain)


@torch.no_grad()
def measure(features: np.ndarray, cluster: Tensor, centroids: Tensor) -> Tensor:
    """(K,) offsets of clusters with means ``centroids`` (K, D), from some of the features (N, D) in clusters (N,).

    No process but the one that calls is needed. The same features give the same offsets.
    """
    n, k, device = len(features), len(centroids), centroids.device
    rows = np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)
    unit = F.normalize(torch.from_numpy(np.array(features[rows], np.float32)).to(device), dim=1)
    cluster = cluster[torch.from_numpy(rows).to(device)]
    seen = torch.stack([silhouettes(unit, cluster, centroids), _neighbours(unit, cluster), _steady(unit, cluster, k)])
    total = torch.zeros(3, k, device=device).index_add_(1, cluster, seen)
    size = torch.bincount(cluster, minlength=k)
    # a cluster that is not in the sample, or hardly, is taken for as good as the others
    mean = (total + 2 * seen.mean(1, keepdim=True)) / (size + 2)
    return START + torch.tensor([SEPARATE, NEAR, STEADY], device=device) @ mean


def _neighbours(unit: Tensor, cluster: Tensor) -> Tensor:
    """(S,) share of an image's nearest neighbours in its own cluster."""
    near = min(NEIGHBOURS, len(unit) - 1)
    if near < 1:
        return torch.ones(len(unit), device=unit.device)
    shares = []
    for start in range(0, len(unit), 512):
        close = unit[start : start + 512] @ unit.T
        rows = torch.arange(len(close), device=unit.device)
        close[rows, start + rows] = -2
        own = cluster[start : start + 512, None]
        shares.append((cluster[close.topk(near).indices] == own).float().mean(1))
    return torch.cat(shares)


def _steady(unit: Tensor, cluster: Tensor, k: int) -> Tensor:
    """(S,) share of other clusterings, each of a bootstrap, in which an image is where most of its cluster is."""
    used, place = cluster.unique(return_inverse=True)
    votes = torch.zeros(len(unit), device=unit.device)
    for seed in range(AGAIN):
        rng = torch.Generator().manual_seed(seed)
        drawn = unit[torch.randint(len(unit), (len(unit),), generator=rng).to(unit.device)]
        means = plus_plus(drawn, len(used), rng, drawn[:0])
        for _ in range(ITERATIONS):
            sums = torch.zeros_like(means).index_add_(0, nearest(drawn, means)[0], drawn)
            means = torch.where(sums.abs().sum(1, keepdim=True) > 0, F.normalize(sums, dim=1), means)
        other = nearest(unit, means)[0]
        pairs = torch.bincount(place * len(used) + other, minlength=len(used) ** 2).view(len(used), -1)
        _, match = linear_sum_assignment(pairs.cpu().numpy(), maximize=True)
        votes += torch.from_numpy(match).to(unit.device)[place] == other
    return votes / AGAIN
