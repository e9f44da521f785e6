"""An epoch of training."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import CPU, Case, finished, rates
from benchmarks.extract import ready_store
from deepcluster import heap, trainer
from deepcluster.backbones import make_backbone
from deepcluster.batches import Batch, train_batches
from deepcluster.log import Metrics
from deepcluster.model import Model
from deepcluster.recipe import Clock, Every, Recipe, Targets, make_recipe

BATCH = 256
STEPS = 40  # of the epoch that is reckoned with: 10,240 images; fewer are done, which say what a step takes


@dataclass
class InTurns:
    """``progress`` and hook of fit: after each of its epochs the bare steps are done, and both are timed."""

    bare: Callable[[], None]
    device: torch.device
    steps: list[float] = field(default_factory=list)  # seconds of an epoch's steps
    rest: list[float] = field(default_factory=list)  # and of the remainder: examining, hooks, saving
    theirs: list[float] = field(default_factory=list)

    def now(self) -> float:
        """Of one thread's processor time, or by the clock where a GPU does the work."""
        finished(self.device)
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def progress(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Times all steps of an epoch."""
        began = self.now()
        yield from batches
        self.steps.append(self.now() - began)

    def hook(self, report: trainer.Report) -> None:
        """The end of an epoch; saving it falls into the time of the next."""
        if report.clock.epoch:
            self.rest.append(self.now() - self.began - self.steps[-1])
            began = self.now()
            self.bare()
            self.theirs.append(self.now() - began)
        self.began = self.now()

    def case(self, name: str, share: float) -> Case:
        """Of ``STEPS`` steps, of which a ``share`` was done."""
        ours = [steps / share + rest for steps, rest in zip(self.steps[2:], self.rest[1:], strict=True)]
        theirs = [seconds / share for seconds in self.theirs[1:]]
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        return {"case": name, "peer": "bare", "ours": BATCH * STEPS / statistics.median(ours), "unit": "images/s",
                "theirs": BATCH * STEPS / statistics.median(theirs), "ratio": statistics.median(ratios),
                "n": len(ratios), "low": min(ratios), "high": max(ratios)}  # fmt: skip


def bare_steps(
    network: nn.Module, recipe: Recipe, training: trainer.Training, ready: list[list[Tensor]]
) -> Callable[[], None]:
    """Forward, loss, backward and optimizer on views that are there already, and no more."""
    optimizer, device = training.optimizer(network), ready[0][0].device
    labels = torch.zeros(len(recipe.heads), BATCH, dtype=torch.long, device=device)

    def run() -> None:
        network.train()
        for views in ready:
            with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                logits = network(views)
            loss = recipe.losses(logits, labels, Clock(0, 1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def loop(device: torch.device = CPU) -> Iterator[Case]:
    """trainer.fit, beside the bare steps of the same network, views, batch and loss on tensors that are ready.

    Views, labels, figures, health and checkpoints are ours; a refresh of labels is another benchmark's. What memory is
    kept between steps is the same for both.
    """
    torch.set_num_threads(1)
    for name, shape, method, steps, rounds in (
        ("convnet", (1, 16, 16), "sela", 20, 7),
        ("convnet", (3, 32, 32), "sela", 8, 5),
        ("convnet", (3, 32, 32), "simclr", 4, 5),
        ("resnet18", (3, 32, 32), "sela", 2, 3),
    ):
        steps = steps if device.type == "cpu" else STEPS
        recipe = replace(make_recipe(method), label_views=("clean",))
        if method == "sela":
            recipe = replace(recipe, refresh=Every(10**6))  # before the first epoch, which is not counted
        torch.manual_seed(0)
        model = Model(*make_backbone(name, shape), recipe.heads, recipe.head)
        model = model.to(device, memory_format=torch.channels_last)
        store = ready_store(shape, steps * BATCH, device)
        batches = train_batches(store, Targets.unlabelled(len(recipe.heads), len(store)), recipe, BATCH, seed=0)
        ready = [[v.contiguous(memory_format=torch.channels_last) for v in batch.views] for batch in batches]
        with tempfile.TemporaryDirectory() as folder, heap.reused():
            out = Path(folder)
            training = trainer.Training(rounds + 2, BATCH, bf16=device.type == "cuda", out=out)
            turns = InTurns(bare_steps(copy.deepcopy(model), recipe, training, ready), device)
            hooks = [Metrics(out / "metrics.jsonl"), turns.hook]
            trainer.fit(model, store, recipe, training, hooks, turns.progress)
        yield turns.case(f"{name} {'x'.join(map(str, shape))} {method}", steps / STEPS)
        if device.type == "cpu" and method == "simclr":  # the large maps of 512 images
            bare = bare_steps(model, recipe, training, ready)
            yield rates("memory kept in steps", "bare", steps * BATCH, heap.reused()(bare), bare, 5)
