"""Any image, array or cache of decoded images, whole or damaged: read, or an error of one line."""

import json

import numpy as np
from fuzzing import DAMAGE, VALUES, WAYS, cases, changed, damaged, documented, tried
from fuzzing_files import BYTES, PICTURES, folders, read
from hypothesis import strategies as st

from deepcluster import decode
from deepcluster.decode import BadImage
from deepcluster.sources import open_source
from deepcluster.store import open_store


@cases(250)
def test_images(n, capfd):
    """Damaged in any way, their header and pixels, as a photograph or a character."""

    def check(data, size, channels):
        pixels = documented(lambda: decode.decode(data, size, channels), BadImage)
        assert pixels is None or pixels.shape == (channels, size, size)
        seen = documented(lambda: decode.header(data), BadImage)
        assert seen is None or (min(seen[:2]) > 0 and seen[2] in (1, 3))
        assert capfd.readouterr().err == ""

    tried(n, check, BYTES, st.sampled_from([1, 8, 33]), st.sampled_from([1, 3]))


KINDS = [
    "u1",
    "<u2",
    ">u2",
    "i1",
    "i4",
    "i8",
    "f2",
    "f4",
    ">f8",
    "?",
    "c8",
    "S3",
    "U2",
    "M8[s]",
    "m8[s]",
    "V4",
    "f4,u1",
]
SHAPES = st.one_of(
    st.sampled_from([(2, 8, 8), (2, 8, 8, 3), (2, 3, 8, 8), (3, 4), (3, 3, 3, 3)]),
    st.lists(st.integers(0, 4), max_size=5).map(tuple),
)


@cases(100)
def test_arrays(n, tmp_path, monkeypatch):
    fresh = folders(tmp_path, monkeypatch)

    def check(kind, shape, order, fill, packed, damage):
        folder = fresh()
        with np.errstate(all="ignore"):
            try:
                x = np.asarray(np.full(shape, fill), order=order).astype(kind, order=order)
            except (ValueError, TypeError, OverflowError):
                x = np.zeros(shape, kind, order)
        if x.dtype.kind in "buif" and x.ndim > 1 and damage is None:
            read(x)
        elif packed is None:
            np.save(folder / "x.npy", x)
        else:
            np.savez(folder / "x.npz", **packed, images=x)
        name = "x.npy" if packed is None else "x.npz"
        if (folder / name).exists():
            if damage:
                (folder / name).write_bytes(damaged((folder / name).read_bytes(), damage))
            read(name)

    packed = st.one_of(
        st.none(),
        st.none(),
        st.fixed_dictionaries(
            {"labels": st.lists(st.one_of(st.integers(-1, 3), st.floats(), st.text(max_size=3)), max_size=3)}
        ),
    )
    fills = st.sampled_from([0, 1, 0.5, -1, 255, 300, 65536, 1e300, float("nan"), float("inf")])
    tried(n, check, st.sampled_from(KINDS), SHAPES, st.sampled_from("CF"), fills, packed, st.one_of(st.none(), DAMAGE))


@cases(50)
def test_a_damaged_cache_of_decoded_images_is_made_anew(n, tmp_path, monkeypatch):
    fresh = folders(tmp_path, monkeypatch)

    def check(name, damage, other, way, instead):
        folder = fresh()
        (folder / "in").mkdir()
        for i, data in enumerate(PICTURES[:6]):
            (folder / "in" / f"{i}.png").write_bytes(data)
        (folder / "in" / "bad.png").write_bytes(b"bad")
        whole = open_store(open_source("in"), size=8, channels=3)
        at = next((folder / "cache").glob("*/index.json")).parent
        size = (at / name).stat().st_size
        data = (at / other).read_bytes() if other else damaged((at / name).read_bytes(), damage)
        if name == "index.json" and not other:
            data = json.dumps(changed(json.loads((at / name).read_text()), way, instead)).encode()
        if name == "images.npy" and len(data) == size:
            return  # pixels: what they were is not known again
        (at / name).write_bytes(data)
        again = open_store(open_source("in"), size=8, channels=3)
        assert again.names == whole.names or name == "index.json"  # a row of it that could be bad is taken for bad

    files = st.sampled_from(["images.npy", "sha1.npy", "index.json"])
    tried(n, check, files, DAMAGE, st.one_of(st.none(), st.none(), files), WAYS, st.one_of(VALUES, st.just("drop")))
