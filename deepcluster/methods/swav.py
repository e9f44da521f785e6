"""SwAV (Caron et al., NeurIPS 2020, arXiv:2006.09882): predict one view's balanced assignment from another view.

Labels are made within the batch, by Sinkhorn's algorithm over the cosines to learned prototypes.

Deviations: prototypes compare the backbone's features, without a projector, because they are the clusters here; several
heads compete, and as many with more clusters help them; one of the two views that are assigned is the image as it is
(``first``), and there are no small crops by default, which cut characters to pieces; the queue is as long as batch and
prototypes need, and unused where the batch suffices; prototypes learn from the first step; AdamW instead of LARS, whose
learning rate does not carry over.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.losses import swapped_prediction
from deepcluster.model import Prototypes, configured
from deepcluster.networks import Queued
from deepcluster.recipe import Clock, Recipe, method
from deepcluster.transport import sinkhorn


@dataclass(frozen=True)
class SwappedPrediction:
    """Views 0 and 1 are assigned, all predict; rows after the views are the queues of views 0 and 1.

    Attributes:
        views: how many, all crops together.
        temperature: what the head's cosines were divided by.
        epsilon: Sinkhorn's, in units of cosine; smaller is harder. As large as the temperature, all collapses to ln K.
        queue_from: share of training after which the queue takes part.
    """

    views: int = 2
    temperature: float = 0.1
    epsilon: float = 0.05
    queue_from: float = 0.05

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        views, queued = logits[: self.views], logits[self.views :]
        used = len(queued) // 2 if clock.progress >= self.queue_from else 0
        codes = []
        for own, old in zip(views[:2].detach(), (queued[:used], queued[len(queued) // 2 :][:used]), strict=True):
            rows = torch.cat([own, *old])
            codes.append(sinkhorn(rows, epsilon=self.epsilon / self.temperature)[: len(own)])
        return swapped_prediction(views, torch.stack(codes))


@method(n_heads=1, overcluster=1, crops=8, first="crop", weight_decay=1e-6)
def swav(
    n_clusters: int = 10,
    overcluster: int = 5,
    n_heads: int = 3,
    crops: int = 2,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    queue: float = 1.5,
    first: str = "clean",
    view: str = "strong",
) -> Recipe:
    """``n_heads`` of each width; ``crops`` (2 at least) are seen through ``first``, ``view`` and, if more, "small".

    Batches with fewer than ``queue`` images a prototype are assigned together with images of the last ones; 0: never.
    """
    if crops < 2:
        raise ValueError(f"swav: crops must be at least 2; got {crops}")
    widths = (n_clusters, n_clusters * overcluster)[: 2 if overcluster > 1 else 1]
    most = widths[-1]
    return Recipe(
        heads=tuple(k for k in widths for _ in range(n_heads)),
        head=configured(Prototypes, temperature=temperature),
        network=configured(Queued, images=round(queue * most)),
        views=(first, view) + ("small",) * (crops - 2),
        objective=SwappedPrediction(crops, temperature, epsilon),
        least_batch=max(2, most // 12) if queue else most,
        passes=2.5,
    )
