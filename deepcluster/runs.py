"""One run from the source to its results: begun, gone on with, or tried out."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from deepcluster import __version__ as version
from deepcluster import atomic, checkpoint, choosing, dist, doctor, ending, evaluate, log, metrics, nuisance, outputs
from deepcluster import edits as editing
from deepcluster import plan as planning
from deepcluster.classifier import Classifier, Spec
from deepcluster.evaluate import Known
from deepcluster.log import Metrics, Recording, logger, no_bar
from deepcluster.plan import Plan, choose_size
from deepcluster.report import write_report
from deepcluster.sentinel import Sentinel
from deepcluster.settings import Settings
from deepcluster.sources import Source, open_source
from deepcluster.store import Store, open_store


@dataclass(frozen=True)
class Job:
    """What is asked for, besides the settings."""

    out: Path | None = None  # run directory
    overwrite: bool = False
    quiet: bool = True
    labels: str = "none"  # --labels auto | none | FILE.csv
    workers: int | None = None
    data_root: str | None = None
    columns: Sequence[str] | None = None  # names of the features, of a table that has them

    def progress(self, of: Any, **kw: Any) -> Any:
        """A bar over images."""
        return log.bar(kw["desc"], self.quiet, of=of, unit="image", **kw)

    def store(self, source: Source, size: int, channels: int, device: torch.device) -> Store:
        """The decoded images of a source."""
        return open_store(source, size=size, channels=channels, device=device, workers=self.workers,
                          progress=self.progress)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What came out."""

    plan: Plan
    classifier: Classifier
    images: pa.Table  # assignments.parquet
    features: np.ndarray  # (N, D) float32; (0, D) if they are in the run directory
    skipped: list[tuple[str, str]]
    scores: dict[str, Any] | None
    seconds: float
    data: dict[str, Any]  # of config.json: what was clustered


def reads(settings: Settings, X: Any) -> dict[str, str | os.PathLike]:
    """What a run starts from and so must not replace, by its name."""
    given = {"the source": X, "--weights": settings.weights, "--init-from": settings.init_from}
    return {name: path for name, path in given.items() if isinstance(path, (str, os.PathLike))}


def begin(settings: Settings, X: Any, job: Job, y: Any = None, hooks: tuple[Callable, ...] = ()) -> Result:
    """Cluster a source; ``y`` are labels for training, for settings that use labels, else those of ``job.labels``."""
    planning.check(settings)
    out, again = job.out, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if settings.on_collapse == "rescue" and out is None:
        raise ValueError("on_collapse='rescue' goes back to a checkpoint, so it needs a run directory: give out='RUN'")
    if out and not again:
        outputs.check(out, job.overwrite, reads(settings, X))
    device = dist.setup(settings.device)
    hide = not settings.undecided or no_bar(job.quiet)
    with Recording() as record, log.whole(hide), contextlib.ExitStack() as held:
        source = open_source(X, data_root=job.data_root)
        known = evaluate.known_labels(settings, source.names, job.labels if y is None else y)
        true = evaluate.true_classes(source, "auto" if settings.use_labels and y is None else job.labels)
        size = choose_size(settings, source, device)
        store = job.store(source, *size, device)
        chosen: list[dict[str, Any]] = []
        if settings.undecided:
            settings, chosen = choosing.choose(settings, store, job.progress)
        plan = planning.resolve(settings, len(store), store.shape, device)
        known = known and known.of_rows(store.rows)
        where = os.fspath(X) if isinstance(X, (str, os.PathLike)) else source.location
        data = {"source": where, "cwd": str(Path.cwd()), "data_root": job.data_root, "size": size,
                "labels": job.labels, "n_images": len(store), "content": outputs.content(store),
                "signature": source.signature}  # fmt: skip
        data |= known.facts if known else {}
        data |= {"chosen": chosen} if chosen else {}
        data |= {"feature_names": list(job.columns)} if job.columns is not None else {}
        data |= {"launch": launch} if (launch := dist.launch()) else {}
        if out and again and _same(out, plan, data):  # torchrun started the command anew after a process had died
            return _go_on(out, plan, data, store, job, evaluate.of_rows(true, store.rows), known, record, hooks)
        if out and dist.is_main():
            held.enter_context(outputs.locked(out))
            outputs.check(out, job.overwrite, reads(settings, X), mine=True)
            outputs.prepare(out)
            record.into(out / "train.log")
            describe(out, plan, data, store)
        return train(plan, data, store, job, evaluate.of_rows(true, store.rows), known, hooks=hooks)


def describe(out: Path, plan: Plan, data: dict[str, Any], store: Store) -> None:
    """Write what a run is: env.json, skipped.csv and config.json."""
    atomic.write_json(out / "env.json", doctor.environment())
    outputs.write_skipped(out / "skipped.csv", store.skipped)
    config = {"format": outputs.FORMAT, "version": version, "git": doctor.revision(), "data": data,
              "plan": plan.to_dict()}  # fmt: skip
    atomic.write_json(out / "config.json", config)  # last: a run that has it can be gone on with


def resume(job: Job, device: str, labels: str | None = None, **instead: Any) -> Result:
    """Go on with the run in ``job.out`` exactly where it stopped; by default with the labels it began with.

    ``instead``: fields of the plan that are others from now on; only those that training does not depend on.
    """
    out = job.out
    assert out is not None
    config = outputs.read_config(out)
    plan, data = replace(config["plan"], **instead), config["data"]
    where = dist.setup(device)
    with Recording() as record:
        source = outputs.reopen(data, job.data_root)
        true = evaluate.true_classes(source, evaluate.for_scores(data, labels))
        size, channels = data["size"]
        store = job.store(source, size, channels, where)
        known = evaluate.known_again(data, source.names, store.rows, plan.n_clusters, labels)
        if outputs.content(store) != data["content"]:
            raise ValueError(f"{data['source']} has other images than when {out} began ({len(store)} now, "
                             f"{data['n_images']} then); start anew with --overwrite")  # fmt: skip
        if instead and dist.is_main():
            with outputs.locked(out):
                atomic.write_json(out / "config.json", {**config, "plan": plan.to_dict()})
        return _go_on(out, plan, data, store, job, evaluate.of_rows(true, store.rows), known, record)


def _same(out: Path, plan: Plan, data: dict[str, Any]) -> bool:
    """Whether the run in ``out`` was begun by this launch of torchrun, with this plan and images; rank 0 decides."""
    same = False
    if dist.is_main() and (out / "config.json").exists():
        config = outputs.read_config(out)
        told = [(data.get(name), config["data"].get(name)) for name in ("launch", "content")]
        same = "launch" in data and config["plan"] == plan and all(mine == other for mine, other in told)
    return bool(dist.from_main(torch.tensor(float(same))))


def _go_on(
    out: Path, plan: Plan, data: dict[str, Any], store: Store, job: Job, true: np.ndarray | None, known: Known | None,
    record: Recording, hooks: tuple[Callable, ...] = (),
) -> Result:  # fmt: skip
    with contextlib.ExitStack() as held:
        if dist.is_main():
            held.enter_context(outputs.locked(out))
            record.into(out / "train.log")
        last = out / "checkpoints" / "last.pt"
        saved = checkpoint.read(last) if last.exists() else None
        return train(plan, data, store, job, true, known, saved, hooks)


def report(
    run: Path, table: pa.Table, X: Any = None, to: Path | None = None, data_root: str | None = None, command: str = ""
) -> Path:
    """Write the page of a finished run anew, with pictures from ``X``, else from its source if that is still there.

    ``table``: its assignments; ``command``: see ``write_report``. Labels that the source has are compared with, as when
    the run was trained.

    Raises:
        ValueError: ``X`` holds other images than the run.
    """
    data = outputs.read_config(run)["data"]
    size, channels = data["size"]
    store, true = None, None
    try:
        if X is None and data["source"] in ("array", "list") and not Path(data["source"]).exists():
            raise ValueError("images that were given in Python are not kept: give them again, as report(path, X)")
        source = outputs.reopen(data, data_root) if X is None else open_source(X, data_root=data_root)
        store = open_store(source, size=size, channels=channels)
        if X is not None and store.sha1 != table["sha1"].to_pylist():
            raise ValueError("X holds other images than those the model was trained on")
        known = dict(zip(table["path"].to_pylist(), table["sha1"].to_pylist(), strict=True))
        if store.sha1 == [*known.values()]:
            store.names = [*known]  # also where they lie elsewhere now
            found = evaluate.true_classes(source, evaluate.for_scores(data))
            true = evaluate.unseen(evaluate.of_rows(found, store.rows), store.sha1, outputs.learnt(table))
        else:
            store = _unchanged(store, known)
    except ValueError as error:
        if X is not None:
            raise
        logger.warning("%s; the report shows paths instead of images", error)
    return write_report(run, store, true, to, command)


def _unchanged(store: Store, known: dict[str, str]) -> Store | None:
    """Only the images of a store that have the name and the content (sha1) of an image of the run, if any."""
    kept = [i for i, pair in enumerate(zip(store.names, store.sha1, strict=True)) if known.get(pair[0]) == pair[1]]
    logger.warning("%d of %d images are not there any more, or others now; the report shows their paths",
                   len(known) - len(kept), len(known))  # fmt: skip
    names, sha1 = ([column[i] for i in kept] for column in (store.names, store.sha1))
    return replace(store, rows=store.rows[kept], names=names, sha1=sha1) if kept else None


def train(
    plan: Plan, data: dict[str, Any], store: Store, job: Job, true: np.ndarray | None, known: Known | None,
    saved: dict | None = None, hooks: tuple[Callable, ...] = (),
) -> Result:  # fmt: skip
    """Train by the plan, from a checkpoint if there is one, and write the results to ``job.out`` if there is one."""
    began, out = time.perf_counter(), job.out
    learnt = {store.sha1[i] for i in np.flatnonzero(known.given)} if known else set()
    if known:
        true = evaluate.unseen(true, store.sha1, learnt)
        logger.info("%d labels are used in training: of %s", len(known), ", ".join(known.names))
    watching: list[Callable] = [*hooks]
    if out:
        writer = Metrics(out / "metrics.jsonl", true)
        writer.rewind(saved["stage"] if saved else -1, saved["epoch"] if saved else 0)
        watching.append(writer)
    sentinel = Sentinel(plan.on_collapse)
    sentinel.images(store, plan.n_clusters)
    watching.append(sentinel)
    frozen, vectors = planning.kept(plan, store, saved, job.progress) if plan.frozen else (None, None)
    model, recipe, state = planning.run(plan, vectors or store, out / "checkpoints" if out else None, watching, saved,
                                        job.quiet, torch.from_numpy(known.labels) if known else None,
                                        frozen)  # fmt: skip
    seconds = time.perf_counter() - began
    log.at("results")
    head = state.reported(recipe.rivals)
    spec = Spec(plan.backbone, plan.shape, type(model.heads[head]).__name__, plan.n_clusters, version,
                frozen=model.dim if plan.frozen else 0)  # fmt: skip
    made = out / "model" / "edits.safetensors" if out else None
    steps = editing.unpack(made)[1] if saved and made and made.exists() else []  # a finished run, gone on with
    classifier, images, features = ending.finish(model, head, spec, store, out, known, steps, vectors,
                                                   plan.seed if plan.auto_k else None)  # fmt: skip
    cluster = images["cluster"].to_numpy()
    asked = len(classifier.ids) if plan.auto_k else plan.n_clusters
    scores = None if true is None else evaluate.scores(cluster, true, asked)
    if out and dist.is_main():
        log.at("results", 0.5, "report")
        nuisance.look(out, store, cluster, data["labels"] == "auto")
        write_report(out, store, true)
    dist.barrier()
    used = metrics.health(cluster, classifier.n_clusters)
    logger.info("%d images in %d clusters, the largest has %.0f %%; trained for %.1f s",
                len(store), used["active"], 100 * used["largest_share"], seconds)  # fmt: skip
    return Result(plan, classifier, images, features, store.skipped, scores, seconds, data)
