"""Where the images of a run lie in two dimensions, and which are alike: for the report and for exports.

t-SNE (van der Maaten and Hinton, JMLR 2008) of at most ``LANDMARKS`` images; every other one is placed among the
landmarks it is nearest to, so that a million images take minutes. All of it runs in the calling process alone.

Shapes: N images, D features, L landmarks, k neighbours.
"""

import hashlib
import logging
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # scikit-learn needs it too

from deepcluster import atomic, outputs

LANDMARKS = 2000  # images that t-SNE places
EXACT = 20_000  # above so many images only some cells of an index are searched for neighbours
DIRECTIONS = 64  # principal ones of the features, which that index holds: 128 bytes an image, whatever D
SAMPLE = 2**16  # images that these are found by
BLOCK = 8192  # rows that are normalised at a time
NEIGHBOURS = 8
FORMAT = 2


@dataclass(frozen=True)
class Landscape:
    """A map of N images and the nearest others of each."""

    positions: np.ndarray  # (N, 2) float32, each axis centred, in [-1, 1]
    neighbours: np.ndarray  # (N, k) int32 ids of the nearest other images, nearest first
    distances: np.ndarray  # (N, k) float32 cosine distances of these, in [0, 2]


def landscape(features: np.ndarray, k: int = NEIGHBOURS, seed: int = 0) -> Landscape:
    """Map N images by their features. The same features give the same map, bit for bit on one machine.

    Neighbours are exact up to ``EXACT`` images; above, some may be missed, and distances leave out what the features
    vary little in.

    Args:
        features: (N, D) floats, which may be memory-mapped; only their directions count.
        k: neighbours of an image; N - 1 if there are fewer others.
        seed: of what is random in it: the principal components of wide features.

    Raises:
        ValueError: features are not (N, D) finite numbers.
    """
    if features.ndim != 2 or not features.size or features.dtype.kind not in "fiu":
        raise ValueError(f"features must be (N, D) numbers; got {features.shape} {features.dtype}")
    ids, distances = _neighbours(features, min(k, len(features) - 1))
    return Landscape(_positions(features, seed), ids, distances)


def landscape_of(run: Path) -> Landscape:
    """The landscape of RUN/features.npy, from RUN/map.npz if that was made of it, else made and kept there.

    Raises:
        ValueError: the run has no features yet, or they are damaged.
    """
    features, path = outputs.read_features(run), run / "map.npz"
    digest = _digest(run / "features.npy")
    found = _read(path, digest, len(features))
    if found is None:
        found = landscape(features)
        try:
            with atomic.replacing(path) as file:
                np.savez(file, digest=np.array(digest), **asdict(found))
        except OSError as error:  # it would only have saved time
            logging.getLogger("deepcluster").warning("the map is not kept: cannot write %s (%s)", path, error.strerror)
    return found


def _digest(path: Path) -> str:
    digest = hashlib.sha1(b"landscape %d" % FORMAT)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read(path: Path, digest: str, n: int) -> Landscape | None:
    """What is kept in ``path``, or None if it is not the landscape of these features of n images."""
    try:
        with path.open("rb") as file:  # numpy leaves a damaged one open
            table = np.load(file, allow_pickle=False)
            found = Landscape(**{field.name: table[field.name] for field in fields(Landscape)})
            k = min(NEIGHBOURS, n - 1)
            kinds = {
                "positions": (np.float32, (n, 2)),
                "neighbours": (np.int32, (n, k)),
                "distances": (np.float32, (n, k)),
            }
            same = all((x.dtype, x.shape) == kinds[name] for name, x in vars(found).items())
            same = same and 0 <= found.neighbours.min(initial=0) <= found.neighbours.max(initial=0) < n
            return found if same and np.isfinite(found.positions).all() and str(table["digest"]) == digest else None
    except Exception:  # numpy, zipfile and zlib each have their own way to say damaged
        return None


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32, or of zeros."""
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("features are not finite; the run is damaged or its training failed")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(length > 0, length, 1)).astype(np.float32)


def _neighbours(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, k) int32 ids and float32 cosine distances of the nearest other rows, nearest first."""
    n, dim = features.shape
    index: Any = faiss.IndexFlatIP(dim)
    if n > EXACT:
        cells, kind = min(int(4 * n**0.5), n // 64), faiss.ScalarQuantizer.QT_fp16
        kept = min(dim, DIRECTIONS)
        inner = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(kept), kept, cells, kind, faiss.METRIC_L2, False)
        directions = faiss.PCAMatrix(dim, kept)
        some = features[:: n // (64 * cells)]
        few = some[:: -(-len(some) // SAMPLE)]
        directions.train(np.concatenate([_unit(few[i : i + BLOCK]) for i in range(0, len(few), BLOCK)]))
        parts = (directions.apply(_unit(some[i : i + BLOCK])) for i in range(0, len(some), BLOCK))
        inner.train(np.concatenate(list(parts)))
        index = faiss.IndexPreTransform(directions, inner)
        inner.nprobe = 16
    for i in range(0, n, BLOCK):
        index.add(_unit(features[i : i + BLOCK]))
    ids, cosines = np.empty((n, k), np.int32), np.empty((n, k), np.float32)

    def search(rows: np.ndarray) -> None:
        for own in np.array_split(rows, -(-len(rows) // BLOCK)):
            score, found = index.search(_unit(features[own]), k + 1)
            cosine = score if n <= EXACT else 1 - score / 2  # of unit vectors
            others = np.argsort(found == own[:, None], axis=1, kind="stable")[:, :k]  # itself goes last and falls away
            ids[own] = np.take_along_axis(found, others, 1)
            cosines[own] = np.take_along_axis(cosine, others, 1)

    search(np.arange(n))
    lonely = np.flatnonzero((ids < 0).any(1))  # their cells hold too few others
    if len(lonely):
        inner.nprobe = cells
        search(lonely)
    return ids, np.clip(1 - cosines, 0, 2)


def _positions(features: np.ndarray, seed: int) -> np.ndarray:
    """(N, 2) float32: t-SNE of evenly chosen rows, the others among them."""
    n = len(features)
    chosen = np.unique(np.linspace(0, n - 1, min(n, LANDMARKS)).round().astype(int))
    marks = _unit(features[chosen])
    with warnings.catch_warnings(), threadpool_limits(1):  # sums over several threads differ from run to run
        warnings.simplefilter("ignore")  # constant features have no variance to explain
        pca = PCA(min(50, *marks.shape), random_state=seed).fit(marks)
        marks = pca.transform(marks)
        placed = _tsne(marks, seed)
    if n > len(chosen):
        index = faiss.IndexFlatL2(marks.shape[1])
        index.add(marks)
        rows = (pca.transform(_unit(features[i : i + BLOCK])) for i in range(0, n, BLOCK))
        placed = np.concatenate([_among(placed, *index.search(part, 5)) for part in rows])
    low, high = placed.min(0), placed.max(0)
    return np.clip((placed - (low + high) / 2) / max((high - low).max() / 2, 1e-12), -1, 1).astype(np.float32)


def _tsne(x: np.ndarray, seed: int) -> np.ndarray:
    """(L, 2) map of (L, <= 50) rows; of few or equal ones their principal components."""
    start = np.pad(x, ((0, 0), (0, 2)))[:, :2]
    deviation = start[:, 0].std()
    if len(x) < 8 or deviation < 1e-6:
        return start if deviation >= 1e-6 else np.zeros_like(start)
    perplexity = min(30, (len(x) - 1) / 3)
    return TSNE(init=start / deviation * 1e-4, perplexity=perplexity, max_iter=750, random_state=seed).fit_transform(x)


def _among(placed: np.ndarray, squared: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """(B, 2) positions of images from those of their nearest landmarks, (B, 5) with squared distances.

    The mean of these, the nearer the heavier. Those far from the nearest one in the map have no say: between two groups
    nothing should be put that is in neither.
    """
    around = placed[nearest]
    apart = ((around - around[:, :1]) ** 2).sum(2)
    reach = 0.05 * (placed.max(0) - placed.min(0)).max()
    weights = (apart <= reach**2) / (squared.astype(np.float64) + 1e-9)
    return (around * (weights / weights.sum(1, keepdims=True))[:, :, None]).sum(1)
