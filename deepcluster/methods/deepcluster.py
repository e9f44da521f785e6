"""DeepCluster (Caron et al., ECCV 2018, arXiv:1807.05520): k-means labels, then learn them.

Deviations: a second, overclustering head is trained beside the reported one; new clusters
are renamed to overlap the old ones most, so that heads are kept (``heads="reset"`` is the paper's
way: relearning them every epoch costs ACC); sampling is uniform over pseudo-classes as the paper says, not as its
code does.
"""

from deepcluster.assign import Aligned, KMeans, centroid_heads
from deepcluster.losses import pseudo_label
from deepcluster.recipe import Every, Recipe, hint, keep_heads, method, reset_heads

POLICIES = {"match": keep_heads, "keep": keep_heads, "reset": reset_heads, "centroids": centroid_heads}


@method
def deepcluster(
    n_clusters: int = 10,
    overcluster: int = 10,
    pca_dim: int = 64,
    every: int = 1,
    heads: str = "match",
    view: str = "strong",
) -> Recipe:
    """``heads``: match (renamed to overlap), reset (the paper), keep (ids from the warm start) or centroids."""
    if heads not in POLICIES:
        raise ValueError(f"deepcluster: unknown heads {heads!r}; {hint(heads, POLICIES)}")
    kmeans = KMeans(pca_dim, warm=heads == "keep")
    return Recipe(
        heads=(n_clusters, n_clusters * overcluster) if overcluster > 1 else (n_clusters,),
        assigner=Aligned(kmeans) if heads == "match" else kmeans,
        views=(view,),
        refresh=Every(every),
        reassign=POLICIES[heads],
        balanced=True,
        objective=pseudo_label,
    )
