"""Another number of clusters for a finished run: a cut of the tree over its features, without training or images.

The evidence (``howmany``) is kept in RUN/k.safetensors and made anew where it is missing or of other features.
"""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deepcluster import atomic, dist, outputs
from deepcluster.edits import Recut, Step
from deepcluster.howmany import SAMPLE, Evidence, evidence

FORMAT = 1
FILE = "k.safetensors"
ROWS = 4096  # images at a time

logger = logging.getLogger("deepcluster")


def evidence_of(run: Path, low: int | None = None, high: int | None = None, seed: int = 0) -> Evidence:
    """The evidence for every k in this range of a finished run; kept there, from where it comes the next time.

    Without ``low`` it is what was looked at last, for whatever range, or else from 2 on.

    Raises:
        ValueError: the run did not finish, or see ``howmany.evidence``.
    """
    features = outputs.read_features(run)
    words = {"features": _digest(features), "range": json.dumps([low or 2, high, seed])}
    found = _read(run / FILE, words if low else {"features": words["features"]})
    if found is None:
        found = evidence(features, low=low or 2, high=high, seed=seed, cosine=True)
        words["evidence"] = json.dumps(found.to_dict())
        try:
            atomic.write(run / FILE, save({"centroids": torch.from_numpy(found.centroids)}, metadata=words))
        except OSError as error:  # it would only have saved time
            logger.warning("the evidence is not kept: cannot write %s (%s)", run / FILE, error.strerror)
    return found


def _digest(features: np.ndarray) -> str:
    """Of an even sample of the features: others give another one."""
    rows = np.linspace(0, len(features) - 1, min(len(features), SAMPLE)).astype(int)
    return f"{FORMAT} {len(features)} {hashlib.sha1(np.ascontiguousarray(features[rows]).tobytes()).hexdigest()}"


def _read(path: Path, words: dict[str, str]) -> Evidence | None:
    """What is kept in ``path`` under these words, or None if that is something else, or damaged."""
    try:
        with safe_open(path, "np") as stored:
            found = stored.metadata()
            if any(found[name] != word for name, word in words.items()):
                return None
            return Evidence.from_dict(json.loads(found["evidence"]), stored.get_tensor("centroids"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def cut(found: Evidence, k: int, features: np.ndarray) -> Recut:
    """The edit that makes ``k`` clusters of all images, whose features (N, D) sort them by size.

    Raises:
        ValueError: the tree cannot be cut into so many.
    """
    if not 2 <= k <= found.most:
        raise ValueError(f"the tree of these features can be cut into 2 to {found.most} clusters; got {k}")
    made = Recut(torch.from_numpy(found.centroids), tuple(found.tree.groups(k).tolist()), found.scale)
    sizes = np.bincount(_applied(made, features)[0], minlength=k)
    place = np.argsort(np.argsort(-sizes, kind="stable"))
    return Recut(made.centroids, tuple(place[list(made.groups)].tolist()), made.scale)


def _applied(made: Recut, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) cluster of each image, the small cluster whose centroid is nearest, and its cosine to that."""
    cluster, small = np.empty((2, len(features)), np.int64)
    near = np.empty(len(features), np.float32)
    centroids = F.normalize(made.centroids, dim=1)
    for start in range(0, len(features), ROWS):
        part = slice(start, start + ROWS)
        unit = F.normalize(torch.from_numpy(np.array(features[part], np.float32)), dim=1)
        cluster[part] = made.apply(unit, unit[:, 0], unit)[0].numpy()
        best = (unit @ centroids.T).max(1)
        small[part], near[part] = best.indices.numpy(), best.values.numpy()
    return cluster, small, near


def typical(made: Recut, features: np.ndarray, n: int) -> tuple[list[int], list[np.ndarray]]:
    """Size of each cluster, and the rows of ``n`` images of each: those nearest to the means of its small clusters."""
    cluster, small, near = _applied(made, features)
    k, m = max(made.groups) + 1, len(made.groups)
    order = np.lexsort((-near, small, cluster))
    pair = cluster[order] * m + small[order]
    rank = np.arange(len(order)) - np.searchsorted(pair, pair)  # within its small cluster: one of each, then the next
    order = order[np.lexsort((-near[order], rank, cluster[order]))]
    parts = np.split(order, np.bincount(cluster, minlength=k).cumsum()[:-1])
    return [len(part) for part in parts], [part[:n] for part in parts]


def first(features: np.ndarray, out: Path | None, seed: int, seen: np.ndarray | None = None) -> Recut:
    """The cut that the evidence speaks for, or in two where it speaks for none; kept in ``out`` if there is one.

    ``seen`` (n, d): what the network saw of some of the images, where that is vectors: a network can learn to part
    noise, so that without groups in these there are none.
    """
    found = evidence_of(out, 2, seed=seed) if out else evidence(features, seed=seed, cosine=True)
    before = found if seen is None else evidence(seen, seed=seed)
    if not before.answers:
        found = replace(before, tree=found.tree, centroids=found.centroids, scale=found.scale)
    if found.answers:
        logger.info("%s", found.sentence())
    else:
        logger.warning("%s; the images are cut in 2, which means little", found.sentence())
    return cut(found, found.answers[0] if found.answers else 2, features)


def shared(made: Recut | None, device: torch.device) -> Step:
    """Rank 0's cut as a step, on every rank; others give None."""
    shape = torch.tensor(made.centroids.shape if made else (0, 0), device=device)
    m, dim = dist.from_main(shape).tolist()

    def sent(mine: Tensor | None) -> Tensor:
        return dist.from_main((torch.zeros(m, dim + 2) if mine is None else mine).to(device)).cpu()

    both = sent(None if made is None else _packed(made))
    return Step((Recut(both[:, 2:].contiguous(), tuple(both[:, 0].int().tolist()), float(both[0, 1])),))


def _packed(made: Recut) -> Tensor:
    """(M, 2 + D): group, scale and centroid of each small cluster."""
    m = len(made.groups)
    return torch.cat([torch.tensor(made.groups).float()[:, None], torch.full((m, 1), made.scale), made.centroids], 1)
