"""Balanced assignment by optimal transport, in log space.

Labels a batch (SwAV) and a whole data set (SeLa). Rows may be sharded over ranks: only sums of K numbers
are communicated, and no (N, K) array needs to exist.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deepcluster import dist


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
    n_rows = dist.all_sum(torch.tensor(float(len(scores)), device=scores.device))
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
    log_scale = start.double()
    share = prior.double() if prior is not None else torch.full_like(log_scale, 1 / k)
    entropy = 0.0
    for _ in range(iterations):
        mass = torch.zeros_like(log_scale)
        rows = torch.zeros(2, dtype=torch.float64, device=start.device)  # how many, and their summed entropy
        for z in chunks():
            log_w = torch.log_softmax(strength * z.float() + log_scale.float(), 1)
            w = log_w.exp()
            mass += w.sum(0, dtype=torch.float64)
            rows += torch.stack([rows.new_tensor(len(z)), -(w * log_w).sum(dtype=torch.float64)])
        mass, rows = dist.all_sum(mass), dist.all_sum(rows)
        if not mass.isfinite().all():
            raise FloatingPointError("logits are not finite; lower lr, or use precision fp32")
        ratio = (mass / rows[0] / share).clamp_min(1e-30)
        entropy = float(rows[1] / rows[0])
        if float((ratio - 1).abs().max()) < tolerance:
            break
        log_scale = log_scale - ratio.log()
        log_scale = log_scale - log_scale.mean()
    return log_scale, entropy
