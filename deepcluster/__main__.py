"""The command line: ``deepcluster COMMAND ...``.

Exit codes: 0 done, 2 wrong input, 3 training stopped itself, 130 interrupted.

deepcluster demo
deepcluster fit photos/ --out runs/a --n-clusters 20
deepcluster fit --resume runs/a
deepcluster predict runs/a more/ --out new.parquet
deepcluster evaluate runs/a --labels labels.csv
deepcluster methods
deepcluster doctor
"""

import argparse
import errno
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepcluster import options


def _fit(args: argparse.Namespace) -> None:
    from deepcluster.estimator import DeepCluster

    given = options.given(args)
    if args.resume:
        given.pop("device", None)  # the one setting that may change
        extra = [name for name in ("source", "out", "overwrite", "config", "dry_run") if getattr(args, name)]
        extra += [name for name, value in given.items() if value not in ({}, None)]
        if extra:
            name = extra[0].replace("_", "-") if extra[0] == "source" else f"--{extra[0].replace('_', '-')}"
            raise ValueError(f"{name} cannot be given with --resume RUN: a run goes on as it began; leave it out")
        model = DeepCluster(out=args.resume, quiet=args.quiet, device=args.device or "auto")
        _say(model._resume(args.labels, args.workers, args.data_root), args.resume)
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
    model = DeepCluster(**given, out=args.out, overwrite=args.overwrite, quiet=args.quiet)
    if args.dry_run:
        print("\n".join(model._dry_run(args.source, labels, args.workers, args.data_root)))
        return
    _say(model._fit(args.source, labels, args.workers, args.data_root), args.out)


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
    from deepcluster import outputs
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
    outputs.check_folder(out.parent)
    model = load(args.run, args.device)
    model.quiet = args.quiet
    store, found = model._predict(args.source, args.data_root)
    out.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_table(out, outputs.predictions(found, store.names, store.sha1, model.classifier_.names))
    if store.skipped:
        print(f"{len(store.skipped)} images were skipped, the first: {store.skipped[0][0]} ({store.skipped[0][1]})")
    print(f"{len(store)} images: {out}")


def _evaluate(args: argparse.Namespace) -> None:
    from deepcluster import evaluate, outputs
    from deepcluster.estimator import load
    from deepcluster.sources import open_source

    config = outputs.read_config(Path(args.run))
    data, labels = config["data"], args.labels
    opened = open_source(args.source, data_root=args.data_root) if args.source else outputs.reopen(data, args.data_root)
    if labels == "auto" and not args.source and data["labels"] != "none":
        labels = evaluate.for_scores(data)
    true = evaluate.true_classes(opened, labels)
    if true is None:
        raise ValueError(f"{opened.location} has no classes to compare with; give --labels FILE.csv with path,label")
    table = outputs.read_assignments(Path(args.run))
    if args.source:
        model = load(args.run, args.device)
        model.quiet = args.quiet
        store, found = model._predict(args.source, args.data_root)
        names, cluster, sha1 = store.names, found["cluster"], store.sha1
    else:
        names, cluster, sha1 = table["path"].to_pylist(), table["cluster"].to_numpy(), table["sha1"].to_pylist()
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
    scores = evaluate.scores(cluster, true, config["plan"].n_clusters)
    if learnt:
        scores["n_given_left_out"] = int((known >= 0).sum() - (true >= 0).sum())
    split = args.source or "train"
    print(json.dumps({**scores, "split": split, "splits": {split: scores}}))


def _report(args: argparse.Namespace) -> None:
    from deepcluster import evaluate, outputs
    from deepcluster.report import write_report
    from deepcluster.store import open_store

    run = Path(args.run)
    config, rows, table, clusters = outputs.read_run(run)
    store, true = None, None
    try:
        source = outputs.reopen(config["data"], args.data_root)
        size, channels = config["data"]["size"]
        store = open_store(source, size=size, channels=channels)
        if store.names == table["path"].to_pylist():
            found = evaluate.true_classes(source, evaluate.for_scores(config["data"]))
            true = evaluate.unseen(evaluate.of_rows(found, store.rows), store.sha1, outputs.learnt(table))
    except ValueError as error:
        logging.getLogger("deepcluster").warning("%s; the report shows paths instead of images", error)
    print(f"report: {write_report(run, config, rows, table, clusters, store, true)}")


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
    "demo": _demo,
    "predict": _predict,
    "evaluate": _evaluate,
    "report": _report,
    "methods": _methods,
    "doctor": _doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold bytes, and a name letters, that the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    args = options.parser(__doc__ or "").parse_args(argv)
    try:
        with _surroundings(args):
            COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        print(f"deepcluster: interrupted; {_how_to_go_on(args)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"deepcluster: error: {_line(error, args)}", file=sys.stderr)
        return 3 if isinstance(error, FloatingPointError) else 2
    except Exception as error:
        if args.debug:
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"deepcluster: internal error: {what}; please report it with the output of --debug", file=sys.stderr)
        return 1


@contextmanager
def _surroundings(args: argparse.Namespace) -> Iterator[None]:
    """Remarks go to stderr, warnings of libraries nowhere, and SIGTERM is like Ctrl-C."""
    log = logging.getLogger("deepcluster")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING if args.quiet else logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    if os.environ.get("RANK", "0") != "0":
        handler.setLevel(logging.ERROR)
    level, signals = log.level, threading.current_thread() is threading.main_thread()

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate) if signals else None
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        if signals:
            signal.signal(signal.SIGTERM, previous)
        log.removeHandler(handler)
        log.setLevel(level)


def _how_to_go_on(args: argparse.Namespace) -> str:
    run = getattr(args, "resume", None) or getattr(args, "out", None)
    if args.command in ("fit", "demo") and run and (Path(run) / "config.json").exists():
        return f"go on with: deepcluster fit --resume {run}"
    return "nothing was written; start it again"


def _line(error: Exception, args: argparse.Namespace) -> str:
    """The error on one line, with what to do where the system's own words do not say."""
    text = " ".join(str(error).split())
    if not isinstance(error, OSError) or error.strerror is None:
        return text
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    todo = f"free some space; {_how_to_go_on(args)}" if full else "give a place that can be read and written"
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}; {todo}"


if __name__ == "__main__":
    sys.exit(main())
