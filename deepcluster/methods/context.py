"""Context (Doersch et al., ICCV 2015, arXiv:1505.05192): on which side of the middle one is this tile? A pretext.

The backbone sees tiles one by one, so that each image gives all eight pairs at the cost of nine tiles.
Deviations: the middle tile of a 3 x 3 grid with all its neighbours, not pairs anywhere in an image. Tiles are
``jigsaw``'s: 64 of a cell's 75 pixels anywhere in it, so gaps are a sixth of a tile (the paper: a half), and shown at
half the image's side. Against chromatic aberration a tile is grey with probability 0.3 and its hue is turned, where the
paper drops two colours or projects them out. AdamW, BatchNorm and a smaller head.
"""

import torch

from deepcluster.losses import view_number
from deepcluster.model import Arranged
from deepcluster.recipe import Recipe, method

MIDDLE = 4
PAIRS = tuple((MIDDLE, tile) for tile in range(9) if tile != MIDDLE)


def beside_the_middle(dim: int, n: int) -> Arranged:
    """The head: on which of n sides?"""
    return Arranged(dim, n, torch.tensor(PAIRS))


@method
def context(n_clusters: int = 10) -> Recipe:
    """Learns features; ``n_clusters`` is for the recipe that follows."""
    return Recipe(
        heads=(len(PAIRS),),
        head=beside_the_middle,
        views=tuple(f"tile{i}" for i in range(9)),
        objective=view_number,
        pretext=True,
    )
