"""MoCo (He et al., CVPR 2020, arXiv:1911.05722) with v2's MLP head and temperature (Chen et al., arXiv:2003.04297).

Every view finds the teacher's output (key) of the image's other view among the keys of other images: those of the batch
and a queue of earlier ones. A pretext.

Deviations: both views are queries in turn, as in v3 (arXiv:2104.02057). The batch's other keys are negatives too, and
have the same batch statistics as the right one, so that these cannot give it away: nothing is shuffled between BNs,
which see the batch of all processes. The queue starts empty, and while it fills, the negatives there are count for
those that are missing. It is short by default, for small data: where it is longer than the data set, one in N of its
keys is an image's own old one. AdamW by default.
"""

from dataclasses import dataclass

from torch import Tensor

from deepcluster.losses import info_nce
from deepcluster.model import Projector, configured
from deepcluster.networks import Queue, share
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class QueueContrast:
    """InfoNCE of both views against the teacher's other view; rows 0-1 student, 2-3 teacher, then the queue."""

    temperature: float = 0.2
    queue: int = 1024

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        (u, v), (key_u, key_v), old = logits[:2], logits[2:4], logits[4:].flatten(0, 1)
        first = info_nce(u, key_v, old, places=self.queue, temperature=self.temperature)
        return (first + info_nce(v, key_u, old, places=self.queue, temperature=self.temperature)) / 2


@method(lr=0.03, momentum=0.9, weight_decay=1e-4, batch_size=256, queue=65536, teacher=0.999)
def moco(
    n_clusters: int = 10,
    queue: int = 1024,
    teacher: float = 0.99,
    temperature: float = 0.2,
    projection: int = 128,
    view: str = "crop",
) -> Recipe:
    """Learns features; ``queue`` keys are remembered, ``teacher`` is the share of it that stays in a step."""
    return Recipe(
        heads=(projection,),
        head=Projector,
        network=configured(Queue, momentum=share(teacher), length=queue),
        views=(view, view),
        objective=QueueContrast(temperature, queue),
        pretext=True,
        passes=1.5,
    )
