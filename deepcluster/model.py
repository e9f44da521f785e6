"""A backbone that makes features, and heads that turn features into cluster scores.

Shapes: V views, B images, C channels, D features, H heads, K clusters.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def configured(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``partial(make, **options)``, but the same one for the same options: a recipe that holds it stays a value."""
    return partial(make, **options)


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
    """Cosines to K learned directions, over a temperature (kept with the weights); they need no renormalising step."""

    temperature: Tensor

    def __init__(self, dim: int, k: int, temperature: float = 1.0):
        super().__init__(dim, k, bias=False)
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1)).float() / self.temperature


class Centroids(nn.Module):
    """Cosines to K directions that are set, not trained (centroids of k-means), over a temperature."""

    temperature: Tensor

    def __init__(self, dim: int, k: int, temperature: float = 1.0):
        super().__init__()
        self.out_features = k
        self.weight = nn.Parameter(F.normalize(torch.randn(k, dim), dim=-1), requires_grad=False)
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1)).float() / self.temperature


class ScaledCentroids(nn.Module):
    """Cosines of standardised features to K centroids, over each cluster's concentration phi: small where tight (PCL).

    In training features are standardised over the batch, so that centroids found in evaluation fit there as well. In
    evaluation all cosines are divided by the mean of phi, so that an image belongs to the nearest centroid.
    """

    def __init__(self, dim: int, k: int):
        super().__init__()
        self.out_features = k
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.weight = nn.Parameter(F.normalize(torch.randn(k, dim), dim=-1), requires_grad=False)
        self.phi = nn.Parameter(torch.ones(k), requires_grad=False)  # like the weight set, not trained

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(features.flatten(0, -2)).view_as(features).float()
        cosines = F.linear(F.normalize(x, dim=-1, eps=1e-3), F.normalize(self.weight, dim=-1)).float()
        return cosines / (self.phi if self.training else self.phi.mean())


class Projector(nn.Module):
    """Linear-BN-ReLU-Linear to unit vectors: the head of contrastive pretexts, thrown away afterwards."""

    def __init__(self, dim: int, out_features: int, hidden: int | None = None):
        super().__init__()
        self.out_features = out_features
        width = hidden or dim
        self.hidden = nn.Linear(dim, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.hidden(features)
        hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden).relu()
        return F.normalize(self.out(hidden).float(), dim=-1)


class Arranged(nn.Module):
    """Puts views side by side in P ways and scores which way that is: the head of spatial pretexts, thrown away.

    (V, B, D) features -> (P, B, P) logits; row p shows views ``orders[p]`` in this order. A view's features are coded
    once, then Linear-BN-ReLU-Linear reads the codes of each row side by side; its first layer is computed once for
    every (view, place) and added up, not once for each of the P rows.

    Args:
        dim: D.
        out_features: P, the number of orders.
        orders: (P, places) views by number.
        code: numbers a view is coded by.
        hidden: width of the layer after.
    """

    orders: Tensor

    def __init__(self, dim: int, out_features: int, orders: Tensor, code: int = 128, hidden: int = 256):
        super().__init__()
        if len(orders) != out_features:
            raise ValueError(f"{len(orders)} orders need as many outputs; got {out_features}")
        self.out_features, self.places = out_features, orders.shape[1]
        self.register_buffer("orders", orders.clone())
        self.code = nn.Linear(dim, code)
        self.place = nn.Linear(code, self.places * hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.out = nn.Linear(hidden, out_features)

    def forward(self, features: Tensor) -> Tensor:
        placed = self.place(self.code(features).relu()).unflatten(-1, (self.places, -1))  # (V, B, places, hidden)
        numbers = torch.arange(len(features), device=features.device)
        chosen = (self.orders[..., None] == numbers).to(placed)  # (P, places, V)
        hidden = torch.einsum("piv,vbih->pbh", chosen, placed)
        hidden = self.norm(hidden.flatten(0, 1)).view_as(hidden).relu()
        return self.out(hidden)


HEADS: dict[str, Callable[[int, int], Head]] = {
    "Linear": nn.Linear,
    "Standardised": Standardised,
    "Prototypes": Prototypes,
    "Centroids": Centroids,
    "ScaledCentroids": ScaledCentroids,
    "Projector": Projector,
}
