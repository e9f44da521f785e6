"""The k nearest other rows of every row, by cosine, over rows that may be sharded over ranks.

Nothing as large as (N, N) exists: every rank compares its own rows with blocks of all rows and keeps the best k. Nor
does any rank hold (N, D): blocks, of rows or of what is asked for, go round.

Shapes: n rows of this rank, N rows in all, D features.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster import dist
from deepcluster.kmeans import kmeans
from deepcluster.model import Head
from deepcluster.recipe import Targets

BLOCK = 2**15  # rows, those of all ranks together, that are compared at a time
SCORES = 2**26  # cosines that exist at a time on an accelerator
EXACT = 200_000  # above so many rows a CPU searches an index, which misses some neighbours
PROBED = 32  # cells of it that are searched for each row


def neighbours(x: Tensor, k: int, *, exact: bool | None = None) -> Tensor:
    """Ids of the k rows with the largest cosine to each row, itself left out, nearest first.

    Exact, except on a CPU with more than ``EXACT`` rows in all: comparing all would take hours there, so only the
    32 nearest of 4 sqrt(N) cells are searched (faiss IVF), and a row may miss some of its neighbours.

    Args:
        x: (n, D) float, this rank's contiguous rows; n may differ between ranks.
        k: how many, at most N - 1.
        exact: whether all rows are compared; None decides as said above.

    Returns:
        (n, k) int64 ids in 0..N-1, on the CPU. The same for any number of ranks, up to ties and rounding.

    Raises:
        ValueError: there are not k other rows.
        FloatingPointError: x is not finite.
    """
    sizes = dist.all_cat(torch.tensor([len(x)], device=x.device)).tolist()
    total, offset = sum(sizes), sum(sizes[: dist.rank()])
    if not 1 <= k < total:
        raise ValueError(f"k must be between 1 and {total - 1}, the number of other rows; got {k}")
    if dist.all_max((~x.isfinite()).any().float()):
        raise FloatingPointError("features are not finite; lower lr, or use precision fp32")
    unit = F.normalize(x.float(), dim=1)
    own = torch.arange(offset, offset + len(x), device=x.device)
    if exact is None:
        exact = x.device.type != "cpu" or total <= EXACT
    found = _all(unit, own, k + 1, max(sizes)) if exact else _cells(unit, own, k + 1, total, max(sizes))
    return _without(own, found)[:, :k].cpu()


def _blocks(unit: Tensor, own: Tensor, longest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (m, D) of all ranks and their ids (m,), block by block; every rank goes through all of them."""
    share = max(1, BLOCK // dist.world())
    for start in range(0, longest, share):
        part = slice(start, start + share)
        yield dist.all_cat(unit[part]), dist.all_cat(own[part])


def _all(unit: Tensor, own: Tensor, k: int, longest: int) -> Tensor:
    """(n, k) ids of the nearest of all rows, nearest first, the lower id where two are equally near."""
    best = torch.empty(len(unit), 0, device=unit.device)
    ids = torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for rows, names in _blocks(unit, own, longest):
        scores, index = _nearest(unit, rows, min(k, len(rows)))
        best, ids = _top(torch.cat([best, scores], 1), torch.cat([ids, names[index]], 1), k)
    return ids


def _nearest(x: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (n, k) and indices (n, k) of the rows (m, D) nearest to each of the unit vectors x (n, D)."""
    if len(x) == 0:
        return x.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=x.device)
    if x.device.type == "cpu":
        scores, index = faiss.knn(x.numpy(), rows.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(scores), torch.from_numpy(index)
    return _best(x, rows, k)


def _best(x: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by torch: never more than ``SCORES`` cosines at a time."""
    parts = [torch.topk(part @ rows.T, k) for part in x.split(max(1, SCORES // len(rows)))]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _cells(unit: Tensor, own: Tensor, k: int, total: int, longest: int) -> Tensor:
    """(n, k) ids of near rows, found in the nearest of cells that are the same on every rank.

    A rank has an index of its own rows only. Rows that look for neighbours go round, and so do the k that each finds.
    """
    n_cells = max(1, min(int(4 * math.sqrt(total)), total // 64))
    step = max(1, total // (64 * n_cells))  # 64 rows a cell are enough to place the cells
    sample = unit[(-int(own[0]) % step if len(own) else 0) :: step]
    cells = faiss.IndexFlatIP(unit.shape[1])
    cells.add(kmeans(sample, n_cells, seed=0, iterations=10, spherical=True)[1].numpy())
    index: Any = faiss.IndexIVFFlat(cells, unit.shape[1], n_cells, faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(unit.numpy(), own.numpy())
    index.nprobe = min(PROBED, n_cells)
    ids = own.new_empty(0, k)
    for rows, names in _blocks(unit, own, longest):
        mine = (names >= own[0]) & (names <= own[-1]) if len(own) else names < 0
        near, probed = (_of_all(part) for part in cells.search(rows[mine].numpy(), index.nprobe))
        scores, found = index.search_preassigned(rows.numpy(), k, probed, near)
        best, who = (dist.all_stack(torch.from_numpy(part))[:, mine] for part in (scores, found))  # (ranks, n, k)
        ids = torch.cat([ids, _top(best.transpose(0, 1).flatten(1), who.transpose(0, 1).flatten(1), k)[1]])
    return torch.where(ids >= 0, ids, own[:, None])  # too few rows in these cells: the row itself


def _of_all(part: np.ndarray) -> np.ndarray:
    return dist.all_cat(torch.from_numpy(part)).numpy()


def _top(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row's (n, M) scores and their ids, best first, the lower id where two are equal."""
    by_id = ids.argsort(1)
    scores, ids = scores.gather(1, by_id), ids.gather(1, by_id)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def _without(own: Tensor, found: Tensor) -> Tensor:
    """(n, k) without one column each: the row's own id, or the last if it is not among them (more than k are equal)."""
    mine = found == own[:, None]
    mine[:, -1] |= ~mine.any(1)
    first = mine.to(torch.int8).argmax(1)  # a padded row has its own id several times
    kept = torch.arange(found.shape[1], device=found.device) != first[:, None]
    return found[kept].view(len(found), -1)


@dataclass(frozen=True)
class Neighbors:
    """Assigner: the partners of an image are its ``k`` nearest others by cosine of the features (SCAN's mining)."""

    k: int = 20

    def __call__(self, features: Tensor, heads: Sequence[Head], previous: Targets, seed: int) -> Targets:
        n_images = previous.labels.shape[1]
        near = neighbours(features, min(self.k, n_images - 1))
        return replace(previous, partners=dist.all_cat(near.to(features.device)).cpu())
