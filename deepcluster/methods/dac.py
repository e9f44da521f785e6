"""DAC (Chang et al., ICCV 2017): pairs of images that the network is sure about, alike or not, teach it the others.

Deviations: the pairs are those of images with augmentations, so that the network also learns to see both alike, as
IIC's (arXiv:1807.06653) does; ``across=False`` pairs augmentations with each other, as the paper. They are labelled on
the images in the same step. The thresholds meet at the end of training, however long, and move with every step (the
paper's: with every epoch, 46 of them). The mean is over selected pairs. Scores are standardised over the batch before
the softmax, without which all pairs start out alike, and start further apart where clusters are few. ``balance`` times
(ln K - entropy of the mean assignment) is added, as nothing in the paper keeps clusters from dying out. Many heads
compete: what one takes for a pair in the first epochs it keeps to, and the one with the lowest loss is most often good.
AdamW instead of RMSProp.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepcluster.losses import batch_mean, marginal_entropy, pairwise
from deepcluster.model import Standardised
from deepcluster.recipe import Clock, Recipe, method


def thresholds(t: float) -> tuple[float, float]:
    """(upper, lower) similarity at t, which grows from 0 to 0.45, where they meet at 0.5."""
    return 0.95 - t, 0.455 + 0.1 * t


@dataclass(frozen=True)
class Pairs:
    """View 0 labels the pairs; the others learn them, each with view 0 (``across``) or with itself.

    ``star`` is the authors' code (DAC*): all pairs, by one threshold that falls from 0.9 to 0.5, and ``auxiliary``
    times the cross-entropy of each label feature (the assignment at unit length) with that of view 0.
    """

    balance: float = 8.0
    across: bool = True
    star: bool = False
    auxiliary: float = 10.0

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        upper, lower = (0.9 - 0.4 * clock.progress,) * 2 if self.star else thresholds(0.45 * clock.progress)
        image, views = logits[0], logits[1:]
        pairs = [pairwise(image, image if self.across else z, z, upper=upper, lower=lower) for z in views]
        loss = torch.stack(pairs).mean() + self.balance * (math.log(logits.shape[-1]) - marginal_entropy(views))
        return loss + self.auxiliary * _unlike(image, views) if self.star and self.auxiliary else loss


def _unlike(image: Tensor, views: Tensor) -> Tensor:
    """Mean binary cross-entropy over V views, B images and K entries of label features; the image's are the target."""
    target, found = (F.normalize(z.float().softmax(-1), dim=-1).clamp(0, 1) for z in (image.detach(), views))
    each = F.binary_cross_entropy(found, target.expand_as(found), reduction="none")  # limits its logarithms to -100
    return batch_mean(each)


def spread(dim: int, k: int) -> Standardised:
    """Scores that tell most images apart at first: with few clusters a softmax of scores near 1 makes all alike."""
    head = Standardised(dim, k)
    nn.init.constant_(head.norm.weight, max(1.0, 9 / k))
    return head


@method(sub_heads=1, balance=0, across=False, batch_size=128, lr=1e-3)
def dac(
    n_clusters: int = 10,
    overcluster: int = 1,
    sub_heads: int = 10,
    balance: float = 8.0,
    across: bool = True,
    star: bool = False,
    auxiliary: float = 10.0,
    view: str = "strong",
) -> Recipe:
    """``sub_heads`` of each width; ``auxiliary`` counts with ``star`` only."""
    over = (n_clusters * overcluster,) * sub_heads if overcluster > 1 else ()
    return Recipe(
        heads=(n_clusters,) * sub_heads + over,
        head=spread,
        views=("clean", view),
        objective=Pairs(balance, across, star, auxiliary),
        passes=1.5,
    )
