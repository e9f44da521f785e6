"""Jigsaw (Noroozi & Favaro, ECCV 2016, arXiv:1603.09246): in which order are these nine tiles? A pretext.

The backbone sees tiles one by one, so reordering their features is reordering the tiles: each image is scored in all
its orders at once.
Deviations: all orders of an image are in a batch, not one drawn at random. The first order is the image's own, not a
random one, so that every run has the same set; the next one is the farthest from the nearest chosen, then from all on
average (the paper: on average only, where two of 24 may differ in two tiles; here in seven). Tiles are shown at half
the image's side, so that small networks can take them. Against shortcuts: a tile is cut anywhere in its cell, as in the
paper; brightness, contrast, saturation and hue are drawn anew for every tile, where the paper makes mean and deviation
of a tile 0 and 1; a tile is grey with probability 0.3 (the paper: an image), and colour channels are not shifted
against each other. BatchNorm; AdamW instead of SGD by default.
"""

from functools import lru_cache
from itertools import permutations as every_order

import torch
from torch import Tensor

from deepcluster.losses import view_number
from deepcluster.model import Arranged
from deepcluster.recipe import Recipe, method

TILES = 9
LARGEST = 1000  # the paper's largest set; a batch of B images has B x P x P scores


@lru_cache
def far_apart(n: int) -> Tensor:
    """(n, 9) int64, different orders of the tiles, each chosen as far from those before it as can be."""
    orders = torch.tensor(list(every_order(range(TILES))), dtype=torch.int8)
    nearest, total = torch.full((len(orders),), TILES), torch.zeros(len(orders), dtype=torch.int64)
    chosen = [0]
    while len(chosen) < n:
        distance = (orders != orders[chosen[-1]]).sum(1)
        nearest, total = torch.minimum(nearest, distance), total + distance
        chosen.append(int((nearest * (TILES * n) + total).argmax()))
    return orders[chosen].long()


def in_order(dim: int, n: int) -> Arranged:
    """The head: which of n orders?"""
    return Arranged(dim, n, far_apart(n))


@method(permutations=100, lr=0.01, momentum=0.9, batch_size=256)
def jigsaw(n_clusters: int = 10, permutations: int = 24) -> Recipe:
    """Learns features; ``n_clusters`` is for the recipe that follows. More ``permutations``: a harder task."""
    if not 2 <= permutations <= LARGEST:
        raise ValueError(f"jigsaw: permutations must be between 2 and {LARGEST}; got {permutations}")
    return Recipe(
        heads=(permutations,),
        head=in_order,
        views=tuple(f"tile{i}" for i in range(TILES)),
        objective=view_number,
        pretext=True,
    )
