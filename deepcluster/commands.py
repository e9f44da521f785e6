"""What each command does. Imports wait until a command needs them, so that ``--help`` is answered at once."""

import argparse
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

from deepcluster import counting, options
from deepcluster.terminal import visible


def _fit(args: argparse.Namespace) -> None:
    from deepcluster.estimator import DeepCluster

    given = options.given(args)
    if args.resume:
        given.pop("device", None)  # it may change, and so may these
        instead: dict[str, Any] = {n: given.pop(n) for n in ("on_collapse", "checkpoint_every") if n in given}
        extra = [name for name in ("source", "out", "overwrite", "config", "dry_run") if getattr(args, name)]
        extra += [name for name, value in given.items() if value not in ({}, None)]
        if extra:
            name = extra[0].replace("_", "-") if extra[0] == "source" else f"--{extra[0].replace('_', '-')}"
            raise ValueError(f"{name} cannot be given with --resume RUN: a run goes on as it began; leave it out")
        model = DeepCluster(out=args.resume, quiet=args.quiet, device=args.device or "auto", **instead)
        model._settings()  # checks them
        _say(model._resume(args.labels, instead, workers=args.workers, data_root=args.data_root), args.resume)
        return
    if not args.source or not (args.out or args.dry_run):
        raise ValueError("fit needs a SOURCE and --out RUN, or --resume RUN")
    labels = args.labels or "auto"
    if given.get("use_labels"):
        from deepcluster import evaluate

        if labels in ("auto", "none"):
            raise ValueError("--use-labels learns from the labels in a file: add --labels FILE.csv with path,label")
        given.setdefault("n_clusters", len(evaluate.label_names(labels)))
    given["random_state"] = given.pop("seed", 0)
    job = {"labels": labels, "workers": args.workers, "data_root": args.data_root}
    model = DeepCluster(**given, out=args.out, overwrite=args.overwrite, quiet=args.quiet)
    if args.dry_run:
        from deepcluster import dryrun

        print("\n".join(dryrun.lines(model._settings(), args.source, model._job(**job))))
        return
    _say(model._fit(args.source, **job), args.out)


def _cluster(args: argparse.Namespace) -> None:
    from deepcluster import choosing

    choosing.fill(args)
    _fit(args)


def _say(model: Any, out: str) -> None:
    """The last lines a user sees: what came out, and where it lies."""
    from deepcluster import dist

    if not dist.is_main():
        return
    if model.skipped_:
        print(f"{len(model.skipped_)} images were skipped; see {out}/skipped.csv")
    few = f"{model.n_labelled_} labels were used in training" if model.n_labelled_ else ""
    if few:
        print(few)
    if scores := model.scores_:
        print(
            "  ".join(f"{k.upper()} {scores[k]:.3f}" for k in ("acc", "nmi", "ari")),
            f" (of {scores['n_images']} other images)" if few else " (labels were used for this line only)",
        )
    print(f"clusters: {out}/clusters.parquet   images: {out}/assignments.parquet   model: {out}/model")
    print(f"to look at: {out}/report.html")
    if not model.quiet and len(set(model.labels_.tolist())) == 1:
        print(
            f"deepcluster: warning: collapsed: all {len(model.labels_)} images are in one cluster; train longer, try "
            "another --method or --seed, a lower --lr, or look whether the images differ at all",
            file=sys.stderr,
        )


def _demo(args: argparse.Namespace) -> None:
    from deepcluster.estimator import DeepCluster

    began = time.perf_counter()
    model = DeepCluster(10, out=args.out, overwrite=args.overwrite, quiet=args.quiet)
    _say(model._fit("digits", labels="auto"), args.out)
    print(f"time: {time.perf_counter() - began:.1f} s   run: {args.out}")


def _predict(args: argparse.Namespace) -> None:
    import pyarrow.parquet as pq

    from deepcluster import atomic, confidence, outputs, results
    from deepcluster.classifier import COLUMNS
    from deepcluster.estimator import load

    out = Path(args.out)
    if out.suffix != ".parquet":
        raise ValueError(f"--out must name a .parquet file; got {args.out}")
    if out.resolve() == Path(args.source).resolve():
        raise ValueError(f"--out {args.out} is the source, which would be lost; give --out another name")
    if Path(args.run).exists() and out.resolve().is_relative_to(Path(args.run).resolve()):
        raise ValueError(f"--out {args.out} lies in the run {args.run}; give --out a place outside it")
    if out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; give --out the name of a .parquet file")
    if out.exists() and not results.is_predictions(out):
        raise ValueError(f"--out {args.out} is there and holds no predictions, so it is kept; give --out another name")
    outputs.check_folder(out.parent)
    abstain = confidence.check(args.abstain)
    model = load(args.run, args.device)
    model.quiet = args.quiet
    classifier, n, left, skipped, writer = model.classifier_, 0, 0, [], None
    parts = model._parts(args.source, args.data_root)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out) as file:
        for store in parts:
            skipped += store.skipped
            if len(store):
                found = classifier.predict(store, COLUMNS)
                table = results.images(found, store.names, store.sha1, classifier, abstain)
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table)
                n += len(store)
                left += int((table["cluster"].to_numpy() < 0).sum())
        assert writer is not None
        writer.close()
    if skipped:
        first = visible(f"{skipped[0][0]} ({skipped[0][1]})")
        print(f"{len(skipped)} images were skipped, the first: {first}")
    print(f"{n} images{f', {left} of them in no cluster (confidence below {abstain:g})' if abstain else ''}: {out}")


def _evaluate(args: argparse.Namespace) -> None:
    import numpy as np

    from deepcluster import evaluate, outputs, probe, reliability
    from deepcluster.estimator import load
    from deepcluster.sources import open_source

    data, labels = outputs.read_config(Path(args.run))["data"], args.labels
    opened = open_source(args.source, data_root=args.data_root) if args.source else outputs.reopen(data, args.data_root)
    if labels == "auto" and not args.source and data["labels"] != "none":
        labels = evaluate.for_scores(data)
    true = evaluate.true_classes(opened, labels)
    if true is None:
        raise ValueError(f"{opened.location} has no classes to compare with; give --labels FILE.csv with path,label")
    model = load(args.run, args.device)
    model.quiet = args.quiet
    table = model.image_info()
    if args.source:
        wanted = ("cluster", "confidence", *(("features",) if args.probe else ()))
        names, sha1, parts = [], [], []
        for store in model._parts(args.source, args.data_root):
            names += store.names
            sha1 += store.sha1
            parts += [model.classifier_.predict(store, wanted)] if len(store) else []
        found = {name: np.concatenate([part[name] for part in parts]) for name in wanted}
        cluster, sure, features = found["cluster"], found["confidence"], found.get("features", np.empty(0))
    else:
        outputs.check_unchanged(opened, data)
        names, cluster, sha1 = table["path"].to_pylist(), table["cluster"].to_numpy(), table["sha1"].to_pylist()
        features = model.embedding_ if args.probe else np.empty(0)
        sure = model._found().get("confidence", np.full(len(table), np.nan))  # or older
    position = {name: i for i, name in enumerate(opened.names)}
    kept = [position.get(name, -1) for name in names]
    if min(kept) < 0:
        raise ValueError(
            f"{opened.location} has no image {names[kept.index(-1)]} any more; give the source it moved to"
        )
    learnt, known = outputs.learnt(table), true[kept]
    true = evaluate.unseen(known, sha1, learnt)
    if true is None:
        raise ValueError(
            f"every label of {opened.location} in --labels {labels} was given to training; give a file with others"
        )
    scores = evaluate.scores(cluster, true, len(model.classifier_.ids))
    scores |= reliability.draw(Path(args.run), sure, cluster, true)
    if learnt:
        scores["n_given_left_out"] = int((known >= 0).sum() - (true >= 0).sum())
    if args.probe is not None:
        scores["probe"] = probe.probes(features, true, args.probe.split(","))
    split = args.source or "train"
    print(json.dumps({**scores, "split": split, "splits": {split: scores}}))


def _report(args: argparse.Namespace) -> None:
    from deepcluster import runs
    from deepcluster.estimator import load

    page = runs.report(Path(args.run), load(args.run).image_info(), data_root=args.data_root)
    print(f"report: {page}")


def _export(args: argparse.Namespace) -> None:
    from deepcluster.estimator import load
    from deepcluster.export import export

    load(args.run)  # an interrupted edit is mended
    out, copy = Path(args.out), args.copy
    print(export(Path(args.run), args.format, out, copy=copy, overwrite=args.overwrite, data_root=args.data_root))


def _merge(args: argparse.Namespace) -> None:
    from deepcluster.estimator import load

    if bool(args.decisions) == bool(args.clusters):
        raise ValueError("merge takes clusters, as in: merge RUN 3 17, or --from FILE.json of the report")
    model = load(args.run)
    by_page = bool(args.decisions)
    _edited(args, model.apply_decisions(args.decisions) if by_page else model.merge_clusters([args.clusters]))


def _split(args: argparse.Namespace) -> None:
    from deepcluster.estimator import load

    _edited(args, load(args.run).split_cluster(args.cluster, args.into))


def _name(args: argparse.Namespace) -> None:
    from deepcluster.estimator import load

    _edited(args, load(args.run).set_cluster_names({args.cluster: args.name}))


def _junk(args: argparse.Namespace) -> None:
    from deepcluster.estimator import load

    _edited(args, load(args.run).mark_junk(args.clusters, not args.off))


def _reduce_outliers(args: argparse.Namespace) -> None:
    from deepcluster.estimator import load

    _edited(args, load(args.run).reduce_outliers())


def _undo(args: argparse.Namespace) -> None:
    from deepcluster.estimator import load

    _edited(args, load(args.run).undo())


def _edited(args: argparse.Namespace, model: Any) -> None:
    """What there is now, and what shows it."""
    n = model.cluster_info().num_rows
    steps = len(model.classifier_.steps)
    print(f"{n} clusters; edits that can be undone: {steps}   clusters: {args.run}/clusters.parquet")
    print(f"to look at: deepcluster report {args.run}")


def _methods(args: argparse.Namespace) -> None:
    import deepcluster.methods  # noqa: F401
    from deepcluster.recipe import METHODS, PAPER, make_recipe

    for name in sorted(METHODS):
        module = inspect.getmodule(METHODS[name])
        recipe = make_recipe(name)
        print(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        kind = "pretext: learns features, a clustering method follows" if recipe.pretext else "clusters"
        kind += ", with the names of a few labels given to it (--use-labels)" if recipe.supervised else ""
        print(f"    {kind}; labels are made {recipe.refresh}; views: {', '.join(recipe.views)}")
        options = inspect.signature(METHODS[name]).parameters.values()
        print("    " + "  ".join(f"{p.name}={p.default}" for p in options))
        if PAPER[name]:
            print("    --preset paper: " + "  ".join(f"{key}={value}" for key, value in PAPER[name].items()))


def _doctor(args: argparse.Namespace) -> None:
    from deepcluster import doctor

    print("\n".join(doctor.lines()))


COMMANDS = {
    "fit": _fit,
    "cluster": _cluster,
    "demo": _demo,
    "predict": _predict,
    "evaluate": _evaluate,
    "advise": counting.advise,
    "export": _export,
    "report": _report,
    "merge": _merge,
    "split": _split,
    "name": _name,
    "junk": _junk,
    "reduce-outliers": _reduce_outliers,
    "undo": _undo,
    "k": counting.k,
    "recut": counting.recut,
    "methods": _methods,
    "doctor": _doctor,
}
