"""Balanced assignment by optimal transport, in log space; and the assignment of names to clusters.

Labels a batch (SwAV) and a whole data set (SeLa). Rows may be sharded over ranks: only sums of K numbers
are communicated, and no (N, K) array needs to exist.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from deepcluster import dist

CACHED = 2**18  # numbers of a block on a CPU: what is done to them is done in its cache
REMEMBERED = 10  # moves from which the second derivative is known
DENSE = 2048  # clusters up to which overlaps are a K x K array


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignment whose columns all receive the same total mass (Cuturi 2013; SwAV, arXiv:2006.09882).

    Args:
        scores: (N, K) similarity of each row to each cluster, any float dtype; this rank's rows.
        epsilon: temperature in units of score, > 0; smaller is harder.
        iterations: column and row rescalings; 3 for a batch, 100 for a data set.

    Returns:
        (N, K) float32. Rows sum to 1, columns to about N / K, N counted over all ranks.

    Raises:
        ValueError: epsilon is not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0; got {epsilon}")
    log_q = scores.float() / epsilon
    n_rows = dist.all_sum(torch.full((), float(len(scores)), device=scores.device))
    log_share = torch.log(n_rows) - math.log(scores.shape[1])
    for _ in range(iterations):
        top = dist.all_max(log_q.amax(0, keepdim=True))
        total = top + dist.all_sum((log_q - top).exp().sum(0, keepdim=True)).log()
        log_q = log_q - total + log_share
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


@torch.no_grad()
def log_scales(
    chunks: Callable[[], Iterable[Tensor]],
    strength: float,
    start: Tensor,
    *,
    prior: Tensor | None = None,
    tolerance: float = 0.01,
    iterations: int = 300,
) -> tuple[Tensor, float]:
    """The streaming form of SeLa's Sinkhorn (arXiv:1911.05371, eq. 8): some vectors of K numbers are the whole state.

    The plan is softmax_k(strength * z_ik + scale_k): the row scalings of the dense algorithm and the softmax
    denominators cancel, so that one pass over the logits per iteration is all, and float32 cannot underflow.
    The balanced label of row i is argmax_k(strength * z_ik + scale_k).

    The scales are where a convex sum has its minimum, mean_i logsumexp_k - share . scale. Sinkhorn goes there by steps
    of -log(mass / share), by the hundred where the plan is decided. Here only the first step is Sinkhorn's; the others
    are those of L-BFGS (Liu and Nocedal 1989) on the same sum, about a sixth as many.

    Args:
        chunks: called once an iteration; yields this rank's logits, (n, K) each, always in the same order.
        strength: the paper's lambda, > 0, in 1 / units of logit; larger is harder.
        start: (K,) scales to begin with; zeros, or the last ones.
        prior: (K,) share of the mass that each cluster is to receive, summing to 1; default 1 / K each.
        tolerance: stop when no cluster's mass is off by more than this part of its share.
        iterations: stop there at the latest.

    Returns:
        (K,) float64 log scales with mean 0, and the mean entropy of the plan's rows in nats.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    k = len(start)
    share = prior.double() if prior is not None else torch.full((k,), 1 / k, dtype=torch.float64, device=start.device)
    scale = tried = start.double()
    lowest, entropy, slope = math.inf, 0.0, torch.zeros_like(share)
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=REMEMBERED)
    for _ in range(iterations):
        found = _pass(chunks, strength, tried)
        if not found.isfinite().all():
            raise FloatingPointError("logits are not finite; lower lr, or use precision fp32")
        n, value, uncertain = found[:3].tolist()
        value = value / n - float(share @ tried)
        if value > lowest + 1e-6 * max(1.0, abs(lowest)):  # too far: the sum that is minimised is convex
            tried = scale + (tried - scale) / 4
            continue
        gradient = found[3:] / n - share
        if math.isfinite(lowest) and float((tried - scale) @ (gradient - slope)) > 0:
            past.append((tried - scale, gradient - slope))
        scale, slope, lowest, entropy = tried, gradient, value, uncertain / n
        if float((gradient / share).abs().max()) < max(tolerance, 1e-6):  # less is float32's noise
            break
        step = _step(slope, past, share) if past else (found[3:] / n / share).clamp_min(1e-30).log()
        tried = scale - step.clamp(-5, 5)
        tried = tried - tried.mean()
    return scale, entropy


def _step(slope: Tensor, past: Sequence[tuple[Tensor, Tensor]], share: Tensor) -> Tensor:
    """The inverse of the second derivative, as the ``past`` (moves, changes of slope) show it, times ``slope`` (K,)."""
    weights = []
    for move, change in reversed(past):
        weights.append(move @ slope / (move @ change))
        slope = slope - weights[-1] * change
    move, change = past[-1]
    step = slope / share * (move @ change) / (change @ (change / share))
    for (move, change), weight in zip(past, reversed(weights), strict=True):
        step = step + (weight - change @ step / (move @ change)) * move
    return step


def _pass(chunks: Callable[[], Iterable[Tensor]], strength: float, scale: Tensor) -> Tensor:
    """(3 + K,) float64 sums over the rows of all ranks: 1, log of the denominator, entropy; mass of each cluster."""
    k, shift = len(scale), scale.float()
    sums = torch.zeros(3 + k, dtype=torch.float64, device=scale.device)
    block = max(1, (CACHED if scale.device.type == "cpu" else 2**26) // k)
    for z in (part for chunk in chunks() for part in chunk.split(block)):
        logits = torch.add(shift, z.float(), alpha=strength)
        top = logits.amax(1, keepdim=True)
        weights = logits.sub_(top).exp()
        denominator = weights.sum(1)
        log_denominator = denominator.log()
        sums[:3] += torch.stack([
            sums.new_tensor(len(z)), (top[:, 0].double() + log_denominator).sum(),
            (log_denominator - torch.linalg.vecdot(weights, logits) / denominator).double().sum(),
        ])  # fmt: skip
        sums[3:] += denominator.reciprocal() @ weights
    return dist.all_sum(sums)


def renamed(new: Tensor, old: Tensor, k: int) -> Tensor:
    """The clustering ``new`` with the names that give the most rows their ``old`` label.

    Args:
        new: (N,) int64 in -1..K-1, on the CPU; -1 has no label and keeps none.
        old: (N,) int64 likewise.
        k: clusters. Beyond ``DENSE`` only the overlaps that exist are kept, at most N.

    Returns:
        (N,) int32.
    """
    seen = (old >= 0) & (new >= 0)
    if k <= DENSE:
        overlap = torch.bincount(new[seen] * k + old[seen], minlength=k * k).view(k, k)
        names = linear_sum_assignment(-overlap.numpy())[1]
    else:
        pairs, counts = torch.unique(new[seen] * k + old[seen], return_counts=True)
        alone = np.arange(k)  # each may have a column of its own, worth less than any overlap, instead of a name
        rows, columns = np.concatenate([pairs // k, alone]), np.concatenate([pairs % k, k + alone])
        worth = np.concatenate([counts + 1, np.ones(k)])
        names = min_weight_full_bipartite_matching(csr_array((worth, (rows, columns)), (k, 2 * k)), maximize=True)[1]
        names[names >= k] = np.setdiff1d(alone, names)
    return torch.where(new >= 0, torch.from_numpy(names)[new.clamp_min(0)], new).to(torch.int32)
