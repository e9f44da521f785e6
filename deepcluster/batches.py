"""The order images are seen in, and the views they are seen through. Batches carry ids, never labels.

Everything is a function of (seed, epoch, step) and the targets, for the global batch; a rank takes its rows of it.
So the shuffle, the draws and the labels are the same for any number of ranks.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepcluster import dist
from deepcluster.recipe import Recipe, Targets
from deepcluster.store import Store
from deepcluster.views import VIEWS


class Batch(NamedTuple):
    """This rank's rows of a global batch."""

    ids: Tensor  # (B,) int64, on the CPU: positions in the training set
    views: list[Tensor]  # V tensors (B, C, H, W) in [0, 1], on the device


def steps(n_images: int, batch_size: int) -> int:
    """Batches in an epoch; a remainder smaller than a batch is left out of it.

    Raises:
        ValueError: the batch is larger than the data set, or cannot be shared by the ranks.
    """
    if not 2 <= batch_size <= n_images:
        raise ValueError(f"batch_size must be between 2 and the {n_images} training images; got {batch_size}")
    if batch_size < 2 * dist.world():
        raise ValueError(f"batch_size {batch_size} is less than 2 for each of {dist.world()} processes; make it larger")
    return n_images // batch_size


def train_batches(
    store: Store, targets: Targets, recipe: Recipe, batch_size: int, seed: int, first: int = 0
) -> Iterator[Batch]:
    """One epoch of augmented batches, from number ``first`` on. ``batch_size`` is global; ``seed`` is the epoch's."""
    rng = torch.Generator().manual_seed(seed)
    n = len(store)
    order = uniform_over(targets.labels[-1], n, rng) if recipe.balanced else torch.randperm(n, generator=rng)
    if recipe.supervised:  # every batch has its share of images of known class, and so has every process
        share = max(1, round(recipe.supervised * batch_size))
        few = uniform_over(targets.labels[-1], steps(n, batch_size) * share, rng)
        others = order[: steps(n, batch_size) * (batch_size - share)].view(-1, batch_size - share)
        places = torch.cat([(torch.arange(n) + 0.5) / n for n in (batch_size - share, share)]).argsort()
        order = torch.cat([others, few.view(-1, share)], 1)[:, places].flatten()
    for step, ids in enumerate(order[: steps(n, batch_size) * batch_size].split(batch_size)):
        if step < first:
            continue
        rng = torch.Generator().manual_seed(dist.step_seed(seed, step))  # so that an epoch can be gone on with
        column = torch.randint(targets.partners.shape[1], (batch_size,), generator=rng)
        partners = targets.partners[ids, column]
        lo, hi = dist.shard(batch_size)
        whole = store.take(ids[lo:hi])
        mates = whole if targets.partners.shape[1] == 1 else store.take(partners[lo:hi])
        rows = (lo, batch_size)
        views = [seen(store, whole if v == 0 else mates, name, rng, rows) for v, name in enumerate(recipe.views)]
        yield Batch(ids[lo:hi], views)


def eval_batches(
    store: Store, view: str = "clean", batch_size: int = 512, seed: int = 0, shard: bool = True
) -> Iterator[Tensor]:
    """This rank's contiguous shard (or all images) in order, through one view: (B, C, H, W) in [0, 1] each."""
    lo, hi = dist.shard(len(store)) if shard else (0, len(store))
    rng = torch.Generator().manual_seed(seed)
    for start in range(0, len(store), batch_size):  # the same draws whatever the shard: batches are cut from all N
        total = min(batch_size, len(store) - start)
        first, last = max(lo, start), min(hi, start + total)
        rows = torch.arange(first, max(first, last))
        if len(rows):
            yield seen(store, store.take(rows), view, rng, (first - start, total))
        elif view != "clean":
            seen(store, store.take(torch.arange(1)), view, rng, (0, total))  # advances the generator on every rank


def seen(store: Store, raw: Tensor, view: str, rng: torch.Generator, rows: tuple[int, int]) -> Tensor:
    """What the store's rows look like through a view. The noise of vectors is in units of their own deviation."""
    if raw.ndim == 4 or view == "clean":
        return VIEWS[view](raw, rng, rows)
    mean, std = (s.to(raw.device, non_blocking=True) for s in store.statistics)
    return VIEWS[view]((raw - mean) / std, rng, rows) * std + mean


def uniform_over(labels: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n ids in random order such that every non-empty pseudo-class is seen equally often.

    A class smaller than its share is seen whole, again and again; no image is left out of it before another is
    repeated. The paper's sampler means this, but indexes the wrong table (methods of sampling by label must
    return ids of images in their original order). Unlabelled images (-1) are not drawn.

    Args:
        labels: (N,) int, pseudo-class of each image.
        n: how many to draw.
        rng: of the order and of who is drawn once more.

    Raises:
        ValueError: no image has a label.
    """
    shuffled = torch.randperm(len(labels), generator=rng)
    shuffled = shuffled[labels[shuffled] >= 0]
    if len(shuffled) == 0:
        raise ValueError("no image has a pseudo-label to balance over; use a recipe that refreshes labels first")
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(labels[by_class].long())
    counts = counts[counts > 0]
    starts = counts.cumsum(0) - counts
    draws = torch.full_like(counts, n // len(counts))
    draws[torch.randperm(len(counts), generator=rng)[: n % len(counts)]] += 1
    within = torch.arange(n) - (draws.cumsum(0) - draws).repeat_interleave(draws)
    ids = by_class[starts.repeat_interleave(draws) + within % counts.repeat_interleave(draws)]
    return ids[torch.randperm(n, generator=rng)]


def joined(parts: Iterable[dict[str, np.ndarray]], n: int) -> dict[str, np.ndarray]:
    """Batches of columns, one after the other, n rows in all."""
    columns: dict[str, np.ndarray] = {}
    row = 0
    for part in parts:
        for name, value in part.items():
            if not row:  # once: small pieces that are kept would hold on to the memory of the large ones between them
                columns[name] = np.empty((n, *value.shape[1:]), value.dtype)
            columns[name][row : row + len(value)] = value
        row += len(value)
    return columns
