"""What stands around a model while it trains: a recipe's ``network``, with whatever a method remembers between batches.

Called with the views, each returns one tensor a head, (V', B, K): the views' logits first, then rows of its own, which
the objective expects. Memory is in buffers, or in parameters without gradient: checkpointed, and alike on every rank.

Shapes: V views, B images of this rank's batch, H heads, K outputs of a head, Q keys of a queue.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepcluster import dist
from deepcluster.losses import divergence
from deepcluster.model import Model
from deepcluster.norm import Shared, deviation


def parallel(network: nn.Module) -> nn.Module:
    """What a step calls: the network itself or, with several processes, a shell that makes them train as one.

    Gradients are averaged, and batch norms in training use the batch of all processes: the same weights, running
    statistics and losses come out, up to rounding, as on one process with the whole batch. The network keeps its
    modules and its state; buffers are not sent round, as all processes compute the same. Every trained parameter needs
    a gradient in every step, if only of 0: none is looked for that the loss does not reach. Dropout (alexnet, vgg16)
    cannot be the same: each process draws for its own rows.
    """
    if dist.world() == 1:
        return network
    return DistributedDataParallel(Shared(network), broadcast_buffers=False)


class Teacher(nn.Module):
    """The model and its teacher, a moving average of it over the steps: (2V, B, K) logits, first the model's.

    The teacher follows at the start of every training step, has no gradient, and starts as a copy of the model, so that
    the first step sees two equals. Like the model it normalises by the batch in training, and it moves its own running
    statistics. What is set and not trained (frozen centroids) it takes over as it is.

    Args:
        model: the student; what is trained.
        momentum: share of the teacher that stays in a step, in [0, 1].

    Raises:
        ValueError: the momentum is no such share.
    """

    def __init__(self, model: Model, momentum: float = 0.99):
        super().__init__()
        self.model, self.momentum = model, share(momentum)
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """V tensors (B, C, H, W) -> H tensors (2V, B, K): the student's logits of all views, then the teacher's."""
        if self.training:
            self.follow()
        with torch.no_grad():
            taught = self.teacher(views)
        return [torch.cat(both) for both in zip(self.student(views), taught, strict=True)]

    def student(self, views: Sequence[Tensor]) -> list[Tensor]:
        """What is compared with the teacher: the model's own logits."""
        return self.model(views)

    @torch.no_grad()
    def follow(self) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, for every trained parameter."""
        for old, new in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            old.lerp_(new, 1 - self.momentum if new.requires_grad else 1.0)


def share(momentum: float) -> float:
    """The momentum itself.

    Raises:
        ValueError: it is no share, between 0 and 1.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"the teacher's momentum must be between 0 and 1; got {momentum}")
    return momentum


class Predicted(Teacher):
    """A teacher whose student has to predict it: one MLP a head (Linear-BN-ReLU-Linear) on the student's side only."""

    def __init__(self, model: Model, momentum: float = 0.99, hidden: int = 512):
        super().__init__(model, momentum)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # a run is a function of its seed and the model, not of what was drawn in between
            self.predictors = nn.ModuleList(
                nn.Sequential(nn.Linear(k, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, k))
                for k in (head.out_features for head in model.head_list())
            )

    def student(self, views: Sequence[Tensor]) -> list[Tensor]:
        """The predictions (V, B, K) of the teacher's logits of the other views."""
        logits = super().student(views)
        return [predict(z.flatten(0, 1)).view_as(z) for predict, z in zip(self.predictors, logits, strict=True)]


class Queue(Teacher):
    """A teacher, and its last ``length`` outputs for the last view (keys) under every head; the oldest is overwritten.

    Returns (2V + M, B, K): after the teacher's rows M = ceil(Q / B) rows hold the queue as it was before this batch, in
    no order that matters. Places that no key has filled yet, and those that only complete the last row, are zero
    vectors; keys are unit vectors, never zero. Every rank holds the keys of all.
    """

    def __init__(self, model: Model, momentum: float = 0.99, length: int = 1024):
        super().__init__(model, momentum)
        self.length = length
        self.queues = [f"keys{h}" for h in range(len(model.heads))]
        for name, head in zip(self.queues, model.head_list(), strict=True):
            self.register_buffer(name, torch.zeros(length, head.out_features))
        self.next: Tensor
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """V tensors (B, C, H, W) -> H tensors (2V + M, B, K): student's, teacher's, queue."""
        logits = super().forward(views)
        batch = logits[0].shape[1]
        rows = math.ceil(self.length / batch)
        out, added = [], 0
        for name, z in zip(self.queues, logits, strict=True):
            queue = self.get_buffer(name)
            whole = F.pad(queue, (0, 0, 0, rows * batch - self.length)).view(rows, batch, -1)
            out.append(torch.cat([z, whole.to(z)]))  # a copy: the queue may change before the backward pass
            if self.training:
                keys = dist.all_cat(z[-1].detach().float())[-self.length :]
                places = (self.next + torch.arange(len(keys), device=keys.device)) % self.length
                queue[places], added = keys, len(keys)
        self.next.copy_((self.next + added) % self.length)
        return out


class Queued(nn.Module):
    """The model, and under its heads of today the features of two views of the last batches (SwAV's queue).

    Batch and queue together hold ``images`` at least: M = ceil(images / global batch) - 1 batches are remembered. When
    M batches have been seen, (V + 2M, B, K) logits are returned: after the V views' M rows of view 0 and M of view 1,
    without gradient, in no order that matters; else, and in evaluation, (V, B, K). Every rank holds the features of
    all and scores its share. Heads that normalise by the batch would count the past twice: use none.
    """

    def __init__(self, model: Model, images: int):
        super().__init__()
        self.model, self.images = model, images
        self.memory: Tensor
        self.batches: Tensor
        self.register_buffer("memory", torch.zeros(2, images, model.dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.seen: int | None = None  # the same number, where it is known without waiting for the device
        self.register_load_state_dict_post_hook(_forget)

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """V tensors (B, C, H, W) -> H tensors (V + 2M, B, K)."""
        features = self.model.features(views)
        logits = self.model.classify(features)
        if not self.training:
            return logits
        new = dist.all_cat(features[:2].detach().float().transpose(0, 1).contiguous())  # (global batch, 2, D)
        total = len(new)
        kept = max(0, -(-self.images // total) - 1)
        if not kept:
            return logits
        seen = int(self.batches) if self.seen is None else self.seen
        lo, hi = dist.shard(total)
        memory = self.memory[:, : kept * total].view(2, kept, total, -1)
        if seen >= kept:
            with torch.no_grad():
                old = self.model.classify(memory[:, :, lo:hi].flatten(0, 1))
            logits = [torch.cat([z, queued.to(z)]) for z, queued in zip(logits, old, strict=True)]
        memory[:, seen % kept] = new.transpose(0, 1)
        self.batches += 1
        self.seen = seen + 1
        return logits


def _forget(queued: nn.Module, keys: object) -> None:
    """Other weights were loaded, and with them another number of batches seen."""
    queued.seen = None  # type: ignore[assignment]


class Adversary(nn.Module):
    """The model, and what it says of view 0 after the small step that changes its mind most: (V + 1, B, K) in training.

    The step is virtual adversarial training's (Miyato et al., TPAMI 2018, arXiv:1704.03976): one power iteration on the
    divergence, all heads together. While it is sought and taken, normalisation uses the batch without moving running
    statistics, and dropout is off. Random directions are torch's, which the trainer seeds: a run repeats and resumes
    exactly. They are drawn for the whole batch, of which a process takes its rows, and so are the same for any number
    of processes; on another kind of device they are others.

    Args:
        model: what is attacked.
        radius: root mean square of the step, in standard deviations of each channel of images (or of each feature), so
            that it means the same for any size and range; 0.2 is a small part of what tells two images apart.
        probe: the same of the random step that the divergence is measured at (the paper's xi).
    """

    def __init__(self, model: Model, radius: float = 0.2, probe: float = 0.5):
        super().__init__()
        self.model, self.radius, self.probe = model, radius, probe

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """V tensors (B, C, H, W) or (B, D) -> H tensors (V + 1, B, K); (V, B, K) in eval mode."""
        logits = self.model(views)
        if not self.training:
            return logits
        with _undisturbed(self.model):
            moved = self.model([views[0] + self.step(views[0], [z[0].detach() for z in logits])])
        return [torch.cat(both) for both in zip(logits, moved, strict=True)]

    def step(self, images: Tensor, logits: Sequence[Tensor]) -> Tensor:
        """(B, ...) images, their (B, K) logits under each head -> what to add to them; 0 where nothing matters."""
        unit = deviation(images)
        first, total = dist.place(len(images), images.device)
        drawn = torch.randn(total, *images.shape[1:], dtype=images.dtype, device=images.device)
        with torch.enable_grad():
            direction = _per_image(drawn[first : first + len(images)]).requires_grad_()
            moved = self.model([images + self.probe * unit * direction])
            changes = [divergence(z, m[0]) for z, m in zip(logits, moved, strict=True)]
            (slope,) = torch.autograd.grad(torch.stack(changes).sum(), direction)
        return self.radius * unit * _per_image(slope)


def _per_image(x: Tensor) -> Tensor:
    """(B, ...) scaled so that each image has root mean square 1; zeros stay zero."""
    flat = x.float().flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # squares may underflow
    return (F.normalize(flat) * flat.shape[1] ** 0.5).view_as(x)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Within, a model in training mode still normalises by the batch but remembers nothing of it, and drops nothing."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    drops = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for norm in norms:
        norm.track_running_stats = False
    for drop in drops:
        drop.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for drop in drops:
            drop.training = True
