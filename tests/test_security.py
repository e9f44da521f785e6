"""Attacks by what is clustered: arrays, archives, lists, patterns, and the cache made of them.

By images: test_security_images.py; by a run: test_security_runs.py; by a model, weights or labels:
test_security_models.py; by names in what is written: test_security_text.py. Tested elsewhere: EPS, pipes and 4 GB files
(test_decode.py), pickles in .npy and .npz, links in circles (test_sources.py). What is promised: docs/security.md.
"""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attack import Bait, limits, png, refused

from deepcluster import doctor
from deepcluster.sources import open_source
from deepcluster.store import open_store, probe

CPU = torch.device("cpu")

# --- arrays ---


def npy_header(shape, kind="<f8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("shape", [(3_000_000, 8, 8), (10**9, 8, 8), (2**62, 2**62, 8), (10**30, 4)])
def test_arrays_are_no_larger_than_their_file(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(npy_header(shape) + bytes(99))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images.npy", npy_header(shape) + bytes(99))
    for name, said in (("a.npy", ""), ("a.npz", "images is truncated")):
        with refused(f"is no readable .*{said}", megabytes=64):
            open_source(tmp_path / name)


def test_a_zip_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((256, 512, 512), np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    assert len(open_source(tmp_path / "bomb.npz").names) == 256
    monkeypatch.setattr(doctor, "free_memory", lambda: 60 << 20)  # of a smaller machine
    with refused("images takes 67 MB, 63 MB are free", megabytes=32):
        open_source(tmp_path / "bomb.npz")


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images", b"text")
    with refused("is no readable .npz"):
        open_source(tmp_path / "a.npz")


# --- tars ---


def tar(path, *members, form=tarfile.GNU_FORMAT):
    """(name, kind, content or where a link leads)."""
    with tarfile.open(path, "w", format=form) as file:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                file.addfile(member)


def test_members_of_a_tar_never_leave_it(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "secret.png").write_bytes(png(9))
    tar("a.tar", ("../escaped.png", tarfile.REGTYPE, png(1)), (f"{tmp_path}/absolute.png", tarfile.REGTYPE, png(2)),
        ("x/../../up.png", tarfile.REGTYPE, png(3)), ("link.png", tarfile.SYMTYPE, "../secret.png"),
        ("hard.png", tarfile.LNKTYPE, "../secret.png"), ("null.png", tarfile.CHRTYPE, ""),
        ("pipe.png", tarfile.FIFOTYPE, ""))  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    source = open_source("a.tar")
    assert [source.read(i) for i in range(len(source.names))] == [png(1), png(2), png(3)]
    open_store(source, size=8, channels=3)
    assert sorted(tmp_path.rglob("*")) == before
    with tarfile.open("a.tar") as file:  # the bait is real
        Path("deep").mkdir()
        file.extractall("deep", members=[file.getmembers()[0]], **trusted())
    assert Path("escaped.png").exists()


def trusted():
    return {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}


def raw(size, kind=b"0", name=b"a.png"):
    """A header with any size, also a negative one."""
    member = tarfile.TarInfo("a.png")
    head = bytearray(member.tobuf())
    head[:100] = name.ljust(100, b"\0")
    head[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    head[156:157] = kind
    head[148:156] = b"%06o\0 " % sum(head[:148] + b" " * 8 + head[156:])
    return bytes(head)


GOOD = raw(len(png(1)), name=b"good.png") + png(1).ljust(-(-len(png(1)) // 512) * 512, b"\0")
TARS = {
    "a long name of 2 ** 60 bytes": raw(2**60, b"L"),
    "words of 2 ** 40 bytes": raw(2**40, b"x"),
    "a negative size": raw(-512),
    "a size that leads back": raw(-1024, name=b"b.txt"),
    "headers of headers": raw(0, b"x") * 5000,
    "sparse without end": raw(0, b"S"),
    "words that are none": raw(512, b"x") + b"9" * 512,
}


@pytest.mark.parametrize("name", TARS)
def test_headers_that_lie(tmp_path, name):
    (tmp_path / "bad.tar").write_bytes(TARS[name] + bytes(1024))
    (tmp_path / "good.tar").write_bytes(GOOD + TARS[name] + bytes(1024))
    with refused("bad.tar: no|no readable tar|no images", megabytes=256):
        open_source(tmp_path / "bad.tar")
    with limits(megabytes=256):
        source = open_source(tmp_path / "good.tar")
    assert [source.read(i) for i in range(len(source.names))] == [png(1)]


def test_a_name_of_a_megabyte(tmp_path):
    name = "a/" * 500_000 + "a.png"
    tar(tmp_path / "a.tar", (name, tarfile.REGTYPE, png(1)), ("b.png", tarfile.REGTYPE, png(2)))
    source = open_source(tmp_path / "a.tar")
    assert [Path(one).name for one in source.names] == ["b.png"]
    assert [reason for _, reason in source.skipped] == ["name too long"]


# --- Parquet ---


def test_a_parquet_of_more_rows_than_bytes(tmp_path):
    nothing = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4_000_000, np.int32)), pa.array([b"x"], pa.binary()))
    pq.write_table(pa.table({"image": nothing}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    with refused("4000000 rows in", megabytes=100):
        open_source(tmp_path / "a.parquet")


@pytest.mark.parametrize("words", ["[" * 200_000, '{"info": {"features": {"label": {"names": 5}}}}'])
def test_words_of_a_parquet_that_are_no_names(tmp_path, words):
    table = pa.table({"image": [png(1), png(2)], "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": words}), tmp_path / "a.parquet")
    with limits():
        assert open_source(tmp_path / "a.parquet").classes == ["0", "1"]


def test_rows_of_a_parquet_read_images_and_nothing_else(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "secret").write_text("root:x:0:0:root:/root:/bin/bash")
    (tmp_path / "good.png").write_bytes(png(1))
    rows = ["pipe.png", "secret", "/dev/zero", "/dev/tty", "good.png", "../" * 40 + "etc/passwd", "a\0b", "~x/y"]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    with limits():
        source = open_source(tmp_path / "a.parquet")
        assert probe(source).height == 7
        store = open_store(source, size=8, channels=3)
    assert [Path(name).name for name in store.names] == ["a.parquet#4"]
    reasons = dict(store.skipped)
    assert reasons[f"{tmp_path}/a.parquet#1"] == "not an image"
    assert reasons[f"{tmp_path}/a.parquet#0"] == "not a regular file"


# --- lists and patterns ---


def test_lists_with_names_that_cannot_be(tmp_path):
    (tmp_path / "good.png").write_bytes(png(1))
    lines = [b"nul\0.png", b"/dev/zero", b"~nobody/a.png", b"x" * 5000, b"../" * 2000, b"good.png"]
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    (tmp_path / "a.csv").write_bytes(b"path\n" + b"\n".join(lines))
    for name in ("a.txt", "a.csv"):
        source = open_source(tmp_path / name)
        assert [Path(one).name for one in source.names] == ["good.png"]
        assert [reason for _, reason in source.skipped][:2] == ["no such file", "not a regular file"]


@pytest.mark.parametrize(
    "pattern", ["a-{0..99999999999}.tar", "a-{1..999}{1..999}{1..999}.tar", "{1..%s}" % ("9" * 99)]
)
def test_patterns_that_stand_for_too_much(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("stands for"):
        open_source(pattern)


# --- the cache ---


def nested(folder, source):
    (folder / "index.json").write_text("[" * 200_000)


def outside(folder, source):
    words = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(words | {"bad": [[10**9, "x"]]}))


def no_pairs(folder, source):
    words = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(words | {"bad": [[0, {}]]}))


def pickled(folder, source):
    np.save(folder / "sha1.npy", np.array([Bait(source / "victim")], object), allow_pickle=True)


def absurd(folder, source):
    (folder / "sha1.npy").write_bytes(npy_header((10**12, 20), "|u1"))


@pytest.mark.parametrize("damage", [nested, outside, no_pairs, pickled, absurd])
def test_a_cache_of_others_is_made_anew(tmp_path, damage):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    source = open_source(str(tmp_path))
    good = open_store(source, size=8, channels=3)
    (folder,) = [path for path in doctor.cache_dir().iterdir() if path.is_dir()]
    damage(folder, tmp_path)
    with limits():
        again = open_store(source, size=8, channels=3)
    assert again.sha1 == good.sha1
    assert torch.equal(again.data, good.data)
    assert not (tmp_path / "victim").exists()
