"""What clustering the features of a pretrained backbone comes to, against plain k-means on them; and what it takes.

    python scripts/frozen.py SOURCE --n-clusters 5 [--seeds 5] [--methods best,kmeans,spectral,temi,scan,iic,sela]

For every method the median and the range of ACC and NMI over seeds, compared with the labels the source has; first of
scikit-learn's k-means on the features as they are. Features are extracted once; times are without that.
"""

import argparse
import logging
import time

import numpy as np
import torch
from sklearn.cluster import KMeans

from deepcluster import DeepCluster, choosing, dist, evaluate, frozen, metrics, runs
from deepcluster import plan as planning
from deepcluster.batches import eval_batches
from deepcluster.settings import Settings
from deepcluster.sources import open_source


def line(name: str, found: list[tuple[float, float]], seconds: float, more: str = "") -> str:
    """A row of the table."""
    cells = (f"{np.median(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in zip(*found, strict=True))
    return f"{name:20} ACC {next(cells)}   NMI {next(cells)}   {seconds:.1f} s   {more}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--n-clusters", type=int, default=10)
    parser.add_argument("--backbone")
    parser.add_argument("--weights")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(("best", *choosing.TRIED)))
    parser.add_argument("--speed", action="store_true", help="extraction against the bare forward, on 256 images")
    args = parser.parse_args()
    logging.getLogger("deepcluster").setLevel(logging.ERROR)
    backbone = args.backbone or choosing.at_hand()
    source, device = open_source(args.source), dist.setup()
    settings = Settings(method="kmeans", n_clusters=args.n_clusters, backbone=backbone, weights=args.weights)
    store = runs.Job().store(source, *planning.choose_size(settings, source, device), device)
    plan = planning.resolve(settings, len(store), store.shape, device)
    true = evaluate.of_rows(evaluate.true_classes(source, "auto"), store.rows)
    began = time.perf_counter()
    model, vectors = planning.kept(plan, store, None, lambda it, **_: it)
    print(f"{len(store)} images, features {tuple(model.map_mean.shape)} in {time.perf_counter() - began:.1f} s")
    if args.speed:
        print(speed(model, store))
    features = frozen.extract(model, store, plan.backbone).astype(np.float32)
    found, began = [], time.perf_counter()
    for seed in range(args.seeds):
        labels = KMeans(args.n_clusters, n_init=10, random_state=seed).fit_predict(features)
        found.append((metrics.accuracy(labels, true), metrics.nmi(labels, true)))
    print(line("k-means, as they are", found, (time.perf_counter() - began) / args.seeds), flush=True)
    for method in args.methods.split(","):
        found, began, chosen = [], time.perf_counter(), []
        for seed in range(args.seeds):
            given = {"backbone": backbone, "weights": args.weights, "method": method, "random_state": seed}
            run = DeepCluster(args.n_clusters, **given).fit(args.source)
            found.append((metrics.accuracy(run.labels_, true), metrics.nmi(run.labels_, true)))
            chosen.append(run.plan_.stages[-1].method)
        more = " ".join(chosen) if set(chosen) != {method} else ""
        print(line(method, found, (time.perf_counter() - began) / args.seeds, more), flush=True)
    del vectors


def speed(model: frozen.Frozen, store) -> str:
    """Images a second of the bare network on batches that are there, and of extraction from the store; in turns."""
    part = runs.replace(store, rows=store.rows[:256])
    batch = next(iter(eval_batches(part, batch_size=frozen.ROWS, shard=False)))
    bare, whole = [], []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(len(part) // frozen.ROWS):
                model.network(batch)
            bare.append(len(part) // frozen.ROWS * frozen.ROWS / (time.perf_counter() - began))
            began = time.perf_counter()
            rows = sum(len(features) for _, features in frozen._parts(model, part, "", lambda it, **_: it, []))
            whole.append(rows / (time.perf_counter() - began))
    return f"bare forward {max(bare):.1f} images/s, extraction {max(whole):.1f}: {max(whole) / max(bare):.2f}"


if __name__ == "__main__":
    main()
