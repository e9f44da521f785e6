"""Images a part at a time: the same as a store of all, nothing kept, nothing read too far ahead."""

import threading
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from deepcluster import decode
from deepcluster.sources import open_source
from deepcluster.store import open_store, stream

N = 75


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"in/{i:03d}.png")
    return tmp_path


def together(parts):
    parts = list(parts)
    images = torch.cat([part.take(torch.arange(len(part))) for part in parts])
    columns = [[one for part in parts for one in getattr(part, name)] for name in ("names", "sha1", "skipped")]
    return images, *columns, [len(part) for part in parts]


@pytest.mark.parametrize("cached", [False, True])
def test_the_parts_are_the_whole(folder, cached):
    (folder / "in/003.png").write_bytes(b"no image")
    (folder / "in/040.png").unlink()
    (folder / "in/040.png").symlink_to("nowhere")
    source = open_source(str(folder / "in"))
    if cached:
        whole = open_store(source, size=8, channels=3)
    images, names, sha1, skipped, sizes = together(stream(source, size=8, channels=3, rows=32))
    if not cached:
        assert not (folder / "cache").exists(), "streaming wrote something"
        whole = open_store(source, size=8, channels=3)
    assert torch.equal(images, whole.take(torch.arange(len(whole))))
    assert (names, sha1) == (whole.names, whole.sha1)
    assert sorted(skipped) == sorted(whole.skipped)
    assert sum(sizes) == N - 2
    assert max(sizes) <= 32
    assert len(sizes) == 3


def test_a_part_of_bad_images_is_empty(folder):
    for i in range(16, 32):
        (folder / f"in/{i:03d}.png").write_bytes(b"no image")
    parts = list(stream(open_source(str(folder / "in")), size=8, channels=3, rows=16))
    assert [len(part) for part in parts] == [16, 0, 16, 16, 11]
    assert [len(part.skipped) for part in parts] == [0, 16, 0, 0, 0]


def test_only_bad_images_are_an_error(folder):
    for i in range(N):
        (folder / f"in/{i:03d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 75 can be used"):
        list(stream(open_source(str(folder / "in")), size=8, channels=3, rows=16))


def test_features_in_parts(folder):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[7] = np.nan
    images, names, _, skipped, sizes = together(stream(open_source(x), size=0, channels=3, rows=20))
    assert np.array_equal(images, np.delete(x, 7, 0))
    assert len(names) == 49
    assert [name for name, _ in skipped] == ["array/000007"]
    assert sizes == [20, 20, 9]


def test_no_more_is_decoded_than_a_part_ahead(folder, monkeypatch):
    done, lock, real = [0], threading.Lock(), decode.decode

    def counted(*args):
        with lock:
            done[0] += 1
        return real(*args)

    monkeypatch.setattr(decode, "decode", counted)
    source = open_source(np.zeros((2000, 8, 8), np.uint8))
    parts = stream(source, size=8, channels=1, rows=64, workers=2)
    for n in range(1, 6):
        next(parts)
        assert done[0] <= n * 64 + 64 + 3 * 16
    parts.close()
    assert threading.active_count() < 10


def test_progress_sees_every_image(folder):
    seen = []

    def progress(it, total, desc):
        for i in it:
            seen.append(i)
            yield i
        seen.append("closed")

    list(stream(open_source(str(folder / "in")), size=8, channels=3, rows=32, progress=progress))
    assert seen == [*range(N), "closed"]


def test_memory_is_that_of_a_part():
    """Ten times the images need little more room: names and digests."""
    peaks = []
    for n in (1_000, 8_000):
        source = open_source(np.broadcast_to(np.zeros((1, 8, 8), np.uint8), (n, 8, 8)))
        tracemalloc.start()
        for part in stream(source, size=32, channels=1, rows=512, workers=1):
            assert len(part) <= 512
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 7_000 * 32 * 32 // 8, f"{peaks} bytes: it grows with the number of images"
