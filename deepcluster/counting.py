"""The commands ``advise``, which backbone; ``k``, how many clusters there are; ``recut``, another number of them."""

import argparse
import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from deepcluster.estimator import DeepCluster
    from deepcluster.howmany import Evidence

TYPICAL = 8  # images a cluster is shown by
PICTURES = 2000  # on the page, at most


def advise(args: argparse.Namespace) -> None:
    """Print which of the backbones at hand fits the images."""
    from deepcluster.advise import advise

    print("\n".join(advise(args.source, args.backbone, args.n, args.device, args.data_root, args.quiet)))


def k(args: argparse.Namespace) -> None:
    """Print the evidence for each k, of a finished run or of features, and write RUN/k.html."""
    from deepcluster import atomic, howmany
    from deepcluster.estimator import load
    from deepcluster.report.plateaus import page

    said: dict[str, Any] = {}
    if (Path(args.source) / "config.json").is_file():
        run, model = Path(args.source), load(args.source)
        found = model.k_evidence(args.min, args.max)
        command = f"deepcluster recut {shlex.quote(args.source)} --k"
        atomic.write(run / "k.html", page(found, str(run), _galleries(found, model, args.data_root), command))
        said["page"] = str(run / "k.html")
    else:
        features, cosine = _features(args)
        found = howmany.evidence(features, low=args.min, high=args.max, seed=args.seed, cosine=cosine)
    told = {name: value for name, value in found.to_dict().items() if name not in ("tree", "scale")}
    if args.json:
        print(json.dumps({"source": args.source, **told, **said}))
        return
    print("\n".join(lines(found)))
    if said:
        print(f"to look at: {said['page']}   another number: deepcluster recut {args.source} --k K")


def lines(found: "Evidence") -> list[str]:
    """The table and the answer."""
    head = f"{'k':>4}  stability  generalisation  separation  gain  answer"
    rows = [f"{row.k:>4}  {row.stability:>9.2f}  {row.generalisation:>14.2f}  {row.separation:>10.2f}  {row.gain:>4.1f}"
            f"  {'*' * (4 - row.plateau) if row.plateau else ''}".rstrip() for row in found.rows]  # fmt: skip
    some = found.n_sampled < found.n_images
    looked = f" ({found.n_sampled:,} of {found.n_images:,} images were looked at)" if some else ""
    return [head, *rows, f"{found.sentence()}{looked}"]


def recut(args: argparse.Namespace) -> None:
    """Cut the tree of a run into another number of clusters."""
    from deepcluster.estimator import load

    model = load(args.run)
    edits = len(model.classifier_.steps)
    model.recut(args.k)
    aside = f"; {edits} edits before it are set aside until undo" if edits else ""
    print(f"{args.k} clusters, numbered by size{aside}   clusters: {args.run}/clusters.parquet")
    print(f"to look at: deepcluster report {args.run}")


def _features(args: argparse.Namespace) -> "tuple[np.ndarray, bool]":
    """(N, D) of a source that holds features, or (N, d) of its images as heads on a pretrained network see them.

    And whether only their directions count, as in a run.
    """
    from deepcluster import dist, log
    from deepcluster import plan as planning
    from deepcluster.runs import Job
    from deepcluster.settings import Settings
    from deepcluster.sources import open_source

    source = open_source(args.source, data_root=args.data_root)
    if source.features is not None:
        return source.features, False
    if not args.backbone:
        raise ValueError(f"{source.location} holds images, and how many kinds there are shows in features: name a "
                         "pretrained --backbone, or train first: deepcluster fit SOURCE --n-clusters auto --out RUN, "
                         "deepcluster k RUN")  # fmt: skip
    settings = Settings(n_clusters=2, backbone=args.backbone, weights=args.weights, frozen=True, seed=args.seed)
    planning.check(settings)
    device = dist.setup("auto")
    job = Job(quiet=args.quiet, data_root=args.data_root)
    with log.Recording():
        store = job.store(source, *planning.choose_size(settings, source, device), device)
        plan = planning.resolve(settings, len(store), store.shape, device)
        _, vectors = planning.kept(plan, store, None, job.progress)
        return vectors.data.cpu().numpy(), True


def _galleries(found: "Evidence", model: "DeepCluster", data_root: str | None) -> list[Any]:
    """Typical images of each cluster, for each answer."""
    import numpy as np

    from deepcluster import outputs, recut
    from deepcluster.log import logger
    from deepcluster.report.pictures import Pictures
    from deepcluster.report.plateaus import Gallery
    from deepcluster.store import open_store

    features, paths = model.embedding_, model.names_
    pictures = None
    try:
        size, channels = model._data["size"]
        store = open_store(outputs.reopen(model._data, data_root), size=size, channels=channels)
        if len(store.shape) == 3 and outputs.content(store) == model._data["content"]:
            store.names = paths
            pictures = Pictures(store, paths)
    except ValueError as error:
        logger.warning("%s; the page shows paths instead of images", error)
    made = []
    each = max(1, min(TYPICAL, PICTURES // max(1, sum(found.answers))))
    for n in found.answers:
        sizes, typical = recut.typical(recut.cut(found, n, features), features, each)
        drawn = pictures.each(np.concatenate(typical)) if pictures else [""] * sum(map(len, typical))
        split = np.cumsum([0, *map(len, typical)])
        made.append(Gallery(n, sizes, [[paths[i] for i in rows.tolist()] for rows in typical],
                            [drawn[a:b] for a, b in pairwise(split)]))  # fmt: skip
    return made
