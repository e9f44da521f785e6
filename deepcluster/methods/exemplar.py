"""Exemplar-CNN (Dosovitskiy et al., NeurIPS 2014, arXiv:1406.6909): which of K images is this a view of? A pretext.

Every chosen image is a surrogate class, and its augmentations are the members.
Deviations: whole images drawn at random, not patches drawn where gradients are large; views are drawn anew each time,
not a fixed set of some hundred; the package's augmentations instead of the paper's, which also has colour along
principal components; AdamW instead of SGD by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepcluster.losses import pseudo_label
from deepcluster.model import Head
from deepcluster.recipe import Recipe, Targets, method, once


@dataclass(frozen=True)
class Chosen:
    """min(K, N) images drawn without repetition are 0, 1, 2, ..., all others unlabelled; a function of the seed."""

    exemplars: int

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        labels = torch.full_like(previous.labels, -1)
        who = torch.randperm(labels.shape[1], generator=torch.Generator().manual_seed(seed))[: self.exemplars]
        labels[:, who] = torch.arange(len(who), dtype=labels.dtype)
        return replace(previous, labels=labels)


@method(exemplars=16000, lr=0.01, momentum=0.9)
def exemplar(n_clusters: int = 10, exemplars: int = 1000, view: str = "strong") -> Recipe:
    """``exemplars`` of the images are drawn, equally often, and no others. ``n_clusters`` is for what follows."""
    return Recipe(
        heads=(exemplars,),
        assigner=Chosen(exemplars),
        refresh=once,
        balanced=True,
        views=(view,),
        objective=pseudo_label,
        pretext=True,
    )
