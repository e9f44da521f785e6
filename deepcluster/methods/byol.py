"""BYOL (Grill et al., NeurIPS 2020, arXiv:2006.07733): predict the teacher's output of the other view. A pretext.

No image is told from another. What keeps all from becoming one is the predictor, which the teacher has not got, and
the normalisation over the batch in projector and predictor.

Deviations: projections are unit vectors before the predictor, too; the teacher's momentum is constant, where the
paper's rises to 1; the loss is the mean of both directions, not their sum; AdamW by default. The paper's preset has
plain SGD for LARS, so the smallest batch of its figure 3 and the learning rate that goes with it. Training is short
here, so the teacher is quicker by default.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from deepcluster.losses import batch_mean
from deepcluster.model import Projector, configured
from deepcluster.networks import Predicted, share
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class Agreement:
    """2 - 2 cos of prediction and teacher, in [0, 4]; rows 0-1 are predictions, 2-3 the teacher's outputs."""

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        unit = F.normalize(logits.float(), dim=-1, eps=1e-3)  # a zero vector has a bounded gradient
        predicted, taught = unit[:2], unit[2:].detach().flip(0)
        return 2 - 2 * batch_mean((predicted * taught).sum(-1))


@method(lr=0.2, momentum=0.9, weight_decay=1.5e-6, batch_size=256, teacher=0.996, hidden=4096)
def byol(
    n_clusters: int = 10,
    teacher: float = 0.99,
    projection: int = 256,
    hidden: int = 512,
    view: str = "crop",
) -> Recipe:
    """Learns features; ``teacher`` is the share of it that stays in a step, ``hidden`` the width of both MLPs."""
    return Recipe(
        heads=(projection,),
        head=configured(Projector, hidden=hidden),
        network=configured(Predicted, momentum=share(teacher), hidden=hidden),
        views=(view, view),
        objective=Agreement(),
        pretext=True,
        passes=1.5,
    )
