"""What follows the training: features of all images, their clusters, and what is remarkable about them.

Every process computes the features of its share of the images; with a run directory they go from there straight into
RUN/features.npy, and no process ever holds more than some batches of them. All else is done by rank 0, which reads that
file in parts, and what it finds is sent to the others. So N vectors of numbers and words are held, but not N x D.

Shapes: N images, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from deepcluster import confidence, dist, oddities, outputs, recut, results
from deepcluster.batches import eval_batches
from deepcluster.classifier import ROWS, Classifier, Spec
from deepcluster.edits import Recut, Step
from deepcluster.evaluate import Known
from deepcluster.howmany import SAMPLE
from deepcluster.model import Model
from deepcluster.store import Store

PIECE = 1 << 26  # bytes that are sent at a time
VIEWED = 64  # images at a time


@torch.no_grad()
def finish(
    model: Model, head: int, spec: Spec, store: Store, out: Path | None = None, known: Known | None = None,
    steps: Sequence[Step] = (), vectors: Store | None = None, auto_k: int | None = None,
) -> tuple[Classifier, pa.Table, np.ndarray]:  # fmt: skip
    """Label the training images by one head of a trained model; called by all ranks, and all get the same.

    Args:
        model: rank 0's is taken.
        head: which of its heads.
        spec: of that.
        store: all training images, on every rank.
        out: run directory; rank 0 writes the model, the features and the tables there.
        known: the labels that were given to training.
        steps: edits that were made already.
        vectors: the features of these images, where they are there already.
        auto_k: seed, if the clusters are to be cut into as many as the features show, unless there are ``steps``.

    Returns:
        The classifier, assignments.parquet, and the features (N, D) float32. These have no rows with a run directory,
        where they are on the disk; without one every rank holds them all, for want of another place.

    Raises:
        OSError: the run directory cannot be written; no half file is left there.
    """
    classifier = Classifier(spec, model.backbone, model.heads[head], model.dim).to(store.device)
    names = known.names if known else ()
    _share(classifier)
    features = _features(classifier, store, vectors, out)
    table = None
    if auto_k is not None and not steps:
        made = _cut(outputs.read_features(out) if out else features, store, out, auto_k) if dist.is_main() else None
        steps = [recut.shared(made, store.device)]
    if dist.is_main():
        found = classifier.sort(
            outputs.read_features(out) if out else features, names, steps, _looks(classifier, store)
        )
        columns = _seen(store, found, classifier, known)
        table = results.training_images(found, store.names, store.sha1, classifier, columns)
        if out:
            del found["features"]  # written already
            results.write(out, classifier, found, table)
    else:
        classifier.sort(np.zeros((1, model.dim), np.float32), names, steps)  # for the shapes: the values are rank 0's
    _share(classifier)
    classifier.name(names)
    return classifier, _sent(table, store), features


def _cut(features: np.ndarray, store: Store, out: Path | None, seed: int) -> Recut:
    """As many clusters as there are."""
    some = torch.from_numpy(np.linspace(0, len(store) - 1, min(len(store), SAMPLE)).astype(np.int64))
    seen = store.take(some).float().cpu().numpy() if len(store.shape) == 1 else None
    return recut.first(features, out, seed, seen)


def _looks(classifier: Classifier, store: Store) -> torch.Tensor:
    """(2, n, D) features of some images through two random views; of fewer if the network is large and was not trained.

    They are computed in small batches, by the process that calls.
    """
    n = confidence.LOOKED // 16 if classifier.spec.frozen else confidence.LOOKED
    rows = np.linspace(0, len(store) - 1, min(len(store), n)).astype(np.int64)
    some = replace(store, rows=store.rows[rows], names=[], sha1=[], skipped=[])
    views = (eval_batches(some, confidence.VIEW, VIEWED, seed, shard=False) for seed in range(2))
    return torch.stack([torch.cat([classifier.backbone(images).float() for images in view]) for view in views])


def _share(classifier: Classifier) -> None:
    """Rank 0's weights and measurements on every rank."""
    for mine in (*classifier.state_dict().values(), *classifier.trained.values()):
        mine.copy_(dist.from_main(mine.contiguous()))


def _features(classifier: Classifier, store: Store, vectors: Store | None, out: Path | None) -> np.ndarray:
    """(N, D) features on every rank, or (0, D) where they are written to a run directory."""
    shape = (len(store), classifier.dim)
    blocks = (part.cpu().numpy() for part in vectors.data.split(ROWS)) if vectors else _blocks(classifier, store)
    if out and dist.is_main():
        results.write_features(out, blocks, shape)
    features, row = np.empty((0, classifier.dim) if out else shape, np.float32), 0
    for block in blocks:
        if not out:
            features[row : row + len(block)] = block
        row += len(block)
    return features


def _blocks(classifier: Classifier, store: Store) -> Iterator[np.ndarray]:
    """The features of all images in order, on every rank, ROWS from each at a time.

    Batches are those of a single process, whoever computes them: so the features are the same bit for bit.
    """
    for start in range(0, len(store), ROWS * dist.world()):
        first = start + ROWS * dist.rank()
        part = replace(store, rows=store.rows[first : first + ROWS], names=[], sha1=[], skipped=[])
        found = classifier.predict(part, ("features",)).get("features", np.empty((0, classifier.dim), np.float32))
        yield dist.all_cat(torch.from_numpy(found).to(store.device)).cpu().numpy()


def _seen(
    store: Store, found: dict[str, np.ndarray], classifier: Classifier, known: Known | None
) -> dict[str, pa.Array]:
    """Columns that only training images have."""
    first = oddities.duplicates(store, found["features"])
    names = store.names
    looks = oddities.looks(store)
    columns = {
        "look": pa.array(looks, pa.string()),
        "reason": pa.array(oddities.reasons(looks, found, classifier), pa.string()),
        "duplicate_of": pa.array([names[i] if i >= 0 else None for i in first.tolist()], pa.string()),
    }
    return columns | ({"given": pa.array(known.given)} if known else {})


def _sent(table: pa.Table | None, store: Store) -> pa.Table:
    """Rank 0's table of the images of a store, on every rank; what the store knows is not sent."""
    if dist.world() == 1:
        return table
    data = np.empty(0, np.uint8)
    if table is not None:
        rest = table.drop_columns(["path", "sha1"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rest.schema) as stream:
            stream.write_table(rest)
        data = np.frombuffer(sink.getvalue(), np.uint8).copy()  # torch wants what it could write to
    size = int(dist.from_main(torch.tensor(len(data), device=store.device)))
    data = np.empty(size, np.uint8) if table is None else data
    for start in range(0, size, PIECE):
        piece = torch.from_numpy(data[start : start + PIECE])
        piece.copy_(dist.from_main(piece.to(store.device)))
    if table is not None:
        return table
    rest = pa.ipc.open_stream(data).read_all()
    for i, (name, column) in enumerate((("path", store.names), ("sha1", store.sha1))):
        rest = rest.add_column(i, name, pa.array(column, pa.string()))
    return rest
