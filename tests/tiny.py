"""What the tests of the core share: a store of noise, and a network that trains in milliseconds."""

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import deepcluster.methods  # noqa: F401
from deepcluster.model import Model
from deepcluster.recipe import Recipe
from deepcluster.store import Store


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


def two_ranks(work: Callable[[int, int, Path], None], folder: Path) -> list[dict]:
    """What two processes write to folder/RANK.pt in ``work(rank, port, folder)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
