"""What a user would want to look at or throw away: copies of other images, and why an image is out of place.

A near copy shows the same picture after saving it anew, resizing, a change of brightness, a small crop or mark. Three
things must agree: a perceptual thumbnail (8 x 8 grey values without their mean and contrast; its nearest ones are the
candidates), the features, and the pixels at 16 x 16.

Features may be memory-mapped: at most BLOCK rows of them are held at a time. An image costs about 0.5 kB of memory
besides, for its candidates, 0.5 to 1 kB for its thumbnails, which of many images are on the disk (see ``scratch``), and
up to 9 reads of two rows of features.

Shapes: N images, M different ones that are compared, P pairs of them, D features, K clusters.
"""

import hashlib
from collections.abc import Iterator, Sequence

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from deepcluster import scratch
from deepcluster.classifier import Classifier
from deepcluster.store import Store

SIDE = 16  # pixels of a side that pictures are compared at; of smaller ones only equal ones are copies
CONTRAST = 4.0  # grey levels of deviation below which a picture is almost blank
UNLIKE = 0.2  # of its contrast by which a copy may differ in three quarters of its pixels
SMALL, LESS = 24, 0.15  # the same, below so many pixels of a side
SAME = 0.06  # the same, always allowed: two drawings are not that much alike
CLOSE = 0.3  # of the usual distance of features, which those of a copy must be within
FEW = 32  # images that are too few to tell what is usual
NEAR = 8  # nearest thumbnails of each image that are compared with it
EXACT = 10_000  # above so many images candidates come from an index, which may miss some
BLOCK = 2**13  # images or pairs at a time
NUMBERS = 2**23  # of the images at a time
PAIRS = 2**10  # pairs whose features are read at a time
BLANK, DARK, BRIGHT = LOOKS = ("almost blank", "among the darkest 1 %", "among the brightest 1 %")


def duplicates(store: Store, features: np.ndarray) -> np.ndarray:
    """The image that each image is a copy of.

    Copies are equal as stored, or close as the module says. How close depends on how much the images of this store
    differ anyway, so that two digits in like handwriting are none; where most images have eight copies, fewer of the
    strongly changed ones are found. Pictures of less than 16 pixels, almost blank ones and vectors must be equal.
    A chain of small changes is not followed: every copy is close to the image it is said to be a copy of.

    Args:
        store: the images.
        features: (N, D) of these.

    Returns:
        (N,) int64: row of the first image of its group, -1 for images that are first or alone.
    """
    first = _equal(store)
    if len(store.shape) == 3 and store.shape[1] >= SIDE:
        rows = np.flatnonzero(first < 0)
        small, rows = _small(store, rows)
        near = _near(small, features, rows, UNLIKE if store.shape[1] >= SMALL else LESS)
        copies = np.flatnonzero(near >= 0)
        first[rows[copies]] = rows[near[copies]]
    return np.where((first >= 0) & (first[first] >= 0), first[first], first)


def _blocks(store: Store, rows: np.ndarray) -> Iterator[Tensor]:
    """The images of these rows as stored, ``_step`` at a time."""
    step = _step(store)
    for start in range(0, len(rows), step):
        yield store.take(torch.from_numpy(rows[start : start + step]))


def _step(store: Store) -> int:
    """How many images at a time."""
    return max(1, min(BLOCK, NUMBERS // int(np.prod(store.shape))))


def _equal(store: Store) -> np.ndarray:
    """(N,) the first row that is stored with the same values, -1 for the first ones; so are all of the same file."""
    digests, row = np.empty(len(store), "V16"), 0
    for part in _blocks(store, np.arange(len(store))):
        for one in part.cpu().numpy():
            digests[row] = hashlib.blake2b(one.data, digest_size=16).digest()
            row += 1
    _, index, group = np.unique(digests, return_index=True, return_inverse=True)
    first = index[group.reshape(-1)]
    return np.where(first == np.arange(len(store)), -1, first).astype(np.int64)


def _small(store: Store, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Thumbnails (M, C, 16, 16) uint8 on the CPU of the M images among these that are not almost blank, and which."""
    small = torch.from_numpy(scratch.zeros((len(rows), store.shape[0], SIDE, SIDE), np.uint8))
    kept, m = np.empty_like(rows), 0
    for start, part in zip(range(0, len(rows), _step(store)), _blocks(store, rows), strict=True):
        pooled = F.adaptive_avg_pool2d(part.float(), SIDE)
        good = pooled.std((2, 3), correction=0).amax(1).cpu() >= CONTRAST
        count = int(good.sum())
        small[m : m + count] = pooled.round().byte().cpu()[good]
        kept[m : m + count] = rows[start : start + len(part)][good.numpy()]
        m += count
    return small[:m], kept[:m]


def _near(small: Tensor, features: np.ndarray, rows: np.ndarray, limit: float) -> np.ndarray:
    """(M,) position of the first picture each is a near copy of, -1 if it is of none; ``limit``: how unlike at most."""
    m = len(rows)
    first = np.full(m, -1, np.int64)
    if m < 2:
        return first
    tiny = torch.from_numpy(scratch.zeros((m, 64), np.float32))
    for part, here in zip(small.split(BLOCK), tiny.split(BLOCK), strict=True):
        here.copy_(_tiny(part))
    found = _nearest(tiny, min(NEAR + 1, m))
    limit = min(limit, max(SAME, _ordinary(small, found)))
    farthest = CLOSE * _usual(features, rows) + 1e-6

    def close(pairs: np.ndarray) -> np.ndarray:
        """Those of the pairs i * m + j that agree, (P', 2)."""
        good = [np.empty((0, 2), np.int64)]
        for start in range(0, len(pairs), BLOCK):
            i, j = np.divmod(pairs[start : start + BLOCK], m)
            kept = _apart(features, rows[i], rows[j]) <= farthest
            for images, most in ((tiny.view(-1, 1, 8, 8), 1.5 * limit), (small, limit)):  # the cheaper one first
                left = np.flatnonzero(kept)
                kept[left] = _unlike(images[i[left]], images[j[left]]) <= most
            good.append(np.stack([i[kept], j[kept]], 1))
        return np.concatenate(good)

    pairs = close(_pairs(found, m))
    graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (m, m))
    _, group = connected_components(graph, directed=False)
    lowest = np.unique(group, return_index=True)[1][group]
    others = np.flatnonzero(lowest != np.arange(m))
    others = close(lowest[others] * m + others)[:, 1]
    first[others] = lowest[others]
    for i, j in pairs.tolist():  # in order, so that i is settled; for what has drifted from the first of its group
        if first[i] < 0 and first[j] < 0:
            first[j] = i
    return first


def _pairs(found: np.ndarray, m: int) -> np.ndarray:
    """(P,) sorted i * m + j, with i < j, of all pairs of a row and one of its nearest (M, k): 8 bytes each."""
    for start in range(0, m, BLOCK):  # in place: there are millions
        part = found[start : start + BLOCK]
        own = np.arange(start, start + len(part))[:, None]
        part[:] = np.where((part == own) | (part < 0), -1, np.minimum(part, own) * m + np.maximum(part, own))
    found = found.reshape(-1)
    found.sort()
    return found[(found >= 0) & np.append(True, found[1:] != found[:-1])]


def _tiny(small: Tensor) -> Tensor:
    """(M, 64) unit vectors: the thumbnails in grey at 8 x 8, without mean and contrast."""
    grey = F.avg_pool2d(small.float().mean(1, keepdim=True), SIDE // 8).flatten(1)
    return F.normalize(grey - grey.mean(1, keepdim=True), dim=1)


def _nearest(tiny: Tensor, k: int) -> np.ndarray:
    """(M, k) positions of the nearest vectors, itself mostly among them, -1 where none was found."""
    x = tiny.numpy()
    if len(x) <= EXACT:
        return faiss.knn(x, x, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    cells = min(int(4 * len(x) ** 0.5), len(x) // 64)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(x.shape[1]), x.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.train(x[:: len(x) // (64 * cells)])
    index.add(x)
    index.nprobe = NEAR
    return index.search(x, k)[1]


def _ordinary(small: Tensor, found: np.ndarray) -> float:
    """A limit to how unlike copies may be: well below how unlike the eighth nearest picture mostly is."""
    if len(small) <= FEW:
        return np.inf
    some = np.linspace(0, len(small) - 1, min(2000, len(small))).astype(int)
    some = some[found[some, -1] >= 0]
    return 0.22 * float(np.median(_unlike(small[some], small[found[some, -1]]))) if len(some) else np.inf


def _unlike(a: Tensor, b: Tensor) -> np.ndarray:
    """(P,) 0 for equal pictures, about 1 for unrelated ones, for any brightness and contrast of the two.

    The difference in units of the contrast, as it is in three quarters of the pixels at least, so that a mark does not
    count. Pixels of the background of both do not count either: two digits on black are not alike for their black.
    """
    a, b = (x.float() - x.float().mean((1, 2, 3), keepdim=True) for x in (a, b))
    deviation = [x.pow(2).mean((1, 2, 3)).sqrt().clamp_min(1e-6) for x in (a, b)]
    seen = torch.zeros(len(a), a.shape[2:].numel(), dtype=torch.bool)
    for x, own in zip((a, b), deviation, strict=True):
        grey = x.mean(1).flatten(1)
        seen |= (grey - grey.median(1, keepdim=True).values).abs() > 0.25 * own[:, None]
    gain = (a * b).mean((1, 2, 3)) / deviation[0] ** 2
    apart = (b - gain[:, None, None, None] * a).abs().mean(1).flatten(1).masked_fill(~seen, torch.inf)
    rank = (0.75 * (seen.sum(1) - 1).clamp_min(0)).long()
    apart = apart.sort(1).values.gather(1, rank[:, None])[:, 0] / deviation[1]
    return torch.where((gain > 0.4) & (gain < 2.5), apart, torch.inf).numpy()


def _apart(features: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(P,) cosine distances of the features of rows i and j, which are read PAIRS at a time."""
    far = np.empty(len(i), np.float32)
    for start in range(0, len(i), PAIRS):
        some = slice(start, start + PAIRS)
        a, b = (F.normalize(torch.from_numpy(np.asarray(features[rows[some]], np.float32)), dim=1) for rows in (i, j))
        far[some] = 1 - (a * b).sum(1)
    return far


def _usual(features: np.ndarray, rows: np.ndarray) -> float:
    """The median distance of two images, of 10,000 pairs; infinite for few images."""
    if len(rows) <= FEW:
        return np.inf
    rng = np.random.default_rng(0)
    i = rng.integers(len(rows), size=10_000)
    j = (i + rng.integers(1, len(rows), size=10_000)) % len(rows)
    return float(np.median(_apart(features, rows[i], rows[j])))


def reasons(looks: Sequence[str], found: dict[str, np.ndarray], classifier: Classifier | None = None) -> list[str]:
    """Why an image is out of place, in a few words; "" for unremarkable images.

    Every outlier has a reason; another image only if it is almost blank and images of this store are mostly not.

    Args:
        looks: N, of ``looks``.
        found: what the classifier says of them: ``is_outlier``, ``cluster``, ``distance`` and ``features``.
        classifier: tells which cluster an outlier is near to, if any.

    Returns:
        N reasons: one of LOOKS, "far from every cluster", "nearer to cluster 7" or "far from its own cluster".
    """
    look = np.array(looks, object)
    said = np.where(found["is_outlier"] | (look == BLANK), look, "").astype(object)
    rows = np.flatnonzero(found["is_outlier"] & (said == ""))
    said[rows] = "far from its own cluster"
    if classifier is not None:
        for some in np.split(rows, range(BLOCK, len(rows), BLOCK)):
            said[some] = _where(found["features"][some], found["cluster"][some], found["distance"][some], classifier)
    return said.tolist()


def _where(features: np.ndarray, cluster: np.ndarray, distance: np.ndarray, classifier: Classifier) -> list[str]:
    """What the features of outliers say."""
    centroids, reach = classifier.centroids.cpu(), classifier.reach.cpu()
    used = centroids.norm(dim=1).nonzero()[:, 0]  # clusters without images have no mean
    if not len(used):  # all features are zero
        return ["far from its own cluster"] * len(features)
    unit = F.normalize(torch.from_numpy(features.astype(np.float32)), dim=1)
    far = 1 - unit @ F.normalize(centroids[used], dim=1).T
    near = far.min(1)
    nearer = (near.values.numpy() < distance) & (used[near.indices].numpy() != cluster)
    outside = (far > reach[used]).all(1).tolist()
    return [
        "far from every cluster" if out else f"nearer to cluster {c}" if other else "far from its own cluster"
        for out, other, c in zip(outside, nearer, used[near.indices].tolist(), strict=True)
    ]


def looks(store: Store) -> list[str]:
    """N: which of LOOKS an image has, "" if none, as it is stored."""
    said = np.full(len(store), "", object)
    if len(store.shape) == 1:
        return said.tolist()
    rows = np.arange(len(store))
    light, contrast = np.empty(len(store)), np.empty(len(store))
    for start, part in zip(range(0, len(store), _step(store)), _blocks(store, rows), strict=True):
        deviation, mean = torch.std_mean(part.float(), (2, 3), correction=0)
        light[start : start + len(part)] = mean.mean(1).cpu()
        contrast[start : start + len(part)] = deviation.amax(1).cpu()
    dark, bright = np.quantile(light, 0.01, method="lower"), np.quantile(light, 0.99, method="higher")
    said[light < dark] = DARK
    said[light > bright] = BRIGHT
    said[contrast < min(CONTRAST, 0.2 * float(np.median(contrast)))] = BLANK
    return said.tolist()
