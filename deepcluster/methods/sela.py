"""SeLa (Asano et al., ICLR 2020, arXiv:1911.05371): labels by optimal transport, many heads.

Deviations: labels come from the mean feature of a few random views in eval mode, not from one augmentation in
train mode; lambda is found from the logits' spread (``strength`` sets it); every head is refreshed each
time; refreshes fall on whole epochs.
"""

from deepcluster.assign import Balanced
from deepcluster.losses import pseudo_label
from deepcluster.recipe import Recipe, Spread, method


@method
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
        passes=0.75,
    )
