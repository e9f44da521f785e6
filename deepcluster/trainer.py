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

from deepcluster import checkpoint, dist, heap, networks
from deepcluster.batches import Batch, steps, train_batches
from deepcluster.checkpoint import Saver, State
from deepcluster.features import extract
from deepcluster.health import Health, examine, flat_loss
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
        seed: an epoch depends on it and on its number only, a step on its own number, too.
        bf16: compute in bfloat16.
        stage: position in the plan, kept in the checkpoint.
        out: where checkpoints are written, if anywhere.
        checkpoint_every: seconds after which an epoch under way is saved.
        keep_healthy: save every epoch that ends without a symptom, and keep the last of them for a rescue.
        rescues: changes made after a collapse, which ``lr`` and ``seed`` have in them already.
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
    checkpoint_every: float = 600.0
    keep_healthy: bool = False
    rescues: tuple[str, ...] = ()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW, or SGD if there is a momentum."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.momentum is None:
            return torch.optim.AdamW(trained, self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(trained, self.lr, self.momentum, weight_decay=self.weight_decay)

    def set_lr(self, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
        """Give every parameter the learning rate of this moment."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_at(clock)

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
        health: what can be known of the epoch without labels.
    """

    clock: Clock
    loss: float
    seconds: float
    refreshed: bool
    before: Tensor
    state: State
    recipe: Recipe
    health: Health


Hook = Callable[[Report], None]
Progress = Callable[[Iterable[Batch]], Iterable[Batch]]


def start(
    model: Model,
    store: Store,
    recipe: Recipe,
    training: Training,
    known: Tensor | None = None,
    resume: dict | None = None,
) -> State:
    """The state of a stage before its first epoch, or as ``resume`` has it.

    Raises:
        ValueError: the recipe learns from given labels and ``known`` has none; ``resume`` is of another plan.
    """
    n, heads = len(store), len(recipe.heads)
    network = recipe.network(model).to(store.device)
    unseen = torch.full((heads, n), -1, dtype=torch.int32, device=store.device)
    targets = Targets.unlabelled(heads, n)
    if recipe.supervised:
        if known is None or bool((known < 0).all()):
            raise ValueError("this method learns from some known labels; give --labels FILE.csv --use-labels")
        targets.labels[:] = known
    state = State(model, network, training.optimizer(network), targets, unseen, torch.zeros(heads), training.stage)
    if resume:
        checkpoint.restore(resume, state, recipe.heads)
    state.rescues = list(training.rescues)
    return state


def finish_epoch(state: State, lr: float) -> float:
    """Close the epoch under way; returns its loss, the mean over heads and steps.

    Raises:
        FloatingPointError: the loss is no number any more; nothing was saved of this epoch.
    """
    state.epoch_done()
    loss = state.head_losses.mean().item()
    largest = torch.stack([p.detach().abs().max() for p in state.network.parameters()]).max().item()
    if not math.isfinite(loss + largest):
        what = "a weight became infinite" if math.isfinite(loss) else f"the loss became {loss}"
        raise FloatingPointError(f"{what} in epoch {state.epoch}; lower --lr (now {lr:g}) or set --precision fp32")
    return loss


@heap.reused()
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
    state = start(model, store, recipe, training, known, resume)
    parallel = networks.parallel(state.network)
    n_steps = steps(len(store), training.batch_size)

    with Saver(training.out, training.checkpoint_every, training.keep_healthy) as saver:
        for epoch in range(state.epoch, training.epochs):
            began, before = time.perf_counter(), state.predicted
            clock = Clock(epoch, training.epochs, state.step, n_steps)
            seed = dist.epoch_seed(training.seed, epoch)
            torch.manual_seed(seed)  # labelling depends on (seed, epoch) only, a step on its number, too: see below

            refreshed = recipe.refresh.due(clock)
            if refreshed and not state.step:
                model.eval()  # heads, too: labelling may neither use nor move the statistics of a batch
                features = extract(model, store, recipe.label_views, seed=seed, bf16=training.bf16)
                with torch.no_grad():
                    state.targets = recipe.assigner(features, model.head_list(), state.targets, seed)
                recipe.reassign(model.head_list(), state.optimizer, features, state.targets)
                del features  # N x D: the next ones come before this name is bound again

            state.network.train()
            labels = state.targets.labels.to(store.device)
            batches = train_batches(store, state.targets, recipe, training.batch_size, seed, state.step)
            for batch in saver.during(progress(batches), state):
                clock = Clock(epoch, training.epochs, state.step, n_steps)
                torch.manual_seed(dist.step_seed(seed, state.step))  # so resuming is exact
                training.set_lr(state.optimizer, clock)
                with torch.autocast(store.device.type, torch.bfloat16, enabled=training.bf16):
                    logits = parallel(batch.views)
                ids = batch.ids.to(store.device, non_blocking=True)  # a step never waits for the device
                each = recipe.losses(logits, own := labels[:, ids], clock)
                flat_loss(state, recipe, logits, own, clock)

                state.optimizer.zero_grad(set_to_none=True)
                each.mean().backward()
                state.optimizer.step()
                state.step_done(ids, logits, each)

            loss = finish_epoch(state, training.lr)
            health = examine(model, store, recipe, state, clock, before, loss, training.bf16)
            report = Report(clock, loss, time.perf_counter() - began, refreshed, before, state, recipe, health)
            for hook in hooks:
                hook(report)
            saver.epoch(state, epoch + 1 == training.epochs)  # last: what was cut short is trained and reported again
    return state
