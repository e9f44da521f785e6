"""Deep clustering: features and pseudo-classes learnt together from images without labels."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["METHODS", "DeepCluster", "Recipe", "__version__", "fit", "load"]

if TYPE_CHECKING:
    from deepcluster.estimator import DeepCluster, fit, load
    from deepcluster.recipe import METHODS, Recipe


def __getattr__(name: str) -> Any:
    """Import the parts when they are asked for: ``deepcluster doctor`` must run where torch does not."""
    if name in ("DeepCluster", "fit", "load"):
        from deepcluster import estimator

        return getattr(estimator, name)
    if name in ("METHODS", "Recipe"):
        import deepcluster.methods  # noqa: F401  (registers them)
        from deepcluster import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module 'deepcluster' has no attribute {name!r}")
