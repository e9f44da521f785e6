"""Losses as pure functions, in float32 whatever autocast says.

Shapes: V views, B images, K clusters. ``logits`` is (V, B, K) unless said otherwise. Under several
processes B is this rank's part of the batch, and sums over the batch are sums over all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import dist

UNLABELLED = -1
_TINY = torch.finfo(torch.float32).tiny


def pseudo_label(logits: Tensor, labels: Tensor, clock: object = None) -> Tensor:
    """Cross-entropy of every view with its image's pseudo-label (B,); -1 is skipped.

    The mean is over labelled images only and is 0, not NaN, when there are none.
    Usable as an Objective as it stands, hence ``clock``.
    """
    flat, target = logits.flatten(0, 1).float(), labels.long().repeat(len(logits))
    total = F.cross_entropy(flat, target, ignore_index=UNLABELLED, reduction="sum")
    return total / (target != UNLABELLED).sum().clamp_min(1)


def mutual_information(p: Tensor, q: Tensor, *, marginal_weight: float = 1.0) -> Tensor:
    """Negative mutual information of paired soft assignments, in nats (IIC, arXiv:1807.06653, eq. 3).

    Args:
        p: (B, K) assignment of each image, rows sum to 1.
        q: (B, K) assignment of its partner.
        marginal_weight: weight of the two entropies against the joint one; the paper's lambda.

    Returns:
        Scalar in [-ln K, 0] for weight 1: -ln K when both agree and clusters are equally used.
    """
    with torch.autocast(p.device.type, enabled=False):  # or the product would be rounded to bfloat16
        joint = dist.all_sum(p.float().T @ q.float())
    joint = (joint + joint.T) / (2 * joint.sum())
    row, col = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    log = lambda x: x.clamp_min(_TINY).log()  # noqa: E731
    return -(joint * (log(joint) - marginal_weight * (log(row) + log(col)))).sum()


def contrastive(u: Tensor, v: Tensor, *, temperature: float = 0.5) -> Tensor:
    """NT-Xent of SimCLR (arXiv:2002.05709, eq. 1): find each image's other view among 2B - 1 candidates.

    Args:
        u: (B, D) unit vectors, first views.
        v: (B, D) unit vectors, second views.
        temperature: divides the cosines, > 0.

    Returns:
        Scalar >= 0, the mean over all 2B anchors; ln(2B - 1) when all vectors are equal.
    """
    z = torch.cat([u, v]).float()
    with torch.autocast(z.device.type, enabled=False):
        scores = z @ z.T / temperature
    scores.fill_diagonal_(float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(u))
    return F.cross_entropy(scores, partner)
