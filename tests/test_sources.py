"""Everything a user may type as SOURCE, and everything that may be wrong with it."""

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepcluster.decode import BadImage, decode, header
from deepcluster.sources import open_source, shards


def picture(value, size=8):
    """The bytes of a PNG of one grey value."""
    file = io.BytesIO()
    Image.new("L", (size, size), value).save(file, "PNG")
    return file.getvalue()


def save(path, value=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(picture(value))


def values(source):
    """The grey value of every image of a source."""
    return [int(decode(source.read(i), 1, 1)[0, 0, 0]) for i in range(len(source.names))]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for i, name in enumerate(["cat/b.png", "cat/a.PNG", "dog/deep/x.png", "dog/y.png"]):
        save(root / name, 10 * i)
    return root


# --- folders ---


def test_folder_is_sorted_named_as_typed_and_classed_by_its_first_level(folder):
    source = open_source(str(folder))
    assert source.names == [f"{folder}/{n}" for n in ("cat/a.PNG", "cat/b.png", "dog/deep/x.png", "dog/y.png")]
    assert values(source) == [10, 0, 20, 30]
    assert source.classes == ["cat", "cat", "dog", "dog"]
    assert source.skipped == []
    assert source.location == str(folder)


def test_names_open_from_here(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for location in ("photos", "photos/", Path("photos"), "./photos"):
        source = open_source(location)
        assert all(Path(name).is_file() for name in source.names)
        assert source.classes == ["cat", "cat", "dog", "dog"]
    assert open_source("photos").names[0] == "photos/cat/a.PNG"


def test_flat_mixed_and_single_folders_have_no_classes(folder):
    assert open_source(folder / "cat").classes is None
    assert open_source(folder / "dog").classes is None
    save(folder.parent / "one" / "only" / "a.png")
    assert open_source(folder.parent / "one").classes is None
    save(folder / "loose.png")
    assert open_source(folder).classes is None


def test_every_image_suffix_is_taken_and_nothing_else(tmp_path):
    wanted = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif", "ppm", "pgm"]
    for suffix in [*wanted, "txt", "csv", "mp4", "py"]:
        (tmp_path / f"a.{suffix}").write_bytes(b"x")
    assert sorted(name.rsplit(".")[-1] for name in open_source(tmp_path).names) == sorted(wanted)


def test_photographs_of_kinds_that_cannot_be_read_are_said(folder):
    """A phone writes them; somebody who misses half of the images wants to know why."""
    (folder / "cat" / "IMG_1.HEIC").write_bytes(b"0")
    (folder / "notes.txt").write_bytes(b"0")
    source = open_source(str(folder))
    assert len(source.names) == 4
    assert source.skipped == [(f"{folder}/cat/IMG_1.HEIC", ".heic cannot be read: convert it to JPEG")]


def test_hidden_files_and_junk_are_passed_over(folder):
    for name in (".hidden.png", ".git/a.png", "__MACOSX/cat/a.png", "cat/._a.png", "Thumbs.db"):
        save(folder / name)
    assert len(open_source(folder).names) == 4


def test_odd_names(tmp_path):
    odd = ["sp ace.png", "quo'te\".png", "new\nline.png", "ünï.png", "日本.png", "#1,2;.png", "%d{0}.png"]
    for i, name in enumerate(odd):
        save(tmp_path / name, i)
    raw = os.fsencode(tmp_path) + b"/bad\xff\xfe.png"
    Path(os.fsdecode(raw)).write_bytes(picture(99))
    source = open_source(tmp_path)
    assert sorted(source.names) == sorted([f"{tmp_path}/{n}" for n in odd] + [f"{tmp_path}/bad\\xff\\xfe.png"])
    assert sorted(values(source)) == [*range(len(odd)), 99]
    assert "\n".join(source.names).encode("utf-8")


def test_loops_and_doubled_folders_end(folder):
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "aaa").symlink_to(folder / "dog")
    (folder / "cat" / "self.png").symlink_to("self.png")
    source = open_source(folder)
    assert len(source.names) == 4
    assert f"{folder}/dog/y.png" in source.names  # under its own name, though the link comes first
    assert [Path(name).name for name, _ in source.skipped] == ["self.png"]


def test_links_are_followed(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "one.png").symlink_to(folder / "dog" / "y.png")
    (tmp_path / "other" / "all").symlink_to(folder / "cat")
    assert sorted(values(open_source(tmp_path / "other"))) == [0, 10, 30]


def test_what_cannot_be_read_is_listed(folder, monkeypatch):
    (folder / "broken.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    scan = os.scandir

    def denied(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    source = open_source(folder)
    assert len(source.names) == 3
    assert sorted((Path(name).name, reason) for name, reason in source.skipped) == [
        ("broken.png", "no such file"),
        ("deep", "cannot list: permission denied"),
        ("pipe.png", "not a regular file"),
    ]


def test_signature_follows_the_content(folder):
    first = open_source(folder).signature
    assert open_source(folder).signature == first
    moved = folder.rename(folder.parent / "moved")
    assert open_source(moved).signature == first
    save(moved / "dog/y.png", 77)
    second = open_source(moved).signature
    (moved / "dog/y.png").rename(moved / "dog/z.png")
    assert len({first, second, open_source(moved).signature}) == 3


def test_same_size_and_time_but_other_content_is_seen(folder):
    path = folder / "dog/y.png"
    before, status = open_source(folder).signature, path.stat()
    path.write_bytes(bytes(len(path.read_bytes())))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert open_source(folder).signature != before


# --- globs and lists ---


def test_globs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_source("cat/*.png").names == ["cat/b.png"]
    assert open_source("**/*.png").names == ["cat/b.png", "dog/deep/x.png", "dog/y.png"]
    assert open_source("*/[ab].*").classes is None
    save("wei[rd].png", 5)
    assert values(open_source("wei[rd].png")) == [5]  # a file that is there is no pattern
    with pytest.raises(ValueError, match=r"\*\.jpg does not exist"):
        open_source("*.jpg")


def test_one_image(folder):
    assert values(open_source(folder / "dog" / "y.png")) == [30]


def test_text_list(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = ["cat/b.png", "", "none.png", "cat/b.png", str(folder / "dog/y.png"), "photos/cat/a.PNG"]
    (folder / "list.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    source = open_source("photos/list.txt")
    assert source.names == ["photos/cat/b.png", str(folder / "dog/y.png"), "photos/cat/a.PNG"]
    assert values(source) == [0, 30, 10]
    assert source.skipped == [("none.png", "no such file"), ("photos/cat/b.png", "listed twice")]


def test_sequence_of_paths(folder):
    paths = [str(folder / "dog/y.png"), folder / "cat/b.png", str(folder / "dog/y.png")]
    source = open_source(paths)
    assert values(source) == [30, 0]
    assert source.skipped == [(paths[0], "listed twice")]
    for wrong in ([], [1, 2], [np.zeros((4, 4))]):
        with pytest.raises(ValueError, match="must hold image paths"):
            open_source(wrong)
    with pytest.raises(ValueError, match=r"no image can be read; the first of 1 is gone\.png: no such file"):
        open_source(["gone.png"])
    with pytest.raises(ValueError, match="got int"):
        open_source(3)


def test_csv(folder):
    table = folder / "t.csv"
    table.write_text('label,Path\nx,cat/a.PNG\n,dog/y.png\n"a, b",none.png\n-1,cat/b.png\nz\n')
    source = open_source(table)
    assert values(source) == [10, 30, 0]
    assert source.classes == ["x", None, None]
    assert len(source.skipped) == 2
    table.write_text("cat/a.PNG\ndog/y.png\n")
    assert values(open_source(table)) == [10, 30]
    assert open_source(table).classes is None
    table.write_text("file,y\ncat/a.PNG,1\n")
    with pytest.raises(ValueError, match="needs a column 'path'; it has file, y"):
        open_source(table)
    table.write_text("")
    with pytest.raises(ValueError, match="lists no image"):
        open_source(table)
    (folder / "t.tsv").write_text("path\tlabel\ncat/a.PNG\tq\n")
    assert open_source(folder / "t.tsv").classes == ["q"]


def test_list_with_bytes_that_are_not_utf8(folder):
    path = os.fsencode(folder) + b"/\xe9.png"
    Path(os.fsdecode(path)).write_bytes(picture(9))
    (folder / "l.txt").write_bytes(b"\xe9.png\n")
    source = open_source(folder / "l.txt")
    assert source.names == [f"{folder}/\\xe9.png"]
    assert values(source) == [9]


# --- arrays ---


def test_digits_are_scaled_to_the_full_range():
    source = open_source("digits")
    assert len(source.names) == 1797
    assert source.names[12] == "digits/0012"
    assert set(source.classes) == set("0123456789")
    first = source.read(0)
    assert first.shape == (8, 8)
    assert first.dtype == np.uint8
    assert max(source.read(i).max() for i in range(20)) == 255


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)


@pytest.mark.parametrize(
    "array",
    [
        IMAGES,
        IMAGES.transpose(0, 3, 1, 2),
        IMAGES / 255,
        IMAGES.astype(np.float32),
        IMAGES.astype(np.uint16) * 257,
        IMAGES.astype(np.int64),
    ],
)
def test_arrays_in_memory(array):
    source = open_source(array)
    assert source.names == [f"array/{i:06d}" for i in range(5)]
    assert source.classes is None
    assert source.features is None
    assert all(np.array_equal(source.read(i), IMAGES[i]) for i in range(5))


def test_grey_bilevel_and_ambiguous_arrays():
    assert np.array_equal(open_source(IMAGES[..., 0]).read(2), IMAGES[2, ..., 0])
    assert open_source(IMAGES[..., 0] > 9).read(2).max() == 255
    assert header(open_source(IMAGES[..., :1]).read(0)) == (7, 6, 1)
    assert open_source(np.zeros((2, 3, 4, 4), np.uint8)).read(0).shape == (4, 4, 3)  # square as (C, H, W)
    assert open_source(np.zeros((2, 4, 4, 3), np.uint8)).read(0).shape == (4, 4, 3)  # square as (H, W, C)


def test_scale_is_one_for_the_whole_array():
    dark = np.zeros((2, 4, 4), np.float32)
    dark[0], dark[1] = 1, 200
    source = open_source(dark)
    assert source.read(0).max() == 1  # alone it would pass for white
    deep = np.stack([np.full((4, 4), 200, np.uint16), np.full((4, 4), 65535, np.uint16)])
    assert open_source(deep).read(0).max() == 1
    with pytest.raises(ValueError, match=r"holds -3\.\.0; rescale it"):
        open_source(np.full((2, 4, 4), -3.0))
    with pytest.raises(ValueError, match="rescale it"):
        open_source(np.full((2, 4, 4), 70000))


def test_nan_images_are_bad_alone():
    array = np.ones((3, 4, 4))
    array[1, 2, 2] = np.nan
    source = open_source(array)
    assert source.read(0).max() == 255
    with pytest.raises(BadImage, match="not finite"):
        source.read(1)


def test_features():
    table = np.arange(12.0).reshape(4, 3)
    source = open_source(table)
    assert source.features.dtype == np.float32
    assert np.array_equal(source.features, table)
    assert open_source(np.full((2, 2), 1e300)).features.max() == np.inf  # without a warning


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros((2, 2, 2, 2, 2)), np.array([["a", "b"]]), np.zeros((0, 8, 8))])
def test_arrays_that_are_no_images(wrong):
    with pytest.raises(ValueError, match=r"array of shape .* allowed are numbers"):
        open_source(wrong)


def test_four_dimensions_need_channels():
    with pytest.raises(ValueError, match="no axis of 1, 3 or 4 channels"):
        open_source(np.zeros((2, 7, 8, 9)))


def test_signature_of_an_array_is_its_content():
    other = IMAGES.copy()
    other[4, 5, 6, 2] ^= 1
    assert open_source(IMAGES).signature == open_source(IMAGES.copy()).signature
    assert open_source(IMAGES).signature != open_source(other).signature
    assert open_source(IMAGES).signature != open_source(IMAGES.reshape(5, 7, 6, 3)).signature


def test_npy_and_npz(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    source = open_source(tmp_path / "a.npy")
    assert source.names[3] == f"{tmp_path}/a.npy#3"
    assert np.array_equal(source.read(3), IMAGES[3])
    np.save(tmp_path / "f.npy", np.eye(3))
    assert np.array_equal(open_source(tmp_path / "f.npy").features, np.eye(3))
    np.savez(tmp_path / "b.npz", y_train=np.arange(5)[:, None], other=np.eye(2), x_train=IMAGES)
    source = open_source(tmp_path / "b.npz")
    assert source.classes == list("01234")
    assert np.array_equal(source.read(3), IMAGES[3])
    np.savez(tmp_path / "c.npz", IMAGES)
    assert len(open_source(tmp_path / "c.npz").names) == 5
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=np.arange(4))
    with pytest.raises(ValueError, match="has 4 labels"):
        open_source(tmp_path / "d.npz")


def test_damaged_and_pickled_arrays(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[: len(data) // 2])
    np.save(tmp_path / "o.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", np.array([{}, []], dtype=object))
    (tmp_path / "t.npz").write_bytes(b"PK\3\4 not at all")
    (tmp_path / "e.npy").touch()
    np.savez(tmp_path / "none.npz")
    for name in ("a.npy", "o.npy", "o.npz", "t.npz", "e.npy", "none.npz"):
        with pytest.raises(ValueError, match=f"{name} is no readable") as error:
            open_source(tmp_path / name)
        assert "\n" not in str(error.value)


# --- Parquet ---


def parquet(path, column, labels=None, rows=2, metadata=None):
    columns = {"image": column} if labels is None else {"image": column, "label": labels}
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=rows)


def test_parquet_of_structs_with_named_labels(tmp_path):
    structs = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(5)]
    names = {"info": {"features": {"label": {"names": ["zero", "one"], "_type": "ClassLabel"}}}}
    parquet(tmp_path / "a.parquet", structs, [0, 1, -1, None, 1], metadata=names)
    source = open_source(tmp_path / "a.parquet")
    assert source.names == [f"{tmp_path}/a.parquet#{i}" for i in range(5)]
    assert source.classes == ["zero", "one", None, None, "one"]
    assert values(source) == [0, 1, 2, 3, 4]
    assert [int(decode(source.read(i), 1, 1)[0, 0, 0]) for i in (4, 0, 2, 1)] == [4, 0, 2, 1]  # and backwards


def test_parquet_of_bytes_of_paths_and_of_both(tmp_path):
    save(tmp_path / "x.png", 7)
    parquet(tmp_path / "b.parquet", [picture(3), picture(4), None], ["u", "v", "v"])
    source = open_source(tmp_path / "b.parquet")
    assert values_until_bad(source) == [3, 4, "no image: empty row"]
    assert source.classes == ["u", "v", "v"]
    parquet(tmp_path / "p.parquet", ["x.png", str(tmp_path / "x.png")])
    assert values(open_source(tmp_path / "p.parquet")) == [7, 7]
    parquet(tmp_path / "s.parquet", [{"bytes": None, "path": "x.png"}, {"bytes": picture(1), "path": None}])
    source = open_source(tmp_path / "s.parquet")
    assert values(source) == [7, 1]
    assert source.classes is None


def values_until_bad(source):
    found = []
    for i in range(len(source.names)):
        try:
            found.append(int(decode(source.read(i), 1, 1)[0, 0, 0]))
        except BadImage as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("as_row", [lambda p: p, lambda p: {"bytes": None, "path": p}, lambda p: {"path": p}])
def test_parquet_of_paths_is_signed_with_the_files_it_names(tmp_path, as_row):
    save(tmp_path / "x.png", 7)
    parquet(tmp_path / "p.parquet", [as_row(name) for name in ("x.png", "y.png", "~nobody-here/z.png", "a\0b")])

    def signature():
        return open_source(tmp_path / "p.parquet").signature

    before = signature()
    assert signature() == before
    save(tmp_path / "y.png", 8)
    there = signature()
    assert there != before, "a new image was not noticed"
    save(tmp_path / "x.png", 9)
    assert signature() != there, "a changed image was not noticed"


def test_parquet_of_bytes_does_not_look_at_the_files_it_names(tmp_path):
    parquet(tmp_path / "b.parquet", [{"bytes": picture(i), "path": "x.png"} for i in range(3)])
    before = open_source(tmp_path / "b.parquet").signature
    save(tmp_path / "x.png", 7)
    assert open_source(tmp_path / "b.parquet").signature == before


def test_parquet_folder_and_glob_with_a_damaged_shard(tmp_path):
    for k in range(3):
        parquet(tmp_path / f"s-{k}.parquet", [picture(10 * k + i) for i in range(3)])
    (tmp_path / "s-1.parquet").write_bytes(b"PAR1 no")
    for location in (tmp_path, f"{tmp_path}/*.parquet", f"{tmp_path}/s-{{0..3}}.parquet"):
        source = open_source(location)
        assert values(source) == [0, 1, 2, 20, 21, 22]
        assert f"{tmp_path}/s-1.parquet" in [name for name, _ in source.skipped]
    assert (f"{tmp_path}/s-3.parquet", "no such file") in source.skipped
    with pytest.raises(ValueError, match=r"s-1\.parquet: no readable parquet"):
        open_source(tmp_path / "s-1.parquet")


def test_parquet_without_images_says_what_it_has(tmp_path):
    for table in ({"text": ["a"], "n": [1]}, {"image": [1], "n": [1]}):
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=f"no column 'image' .* columns are {', '.join(table)}"):
            open_source(tmp_path / "a.parquet")


def test_parquet_is_read_in_batches_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH", 4)
    parquet(tmp_path / "a.parquet", [picture(i) for i in range(100)], rows=30)
    source = open_source(tmp_path / "a.parquet")
    longest = []
    stream = shards._Rows._stream

    def watched(*args):
        for batch in stream(*args):
            longest.append(len(batch))
            yield batch

    monkeypatch.setattr(shards._Rows, "_stream", staticmethod(watched))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: decode(source.read(i), 1, 1)[0, 0, 0], range(100))) == list(range(100))
    assert max(longest) == 4
    assert sum(longest) < 300  # each row about once, not once for each of 4 readers; threads may race a little
    assert [int(decode(source.read(i), 1, 1)[0, 0, 0]) for i in (75, 61, 88, 0, 29)] == [75, 61, 88, 0, 29]


# --- tars ---


def tar(path, members, **options):
    with tarfile.open(path, "w", **options) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_tar_with_classes_and_other_members(tmp_path):
    path = tmp_path / "a.tar"
    tar(
        path,
        [
            ("d/k1.png", picture(1)),
            ("d/k1.cls", b"7\n"),
            ("d/k1.json", b"{}"),
            ("d/k2.cls", b"dog"),
            ("d/k2.PNG", picture(2)),
            ("d/._k2.png", b"junk"),
            ("e/k1.left.png", picture(3)),
            ("d/k1.png", picture(4)),
        ],
    )
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("evil.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    source = open_source(path)
    assert source.names == [f"{path}/{n}" for n in ("d/k1.png", "d/k2.PNG", "e/k1.left.png")]
    assert values(source) == [1, 2, 3]
    assert source.classes == ["7", "dog", None]
    assert source.skipped == [(f"{path}/d/k1.png", "listed twice")]
    assert isinstance(source.read(0), bytes)


def test_tar_ranges_globs_and_folders(tmp_path):
    for k in (8, 9, 10):
        tar(tmp_path / f"t-{k:04d}.tar", [("x.png", picture(k))])
    for location in (f"{tmp_path}/t-{{0008..0010}}.tar", f"{tmp_path}/*.tar", tmp_path):
        source = open_source(location)
        assert values(source) == [8, 9, 10]
        assert source.classes is None
    source = open_source(f"{tmp_path}/t-{{0009..0012}}.tar")
    assert values(source) == [9, 10]
    assert source.skipped == [(f"{tmp_path}/t-{k:04d}.tar", "no such file") for k in (11, 12)]
    with pytest.raises(ValueError, match="does not exist"):
        open_source(f"{tmp_path}/u-{{0..3}}.tar")


@pytest.mark.parametrize("damage", ["inside a member", "inside a header", "overwritten header"])
def test_tar_with_a_damaged_tail_keeps_its_head(tmp_path, damage):
    path = tmp_path / "a.tar"
    tar(path, [(f"{i}.png", picture(i, 30)) for i in range(6)])
    with tarfile.open(path) as file:
        third = file.getmembers()[3]
    data = bytearray(path.read_bytes())
    if damage == "overwritten header":
        data[third.offset : third.offset + 512] = b"\xaa" * 512
    else:
        del data[third.offset_data + 20 if damage == "inside a member" else third.offset + 100 :]
    path.write_bytes(data)
    source = open_source(path)
    assert values(source) == [0, 1, 2]
    assert any("damaged after 3 images" in reason for _, reason in source.skipped), source.skipped


def test_tars_that_are_none(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "b.tar").touch()
    tar(tmp_path / "c.tar", [("a.txt", b"x")])
    for name, reason in (("a.tar", "no readable tar"), ("b.tar", "no readable tar"), ("c.tar", "no images in")):
        with pytest.raises(ValueError, match=reason):
            open_source(tmp_path / name)
    tar(tmp_path / "d.tar", [("a.png", picture(5))])
    source = open_source(f"{tmp_path}/*.tar")
    assert values(source) == [5]
    assert [Path(name).name for name, _ in source.skipped] == ["a.tar", "b.tar"]


# --- torchvision ---


def mnist(root, n=4):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, start in (("train", 0), ("t10k", 100)):
        images = np.stack([np.full((28, 28), start + i, np.uint8) for i in range(n)])
        head = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = np.array([0x801, n], ">i4").tobytes() + bytes(range(n))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def test_torchvision(tmp_path):
    mnist(tmp_path)
    source = open_source("torchvision:MNIST", data_root=str(tmp_path))
    assert values(source) == [0, 1, 2, 3]
    assert source.read(0).shape == (28, 28)
    assert source.names[1] == "MNIST/000001"
    assert source.classes[1] == "1 - one"
    test = open_source("torchvision:MNIST/test", data_root=str(tmp_path))
    assert values(test) == [100, 101, 102, 103]
    assert test.signature != source.signature
    fake = open_source("torchvision:FakeData")
    assert fake.read(3).shape == (224, 224, 3)


def test_torchvision_errors(tmp_path):
    for name, message in (
        ("CIFAR10", f"not found in {tmp_path} .*--data-root or run torchvision.datasets.CIFAR10.*download=True"),
        ("CIFAR10/validation", "CIFAR10 has the splits train and test"),
        ("SVHN/nope", "nope"),
        ("FakeData/test", "no splits"),
        ("CIFAR01", "did you mean CIFAR10?"),
        ("os", "torchvision has no data set 'os'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_source(f"torchvision:{name}", data_root=str(tmp_path))
        assert "\n" not in str(error.value)


# --- wrong ---


def test_wrong_names_are_answered_with_the_nearest(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for wrong, right in (("photo", "photos"), ("digist", "digits"), (f"{folder}/cats", f"{folder}/cat")):
        with pytest.raises(ValueError, match=f"{wrong} does not exist; did you mean {right}?"):
            open_source(wrong)
    with pytest.raises(ValueError, match="zzz/qqq does not exist; a source is a folder, a glob"):
        open_source("zzz/qqq")


def test_empty_and_imageless_folders(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        open_source(tmp_path)
    for name in ("a.txt", "b.txt", "README", "c.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"looked for .*\.jpg.*found 2 \.txt, 1 without suffix, 1 \.mp4|found 2 \.txt"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"has no images.*found 1 \.mp4"):
        open_source(tmp_path / "c.mp4")


@pytest.mark.parametrize("name", ["b{a}.npy", "{.npy", "{0}{{}}.npy"])
def test_an_array_file_with_braces_in_its_name(tmp_path, name):
    np.save(tmp_path / name, np.zeros((2, 8, 8), np.uint8))
    assert open_source(tmp_path / name).names == [f"{tmp_path}/{name}#{i}" for i in range(2)]


def test_a_folder_called_digits(tmp_path, monkeypatch, caplog):
    (tmp_path / "digits").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "digits/a.png")
    assert len(open_source("digits").names) == 1797
    assert not caplog.text
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits").names) == 1797
    assert "write ./digits" in caplog.text
    assert open_source("./digits").names == ["./digits/a.png"]
