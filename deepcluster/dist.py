"""One process or many: every helper here is a no-op when torchrun did not start us."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def setup(device: str = "auto") -> torch.device:
    """Join the torchrun group if there is one and return this rank's device.

    Args:
        device: "auto" (CUDA if there is one, else the CPU), or a torch device string; "mps" is accepted, untested.

    Raises:
        ValueError: the device named is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    kind = device.split(":")[0]
    present = {"cpu": True, "cuda": cuda, "mps": mps}
    if not present.get(kind):
        there = ", ".join(kind for kind, here in present.items() if here)
        raise ValueError(f"device {device!r} is not available; choose from {there} or auto")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is no device; choose {kind}, {kind}:NUMBER or auto") from None
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return chosen


def rank() -> int:
    """This process among all, 0 if alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def shard(n: int) -> tuple[int, int]:
    """[start, stop) of this rank's contiguous part of n rows; parts differ by at most one row."""
    return n * rank() // world(), n * (rank() + 1) // world()


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def all_sum(x: Tensor) -> Tensor:
    """Sum ``x`` over ranks, with gradients.

    The gradient each rank gets is ``world()`` times its share of the global one, which
    is what DistributedDataParallel expects: it averages over ranks afterwards.
    """
    return _AllSum.apply(x) if dist.is_initialized() else x


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum of ``x`` over ranks; no gradient."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def all_cat(x: Tensor) -> Tensor:
    """Concatenate the shards (n_rank, ...) of every rank, in rank order; they may differ in length."""
    if not dist.is_initialized():
        return x
    lengths: list[int | None] = [None] * world()
    dist.all_gather_object(lengths, len(x))
    longest = max(n or 0 for n in lengths)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


def from_main(x: Tensor) -> Tensor:
    """Rank 0's value of ``x`` on every rank, in place."""
    if dist.is_initialized():
        dist.broadcast(x, src=0)
    return x


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def epoch_seed(seed: int, epoch: int) -> int:
    """A 31-bit seed for one epoch of one run; the same on every rank (faiss wants an int32)."""
    return (seed * 1_000_003 + epoch * 7_919) % (2**31 - 1)
