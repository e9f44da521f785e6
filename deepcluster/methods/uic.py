"""UIC (Chen et al., 2020, arXiv:2006.11480): the network's own predictions are its labels; no features are clustered.

Deviations: labels are what the heads say of the clean image in eval mode at the start of an epoch, not what they said
of its augmentation during the last one, while weights moved; they start from one k-means of the features, so that a
pretext before is not unlearnt (``start="random"`` is the paper's); scores are standardised over the batch before the
softmax, and over all images before the argmax, which keeps clusters of like size (``standardised``); several heads
compete, and sampling is uniform over the clusters of the last.
"""

from deepcluster.assign import Argmax, KMeans
from deepcluster.losses import pseudo_label
from deepcluster.model import Standardised
from deepcluster.recipe import Every, Recipe, hint, method

STARTS = {"kmeans": KMeans(pca_dim=24, restarts=5), "random": None}


@method(sub_heads=1, standardised=False, start="random", lr=0.2, momentum=0.9, weight_decay=1e-4, batch_size=1024)
def uic(
    n_clusters: int = 10,
    sub_heads: int = 10,
    every: int = 1,
    start: str = "kmeans",
    standardised: bool = True,
    view: str = "strong",
) -> Recipe:
    """``sub_heads`` of equal width; labels are made anew every ``every`` epochs, first by ``start``: kmeans, random."""
    if start not in STARTS:
        raise ValueError(f"uic: unknown start {start!r}; {hint(start, STARTS)}")
    return Recipe(
        heads=(n_clusters,) * sub_heads,
        head=Standardised,
        assigner=Argmax(STARTS[start], standardised),
        refresh=Every(every),
        views=(view,),
        objective=pseudo_label,
        balanced=True,
        passes=1.5,
    )
