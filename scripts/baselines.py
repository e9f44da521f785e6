"""Cluster the pixels of a source by a known method, so that ours have something to be compared with.

    python scripts/baselines.py kmeans digits --seed 0
    python scripts/baselines.py clustpy:dec train.parquet --n-clusters 10 --image-size 28

Prints one JSON object: scores, seconds of the clustering alone, what went in. ``compare.py`` runs it, a process a run.
The images are those of ``deepcluster fit``: decoded by the same store to the same size and channels, then flattened to
float32 in [0, 1]. Labels are read for the scores only. Exit codes: 0 done, 2 wrong input, 4 a package is missing.

kmeans        scikit-learn's KMeans, n_init=10
spectral      scikit-learn's SpectralClustering on the graph of nearest neighbours; at most 10,000 images
umap+kmeans   the same embedding as the next, then k-means with K clusters.
umap+hdbscan  umap-learn to 10 dimensions (n_neighbors=30, min_dist=0), then scikit-learn's HDBSCAN (min_samples=10, as
              umap-learn's page on clustering has it; min_cluster_size a quarter of N / K). It finds its own number of
              clusters; noise stays unassigned: wrong in ACC, no cluster in n_found, one more group in NMI and ARI
clustpy:*     ``labels_`` of that package's DEC, IDEC, DCN, DDC and VaDE, with its defaults. VaDE wants [0, 1]; the
              others get what its ``get_default_augmented_dataloaders`` does: [0, 1], then mean 0 and std 1 a channel.
              DDC finds its own number of clusters, and needs N^2 memory: at most 20,000 images. Python >= 3.11 only
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # compare.py imports this file, and must stay small: see run() there
    import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CLUSTPY = {"dec": "DEC", "idec": "IDEC", "dcn": "DCN", "ddc": "DDC", "vade": "VaDE"}
NAMES = ("kmeans", "spectral", "umap+hdbscan", "umap+kmeans", *(f"clustpy:{name}" for name in CLUSTPY))
LIMITS = {"spectral": 10_000, "clustpy:ddc": 20_000}  # images; beyond, memory grows past an ordinary machine's
MISSING = "not installed: pip install 'deepcluster[bench]'"
NOT_INSTALLED = 4


def needs(name: str) -> dict[str, str]:
    """Module to import -> its package, beyond scikit-learn."""
    if name.startswith("clustpy:"):
        return {"clustpy.deep": "clustpy"}
    return {"umap": "umap-learn"} if name.startswith("umap") else {}


def read(args: argparse.Namespace) -> tuple["np.ndarray", "np.ndarray", Any]:
    """(N, C, H, W) or (N, D) float32 of the images that can be read, in [0, 1]; their classes; the device."""
    import numpy as np

    from deepcluster import dist, evaluate
    from deepcluster.estimator import choose_size
    from deepcluster.settings import Settings
    from deepcluster.sources import open_source
    from deepcluster.store import open_store

    device = dist.setup(args.device)
    source = open_source(args.source, data_root=args.data_root)
    true = evaluate.true_classes(source, args.labels)
    size, channels = choose_size(Settings(image_size=args.image_size), source, device)
    store = open_store(source, size=size, channels=channels)
    true = evaluate.of_rows(true, store.rows)
    if true is None:
        raise ValueError(f"{source.location} has no classes to compare with; give --labels FILE.csv with path,label")
    x = store.data.numpy()[store.rows]
    return (x / np.float32(255) if x.ndim == 4 else standardised(x)), true, device


def standardised(x: "np.ndarray") -> "np.ndarray":
    """Mean 0 and deviation 1, of each channel of images or feature of vectors."""
    axes = (0, 2, 3) if x.ndim == 4 else 0
    return (x - x.mean(axes, keepdims=True)) / (x.std(axes, keepdims=True) + 1e-8)


def hdbscan(z: "np.ndarray", k: int) -> "np.ndarray":
    """(N,) clusters of points (N, D), -1 for noise; k only sets how small a cluster may be."""
    from sklearn.cluster import HDBSCAN

    return HDBSCAN(min_cluster_size=max(5, len(z) // (4 * k)), min_samples=10, copy=True).fit(z).labels_


def cluster(name: str, x: "np.ndarray", k: int, seed: int, device: Any) -> tuple["np.ndarray", str]:
    """(N,) labels by one baseline, -1 for unassigned, and how its input was scaled."""
    from sklearn.cluster import KMeans, SpectralClustering

    flat, scaled = x.reshape(len(x), -1), "[0, 1]" if x.ndim == 4 else "standardised a feature"
    if name == "kmeans":
        return KMeans(k, n_init=10, random_state=seed).fit(flat).labels_, scaled
    if name == "spectral":
        spectral = SpectralClustering(k, affinity="nearest_neighbors", random_state=seed)
        return spectral.fit(flat).labels_, scaled
    if name in ("umap+hdbscan", "umap+kmeans"):
        from umap import UMAP

        umap = UMAP(n_components=10, n_neighbors=min(30, len(x) - 1), min_dist=0.0, random_state=seed, n_jobs=1)
        z = umap.fit_transform(flat)
        found = hdbscan(z, k) if name == "umap+hdbscan" else KMeans(k, n_init=10, random_state=seed).fit(z).labels_
        return found, scaled
    import clustpy.deep

    kind = name.split(":")[1]
    asked = {} if kind == "ddc" else {"n_clusters": k}
    model = getattr(clustpy.deep, CLUSTPY[kind])(**asked, random_state=seed, device=device)
    if kind != "vade":
        flat, scaled = standardised(x).reshape(len(x), -1), "standardised a channel or feature"
    elif x.ndim == 2:  # it wants [0, 1]
        flat, scaled = (flat - flat.min(0)) / (np.ptp(flat, 0) + 1e-8), "min to max of a feature"
    return model.fit(flat).labels_, scaled


def result(labels: "np.ndarray", true: "np.ndarray", k: int) -> dict[str, Any]:
    """The package's own scores; noise (-1) is no cluster and wrong."""
    from deepcluster import evaluate

    return {**evaluate.scores(labels, true, k), "noise": round(float((labels < 0).mean()), 4)}


def baseline(args: argparse.Namespace) -> dict[str, Any]:
    """One run, scored."""
    packages = needs(args.name)
    for module in packages:
        importlib.import_module(module)
    x, true, device = read(args)
    limit = LIMITS.get(args.name, len(x))
    if len(x) > limit:
        raise ValueError(f"{args.name} takes at most {limit:,} images here; the source has {len(x):,}, see --first")
    began = time.perf_counter()
    labels, scaled = cluster(args.name, x, args.n_clusters, args.seed, device)
    seconds = time.perf_counter() - began
    found = result(labels, true, args.n_clusters)
    versions = {package: version(package) for package in ("scikit-learn", *packages.values())}
    return {**found, "seconds": seconds, "shape": list(x.shape[1:]), "input": scaled, "versions": versions}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-clusters", type=int, default=10)
    parser.add_argument("--image-size", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-root")
    parser.add_argument("--labels", default="auto", metavar="FILE.csv")
    return parser


def main() -> int:
    """Run one baseline; the exit code."""
    args = arguments().parse_args()
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"  # the last line on stderr is the error
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):  # clustpy prints its epochs
            found = baseline(args)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in ("umap", "clustpy"):
            print(MISSING, file=sys.stderr)
            return NOT_INSTALLED
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
