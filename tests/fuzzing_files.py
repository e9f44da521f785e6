"""Images of every format, whole and damaged, and what may come of a source: for the fuzz tests."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import DAMAGE, damaged, documented
from hypothesis import strategies as st
from PIL import Image

from deepcluster.sources import open_source
from deepcluster.store import open_store, probe, stream


def encoded(kind: str, mode: str = "RGB", side: tuple[int, int] = (11, 9), **how) -> bytes:
    rng = np.random.default_rng(0)
    shape = (*side, len(mode)) if mode in ("RGB", "RGBA", "LA", "CMYK") else side
    file = io.BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode if len(shape) == 3 else "L")
    (pixels if pixels.mode == mode else pixels.convert(mode)).save(file, kind, **how)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
PICTURES = [
    encoded("jpeg", exif=EXIF),
    encoded("jpeg", "L", progressive=True),
    encoded("jpeg", "CMYK", (40, 30)),
    encoded("png"),
    encoded("png", "P"),
    encoded("png", "RGBA", exif=EXIF),
    encoded("png", "1"),
    encoded("png", "I;16"),
    encoded("webp"),
    encoded("webp", "RGBA", lossless=True, exif=EXIF),
    encoded("gif", "P"),
    encoded("bmp"),
    encoded("bmp", "P"),
    encoded("tiff"),
    encoded("tiff", "L", compression="tiff_lzw"),
    encoded("tiff", "RGB", compression="jpeg"),
    encoded("tiff", "RGBA", compression="tiff_adobe_deflate"),
    encoded("tiff", "F"),
    encoded("tiff", "1", compression="group4"),
    encoded("ppm"),
    encoded("ppm", "L"),
    b"P2 3 2 255 1 2 3 4 5 6",
    b"P6 99999 99999 255 abc",
    b"BM",
    b"",
    b"no image",
]
BYTES = st.one_of(
    st.sampled_from(PICTURES),
    st.tuples(st.sampled_from(PICTURES), DAMAGE).map(lambda pair: damaged(*pair)),
    st.binary(max_size=40),
)


def read(source, **how) -> None:
    """Open it, look at it, decode it, stream it: each a result of the right form, or an error as documented."""
    opened = documented(lambda: open_source(source, **how))
    if opened is None:
        return
    assert len(opened.names) == len(set(opened.names)) > 0
    assert opened.classes is None or len(opened.classes) == len(opened.names)
    "".join(opened.names).encode()  # valid UTF-8
    if opened.features is None:
        documented(lambda: probe(opened), ValueError)
    store = documented(lambda: open_store(opened, size=8, channels=3, workers=2))
    if store is None:
        return
    assert len(store) + len(store.skipped) == len(opened.names) + len(opened.skipped)
    assert len(store.names) == len(store.sha1) == len(store) > 0
    assert store.shape == ((3, 8, 8) if opened.features is None else opened.features.shape[1:])
    assert all(reason and "\n" not in reason for _, reason in store.skipped)
    assert sum(map(len, stream(opened, size=8, channels=3, workers=2))) == len(store)


def folders(at: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """What makes an empty folder for each case, with the working directory in it and a cache of its own."""
    count = iter(range(10**9))

    def make() -> Path:
        folder = at / str(next(count))
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("DEEPCLUSTER_CACHE", str(folder / "cache"))
        return folder

    return make
