"""A backbone that makes features, and heads that turn features into cluster scores.

Shapes: V views, B images, C channels, D features, H heads, K clusters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(Protocol):
    """Any module from (..., D) features to (..., K) logits that knows K as ``out_features``."""

    out_features: int

    def __call__(self, features: Tensor) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Model(nn.Module):
    """Views -> logits of every head; ``embed`` stops at the features."""

    def __init__(
        self,
        backbone: nn.Module,
        dim: int,
        heads: Sequence[int],
        make_head: Callable[[int, int], Head] | tuple[Callable[[int, int], Head], ...],
    ):
        super().__init__()
        self.backbone = backbone
        self.dim = dim
        makers = make_head if isinstance(make_head, tuple) else (make_head,) * len(heads)
        self.heads = nn.ModuleList(cast(nn.Module, make(dim, k)) for make, k in zip(makers, heads, strict=True))

    def head_list(self) -> list[Head]:
        """The heads, typed."""
        return [cast(Head, head) for head in self.heads]

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [0, 1], or (B, D) vectors -> (B, D) features."""
        return self.backbone(images)

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """V tensors (B, C, H, W) -> H tensors (V, B, K) of logits."""
        return self.classify(self.features(views))

    def classify(self, features: Tensor) -> list[Tensor]:
        """(V, B, D) features -> H tensors (V, B, K) of logits."""
        return [head(features) for head in self.heads]

    def features(self, views: Sequence[Tensor]) -> Tensor:
        """V tensors (B, C, H, W) -> (V, B, D). Views of one size go through together."""
        sizes = [v.shape[1:] for v in views]
        alike = [[i for i, s in enumerate(sizes) if s == size] for size in dict.fromkeys(sizes)]
        features: list[Tensor] = [views[0]] * len(views)
        for group in alike:
            parts = self.embed(torch.cat([views[i] for i in group])).chunk(len(group))
            for i, part in zip(group, parts, strict=True):
                features[i] = part
        return torch.stack(features)


class Standardised(nn.Linear):
    """Linear scores with zero mean and unit variance per cluster over the batch.

    No cluster can start out winning everything, which is how IIC, UIC and DAC collapse.
    """

    def __init__(self, dim: int, k: int):
        super().__init__(dim, k, bias=False)
        self.norm = nn.BatchNorm1d(k)

    def forward(self, features: Tensor) -> Tensor:
        scores = super().forward(features)
        return self.norm(scores.flatten(0, -2)).view_as(scores)


class Prototypes(nn.Linear):
    """Cosine similarity to K learned directions; weights need no renormalising step."""

    def __init__(self, dim: int, k: int):
        super().__init__(dim, k, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


class Projector(nn.Module):
    """Linear-BN-ReLU-Linear to unit vectors: the head of contrastive pretexts, thrown away afterwards."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.out_features = out_features
        self.hidden = nn.Linear(dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)
        self.out = nn.Linear(dim, out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.hidden(features)
        hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden).relu()
        return F.normalize(self.out(hidden).float(), dim=-1)


HEADS: dict[str, Callable[[int, int], Head]] = {
    "Linear": nn.Linear,
    "Standardised": Standardised,
    "Prototypes": Prototypes,
    "Projector": Projector,
}
