"""Arrays that may be larger than memory, and shards that are."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import tiny_store

from deepcluster import features, scratch
from deepcluster.backbones import make_backbone
from deepcluster.model import Model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_small_arrays_are_in_memory_and_touch_no_disk(cache):
    found = scratch.zeros((3, 4), np.float32)
    assert not mapped(found)
    assert not cache.exists()
    assert found.dtype == np.float32
    assert not found.any()


def test_large_arrays_are_mapped_from_a_file_without_a_name(cache, monkeypatch):
    monkeypatch.setattr(scratch, "SMALL", 100)
    found = scratch.zeros((30, 4), np.float32)
    assert mapped(found)
    assert found.shape == (30, 4)
    assert not found.any()
    found[7] = 3
    assert found.sum() == 12
    assert not list(cache.iterdir())


def test_without_room_on_the_disk_they_are_in_memory(cache, monkeypatch):
    monkeypatch.setattr(scratch, "SMALL", 100)
    cache.write_text("a file where the folder should be")
    found = scratch.zeros((30, 4), np.float32)
    assert not mapped(found)
    assert found.shape == (30, 4)


def test_features_are_the_same_wherever_they_are(cache, monkeypatch):
    store = tiny_store(40, size=16)
    model = Model(*make_backbone("convnet", store.shape), (3,), torch.nn.Linear)
    here = features.extract(model, store)
    monkeypatch.setattr(scratch, "SMALL", 100)
    assert torch.equal(features.extract(model, store), here)


N, SIDE, ROOM = 16_000, 90, 250  # images of 24 kB; MB that reading them may take, of 390 in the shard
READ = """
import os, sys, threading, time
from pathlib import Path
import torch
from deepcluster.sources import open_source
from deepcluster.store import open_store
import pyarrow.parquet

def used():
    return sum(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines()
               if l.startswith(("RssAnon", "RssShmem"))) / 1000

most, before = [0.0], used()
def look():
    while True:
        most[0] = max(most[0], used() - before)
        time.sleep(0.005)
threading.Thread(target=look, daemon=True).start()
store = open_store(open_source(sys.argv[1]), size=16, channels=3, workers=2, budget=0)
print(len(store), store.place, most[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process holds")
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_shard_streams_into_the_store_in_less_memory_than_it_has_bytes(cache, tmp_path, kind):
    rng = np.random.default_rng(0)
    images = []
    for _ in range(N):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(file, "bmp")
        images.append(file.getvalue())
    shard = tmp_path / f"images.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": images}), shard, compression="none")  # one row group
    else:
        with tarfile.open(shard, "w") as tar:
            for i, data in enumerate(images):
                member = tarfile.TarInfo(f"{i:05d}.bmp")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert shard.stat().st_size > 1.25e6 * ROOM
    run = subprocess.run([sys.executable, "-c", READ, str(shard)], env=dict(os.environ), capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    n, place, most = run.stdout.split()
    assert (int(n), place) == (N, "mmap")
    assert float(most) < ROOM
