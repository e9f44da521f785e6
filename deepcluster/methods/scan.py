"""SCAN (Van Gansbeke et al., ECCV 2020, arXiv:2005.12320): an image and its nearest neighbours belong together.

Neighbours are mined once, in the features of the stage before (a pretext: ``simclr+scan+selflabel``).

Deviations: they are found in the backbone's features, not in the pretext's projection, which is thrown away; an image
is no neighbour of itself (in the authors' code it is one of 21); the image is seen as it is and its neighbour augmented
(``first`` sets it; the paper augments both); several heads compete; the views are ours; AdamW instead of Adam.
"""

from dataclasses import dataclass

from torch import Tensor

from deepcluster.losses import neighbour_consistency
from deepcluster.neighbors import Neighbors
from deepcluster.recipe import Clock, Recipe, method, once


@dataclass(frozen=True)
class NeighbourConsistency:
    """SCAN's loss of view 0, the image, and view 1, a neighbour of it."""

    entropy_weight: float = 5.0

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        return neighbour_consistency(logits[0], logits[1], entropy_weight=self.entropy_weight)


@method(lr=1e-4, batch_size=128, n_heads=1, first="strong")
def scan(
    n_clusters: int = 10,
    n_heads: int = 5,
    neighbours: int = 20,
    entropy_weight: float = 5.0,
    first: str = "clean",
    view: str = "strong",
) -> Recipe:
    """``n_heads`` compete; of ``neighbours`` of an image, seen through ``first``, one is seen through ``view``."""
    return Recipe(
        heads=(n_clusters,) * n_heads,
        assigner=Neighbors(neighbours),
        refresh=once,
        views=(first, view),
        objective=NeighbourConsistency(entropy_weight),
        least_batch=4 * n_clusters,
    )
