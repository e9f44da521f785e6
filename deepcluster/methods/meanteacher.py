"""Mean Teacher (Tarvainen & Valpola, NeurIPS 2017, arXiv:1703.01780): agree with a moving average of oneself.

Cross-entropy with the few labels that are given, plus w(t) times the mean squared difference of the probabilities that
student and teacher give to two augmentations of any image; w rises as exp(-5 (1 - t)^2). Learns from labels: needs
--use-labels.

Deviations: both views are the student's and the teacher's in turn; the teacher's momentum is constant, and lower as
training is short (the paper has .99, then .999, and weight 100); the noise is augmentation only; the student is
reported, the learning rate having fallen to 0; AdamW.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from deepcluster.losses import batch_mean, few_labels
from deepcluster.model import configured
from deepcluster.networks import Teacher, share
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class Consistency:
    """CE(given) + w(t) |p - p'|^2 / K; rows 0-1 of the logits are the student's, 2-3 the teacher's."""

    weight: float = 10.0
    ramp: float = 0.25

    def w(self, clock: Clock) -> float:
        """Weight of the consistency: rises until ``ramp``, a share of training."""
        t = min(1.0, clock.progress / max(self.ramp, 1e-9))
        return self.weight * math.exp(-5 * (1 - t) ** 2)

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        student, teacher = logits[:2].float(), logits[2:].detach().float().softmax(-1).flip(0)
        apart = (student.softmax(-1) - teacher).square().mean((0, 2))
        given = (few_labels(student[0], labels) + few_labels(student[1], labels)) / 2
        return given + self.w(clock) * batch_mean(apart)


@method(weight=100.0, teacher=0.99)
def meanteacher(
    n_clusters: int = 10,
    weight: float = 10.0,
    ramp: float = 0.25,
    teacher: float = 0.95,
    ratio: int = 7,
    view: str = "strong",
) -> Recipe:
    """``teacher`` is the share of it that stays in a step; ``ratio`` images of any kind come with a labelled one."""
    return Recipe(
        heads=(n_clusters,),
        views=(view, view),
        network=configured(Teacher, momentum=share(teacher)),
        objective=Consistency(weight, ramp),
        supervised=1 / (1 + ratio),
    )
