"""Balanced assignment by optimal transport, in log space; and the assignment of names to clusters.

Labels a batch (SwAV) and a whole data set (SeLa). Rows may be sharded over ranks: only sums of K numbers
are communicated, and no (N, K) array needs to exist.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from deepcluster import dist

CACHED = 2**18  # numbers of a block on a CPU: what is done to them is done in its cache
PAIRED = 32  # rows a cluster from which the second derivative is estimated, at least
CURVED = 4096  # clusters of which it is: above, the K x K numbers would be too many
DENSE = 2048  # clusters up to which overlaps are a K x K array
RIDGE = 1e-3  # of the curvature that a plan of undecided rows would have; where a sample has none


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
    """The streaming form of SeLa's Sinkhorn (arXiv:1911.05371, eq. 8): K numbers are the whole state.

    The plan is softmax_k(strength * z_ik + scale_k): the row scalings of the dense algorithm and the softmax
    denominators cancel, so that one pass over the logits per iteration is all, and float32 cannot underflow.
    The balanced label of row i is argmax_k(strength * z_ik + scale_k).

    The scales are where a convex sum has its minimum, mean_i logsumexp_k - share . scale. Sinkhorn goes there by steps
    of -log(mass / share), by the hundred where the plan is decided; these are Newton's, a few, with a second derivative
    from some rows, kept while it serves. Above ``CURVED`` clusters they are Sinkhorn's.

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
    scale, lowest, entropy = start.double(), math.inf, 0.0
    tried, error, second, every, offset = scale, math.inf, None, 0, 0
    for _ in range(iterations):
        found, local = _pass(chunks, strength, tried, every, offset)
        if not found.isfinite().all():
            raise FloatingPointError("logits are not finite; lower lr, or use precision fp32")
        n, value, uncertain = found[:3].tolist()
        value = value / n - float(share @ tried)
        if value > lowest + 1e-6 * max(1.0, abs(lowest)):  # too far: the sum that is minimised is convex
            tried, every = scale + (tried - scale) / 4, 0
            continue
        scale, lowest, entropy = tried, value, uncertain / n
        ratio = (found[3 : 3 + k] / n / share).clamp_min(1e-30)
        last, error = error, float((ratio - 1).abs().max())
        if error < tolerance:
            break
        if every:
            pairs = found[3 + k :].view(k, k)
            pairs = pairs / pairs.sum()
            flat = torch.outer(share, share)  # the derivative is zero along what moves all scales alike
            second = torch.linalg.cholesky(torch.diag(pairs.sum(1) + RIDGE * share) - pairs + flat)
        elif not math.isfinite(last):
            offset, total = dist.place(local, start.device)
            step = max(1, total // max(PAIRED * k, 2**15)) if k <= CURVED else 0
        if second is None or math.isinf(last):
            moved = ratio.log()
        else:
            moved = torch.cholesky_solve(((ratio - 1) * share)[:, None], second)[:, 0].clamp(-5, 5)
        every = step if second is None or error > 0.3 * last else 0
        tried = scale - moved
        tried = tried - tried.mean()
    return scale, entropy


def _pass(
    chunks: Callable[[], Iterable[Tensor]], strength: float, scale: Tensor, every: int, offset: int
) -> tuple[Tensor, int]:
    """Sums over the rows of all ranks, and the number of this rank's, of which the first is row ``offset`` of all.

    The sums, in float64: the rows themselves, log of the denominators, entropies, mass (K,); with ``every``, over one
    row in so many, products of the plan's entries (K K).
    """
    k, rows = len(scale), 0
    sums = torch.zeros(3 + k + (k * k if every else 0), dtype=torch.float64, device=scale.device)
    kept: list[Tensor] = []
    pairs = torch.zeros(k if every else 0, k, device=scale.device)
    block = max(1, (CACHED if scale.device.type == "cpu" else 2**26) // k)
    for z in (part for chunk in chunks() for part in chunk.split(block)):
        logits = torch.add(scale.float(), z.float(), alpha=strength)
        top = logits.amax(1, keepdim=True)
        logits -= top
        w = logits.softmax(1)
        denominator = -w.amax(1).log()  # of exp(logits), the largest of which is 1
        sums[:3] += torch.stack([
            sums.new_tensor(len(z)), (top[:, 0].double() + denominator).sum(),
            (denominator.double() - torch.linalg.vecdot(w, logits)).sum(),
        ])  # fmt: skip
        sums[3 : 3 + k] += w.sum(0)
        if every:
            kept.append(w[-(offset + rows) % every :: every])
        rows += len(z)
        if sum(map(len, kept)) >= 2**11:  # so many at a time that adding K x K numbers takes no time beside them
            some = torch.cat(kept)
            pairs.addmm_(some.T, some)
            kept = []
    if every:
        some = torch.cat(kept) if kept else pairs[:0]
        sums[3 + k :] = pairs.addmm_(some.T, some).flatten()
    return dist.all_sum(sums), rows


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
