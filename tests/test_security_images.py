"""Attacks by images, and by the data sets of torchvision. See test_security.py."""

import io
import os
import pickle
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from attack import Bait, limits, refused
from PIL import Image, PngImagePlugin
from test_decode import encoded

from deepcluster import decode
from deepcluster.sources import open_source
from deepcluster.store import open_store

CPU = torch.device("cpu")

# --- images ---


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side):
    """A whole, correct PNG of zeros, one bit a pixel."""
    deflate, rows = zlib.compressobj(9, wbits=-15), bytes(1 + -(-side // 8)) * 100
    block = deflate.compress(rows) + deflate.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    total = (len(rows) * (side // 100) % 65521 << 16) + 1
    pixels = b"\x78\xda" + block * (side // 100) + b"\x03\0" + struct.pack(">I", total)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_whole_png_of_fifty_thousand_pixels_a_side_takes_no_memory():
    bomb = png_bomb(50_000)
    assert len(bomb) < 400_000
    assert decode.decode(png_bomb(800), 8, 1).shape == (1, 8, 8)  # such a file is a correct one
    with pytest.raises(MemoryError), limits():  # the bait is real
        PngImagePlugin.PngImageFile(io.BytesIO(bomb)).load()
    for read in (decode.header, lambda data: decode.decode(data, 8, 3)):
        with refused("too large: 50000 x 50000 pixels", megabytes=16):
            read(bomb)


def gif(width, height, left, top):
    """A screen of one pixel with a frame as large as this."""
    frame = b"," + struct.pack("<HHHH", left, top, width, height) + b"\x80" + bytes(6)
    return b"GIF89a" + struct.pack("<HH", 1, 1) + b"\0\0\0" + frame + b"\x02\x02\x4c\x01\0;"


def tiff(width, height):
    tags = ((256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 200), (277, 3, 1),
            (278, 4, height), (279, 4, 20))  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(300)


def webp(width, height):
    body = (
        struct.pack("<4sIB3x", b"VP8X", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    frame = encoded(np.zeros((4, 4, 3), np.uint8), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(body + frame)) + b"WEBP" + body + frame


BOMBS = {
    "gif": gif(65535, 65535, 0, 0),
    "tiff": tiff(60_000, 60_000),
    "webp": webp(60_000, 60_000),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "jpeg": b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 65000, 65000) + b"\x03\1\x22\0\2\x11\1\3\x11\1\xff\xd9",
    "ppm": b"P6 60000 60000 255\n" + bytes(99),
}


@pytest.mark.parametrize("form", BOMBS)
def test_a_few_bytes_that_claim_billions_of_pixels(form):
    for read in (decode.header, lambda data: decode.decode(data, 8, 3)):
        with refused("too large|damaged", megabytes=64):
            read(BOMBS[form])


def test_one_large_image_is_decoded_at_a_time():
    side = 6_000
    image = Image.new("P", (side, side))
    image.info["transparency"] = bytes([0, 128])
    file = io.BytesIO()
    image.save(file, "png")
    assert side**2 > decode.LARGE
    found = []
    work = lambda: found.append(decode.decode(file.getvalue(), 8, 3))
    threads = [threading.Thread(target=work) for _ in range(2)]
    with limits(megabytes=750, seconds=60):  # one takes some 500
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2


def test_text_in_a_png_is_not_unpacked_without_end():
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(40 << 20)))
    data = encoded(np.zeros((4, 4, 3), np.uint8), "PNG")
    with refused("damaged: decompressed data too large", megabytes=16):
        decode.decode(data[:33] + text + data[33:], 4, 3)


@pytest.mark.parametrize("form", ["EPS", "ICO", "PCX", "TGA", "ICNS", "SGI", "DDS", "JPEG2000"])
def test_formats_of_others_are_no_images(form, tmp_path):
    data = encoded(np.full((64, 64, 3), 7, np.uint8), form)
    with Image.open(io.BytesIO(data)) as image:  # the bait is real
        assert image.format == form
    with refused("not an image"):
        decode.decode(data, 8, 3)


def program(folder, monkeypatch, victim):
    """A ghostscript that says that it was started."""
    (folder / "bin").mkdir()
    (folder / "bin/gs").write_text(f"#!/bin/sh\ntouch '{victim}'\n")
    (folder / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)


def test_data_sets_of_torchvision_start_no_program(tmp_path, monkeypatch):
    from torchvision.datasets import ImageFolder

    victim = tmp_path / "victim"
    program(tmp_path, monkeypatch, victim)
    (tmp_path / "data/cat").mkdir(parents=True)
    (tmp_path / "data/cat/a.jpg").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8), "EPS"))
    (tmp_path / "data/cat/b.jpg").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8), "JPEG"))
    store = open_store(open_source("torchvision:ImageFolder", data_root=str(tmp_path / "data")), size=8, channels=3)
    assert store.skipped == [("ImageFolder/000000", "not an image")]
    assert not victim.exists()
    with pytest.raises(OSError, match=r"."):  # the bait is real: it draws nothing
        ImageFolder(tmp_path / "data")[0]
    assert victim.exists()


# --- pickles of data sets ---


def test_pickles_of_torchvision_are_not_loaded(tmp_path):
    victim = tmp_path / "victim"
    bait = pickle.dumps(Bait(victim))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(bait)
    for kind in ("bedroom", "church_outdoor"):
        (tmp_path / f"{kind}_train_lmdb").mkdir()
    (tmp_path / "_cache_").write_bytes(bait)
    for name, said in (("CIFAR10", "not found in"), ("LSUN", "may run any code"), ("LSUNClass", "may run any code")):
        with refused(said):
            open_source(f"torchvision:{name}", data_root=str(tmp_path))
    assert not victim.exists()
    pickle.loads(bait)
    assert victim.exists()


def test_only_data_sets_that_are_known_to_load_pickles_do():
    from torchvision import datasets

    sources = {path.stem: path.read_text() for path in Path(datasets.__file__).parent.glob("*.py")}
    assert {name for name, text in sources.items() if "pickle.load(" in text} == {"cifar", "lsun"}  # cifar checks MD5
    assert not [name for name, text in sources.items() if "torch.load(" in text and "weights_only=True" not in text]
