"""FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685): what is sure of a weak view is the label of a strong one.

Cross-entropy of the weak view with the few labels that are given, plus that of the strong view with the argmax of the
weak one wherever its probability is at least ``threshold``. ``uda`` is UDA (Xie et al., NeurIPS 2020,
arXiv:1904.12848): instead of the argmax the probabilities, sharpened, and optionally training signal annealing, which
leaves out labels that are learnt already. Learns from labels: needs --use-labels.

Deviations: the strong view is the package's, not RandAugment with CTAugment or Cutout; images whose label is given are
no unlabelled ones, too; no moving average of the weights; AdamW.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster.losses import UNLABELLED, few_labels, masked_mean
from deepcluster.recipe import Clock, Recipe, hint, method

# training signal annealing: share of the way from 1/K to 1 that the threshold has gone at progress t
ANNEALING = {
    "linear": lambda t: t,
    "log": lambda t: 1 - math.exp(-5 * t),
    "exp": lambda t: math.exp(5 * (t - 1)),
}


@dataclass(frozen=True)
class Match:
    """CE(weak, given) + weight * [max q >= threshold] CE(strong, argmax q), with q = softmax(weak), no gradient.

    ``temperature`` above 0: KL(softmax(weak / temperature) || strong) instead. ``tsa``: a name in ANNEALING, or none.
    """

    weight: float = 1.0
    threshold: float = 0.95
    temperature: float = 0.0
    tsa: str = "none"

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        weak, strong = logits.float()
        sure, guess = weak.detach().softmax(1).max(1)
        if self.temperature:
            target = (weak.detach() / self.temperature).softmax(1)
            each = F.kl_div(strong.log_softmax(1), target, reduction="none").sum(1)
        else:
            each = F.cross_entropy(strong, guess, reduction="none")
        unlabelled = labels == UNLABELLED
        matched = masked_mean(torch.where(sure >= self.threshold, each, 0.0), unlabelled)
        return few_labels(weak, self.annealed(weak, labels, clock)) + self.weight * matched

    def annealed(self, weak: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        """(B,) labels without those that the weak view is surer of than the schedule allows so far."""
        if self.tsa not in ANNEALING:
            return labels
        k = weak.shape[1]
        most = ANNEALING[self.tsa](clock.progress) * (1 - 1 / k) + 1 / k
        right = weak.detach().softmax(1).gather(1, labels.long().clamp_min(0)[:, None])[:, 0]
        return labels.masked_fill(right > most, UNLABELLED)


@method(lr=0.03, momentum=0.9, weight_decay=5e-4)
def fixmatch(
    n_clusters: int = 10,
    weight: float = 1.0,
    threshold: float = 0.95,
    ratio: int = 7,
    uda: bool = False,
    uda_threshold: float = 0.8,
    temperature: float = 0.4,
    tsa: str = "none",
    view: str = "strong",
) -> Recipe:
    """``ratio`` (mu) images of any kind come with a labelled one; ``uda`` takes the parameters after it."""
    if tsa not in {"none", *ANNEALING}:
        raise ValueError(f"fixmatch: unknown tsa {tsa!r}; {hint(tsa, ['none', *ANNEALING])}")
    soft = Match(weight, uda_threshold, temperature, tsa)
    return Recipe(
        heads=(n_clusters,),
        views=("weak", view),
        objective=soft if uda else Match(weight, threshold),
        supervised=1 / (1 + ratio),
    )
