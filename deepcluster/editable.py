"""What a model knows of its training images, and what people change about their clusters afterwards."""

import contextlib
import operator
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from sklearn.utils.validation import check_is_fitted

from deepcluster import atomic, decisions, edits, outputs, recut, results, runs
from deepcluster.classifier import COLUMNS, MEASURED, Classifier
from deepcluster.howmany import Evidence, evidence
from deepcluster.plan import Plan

Self = TypeVar("Self", bound="Editable")


class Editable:
    """Tables, edits and the report. N training images, D features, K clusters."""

    classifier_: Classifier
    plan_: Plan
    _table: pa.Table | None  # assignments.parquet
    _run: Path | None  # run directory
    _features: np.ndarray  # (N, D), empty if there is a run directory
    _data: dict[str, Any]  # of config.json

    @property
    def labels_(self) -> np.ndarray:
        """(N,) int64 cluster of each readable training image, in input order; numbered by size until edited."""
        return self._images().column("cluster").to_numpy()

    @property
    def names_(self) -> list[str]:
        """N paths of these images."""
        return self._images().column("path").to_pylist()

    @property
    def embedding_(self) -> np.ndarray:
        """(N, D) float32 features of the training images; of a run with a directory, memory-mapped.

        Without one they are held in memory, under torchrun by every process: give ``out`` for many images.
        """
        self._images()
        return outputs.read_features(self._run) if self._run else self._features

    def image_info(self) -> pa.Table:
        """One row a training image, as RUN/assignments.parquet; ``.to_pandas()`` where pandas is installed."""
        return self._images()

    def cluster_info(self) -> pa.Table:
        """One row a cluster that has images, as RUN/clusters.parquet."""
        return results.clusters(self._found(), self.names_, self.classifier_)

    def representative_images(self, cluster: int) -> list[str]:
        """Paths of the images most typical of a cluster, the most typical first.

        Raises:
            ValueError: there is no such cluster.
        """
        self._images()
        self.classifier_.ids.check(cluster)
        rows = [row for row in self.cluster_info().to_pylist() if row["id"] == cluster]
        return rows[0]["representatives"] if rows else []

    def merge_clusters(self: Self, groups: Sequence[Sequence[int]]) -> Self:
        """Make one cluster of each group, e.g. ``[[3, 17]]``, under its smallest id. No other image moves.

        This and every other edit changes the run directory too, if there is one, and returns the model.

        Raises:
            ValueError: a cluster does not exist, or the edit makes no sense; nothing was changed.
        """
        return self._edit(*(edits.Merge(_ids(group)) for group in groups))

    def set_cluster_names(self: Self, names: Mapping[int, str]) -> Self:
        """Call clusters something, e.g. ``{3: "red vans"}``; "" takes a name away."""
        pairs = zip(_ids(names), names.values(), strict=True)
        return self._edit(*(edits.Name(cluster, str(name)) for cluster, name in pairs))

    def mark_junk(self: Self, clusters: Sequence[int], junk: bool = True) -> Self:
        """Mark clusters as junk, or take the mark away."""
        return self._edit(*(edits.Junk(cluster, bool(junk)) for cluster in _ids(clusters)))

    def split_cluster(self: Self, cluster: int, parts: int = 2) -> Self:
        """Split a cluster by its features; the largest part keeps the id, the others get new ones."""
        features, (which, n) = self.embedding_, _ids([cluster, parts])
        return self._edit(self.classifier_.split(features, which, n))

    def reduce_outliers(self: Self) -> Self:
        """Move every outlier to the cluster whose mean is nearest."""
        self._images()
        return self._edit(self.classifier_.nearest())

    def apply_decisions(self: Self, path: str | os.PathLike) -> Self:
        """Make the edits that were chosen on the report page and downloaded from it as decisions.json."""
        return self._apply(decisions.read(Path(path), results.identity(self._images())))

    def recut(self: Self, k: int) -> Self:
        """Make ``k`` clusters of all images, numbered by size, by the merge tree over their features: no training.

        Earlier edits are set aside, as are names; ``undo`` brings them back.

        Raises:
            ValueError: the tree cannot be cut into so many.
        """
        features, (k,) = self.embedding_, _ids([k])
        return self._edit(recut.cut(self.k_evidence(), k, features))

    def k_evidence(self, low: int | None = None, high: int | None = None) -> Evidence:
        """What speaks for each number of clusters from ``low``, 2, to ``high``, 60: see ``howmany.evidence``."""
        features, seed = self.embedding_, self.plan_.seed
        if self._run:
            return recut.evidence_of(self._run, low, high, seed)
        return evidence(features, low=low or 2, high=high, seed=seed, cosine=True)

    def undo(self: Self) -> Self:
        """Take the last edit back. Every edit is kept, so all can be taken back, one after the other."""
        return self._apply(None)

    def report(self, path: str | os.PathLike | None = None, X: Any = None) -> Path:
        """Write the results as one offline page and return where it lies, by default report.html in the run directory.

        Pictures come from ``X``, else from the source itself, if it was a path and is still there. So of arrays in
        memory, which a model does not keep, there are pictures only if ``X`` is given.

        Raises:
            ValueError: ``X`` holds other images than those of the training, or there is nowhere to write to.
        """
        table = self._images()
        if path is None and not self._run:
            raise ValueError("the model has no run directory; say where to: report('report.html')")
        to = None if path is None else Path(path)
        if to and to.is_dir():
            raise ValueError(f"{to} is a folder; name a file in it, such as {to / 'report.html'}")
        if to:
            outputs.check_folder(to.parent)
            to.parent.mkdir(parents=True, exist_ok=True)
        if self._run:
            return runs.report(self._run, table, X, to)
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            atomic.write_json(run / "config.json", {"data": self._data, "plan": self.plan_.to_dict()})
            (run / "metrics.jsonl").touch()
            results.write(run, self.classifier_, {**self._found(), "features": self.embedding_}, table)
            return runs.report(run, table, X, to, command="model.apply_decisions('decisions.json')")

    def _images(self) -> pa.Table:
        check_is_fitted(self, "classifier_")
        if getattr(self, "_table", None) is None:
            raise AttributeError("a classifier read from a folder of its own knows no training images; load(RUN) does")
        return self._table

    def _found(self) -> dict[str, np.ndarray]:
        table = self._images()
        return {name: table.column(name).to_numpy() for name in COLUMNS if name in table.column_names}  # or older

    def _edit(self: Self, *made: edits.Edit) -> Self:
        return self._apply(edits.Step(made)) if made else self

    def _apply(self: Self, step: edits.Step | None) -> Self:
        """Take one step of edits, or the last one back; in the run directory too, if there is one."""
        table, features, classifier = self._images(), self.embedding_, self.classifier_
        before = {name: getattr(classifier, name) for name in ("steps", "ids", *MEASURED, "trained")}
        try:
            with results.editing(self._run, classifier) if self._run else contextlib.nullcontext():
                found = classifier.edit(features, step) if step else classifier.undo(features)
                self._table = results.edited(table, classifier, found)
                if self._run:
                    results.rewrite(self._run, classifier, found, self._table)
        except BaseException:
            self._table = table
            for name, value in before.items():
                setattr(classifier, name, value)
            raise
        return self


def _ids(clusters: Any) -> tuple[int, ...]:
    """Clusters as plain numbers, also where numpy counted them."""
    try:
        return tuple(map(operator.index, clusters))
    except TypeError:
        raise ValueError(f"clusters are whole numbers, a group of them is a list, [3, 17]; got {clusters!r}") from None
