"""Decoded once, kept where there is room, and never half."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepcluster import decode, store
from deepcluster.sources import open_source
from deepcluster.store import Probe, open_store, probe
from deepcluster.store import cache as cache_module


def picture(value, size=(8, 8), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02d}.png").write_bytes(picture(i))
    return root


@pytest.fixture
def calls(monkeypatch):
    """Every image that is decoded."""
    seen = []
    original = decode.decode

    def counted(data, size, channels):
        seen.append(size)
        return original(data, size, channels)

    monkeypatch.setattr(decode, "decode", counted)
    return seen


def opened(source, **options):
    source = source if isinstance(source, store.Source) else open_source(source)
    return open_store(source, **{"size": 4, "channels": 3, "workers": 2} | options)


def reds(kept):
    return kept.take(torch.arange(len(kept)))[:, 0, 0, 0].tolist()


def cache():
    return Path(os.environ["DEEPCLUSTER_CACHE"])


def entries():
    return sorted(path.name.split(".", 1)[-1] if "." in path.name else "key" for path in cache().iterdir())


# --- what is in it ---


def test_images_names_and_digests_stay_together(folder):
    kept = opened(folder)
    assert len(kept) == 40
    assert kept.shape == (3, 4, 4)
    assert kept.data.dtype == torch.uint8
    assert reds(kept) == list(range(40))
    assert kept.names == [f"{folder}/{i:02d}.png" for i in range(40)]
    assert kept.sha1 == [hashlib.sha1(Path(name).read_bytes()).hexdigest() for name in kept.names]
    assert kept.place == "memory"
    assert kept.skipped == []


def test_take_follows_the_ids(folder):
    batch = opened(folder).take(torch.tensor([7, 3, 7]))
    assert batch.shape == (3, 3, 4, 4)
    assert batch.dtype == torch.uint8
    assert batch[:, 0, 0, 0].tolist() == [7, 3, 7]
    with pytest.raises(IndexError):
        opened(folder).take(torch.tensor([40]))


def test_a_batch_is_a_copy(folder):
    for budget in (None, 0):
        kept = opened(folder, budget=budget)
        kept.take(torch.tensor([3])).fill_(99)
        assert reds(kept) == list(range(40))


def test_bad_images_are_left_out_and_listed(folder):
    (folder / "05.png").write_bytes(b"")
    (folder / "06.png").write_text("text")
    (folder / "39.png").write_bytes(picture(39)[:52])
    (folder / "zz.png").symlink_to("nowhere")
    for _ in range(2):  # decoded, then from the cache
        kept = opened(folder)
        assert kept.rows.tolist() == [i for i in range(39) if i not in (5, 6)]
        assert reds(kept) == kept.rows.tolist()
        assert [Path(name).name for name in kept.names] == [f"{i:02d}.png" for i in kept.rows]
        assert kept.sha1[5] == hashlib.sha1(picture(7)).hexdigest()
        assert [(Path(name).name, reason) for name, reason in kept.skipped] == [
            ("zz.png", "no such file"),
            ("05.png", "empty file"),
            ("06.png", "not an image"),
            ("39.png", "truncated"),
        ]
        assert len(kept.data) == 40


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(3):
        (tmp_path / "x" / f"{i}.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"none of 3 can be used; for example .*0\.jpg: not an image"):
        opened(tmp_path / "x")
    assert entries() == ["lock"]


def test_a_reader_that_fails_costs_one_image(folder):
    source = open_source(folder)

    def read(i):
        if i == 3:
            raise RuntimeError("broken\nshard")
        return source.read(i)

    kept = opened(store.Source("x", source.names, read, "s", [], None))
    assert kept.skipped == [(source.names[3], "cannot read: broken shard")]


def test_arrays_and_digits():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4), np.uint8)
    kept = opened(images, channels=1)
    assert np.array_equal(kept.data.numpy()[:, 0], images)
    assert kept.sha1[3] == hashlib.sha1(images[3].tobytes()).hexdigest()
    assert opened("digits", size=8, channels=1).take(torch.tensor([0])).max() == 239


def test_features(calls):
    table = np.random.default_rng(0).normal(size=(9, 5))
    table[2, 1], table[4, 0] = np.nan, np.inf
    kept = opened(table)
    assert kept.rows.tolist() == [0, 1, 3, 5, 6, 7, 8]
    assert torch.equal(kept.take(torch.tensor([2, 0])), torch.tensor(table[[3, 0]], dtype=torch.float32))
    assert kept.shape == (5,)
    assert [name for name, _ in kept.skipped] == ["array/000002", "array/000004"]
    assert kept.sha1[2] == hashlib.sha1(table[3].astype(np.float32).tobytes()).hexdigest()
    assert calls == []


def test_features_of_a_read_only_file(tmp_path):
    np.save(tmp_path / "f.npy", np.eye(4, dtype=np.float32))
    assert torch.equal(opened(tmp_path / "f.npy").take(torch.arange(4)), torch.eye(4))


def test_odd_names_come_back(tmp_path):
    root = tmp_path / "odd"
    root.mkdir()
    for name in (b"new\nline.png", b"quo'te\".png", b"\xff\xfe.png"):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(picture(1))
    for _ in range(2):
        assert opened(root).names == [f"{root}/{n}" for n in ("new\nline.png", "quo'te\".png", "\\xff\\xfe.png")]


def test_no_true_class_comes_near(folder):
    text = Path(store.__file__).read_text() + Path(cache_module.__file__).read_text()
    assert not re.search(r"label|\.classes|\by_true", text)
    assert "classes" not in store.Store.__dataclass_fields__


# --- where it is ---


def test_maps_what_memory_has_no_room_for(folder):
    inside, mapped = opened(folder), opened(folder, budget=100)
    assert (inside.place, mapped.place) == ("memory", "mmap")
    assert torch.equal(inside.data, mapped.data)
    assert torch.equal(inside.take(torch.arange(40)), mapped.take(torch.arange(40)))


def test_writing_to_a_map_does_not_reach_the_cache(folder):
    opened(folder, budget=0).data.fill_(9)
    assert reds(opened(folder)) == list(range(40))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_maps_more_than_the_machine_has_memory(tmp_path):
    shape = (1 << 30, 3, 64, 64)
    with (tmp_path / "big.npy").open("wb") as file:  # sparse
        file.write(cache_module.header(shape))
        file.truncate(len(cache_module.header(shape)) + int(np.prod(shape)))
    assert torch.from_numpy(cache_module.mapped(tmp_path / "big.npy", shape))[-1].sum() == 0


def test_place_prefers_the_gpu_then_memory_then_disk(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert store._place(400, gpu, 0) == "device"
    assert store._place(401, gpu, 401) == "memory"
    assert store._place(401, gpu, 400) == "mmap"
    assert store._place(10, cpu, 10) == "memory"
    assert store._place(11, cpu, 10) == "mmap"


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 0])
def test_on_the_gpu(folder, budget, monkeypatch):
    gpu = torch.device("cuda")
    kept = opened(folder, device=gpu)
    assert kept.place == "device"
    assert kept.take(torch.tensor([7, 3])).device.type == "cuda"
    assert reds(kept) == list(range(40))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    kept = opened(folder, device=gpu, budget=budget)
    assert kept.place == ("memory" if budget is None else "mmap")
    assert kept.take(torch.tensor([7, 3])).device.type == "cuda"
    assert reds(kept) == list(range(40))


# --- the cache ---


def test_second_opening_decodes_nothing(folder, calls):
    first = opened(folder)
    assert len(calls) == 40
    second = opened(folder)
    assert len(calls) == 40
    assert torch.equal(first.data, second.data)
    assert (first.names, first.sha1) == (second.names, second.sha1)
    assert entries() == ["key", "lock"]


def test_size_channels_content_and_version_each_have_their_own(folder, calls, monkeypatch):
    opened(folder)
    opened(folder, size=5)
    opened(folder, channels=1)
    monkeypatch.setattr(decode, "VERSION", decode.VERSION + 1)
    opened(folder)
    assert len(calls) == 160
    assert entries().count("key") == 4


def test_changed_file_is_decoded_again(folder, calls):
    opened(folder)
    (folder / "03.png").write_bytes(picture(200))
    assert reds(opened(folder))[3] == 200
    assert len(calls) == 80


@pytest.mark.parametrize(
    "damage",
    [
        lambda key: os.truncate(key / "images.npy", 200),
        lambda key: os.truncate(key / "images.npy", (key / "images.npy").stat().st_size + 1),
        lambda key: (key / "index.json").write_text('{"bad": ['),
        lambda key: (key / "index.json").write_text("[]"),
        lambda key: (key / "index.json").unlink(),
        lambda key: (key / "sha1.npy").write_bytes(b"\x93NUMPY"),
        lambda key: (key / "sha1.npy").write_bytes(b""),
        lambda key: np.save(key / "images.npy", np.zeros((40, 4, 4, 3), np.uint8)),
        shutil.rmtree,
    ],
)
def test_damaged_cache_is_made_again(folder, calls, damage):
    opened(folder)
    (key,) = [path for path in cache().iterdir() if path.is_dir()]
    damage(key)
    assert reds(opened(folder)) == list(range(40))
    assert len(calls) == 80
    assert entries() == ["key", "lock"]


def test_leftovers_of_a_killed_builder_are_removed(folder):
    key = cache_module.key(open_source(folder), (40, 3, 4, 4))
    (cache() / f"{key}.tmp123").mkdir(parents=True)
    (cache() / f"{key}.tmp123" / "images.npy").write_bytes(b"half")
    (cache() / "other.tmp5").mkdir()
    opened(folder)
    assert entries() == ["key", "lock", "tmp5"]


def test_interrupted_building_leaves_nothing_and_stops_soon(folder, calls):
    def stop(images, **_):
        for i, image in enumerate(images):
            if i == 2:
                raise KeyboardInterrupt
            yield image

    with pytest.raises(KeyboardInterrupt):
        opened(np.zeros((4000, 4, 4), np.uint8), progress=stop)
    assert entries() == ["lock"]
    assert len(calls) < 400  # a bounded queue, dropped at once


def test_decoding_runs_no_further_ahead_than_a_few_hundred_images(calls):
    def wait(images, **_):
        for i, image in enumerate(images):
            if i == 0:
                time.sleep(0.1)  # enough to decode them all
                assert len(calls) <= 5 * cache_module.RUN
            yield image

    opened(np.zeros((800, 4, 4), np.uint8), progress=wait)
    assert len(calls) == 800


def build(path, started, counts):
    """In another process: open a store, report how many images were decoded."""
    original, seen = decode.decode, []
    decode.decode = lambda *args: seen.append(1) or original(*args)
    started.wait()
    kept = opened(path)
    counts.put((len(seen), reds(kept)))


@pytest.mark.skipif(cache_module.fcntl is None, reason="needs flock")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_decode_once(folder):
    context = multiprocessing.get_context("fork")
    started, counts = context.Barrier(2), context.Queue()
    processes = [context.Process(target=build, args=(folder, started, counts)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [counts.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(n for n, _ in found) == [0, 40]
    assert all(values == list(range(40)) for _, values in found)


def test_two_threads_decode_once(folder, calls):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: reds(opened(folder)), range(2)))
    assert found == [list(range(40))] * 2
    assert len(calls) == 40


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["posix_fallocate", "fsync", "write", "free"])
def test_full_disk_is_one_clear_error_and_leaves_nothing(folder, monkeypatch, where):
    if where == "free":
        usage = shutil.disk_usage("/")._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    elif where == "write":
        monkeypatch.setattr(cache_module.Work, "run", full)
    else:
        monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match=r"MB are needed for decoded images in .* set DEEPCLUSTER_CACHE") as error:
        opened(folder)
    assert error.value.errno == errno.ENOSPC
    assert entries() == ["lock"]
    monkeypatch.undo()


def test_disks_without_preallocation_work(folder, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert reds(opened(folder)) == list(range(40))


def test_unwritable_cache_means_memory_or_an_error(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "file" / "cache"))
    (folder / "05.png").write_bytes(b"")
    kept = opened(folder)
    assert kept.place == "memory"
    assert reds(kept) == [i for i in range(40) if i != 5]
    assert kept.skipped == [(f"{folder}/05.png", "empty file")]
    with pytest.raises(ValueError, match=r"cannot write the cache .* do not fit in .*set DEEPCLUSTER_CACHE"):
        opened(folder, budget=100)


def test_a_finished_store_opens_from_a_cache_that_cannot_be_written(folder, calls, monkeypatch):
    opened(folder)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    opened(folder)
    assert len(calls) == 40


def test_progress_sees_every_image(folder):
    seen = []

    def progress(images, total, desc):
        seen.append((total, desc))
        for image in images:
            seen.append(image)
            yield image

    opened(folder, progress=progress)
    assert seen == [(40, "decoding"), *range(40)]


def test_index_is_plain_json(folder):
    opened(folder)
    (path,) = cache().glob("*/index.json")
    assert json.loads(path.read_text())["shape"] == [40, 3, 4, 4]


# --- several ranks ---


def test_only_the_main_rank_builds_while_the_others_wait(folder, monkeypatch, calls):
    order = []
    monkeypatch.setattr(store.dist, "is_main", lambda: False)

    def barrier():
        order.append(len(calls))
        monkeypatch.setattr(store.dist, "is_main", lambda: True)
        monkeypatch.setattr(store.dist, "barrier", lambda: None)
        opened(folder)  # what the main rank does meanwhile

    monkeypatch.setattr(store.dist, "barrier", barrier)
    assert reds(opened(folder)) == list(range(40))
    assert order == [0]
    assert len(calls) == 40


def test_a_failing_main_rank_still_meets_the_others(folder, monkeypatch):
    met = []
    monkeypatch.setattr(store.dist, "barrier", lambda: met.append(1))
    monkeypatch.setattr(cache_module.Work, "run", full)
    with pytest.raises(OSError, match="are needed"):
        opened(folder)
    assert met == [1]


# --- probe ---


def test_probe_is_the_median_of_what_can_be_read(tmp_path):
    for i, size in enumerate([(10, 20), (30, 40), (500, 600)]):
        (tmp_path / f"{i}.png").write_bytes(picture(0, size, "L"))
    (tmp_path / "bad.png").write_text("text")
    assert probe(open_source(tmp_path)) == Probe(height=40, width=30, channels=1)
    (tmp_path / "c.png").write_bytes(picture(0, (30, 40)))
    assert probe(open_source(tmp_path)) == Probe(40, 30, 3)


def test_probe_looks_all_over_and_at_no_more_than_it_may():
    seen = []
    source = store.Source("x", ["n"] * 10_000, lambda i: seen.append(i) or np.zeros((4, 6), np.uint8), "s", [], None)
    assert probe(source) == Probe(4, 6, 1)
    assert len(seen) == 256
    assert seen[0] < 500
    assert seen[-1] > 9500
    assert seen == sorted(seen)


def test_probe_of_nothing(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"no image can be read; for example .*a\.png: not an image"):
        probe(open_source(tmp_path))
    with pytest.raises(ValueError, match=r"holds features \(3, 3\)"):
        probe(open_source(np.eye(3)))


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_all_pixels(channels):
    images = np.random.default_rng(0).integers(0, 256, (150, channels, 9, 7), dtype=np.uint8)
    images[:, -1] //= 3
    store = open_store(open_source(images), size=8, channels=channels)
    seen = store.take(torch.arange(150)).double() / 255
    mean, std = store.statistics
    assert torch.allclose(mean, seen.mean((0, 2, 3)).float(), atol=1e-7)
    assert torch.allclose(std, seen.std((0, 2, 3), correction=0).float(), atol=1e-7)


def test_what_is_the_same_everywhere_has_nothing_to_scale():
    images = np.full((70, 3, 8, 8), 77, np.uint8)
    images[:, 1, 0] = 9
    _, std = open_store(open_source(images), size=8, channels=3).statistics
    assert std[0] == std[2] == 1
    assert 0 < std[1] < 1
