"""SimCLR (Chen et al., ICML 2020, arXiv:2002.05709): tell every image's two views from all others. A pretext.

Deviations: temperature 0.5 as for CIFAR-10 in the paper's appendix B.9; AdamW instead of LARS.
"""

from dataclasses import dataclass

from torch import Tensor

from deepcluster.losses import contrastive
from deepcluster.model import Projector
from deepcluster.recipe import Clock, Recipe, method


@dataclass(frozen=True)
class Contrastive:
    """NT-Xent between the first two views."""

    temperature: float = 0.5

    def __call__(self, logits: Tensor, labels: Tensor, clock: Clock) -> Tensor:
        return contrastive(logits[0], logits[1], temperature=self.temperature)


@method(batch_size=1024, weight_decay=1e-6)
def simclr(n_clusters: int = 10, temperature: float = 0.5, projection: int = 128, view: str = "crop") -> Recipe:
    """Learns features; ``n_clusters`` is for the recipe that follows. A larger batch has more to tell apart."""
    return Recipe(
        heads=(projection,),
        head=Projector,
        views=(view, view),
        objective=Contrastive(temperature),
        pretext=True,
        passes=1.5,
    )
