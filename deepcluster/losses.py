"""Losses as pure functions, in float32 whatever autocast says.

Shapes: V views, B images, K clusters. ``logits`` is (V, B, K) unless said otherwise. Under several processes B is this
rank's part of the batch, sums and means over the batch are those over all ranks, and every rank gets the same value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import dist

UNLABELLED = -1
_TINY = torch.finfo(torch.float32).tiny
_OFFSET = 1e-6  # of a similarity, whose rounding in float32 is 1e-7


def pseudo_label(logits: Tensor, labels: Tensor, clock: object = None) -> Tensor:
    """Cross-entropy of every view with its image's pseudo-label (B,); -1 is skipped.

    The mean is over labelled images only and is 0, not NaN, when there are none.
    Usable as an Objective as it stands, hence ``clock``.
    """
    flat, target = logits.flatten(0, 1).float(), labels.long().repeat(len(logits))
    total = F.cross_entropy(flat, target, ignore_index=UNLABELLED, reduction="sum")
    return _per_row(total, (target != UNLABELLED).sum())


def view_number(logits: Tensor, labels: object = None, clock: object = None) -> Tensor:
    """Cross-entropy of every view with its own number: which rotation, tile or order is this? Needs V <= K.

    Usable as an Objective as it stands; pseudo-labels have no say in it.
    """
    number = torch.arange(len(logits), device=logits.device).repeat_interleave(logits.shape[1])
    return _per_row(F.cross_entropy(logits.flatten(0, 1).float(), number, reduction="sum"), len(number))


def batch_mean(values: Tensor) -> Tensor:
    """Mean of all ``values``, (B,) or of any other shape, over the batch of all ranks."""
    return _per_row(values.sum(), values.numel())


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B,) values where ``mask`` (B,) is true, over the batch of all ranks; 0, not NaN, if it is nowhere."""
    return _per_row(torch.where(mask, values, 0.0).sum(), mask.sum())  # no product, which would keep what is infinite


def _per_row(total: Tensor, rows: Tensor | int) -> Tensor:
    """A total of this rank's ``rows``, of any shape -> what the totals of all ranks come to a row; 0 without rows."""
    count = rows.to(total) if isinstance(rows, Tensor) else total.new_full((), rows)  # which waits for no device
    both = dist.all_sum(torch.cat([total.flatten(), count[None]]))
    return (both[:-1] / both[-1].clamp_min(1)).view_as(total)


def few_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (B, K) logits with the labels (B,) that are known; the mean is over these, on all ranks."""
    each = F.cross_entropy(logits.float(), labels.long().clamp_min(0), reduction="none")
    return masked_mean(each, labels != UNLABELLED)


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
    first, all_u = _rows_of_all(u.float())
    anchors, candidates = torch.cat([u, v]).float(), torch.cat([all_u, _rows_of_all(v.float())[1]])
    with torch.autocast(u.device.type, enabled=False):
        scores = anchors @ candidates.T / temperature
    own = torch.arange(first, first + len(u), device=u.device)
    itself, partner = torch.cat([own, own + len(all_u)]), torch.cat([own + len(all_u), own])
    scores = scores.scatter(1, itself[:, None], float("-inf"))
    return _per_row(F.cross_entropy(scores, partner, reduction="sum"), len(anchors))


def info_nce(
    queries: Tensor, keys: Tensor, queue: Tensor, *, places: int | None = None, temperature: float = 0.2
) -> Tensor:
    """InfoNCE of MoCo (arXiv:1911.05722, eq. 1): find each image's key among the batch's and those of a queue.

    While the queue fills, the negatives there are stand for those that are missing, so that the loss keeps its scale.

    Args:
        queries: (B, D) unit vectors.
        keys: (B, D) unit vectors; row i is the right one for query i, the others, of all ranks, are negatives.
        queue: (Q, D) unit vectors, negatives for all, the same on every rank; rows of zeros are empty and left out.
        places: keys that the full queue holds; Q if None.
        temperature: divides the cosines, > 0.

    Returns:
        Scalar >= 0, the mean over queries; ln(B + places) when all vectors are equal, B counted over all ranks.
    """
    first, keys = _rows_of_all(keys.float())
    q, candidates = queries.float(), torch.cat([keys, queue.float()])
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ candidates.T / temperature
    full = len(keys) - 1 + (len(queue) if places is None else places)
    filled = (queue != 0).any(1)
    stand_for = full / (len(keys) - 1 + filled.sum()).clamp_min(1)
    right = torch.arange(first, first + len(q), device=q.device)
    own = right[:, None] == torch.arange(len(candidates), device=q.device)
    scores = torch.where(own, scores, scores + stand_for.log())
    scores[:, len(keys) :].masked_fill_(~filled, float("-inf"))
    return _per_row(F.cross_entropy(scores, right, reduction="sum"), len(q))


def swapped_prediction(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of every view with the soft assignment of each assigning view but its own (SwAV, arXiv:2006.09882).

    Args:
        logits: (V, B, K); the first A views are those that were assigned.
        codes: (A, B, K) assignments, rows sum to 1; constants.

    Returns:
        Scalar >= 0, the mean over assigning views, other views and images; ln K when all logits are equal.
    """
    log_p = logits.float().log_softmax(-1)
    with torch.autocast(logits.device.type, enabled=False):
        pairs = -_per_row(torch.einsum("abk,vbk->av", codes.float(), log_p), logits.shape[1])
    return torch.cat([part for a, row in enumerate(pairs) for part in (row[:a], row[a + 1 :])]).mean()  # not its own


def neighbour_consistency(logits: Tensor, partners: Tensor, *, entropy_weight: float = 5.0) -> Tensor:
    """SCAN's loss (arXiv:2005.12320, eq. 2): an image and its neighbour in one cluster, all clusters in use.

    -ln of the dot product of both assignments, mean over images, in the log domain, minus ``entropy_weight`` times the
    entropy of the mean assignment of the images over all ranks.

    Args:
        logits: (B, K) of the images.
        partners: (B, K) of one neighbour each.
        entropy_weight: the paper's lambda.

    Returns:
        Scalar >= -entropy_weight * ln K: that when clusters are perfect and equal; 0 when all is in one.
    """
    log_p, log_q = logits.float().log_softmax(1), partners.float().log_softmax(1)
    total = dist.all_sum(torch.cat([log_p.exp().sum(0), log_p.new_full((1,), len(log_p))]))
    mean = total[:-1] / total[-1]
    together = dist.all_sum((log_p + log_q).logsumexp(1).sum()) / total[-1]
    return -together + entropy_weight * torch.xlogy(mean, mean.clamp_min(_TINY)).sum()


def balanced_pseudo_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pseudo-classes in the batch of their images' mean cross-entropy (SCAN's self-labelling).

    Args:
        logits: (B, K).
        labels: (B,) int, -1 is skipped.

    Returns:
        Scalar >= 0, over the batch of all ranks; 0, with a gradient of 0, when nothing is labelled.
    """
    labels = labels.long()
    each = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="none")
    index = labels.clamp_min(0)
    known = (labels != UNLABELLED).float()
    counts = dist.all_sum(torch.zeros(logits.shape[1], device=logits.device).index_add_(0, index, known))
    total = dist.all_sum((each / counts.clamp_min(1)[index]).sum())
    return total / (counts > 0).sum().clamp_min(1)


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(teacher || logits) of (..., K) logits, in nats: the mean over rows, >= 0."""
    p, q = (z.float().log_softmax(-1).flatten(0, -2) for z in (teacher, logits))
    return _per_row(F.kl_div(q, p, log_target=True, reduction="sum"), len(q))


def conditional_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the assignments of (..., K) logits, in nats: 0 where every row is sure, at most ln K."""
    log_p = logits.float().log_softmax(-1)
    return -batch_mean((log_p.exp() * log_p).sum(-1))


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean assignment of (..., K) logits over all ranks, in nats: ln K if clusters are equally used."""
    total = dist.all_sum(logits.float().softmax(-1).flatten(0, -2).sum(0))
    mean = total / total.sum()
    return -(mean * mean.clamp_min(_TINY).log()).sum()


def pairwise(labelling: Tensor, first: Tensor, second: Tensor, *, upper: float, lower: float) -> Tensor:
    """Binary cross-entropy of "these two images belong together" (DAC, Chang et al., ICCV 2017, eqs. 5 to 8).

    Two images are as similar as the cosine of their assignments, in [0, 1]. Pairs more similar than ``upper`` belong
    together, those less than ``lower`` do not, others are left out. Pairs are those of the batch over all ranks.

    Args:
        labelling: (B, K) logits that say which pairs are which; no gradient.
        first: (B, K) logits whose similarities to ``second`` learn it.
        second: (B, K) of the same images, through the same or another view.
        upper: above it pairs belong together.
        lower: below it they do not; at most ``upper``.

    Returns:
        Scalar >= 0, the mean over selected pairs, an image with itself included; 0 if there are none.
    """
    labelling = labelling.detach()
    (_, everyone), (_, others) = _rows_of_all(labelling), _rows_of_all(second)
    known, learnt = pair_labels(similarities(labelling, everyone), upper, lower), similarities(first, others)
    # the offset keeps logarithm and slope finite where the two disagree wholly, and unlike a clamp leaves a slope
    log = lambda x: ((x + _OFFSET) / (1 + _OFFSET)).log()  # noqa: E731
    each = torch.where(known == 1, log(learnt), log((1 - learnt).clamp_min(0)))
    return -masked_mean(each, known != UNLABELLED)


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """(A, K) and (B, K) logits -> (A, B) cosines of their softmax, in [0, 1] but for rounding."""
    rows, columns = (F.normalize(z.float().softmax(-1), dim=-1) for z in (first, second))
    with torch.autocast(first.device.type, enabled=False):
        return rows @ columns.T


def pair_labels(similarity: Tensor, upper: float, lower: float) -> Tensor:
    """(B, B) int8: 1 where more similar than ``upper``, 0 where else less than ``lower``, -1 elsewhere: left out."""
    together, apart = similarity > upper, similarity < lower
    return torch.where(together, 1, torch.where(apart, 0, UNLABELLED)).to(torch.int8)


def _rows_of_all(x: Tensor) -> tuple[int, Tensor]:
    """This rank's rows (b, K) -> where they begin among the rows of all ranks, and these (B, K), with gradient."""
    first, total = dist.place(len(x), x.device)
    return first, dist.all_sum(F.pad(x, (0, 0, first, total - first - len(x)))) if dist.world() > 1 else x
