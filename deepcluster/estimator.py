"""The whole job as one object: a source in; clusters, features and a classifier out."""

import os
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from deepcluster import checkpoint, dist, doctor, dryrun, evaluate, metrics, outputs
from deepcluster import plan as planning
from deepcluster.classifier import Classifier, Spec
from deepcluster.evaluate import Known
from deepcluster.log import Metrics, Recording, logger, no_bar
from deepcluster.plan import Plan, choose_size
from deepcluster.report import write_report
from deepcluster.settings import AUTO, Settings
from deepcluster.sources import Source, open_source
from deepcluster.store import Store, open_store


class DeepCluster(ClusterMixin, TransformerMixin, BaseEstimator):
    """Cluster images by training a network on labels it makes up itself.

    Parameters are those of ``plan.Settings``, under scikit-learn's names, and

    out : str or None, default=None
        Run directory to write; see the README for its files.
    overwrite : bool, default=False
        Replace an earlier run in ``out``.
    quiet : bool, default=True
        No progress bar.

    Attributes
    ----------
    labels_ : ndarray of shape (n_images,), int64
        Cluster of each readable training image, in input order; cluster 0 is the largest.
    names_ : list of str
        Path of each of these images.
    skipped_ : list of (str, str)
        Images that could not be read, and why.
    classifier_ : deepcluster.classifier.Classifier
    plan_ : deepcluster.plan.Plan
        Everything that was resolved.
    """

    def __init__(
        self,
        n_clusters: int = 10,
        *,
        method: str = AUTO,
        preset: str = "default",
        overcluster: int | str = AUTO,
        backbone: str = AUTO,
        weights: str | None = None,
        init_from: str | None = None,
        image_size: int | str = AUTO,
        epochs: int | str = AUTO,
        batch_size: int | str = AUTO,
        lr: float | str = AUTO,
        random_state: int = 0,
        device: str = AUTO,
        precision: str = AUTO,
        use_labels: bool = False,
        params: dict[str, Any] | None = None,
        out: str | os.PathLike | None = None,
        overwrite: bool = False,
        quiet: bool = True,
    ):
        self.n_clusters = n_clusters
        self.method = method
        self.preset = preset
        self.overcluster = overcluster
        self.backbone = backbone
        self.weights = weights
        self.init_from = init_from
        self.image_size = image_size
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.use_labels = use_labels
        self.params = params
        self.out = out
        self.overwrite = overwrite
        self.quiet = quiet

    def _settings(self) -> Settings:
        """These parameters, checked."""
        given = {f.name: getattr(self, f.name) for f in fields(Settings) if f.name not in ("seed", "params")}
        return Settings(**given, seed=self.random_state, params=self.params or {})

    def _reads(self, X: Any) -> dict[str, str | os.PathLike]:
        """What a run starts from and so must not replace, by its name."""
        given = {"the source": X, "--weights": self.weights, "--init-from": self.init_from}
        return {name: path for name, path in given.items() if isinstance(path, (str, os.PathLike))}

    def fit(self, X: Any, y: object = None) -> "DeepCluster":
        """Train on a source (a path, a name such as "digits", or an array).

        ``y`` is ignored unless ``use_labels``: then it has a label for each image in order, -1, None or NaN where
        it is unknown; the method learns from these, and clusters get their names.

        Raises:
            ValueError: the source or a parameter is wrong; the message says what is allowed.
            FloatingPointError: the loss is no number any more.
        """
        if self.use_labels and y is None:
            raise ValueError("use_labels=True learns from y; call fit(X, y) with -1 for images of unknown label")
        return self._fit(X, y=y if self.use_labels else None)

    def _fit(
        self, X: Any, labels: str = "none", workers: int | None = None, data_root: str | None = None, y: Any = None
    ) -> "DeepCluster":
        settings, out = self._settings(), Path(self.out) if self.out is not None else None
        planning.check(settings)
        if out and dist.is_main():
            outputs.check(out, self.overwrite, self._reads(X))
        device = dist.setup(settings.device)
        with Recording() as record:
            source = open_source(X, data_root=data_root)
            known = evaluate.known_labels(settings, source.names, labels if y is None else y)
            true = evaluate.true_classes(source, "auto" if self.use_labels and y is None else labels)
            size = choose_size(settings, source, device)
            store = self._store(source, *size, device, workers)
            plan = planning.resolve(settings, len(store), store.shape, device)
            known = known and known.of_rows(store.rows)
            if out and dist.is_main():
                outputs.prepare(out)
                where = os.fspath(X) if isinstance(X, (str, os.PathLike)) else source.location
                data = {"source": where, "cwd": str(Path.cwd()), "data_root": data_root, "size": size, "labels": labels,
                        "n_images": len(store), "content": outputs.content(store)}  # fmt: skip
                data |= known.facts if known else {}
                config = {"version": _version(), "git": doctor.revision(), "data": data, "plan": plan.to_dict()}
                outputs.write_json(out / "config.json", config)
                record.into(out / "train.log")
                outputs.write_json(out / "env.json", doctor.environment())
                outputs.write_skipped(out / "skipped.csv", store.skipped)
            return self._train(plan, store, out, evaluate.of_rows(true, store.rows), known)

    def _resume(
        self, labels: str | None = None, workers: int | None = None, data_root: str | None = None
    ) -> "DeepCluster":
        """Go on with the run in ``out`` exactly where it stopped; by default with the labels it began with."""
        assert self.out is not None
        out = Path(self.out)
        config = outputs.read_config(out)
        plan, data = config["plan"], config["data"]
        device = dist.setup(self.device)
        last = out / "checkpoints" / "last.pt"
        saved = checkpoint.read(last) if last.exists() else None
        with Recording() as record:
            if dist.is_main():
                record.into(out / "train.log")
            source = outputs.reopen(data, data_root)
            true = evaluate.true_classes(source, evaluate.for_scores(data, labels))
            size, channels = data["size"]
            store = self._store(source, size, channels, device, workers)
            known = evaluate.known_again(data, source.names, store.rows, plan.n_clusters, labels)
            if outputs.content(store) != data["content"]:
                raise ValueError(f"{data['source']} has other images than when {out} began ({len(store)} now, "
                                 f"{data['n_images']} then); start anew with --overwrite")  # fmt: skip
            return self._train(plan, store, out, evaluate.of_rows(true, store.rows), known, saved)

    def _dry_run(
        self, X: Any, labels: str = "none", workers: int | None = None, data_root: str | None = None
    ) -> list[str]:
        """What ``fit`` would need and take, a line each; trains on a sample for some seconds, writes nothing."""
        settings = self._settings()
        planning.check(settings)
        if self.out is not None:
            outputs.check(Path(self.out), self.overwrite, self._reads(X))
        device = dist.setup(settings.device)
        source = open_source(X, data_root=data_root)
        evaluate.known_labels(settings, source.names, labels)
        size, channels = choose_size(settings, source, device)
        shape = (channels, size, size) if source.features is None else (channels,)
        plan = planning.resolve(settings, len(source.names), shape, device)
        return dryrun.lines(plan, source, device, workers)

    def _store(
        self, source: Source, size: int, channels: int, device: torch.device, workers: int | None = None
    ) -> Store:
        progress: Callable[..., Any] = lambda it, **kw: tqdm(it, unit="image", disable=no_bar(self.quiet), **kw)  # noqa: E731
        return open_store(source, size=size, channels=channels, device=device, workers=workers, progress=progress)

    def _train(
        self, plan: Plan, store: Store, out: Path | None, true: np.ndarray | None, known: Known | None = None,
        saved: dict | None = None,
    ) -> "DeepCluster":  # fmt: skip
        began = time.perf_counter()
        self._learnt = {store.sha1[i] for i in np.flatnonzero(known.given)} if known else set()
        if known:
            true = evaluate.unseen(true, store.sha1, self._learnt)
            logger.info("%d labels are used in training: of %s", len(known), ", ".join(known.names))
        hooks = []
        if out:
            writer = Metrics(out / "metrics.jsonl", true)
            if dist.is_main():
                writer.rewind(saved["stage"] if saved else -1, saved["epoch"] if saved else 0)
            hooks.append(writer)
        model, recipe, state = planning.run(plan, store, out / "checkpoints" if out else None, hooks, saved, self.quiet,
                                            torch.from_numpy(known.labels) if known else None)  # fmt: skip
        self.seconds_ = time.perf_counter() - began
        head = state.reported(recipe.rivals)
        spec = Spec(plan.backbone, plan.shape, type(model.heads[head]).__name__, plan.n_clusters, _version())
        classifier, found = Classifier.of(model, head, spec, store)
        if known:
            classifier.names = [known.names[output] for output in classifier.order.tolist()]
        self.n_labelled_ = len(known) if known else 0
        self._keep(classifier, found["cluster"], store.names, store.skipped, plan)
        if out and dist.is_main():
            outputs.write_results(out, classifier, found, store.names, store.sha1, known.given if known else None)
        self.scores_ = None if true is None else evaluate.scores(self.labels_, true, plan.n_clusters)
        if out and dist.is_main():
            write_report(out, *outputs.read_run(out), store, true)
        dist.barrier()
        used = metrics.health(self.labels_, plan.n_clusters)
        logger.info("%d images in %d clusters, the largest has %.0f %%; trained for %.1f s",
                    len(store), used["active"], 100 * used["largest_share"], self.seconds_)  # fmt: skip
        return self

    def _keep(self, classifier: Classifier, labels: np.ndarray, names: list[str],
              skipped: list[tuple[str, str]], plan: Plan | None) -> None:  # fmt: skip
        self.classifier_, self.labels_, self.names_, self.skipped_ = classifier, labels, names, skipped
        self.plan_ = plan

    def _predict(self, X: Any, data_root: str | None = None) -> tuple[Store, dict[str, np.ndarray]]:
        check_is_fitted(self, "classifier_")
        shape = self.classifier_.spec.shape
        source = open_source(X, data_root=data_root)
        if (source.features is not None) != (len(shape) == 1):
            what = ("features", "images") if len(shape) == 1 else ("images", "features")
            raise ValueError(f"the model was trained on {what[0]} of shape {shape}; {source.location} holds {what[1]}")
        store = self._store(source, shape[-1], shape[0], self.classifier_.order.device)
        return store, self.classifier_.predict(store)

    def predict(self, X: Any) -> np.ndarray:
        """(n_images,) int64 cluster of each readable image of a source."""
        return self._predict(X)[1]["cluster"]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n_images, n_clusters) float32 probability of each cluster."""
        return self._predict(X)[1]["probabilities"]

    def transform(self, X: Any) -> np.ndarray:
        """(n_images, n_features) float32 features."""
        return self._predict(X)[1]["features"]

    def score(self, X: Any, y: Any) -> float:
        """Clustering accuracy against true classes ``y`` (n_images,), without images whose label training was given."""
        store, found = self._predict(X)
        kept = [one not in getattr(self, "_learnt", ()) for one in store.sha1]
        return metrics.accuracy(found["cluster"][kept], np.asarray(y)[kept])

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the classifier: safetensors and JSON."""
        check_is_fitted(self, "classifier_")
        self.classifier_.save(Path(path))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, device: str = AUTO) -> "DeepCluster":
        """Read a classifier written by ``save_pretrained`` or found in RUN/model."""
        classifier = Classifier.load(Path(path), dist.setup(device))
        self = cls(classifier.spec.n_clusters, device=device)
        self.classifier_ = classifier
        return self


def load(run: str | os.PathLike, device: str = AUTO) -> DeepCluster:
    """The finished run in a directory: its classifier, and the labels and names of its training images.

    Raises:
        ValueError: no finished run there.
    """
    plan = outputs.read_config(Path(run))["plan"]
    table = outputs.read_assignments(Path(run))
    self = DeepCluster.from_pretrained(Path(run) / "model", device)
    self._keep(self.classifier_, table["cluster"].to_numpy(), table["path"].to_pylist(), [], plan)
    self.out, self._learnt = run, outputs.learnt(table)
    return self


def fit(source: Any, **parameters: Any) -> DeepCluster:
    """``DeepCluster(**parameters).fit(source)``."""
    return DeepCluster(**parameters).fit(source)


def _version() -> str:
    from deepcluster import __version__

    return __version__
