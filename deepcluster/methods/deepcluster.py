"""DeepCluster (Caron et al., ECCV 2018, arXiv:1807.05520): k-means labels, then learn them.

Deviations: several heads compete, each with a k-means of its own, the best of a few, and an overclustering one helps
them; what is clustered is the mean feature of some augmentations, and few of its whitened directions: 24 tell ten kinds
of images apart far better than the paper's 256, most of which are noise in small data; new clusters are renamed to
overlap the old ones most, so that heads are kept (``heads="reset"`` is the paper's way: relearning them every epoch
costs ACC); sampling is uniform over pseudo-classes as the paper says, not as its code does.
"""

from deepcluster.assign import Aligned, KMeans, centroid_heads
from deepcluster.losses import pseudo_label
from deepcluster.recipe import Every, Recipe, hint, keep_heads, method, reset_heads

POLICIES = {"match": keep_heads, "keep": keep_heads, "reset": reset_heads, "centroids": centroid_heads}


@method(
    overcluster=1, pca_dim=256, heads="reset", n_heads=1, restarts=1, label_views=1, lr=0.05, momentum=0.9,
    weight_decay=1e-5, batch_size=256,
)  # fmt: skip
def deepcluster(
    n_clusters: int = 10,
    overcluster: int = 10,
    pca_dim: int = 24,
    every: int = 1,
    heads: str = "match",
    n_heads: int = 5,
    restarts: int = 5,
    label_views: int = 4,
    view: str = "strong",
) -> Recipe:
    """``heads``: match (renamed to overlap), reset (the paper), keep (ids from the warm start) or centroids.

    ``label_views``: augmentations whose mean feature is clustered; 1 is the image itself. ``pca_dim``: more clusters
    need more. ``restarts`` of k-means for up to 32 clusters.
    """
    if heads not in POLICIES:
        raise ValueError(f"deepcluster: unknown heads {heads!r}; {hint(heads, POLICIES)}")
    kmeans = KMeans(pca_dim, warm=heads == "keep", restarts=restarts)
    return Recipe(
        heads=(n_clusters,) * n_heads + ((n_clusters * overcluster,) if overcluster > 1 else ()),
        assigner=Aligned(kmeans) if heads == "match" else kmeans,
        views=(view,),
        label_views=(view,) * label_views if label_views > 1 else ("clean",),
        refresh=Every(every),
        reassign=POLICIES[heads],
        balanced=True,
        objective=pseudo_label,
    )
