"""TEMI (Adaloglou et al., BMVC 2023, arXiv:2303.17896): heads taught by their own average that neighbours agree.

For fixed features (--frozen). An image and one of its nearest neighbours are a pair; a student's assignment of the one
and a teacher's of the other shall have a high pointwise mutual information, weighted by how much the teacher believes
that the two belong together.

Deviations: heads are directions (cosines over ``temperature``), not perceptrons, 8 of them, not 50; the marginal is
that of the batch, not a moving average; each head weighs pairs by its own teacher, not by the mean of all; the teacher
follows sooner and the temperature is higher, for training is much shorter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster import dist
from deepcluster.losses import batch_mean
from deepcluster.model import Prototypes, configured
from deepcluster.neighbors import Neighbors
from deepcluster.networks import Teacher, share
from deepcluster.recipe import Clock, Recipe, method, once

_TINY = 1e-12


def pair_information(student: Tensor, teacher: Tensor, marginal: Tensor, beta: float = 1.0) -> Tensor:
    """(B,) ln of the sum over clusters of (p q)^beta / m: the pointwise mutual information of each pair, for beta 1.

    Args:
        student: (B, K) logits of one image of each pair.
        teacher: (B, K) logits of the other.
        marginal: (K,) how much each cluster is used, sums to 1.
        beta: below 1 it spares clusters from being left empty.
    """
    joint = beta * (student.float().log_softmax(1) + teacher.float().log_softmax(1))
    return (joint - marginal.clamp_min(_TINY).log()).logsumexp(1)


@dataclass(frozen=True)
class PairInformation:
    """Minus ``pair_information`` both ways, weighted by the teacher: of the views' logits, then the teacher's."""

    beta: float = 0.8

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        one, other, taught, taught_other = logits
        p, q = taught.detach().float().softmax(1), taught_other.detach().float().softmax(1)
        total = dist.all_sum(torch.stack([p, q]).sum((0, 1)))
        marginal = total / total.sum()
        both = pair_information(one, taught_other.detach(), marginal, self.beta)
        both = both + pair_information(other, taught.detach(), marginal, self.beta)
        return -batch_mean((p * q).sum(1) * both / 2)


@method
def temi(
    n_clusters: int = 10,
    n_heads: int = 8,
    neighbours: int = 25,
    beta: float = 0.8,
    temperature: float = 0.2,
    teacher: float = 0.9,
) -> Recipe:
    """``n_heads`` compete; one of ``neighbours`` of an image is paired with it; ``teacher`` of it stays in a step."""
    return Recipe(
        heads=(n_clusters,) * n_heads,
        head=configured(Prototypes, temperature=temperature),
        network=configured(Teacher, momentum=share(teacher)),
        assigner=Neighbors(neighbours),
        refresh=once,
        views=("clean", "clean"),
        objective=PairInformation(beta),
        least_batch=4 * n_clusters,
        pace=2.0,
    )
