"""IMSAT (Hu et al., ICML 2017, arXiv:1702.08720): certain assignments, equally used, that small changes do not change.

Deviations: the adversary's radius is one constant in standard deviations of the images, not a share of each image's
distance to its tenth neighbour, which takes a search of all pairs of pixels; the balance is soft (``mu``), as in the
authors' code; augmentations count beside the adversary, which ``rpt=0`` leaves out; scores are standardised over the
batch before the softmax; several heads compete, and one adversary moves the image against all of them together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.losses import conditional_entropy, divergence, marginal_entropy
from deepcluster.model import Standardised, configured
from deepcluster.networks import Adversary
from deepcluster.recipe import Clock, Recipe, method, plain


@dataclass(frozen=True)
class Information:
    """Consistency with the image, view 0, less ``strength`` times its information about the cluster.

    ``vat`` weighs the divergence of the last row, the adversary's, which is there unless this is 0; ``rpt`` that of the
    other views (random perturbation training). ``mu`` weighs the entropy of the mean assignment against the mean
    entropy.
    """

    vat: float = 1.0
    rpt: float = 1.0
    strength: float = 0.1
    mu: float = 4.0

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        image, views = logits[0], logits[1:-1] if self.vat else logits[1:]
        moved = [(self.vat, logits[-1])] * bool(self.vat) + [(self.rpt / len(views), view) for view in views]
        terms = [weight * divergence(image.detach(), other) for weight, other in moved]
        information = self.mu * marginal_entropy(image) - conditional_entropy(image)
        return torch.stack([*terms, -self.strength * information]).sum()


@method(sub_heads=1, vat=1, rpt=0, batch_size=250, lr=2e-3, weight_decay=0)
def imsat(
    n_clusters: int = 10,
    overcluster: int = 1,
    sub_heads: int = 10,
    vat: float = 1.0,
    rpt: float = 1.0,
    radius: float = 0.2,
    strength: float = 0.1,
    mu: float = 4.0,
    view: str = "strong",
) -> Recipe:
    """``sub_heads`` of each width; consistency is ``vat`` under an adversary's step of ``radius`` deviations, ``rpt``
    under the augmentation ``view``, which is made only if this is above 0.
    """
    if not vat and not rpt:
        raise ValueError("imsat: set vat or rpt above 0; without either every clustering is as good as another")
    over = (n_clusters * overcluster,) * sub_heads if overcluster > 1 else ()
    return Recipe(
        heads=(n_clusters,) * sub_heads + over,
        head=Standardised,
        views=("clean", view) if rpt else ("clean",),
        objective=Information(vat, rpt, strength, mu),
        network=configured(Adversary, radius=radius) if vat else plain,
        passes=1.5,
    )
