"""One process or many: every helper here is a no-op when torchrun did not start us."""

import os
import platform
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=1)  # others wait while rank 0 decodes or writes; a rank that dies is torchrun's to notice
MEETING = timedelta(minutes=10)  # a rank that never comes is not waited for longer


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
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, **_meeting_point())
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return chosen


def _meeting_point() -> dict:
    """Where the ranks find each other, as arguments of ``init_process_group``; {} leaves it to torch.

    torchrun's own store outlives a rank that dies and keeps the addresses of the processes before a restart.
    Newer torch reads them as if they were of now ("connection refused"), so each attempt gets keys of its own.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world, is_master=False, timeout=MEETING)
    return {"store": dist.PrefixStore(f"deepcluster/{attempt}", store), "rank": rank, "world_size": world}


def launch() -> str | None:
    """What tells this launch of torchrun from others, on rank 0 also after a restart; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return name if name != "none" else f"{platform.node()} {os.getppid()}"  # the process that started this one


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


def all_stack(x: Tensor) -> Tensor:
    """(world, ...) the ``x`` of every rank, in rank order; of the same shape on all. No gradient."""
    if not dist.is_initialized():
        return x[None]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def all_cat(x: Tensor) -> Tensor:
    """Concatenate the shards (n_rank, ...) of every rank, in rank order; they may differ in length. No gradient."""
    if not dist.is_initialized():
        return x
    lengths = all_stack(torch.tensor(len(x), device=x.device)).tolist()
    parts = all_stack(torch.cat([x, x.new_zeros(max(lengths) - len(x), *x.shape[1:])]))
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


def place(n: int, device: torch.device) -> tuple[int, int]:
    """Where this rank's ``n`` rows begin among those of all ranks, in rank order, and how many these are."""
    if not dist.is_initialized():
        return 0, n
    lengths = all_stack(torch.tensor(n, device=device)).tolist()
    return sum(lengths[: rank()]), sum(lengths)


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


def step_seed(seed: int, step: int) -> int:
    """A 31-bit seed for one step of an epoch with this seed, which is none of the epochs' for 13 million of them."""
    return (seed + (step + 1) * 104_729) % (2**31 - 1)
