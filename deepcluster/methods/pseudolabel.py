"""Pseudo-Label (Lee, ICML 2013 workshop; studied in arXiv:1908.02983): what the network says is true enough to learn.

Cross-entropy with the few labels that are given, plus alpha(t) times cross-entropy of all other images with their own
argmax, made anew in every step. Learns from labels: needs --use-labels.

Deviations: images are augmented; alpha rises from 0 over a part of training, not over steps 100 to 600; AdamW and the
usual network instead of one hidden layer with dropout.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from deepcluster.losses import UNLABELLED, few_labels, masked_mean
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class PseudoLabel:
    """CE(given) + alpha(t) CE(own argmax): alpha is 0 until ``begin``, ``weight`` from ``end`` (shares of training)."""

    weight: float = 3.0
    begin: float = 0.1
    end: float = 0.6

    def alpha(self, clock: Clock) -> float:
        """Weight of the unlabelled images at this moment."""
        risen = (clock.progress - self.begin) / max(self.end - self.begin, 1e-9)
        return self.weight * min(1.0, max(0.0, risen))

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        z = logits[0].float()
        own = F.cross_entropy(z, z.detach().argmax(1), reduction="none")
        return few_labels(z, labels) + self.alpha(clock) * masked_mean(own, labels == UNLABELLED)


@method
def pseudolabel(
    n_clusters: int = 10,
    weight: float = 3.0,
    begin: float = 0.1,
    end: float = 0.6,
    ratio: int = 7,
    view: str = "strong",
) -> Recipe:
    """``ratio`` images of any kind are in a batch for each labelled one; ``weight`` is the paper's alpha_f."""
    return Recipe(
        heads=(n_clusters,),
        views=(view,),
        objective=PseudoLabel(weight, begin, end),
        supervised=1 / (1 + ratio),
    )
