"""The loop. Every method in this package is trained by the function ``fit`` below.

    for each epoch
        1  label      every so often, turn the features of all images into targets
        2  re-assign  decide what the heads keep of what they knew
        3  learn      one pass of SGD on the objective
        4  look       save, report, evaluate; nothing here may change training

Offline methods (DeepCluster, SeLa, UIC) do their work in step 1, online methods
(IIC, DAC, SwAV) in step 3, SCAN in both. Which is which is written in the recipe.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepcluster import checkpoint, dist
from deepcluster.batches import Batch, steps, train_batches
from deepcluster.checkpoint import State
from deepcluster.features import extract
from deepcluster.model import Model
from deepcluster.recipe import Clock, Recipe, Targets
from deepcluster.store import Store


@dataclass(frozen=True)
class Training:
    """How long and how hard to train; nothing method-specific.

    Attributes:
        epochs: passes over the images.
        batch_size: images a step, over all ranks.
        lr: highest learning rate; rises for ``warmup`` (a share of training) and falls to 0 along a cosine.
        momentum: of SGD; None means AdamW.
        weight_decay: of every parameter.
        seed: an epoch depends on it and on its number only.
        bf16: compute in bfloat16.
        stage: position in the plan, kept in the checkpoint.
        out: where checkpoints are written, if anywhere.
    """

    epochs: int = 100
    batch_size: int = 256
    lr: float = 2e-3
    momentum: float | None = None
    weight_decay: float = 1e-4
    warmup: float = 0.05
    seed: int = 0
    bf16: bool = False
    stage: int = 0
    out: Path | None = None

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW, or SGD if there is a momentum."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.momentum is None:
            return torch.optim.AdamW(trained, self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(trained, self.lr, self.momentum, weight_decay=self.weight_decay)

    def lr_at(self, clock: Clock) -> float:
        """Learning rate at this moment."""
        rise = min(1.0, (clock.progress + 1e-3) / max(self.warmup, 1e-3))
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * clock.progress))


@dataclass(frozen=True)
class Report:
    """What hooks may see at the end of an epoch.

    Attributes:
        loss: mean over heads and batches.
        seconds: since the epoch began, labelling included.
        before: (H, N) int32, what was predicted in the epoch before this one; -1 never.
    """

    clock: Clock
    loss: float
    seconds: float
    refreshed: bool
    before: Tensor
    state: State
    recipe: Recipe


Hook = Callable[[Report], None]
Progress = Callable[[Iterable[Batch]], Iterable[Batch]]


def start(model: Model, store: Store, recipe: Recipe, training: Training, known: Tensor | None = None) -> State:
    """The state of a stage before its first epoch.

    Raises:
        ValueError: the recipe learns from given labels and ``known`` has none.
    """
    n, heads = len(store), len(recipe.heads)
    network = recipe.network(model).to(store.device)
    unseen = torch.full((heads, n), -1, dtype=torch.int32, device=store.device)
    targets = Targets.unlabelled(heads, n)
    if recipe.supervised:
        if known is None or bool((known < 0).all()):
            raise ValueError("this method learns from some known labels; give --labels FILE.csv --use-labels")
        targets.labels[:] = known
    return State(model, network, training.optimizer(network), targets, unseen, torch.zeros(heads), training.stage)


def finish_epoch(state: State, seen: Tensor, losses: Tensor, lr: float) -> float:
    """Put together what the ranks saw of an epoch: predictions (H, N), losses (H,), running means; returns the loss.

    Raises:
        FloatingPointError: the loss is no number any more; nothing was saved of this epoch.
    """
    seen = dist.all_max(seen)
    state.predicted = torch.where(seen >= 0, seen, state.predicted)
    for buffer in state.network.buffers():
        dist.from_main(buffer)
    state.head_losses = (dist.all_sum(losses) / dist.world()).cpu()
    state.epoch += 1
    loss = state.head_losses.mean().item()
    largest = torch.stack([p.detach().abs().max() for p in state.network.parameters()]).max().item()
    if not math.isfinite(loss + largest):
        what = "a weight became infinite" if math.isfinite(loss) else f"the loss became {loss}"
        raise FloatingPointError(f"{what} in epoch {state.epoch}; lower --lr (now {lr:g}) or set --precision fp32")
    return loss


def fit(
    model: Model,
    store: Store,
    recipe: Recipe,
    training: Training,
    hooks: Sequence[Hook] = (),
    progress: Progress = iter,
    resume: dict | None = None,
    known: Tensor | None = None,
) -> State:
    """Train ``model`` by ``recipe``; returns the final state. ``resume``: what ``checkpoint.read`` returned.

    ``known``: (N,) labels the user gave, -1 none; only a ``supervised`` recipe sees them.
    """
    state = start(model, store, recipe, training, known)
    if resume:
        checkpoint.restore(resume, state)
    parallel = DistributedDataParallel(state.network) if dist.world() > 1 else state.network
    n_steps = steps(len(store), training.batch_size)

    for epoch in range(state.epoch, training.epochs):
        began, before = time.perf_counter(), state.predicted
        clock = Clock(epoch, training.epochs, steps=n_steps)
        seed = dist.epoch_seed(training.seed, epoch)
        torch.manual_seed(seed)  # an epoch depends on (seed, epoch) only, so resuming is exact

        refreshed = recipe.refresh.due(clock)
        if refreshed:
            model.eval()  # heads, too: labelling may neither use nor move the statistics of a batch
            features = extract(model, store, recipe.label_views, seed=seed, bf16=training.bf16)
            with torch.no_grad():
                state.targets = recipe.assigner(features, model.head_list(), state.targets, seed)
            recipe.reassign(model.head_list(), state.optimizer, features, state.targets)

        state.network.train()
        labels, losses = state.targets.labels.to(store.device), torch.zeros(len(recipe.heads), device=store.device)
        seen = torch.full_like(state.predicted, -1)
        batches = train_batches(store, state.targets, recipe, training.batch_size, seed)
        for step, batch in enumerate(progress(batches)):
            clock = Clock(epoch, training.epochs, step, n_steps)
            for group in state.optimizer.param_groups:
                group["lr"] = training.lr_at(clock)
            with torch.autocast(store.device.type, torch.bfloat16, enabled=training.bf16):
                logits = parallel(batch.views)
            ids = batch.ids.to(store.device)
            each = recipe.losses(logits, labels[:, ids], clock)

            state.optimizer.zero_grad(set_to_none=True)
            each.mean().backward()
            state.optimizer.step()
            losses += each.detach()
            seen[:, ids] = torch.stack([z[0].detach().argmax(1) for z in logits]).int()

        mean = finish_epoch(state, seen, losses / n_steps, training.lr)
        report = Report(clock, mean, time.perf_counter() - began, refreshed, before, state, recipe)
        for hook in hooks:
            hook(report)
        if training.out:  # last: an epoch whose report was cut short is trained and reported again
            checkpoint.save(training.out / "last.pt", state)
    return state
