"""RotNet (Gidaris et al., ICLR 2018, arXiv:1803.07728): by how many quarter turns is this image rotated? A pretext.

As in the paper all four rotations of an image are in a batch, each by exact transposition, which leaves no trace.
Deviations: each rotation is augmented on its own, by more than the paper's crops, and never mirrored (a mirrored
quarter turn is a turn the other way); the head has two hidden layers, not one linear one; AdamW by default.
"""

import torch

from deepcluster.losses import view_number
from deepcluster.model import Arranged
from deepcluster.recipe import Recipe, method
from deepcluster.views import ROTATIONS


def each_alone(dim: int, n: int) -> Arranged:
    """The head: which of n rotations is this one?"""
    return Arranged(dim, n, torch.arange(n)[:, None])


@method(view="weak", lr=0.1, momentum=0.9, weight_decay=5e-4, batch_size=128)
def rotnet(n_clusters: int = 10, view: str = "strong") -> Recipe:
    """Learns features; ``n_clusters`` is for the recipe that follows. ``view``: clean, weak, strong or crop."""
    return Recipe(
        heads=(len(ROTATIONS),),
        head=each_alone,
        views=ROTATIONS if view == "clean" else tuple(f"{view}-{turned}" for turned in ROTATIONS),
        objective=view_number,
        pretext=True,
    )
