"""The whole job as one object: a source in; clusters, features and a classifier out."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from deepcluster import confidence, dist, metrics, outputs, results, runs
from deepcluster import plan as planning
from deepcluster.classifier import Classifier
from deepcluster.editable import Editable
from deepcluster.runs import Job, Result
from deepcluster.settings import AUTO, Settings
from deepcluster.sources import open_source
from deepcluster.store import Store, stream


class DeepCluster(Editable, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, BaseEstimator):
    """Cluster images by training a network on labels it makes up itself.

    ``X``, wherever it is asked for, is a path or another SOURCE of the command line, a list of image paths, an array of
    images (N, H, W), (N, C, H, W) or (N, H, W, C), or a table of features (N, D): an array, a list of lists, or a
    DataFrame, of finite numbers. Images that cannot be read are left out, everywhere; rows of such a table never are.

    Parameters are those of ``settings.Settings``, under scikit-learn's names, and

    n_clusters : int or "auto", default=10
        1 is allowed, for the sake of searches that begin there: two clusters are trained, and merged.
    random_state : int, RandomState or None, default=0
        None draws a new seed for every fit.
    out : str or None, default=None
        Run directory to write; see the README for its files.
    overwrite : bool, default=False
        Replace an earlier run in ``out``.
    quiet : bool, default=True
        No progress bar.

    Attributes
    ----------
    labels_ : ndarray of shape (n_images,), int64
        Cluster of each readable training image, in input order; 0 is the largest until clusters are edited.
    names_ : list of str
        Path of each of these images.
    embedding_ : ndarray of shape (n_images, n_features), float32
        Features of these images, as ``transform`` gives them.
    skipped_ : list of (str, str)
        Images that could not be read, and why.
    n_labelled_ : int
        Labels that training was given.
    scores_ : dict or None
        Scores against labels the source has, if they were asked for.
    classifier_ : deepcluster.classifier.Classifier
    plan_ : deepcluster.plan.Plan
        Everything that was resolved.
    n_features_in_, feature_names_in_
        Columns of a table of features, and their names in a DataFrame.

    Notes
    -----
    ``predict`` of the training images gives ``labels_``, also after the model was saved and loaded. In batches of
    another size or on another device, float32 sums are rounded differently, which moves a probability by some 1e-6:
    only images whose two best clusters are closer than that (``margin`` in ``image_info``) can change sides, and none
    with a margin above 1e-4 does.
    """

    def __init__(
        self,
        n_clusters: int | str = 10,
        *,
        method: str = AUTO,
        preset: str = "default",
        overcluster: int | str = AUTO,
        backbone: str = AUTO,
        weights: str | None = None,
        init_from: str | None = None,
        frozen: bool | str = AUTO,
        tune_last: int = 0,
        image_size: int | str = AUTO,
        epochs: int | str = AUTO,
        batch_size: int | str = AUTO,
        lr: float | str = AUTO,
        random_state: int | np.random.RandomState | None = 0,
        device: str = AUTO,
        precision: str = AUTO,
        on_collapse: str = "warn",
        checkpoint_every: str = "10m",
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
        self.frozen = frozen
        self.tune_last = tune_last
        self.image_size = image_size
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.on_collapse = on_collapse
        self.checkpoint_every = checkpoint_every
        self.use_labels = use_labels
        self.params = params
        self.out = out
        self.overwrite = overwrite
        self.quiet = quiet

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        tags.input_tags.three_d_array = True
        return tags

    def _settings(self, **instead: Any) -> Settings:
        """These parameters, checked; ``instead`` are others."""
        given = {f.name: _plain(getattr(self, f.name)) for f in fields(Settings) if f.name not in ("seed", "params")}
        params, seed = self.params or {}, _plain(self.random_state)
        if isinstance(params, dict):
            params = {name: _plain(value) for name, value in params.items()}
        if seed is not None and not isinstance(seed, np.random.RandomState):
            return Settings(**{**given, **instead}, seed=seed, params=params)
        settings, drawn = Settings(**{**given, **instead}, params=params), check_random_state(seed).randint(2**31 - 1)
        return replace(settings, seed=int(dist.from_main(torch.tensor(drawn, device=dist.setup(settings.device)))))

    def fit(self, X: Any, y: object = None, hooks: Sequence[Callable] = ()) -> "DeepCluster":
        """Train on ``X``.

        ``y`` is ignored unless ``use_labels``: then it has a label for each image in order, -1, None or NaN where
        it is unknown; the method learns from these, and clusters get their names. ``hooks`` are called with a
        ``trainer.Report`` after each epoch.

        Raises:
            ValueError: the source or a parameter is wrong; the message says what is allowed.
            FloatingPointError: the loss is no number any more.
            sentinel.Collapse: training collapsed, and ``on_collapse`` is not "warn".
        """
        if self.use_labels and y is None:
            raise ValueError("use_labels=True learns from y; call fit(X, y) with -1 for images of unknown label")
        if repr(_plain(self.n_clusters)) == "1" and not self.use_labels:
            return self._fit(X, hooks=tuple(hooks), settings=self._settings(n_clusters=2)).merge_clusters([[0, 1]])
        return self._fit(X, y=y if self.use_labels else None, hooks=tuple(hooks))

    def fit_predict(self, X: Any, y: object = None, **params: Any) -> np.ndarray:
        """``fit(X, y).labels_``."""
        return self.fit(X, y, **params).labels_

    def _job(self, **given: Any) -> Job:
        return Job(Path(self.out) if self.out is not None else None, self.overwrite, self.quiet, **given)

    def _fit(self, X: Any, y: Any = None, hooks: Any = (), settings: Any = None, **job: Any) -> "DeepCluster":
        settings = settings or self._settings()
        self.__dict__ = {k: v for k, v in vars(self).items() if k not in ("n_features_in_", "feature_names_in_")}
        X, columns = self._checked(X, reset=True), getattr(self, "feature_names_in_", None)
        return self._keep(runs.begin(settings, X, self._job(columns=columns, **job), y, hooks))

    def _resume(self, labels: str | None = None, instead: dict[str, str] | None = None, **job: Any) -> "DeepCluster":
        return self._keep(runs.resume(self._job(**job), self.device, labels, **(instead or {})))

    def _keep(self, result: Result) -> "DeepCluster":
        self.plan_, self.skipped_, self.scores_ = result.plan, result.skipped, result.scores
        self._table, self._data, self.seconds_ = result.images, result.data, result.seconds
        self.n_labelled_ = result.data.get("n_labelled", 0)
        if names := result.data.get("feature_names"):
            self.feature_names_in_ = np.array(names, object)
        self._run = Path(self.out).absolute() if self.out is not None else None
        self._features = np.empty(0) if self._run else result.features  # what is on disk needs no memory
        return self._use(result.classifier)

    def _use(self, classifier: Classifier) -> "DeepCluster":
        self.classifier_ = classifier
        if len(classifier.spec.shape) == 1:
            self.n_features_in_ = classifier.spec.shape[0]
        return self

    @property
    def _n_features_out(self) -> int:
        check_is_fitted(self, "classifier_")
        return self.classifier_.dim

    def _checked(self, X: Any, reset: bool = False) -> Any:
        """A source that is opened by its name as it is, anything else as an array."""
        if isinstance(X, str | os.PathLike) or (
            isinstance(X, Sequence) and all(isinstance(path, str | os.PathLike) for path in X)
        ):
            return X
        array = X if hasattr(X, "shape") else np.asarray(X)
        if len(array.shape) not in (1, 2):
            return np.asarray(array) if array.shape else X  # open_source says what it may be
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite, and is refused as that
            return validate_data(self, array, reset=reset, dtype=np.float32, ensure_min_samples=2 if reset else 1)

    def _parts(self, X: Any, data_root: str | None = None) -> Iterator[Store]:
        check_is_fitted(self, "classifier_")
        shape = self.classifier_.spec.shape
        source = open_source(self._checked(X), data_root=data_root)
        if (source.features is not None) != (len(shape) == 1):
            what = ("features", "images") if len(shape) == 1 else ("images", "features")
            raise ValueError(f"the model was trained on {what[0]} of shape {shape}; {source.location} holds {what[1]}")
        device, progress = self.classifier_.order.device, self._job().progress
        return stream(source, size=shape[-1], channels=shape[0], device=device, progress=progress)

    def _predict(self, X: Any, *columns: str) -> list[np.ndarray]:
        found = [self.classifier_.predict(s, columns) for s in self._parts(X) if len(s)]
        return [np.concatenate([part[name] for part in found]) for name in columns]

    def predict(self, X: Any, abstain: float = 0.0) -> np.ndarray:
        """(n_images,) int64 cluster of each readable image; -1 for images of less confidence than ``abstain``."""
        least = confidence.check(abstain)
        cluster, sure = self._predict(X, "cluster", "confidence")
        return confidence.kept(cluster, sure, least)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n_images, n_ids) float32 probability of each cluster; ids that a merge took away have none."""
        return self._predict(X, "probabilities")[0]

    def transform(self, X: Any) -> np.ndarray:
        """(n_images, n_features) float32 features."""
        return self._predict(X, "features")[0]

    def score(self, X: Any, y: Any = None) -> float:
        """Larger is better: accuracy against ``y``, or without it, how clearly images belong to their clusters.

        With ``y`` (n_images,), true classes: the share of images right under the best one-to-one naming of clusters by
        classes, in [0, 1], without images whose label training was given.

        Without: the simplified silhouette, in [-1, 1]. For each image, a is the cosine distance of its feature to the
        mean of its own cluster, b to the nearest other one; the score is the mean of (b - a) / max(a, b), 0 where there
        is no other cluster. It has no unit, so a grid search over held-out images can use it to choose ``n_clusters``
        or how long to train. But each model is judged in the features it has learnt itself: a method that draws its
        clusters tight is favoured, right or wrong, so compare methods by some labels, or by eye.
        """
        learnt = outputs.learnt(self._table) if getattr(self, "_table", None) is not None else set()
        cluster, kept, silhouettes = [], [], []
        means = self.classifier_.centroids.cpu().numpy()
        for store in filter(len, self._parts(X)):
            found = self.classifier_.predict(store, ("cluster", "features"))
            cluster.append(found["cluster"])
            kept += [one not in learnt for one in store.sha1]
            silhouettes.append(metrics.silhouettes(found["features"], found["cluster"], means))
        if y is None:
            return float(np.concatenate(silhouettes).mean())
        if np.shape(y) != (len(kept),):
            raise ValueError(f"y must have a class for each of the {len(kept)} images; got shape {np.shape(y)}")
        return metrics.accuracy(np.concatenate(cluster)[kept], np.asarray(y)[kept])

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the classifier, edits included: safetensors and JSON. The way to another machine or device."""
        check_is_fitted(self, "classifier_")
        self.classifier_.save(Path(path))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, device: str = AUTO) -> "DeepCluster":
        """Read a classifier written by ``save_pretrained`` or found in RUN/model."""
        classifier = Classifier.load(Path(path), dist.setup(device))
        spec = classifier.spec
        return cls(spec.n_clusters, backbone=spec.backbone, device=device)._use(classifier)


def load(run: str | os.PathLike, device: str = AUTO) -> DeepCluster:
    """The finished run in a directory: its classifier, its parameters, and what is known of its training images.

    Raises:
        ValueError: no finished run there.
    """
    run = Path(run)
    config, table = outputs.read_config(run), outputs.read_assignments(run)
    self = DeepCluster.from_pretrained(run / "model", device)
    plan, data = config["plan"], config["data"]
    self.set_params(**planning.asked(plan), use_labels=bool(data.get("use_labels")), out=str(run))
    self._keep(Result(plan, self.classifier_, table, np.empty(0), outputs.read_skipped(run), None, np.nan, data))
    self._table = results.mended(run, table, self.classifier_)
    return self


def fit(source: Any, **parameters: Any) -> DeepCluster:
    """``DeepCluster(**parameters).fit(source)``."""
    return DeepCluster(**parameters).fit(source)


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python, a path as a string."""
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
