"""What the tests of the core share: a store of noise, and a network that trains in milliseconds."""

import hashlib
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import deepcluster.methods  # noqa: F401
from deepcluster import dist, ending
from deepcluster.classifier import Classifier, Spec
from deepcluster.model import Model
from deepcluster.recipe import Recipe
from deepcluster.store import Store

T = TypeVar("T")


def noise(n: int, channels: int, size: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=rng, dtype=torch.uint8)


def store_of(data: Tensor) -> Store:
    """A store that holds these images, as if they had just been decoded."""
    names = [f"{i:04d}.png" for i in range(len(data))]
    sha1 = [hashlib.sha1(row.tobytes()).hexdigest() for row in data.numpy()]
    return Store(data, np.arange(len(data)), names, sha1, [], torch.device("cpu"), "memory")


def tiny_store(n: int = 96, channels: int = 1, size: int = 8, seed: int = 0) -> Store:
    return store_of(noise(n, channels, size, seed))


def make_model(recipe: Recipe, seed: int = 0, channels: int = 1) -> Model:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return Model(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 32, recipe.heads, recipe.head)


def classified(model: Model, spec: Spec, store: Store) -> tuple[Classifier, dict[str, np.ndarray]]:
    """What is left of a trained model, and what it says of a store's images."""
    classifier, _, features = ending.finish(model, 0, spec, store)
    return classifier, classifier.describe(features)


def onnx_with_weights_elsewhere() -> bytes:
    """A network of (B, 3, 8, 8) images whose weight is said to lie in a file of the system."""
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="/etc/hostname")
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [image], [out], [weight])
    return helper.make_model(graph).SerializeToString()


def ranks(n: int, work: Callable[[int, int, Path], None], folder: Path) -> list[dict]:
    """What ``n`` processes write to folder/RANK.pt in ``work(rank, port, folder)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=n)
    return [torch.load(folder / f"{rank}.pt") for rank in range(n)]


def two_ranks(work: Callable[[int, int, Path], None], folder: Path) -> list[dict]:
    """What two processes write."""
    return ranks(2, work, folder)


def join(rank: int, port: int, world: int = 2) -> None:
    """Make this process one of ``world``, on one thread, as torchrun would; ``leave`` ends it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.setup("cpu")


def leave() -> None:
    """After ``join``: when all have done their part."""
    dist.barrier()
    torch.distributed.destroy_process_group()


class Threads:
    """What ``deepcluster.dist`` uses of torch.distributed, for threads: the arithmetic of ranks without processes."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, n: int):
        self.own, self.barrier, self.held = threading.local(), threading.Barrier(n, timeout=60), [torch.empty(0)] * n

    def is_initialized(self) -> bool:
        return hasattr(self.own, "rank")

    def get_rank(self) -> int:
        return self.own.rank

    def get_world_size(self) -> int:
        return len(self.held)

    def all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        self.held[self.own.rank] = x.detach().clone()
        self.barrier.wait()
        for part, other in zip(parts, self.held, strict=True):
            part.copy_(other)
        self.barrier.wait()

    def all_reduce(self, x: Tensor, op: object = torch.distributed.ReduceOp.SUM) -> None:
        parts = [torch.empty_like(x) for _ in self.held]
        self.all_gather(parts, x)
        x.detach().copy_(torch.stack(parts).amax(0) if op == self.ReduceOp.MAX else sum(parts))


def in_threads(n: int, work: Callable[[], T], monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """What ``work()`` returns on each of ``n`` ranks that are threads. torch's generator is common to all of them."""
    group = Threads(n)

    def one(rank: int) -> T:
        group.own.rank = rank
        try:
            return work()
        except BaseException:
            group.barrier.abort()  # or the others would wait
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(n) as pool:
        patch.setattr(dist, "dist", group)
        return list(pool.map(one, range(n)))
