"""SeLa (Asano et al., ICLR 2020, arXiv:1911.05371): labels by optimal transport, many heads.

Deviations: heads start from k-means on whitened features, not from random labels; labels come from the mean feature of
a few random views in eval mode, not from one augmentation in train mode; lambda is found from the logits' spread
(``strength`` sets it); every head is refreshed each time; refreshes fall on whole epochs.
"""

from deepcluster.assign import Balanced
from deepcluster.losses import pseudo_label
from deepcluster.recipe import Recipe, Spread, method


@method(
    n_heads=10, refreshes=100, strength=25.0, label_views=1, lr=0.08, momentum=0.9, weight_decay=1e-5, batch_size=256
)  # fmt: skip
def sela(
    n_clusters: int = 10,
    overcluster: int = 1,
    n_heads: int = 10,
    refreshes: int = 20,
    strength: float = 0.0,
    label_views: int = 4,
    view: str = "strong",
) -> Recipe:
    """``n_heads`` of each width; labels are balanced by Sinkhorn, ``refreshes`` times over the run."""
    over = (n_clusters * overcluster,) * n_heads if overcluster > 1 else ()
    return Recipe(
        heads=(n_clusters,) * n_heads + over,
        assigner=Balanced(strength),
        refresh=Spread(refreshes),
        views=(view,),
        label_views=(view,) * label_views,
        objective=pseudo_label,
    )
