"""Images in one folder a cluster, and TensorBoard's projector: whatever the files are called, and wherever they are."""

import io
import os
import re
import shutil
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from finished import edit, finished
from PIL import Image

from deepcluster import edits, outputs, results
from deepcluster.export import export, tensorboard
from deepcluster.export.links import free, safe
from deepcluster.export.task import Images

N = 24


def pixels(i):
    return (np.random.default_rng(i).integers(0, 80, (8, 8)) + 80 * (i % 3)).astype(np.uint8)


def png(i):
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, "png")
    return file.getvalue()


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(N):
        Path(f"in/{i:02d}.png").write_bytes(png(i))
    return finished(Path("run"), "in")


def table_of(run):
    return pq.read_table(run / "assignments.parquet").to_pylist()


def below(folder):
    """Every image below, as parts of its path."""
    return sorted(path.relative_to(folder).parts for path in folder.rglob("*") if path.suffix)


def test_links_lead_to_the_images(run):
    assert "24 links in 3 folders" in export(run, "folders", Path("out"))
    assert below(Path("out")) == sorted((str(row["cluster"]), Path(row["path"]).name) for row in table_of(run))
    for row in table_of(run):
        link = Path("out", str(row["cluster"]), Path(row["path"]).name)
        assert os.readlink(link) == str(Path(row["path"]).resolve())  # noqa: PTH115
        assert link.read_bytes() == Path(row["path"]).read_bytes()
    Path("out").rename("moved")
    assert Path("moved", str(table_of(run)[0]["cluster"]), "00.png").exists(), "links must be absolute"


def test_links_to_links_lead_to_the_file(run):
    Path("in/05.png").rename("elsewhere.png")
    Path("in/05.png").symlink_to("../elsewhere.png")
    export(run, "folders", Path("out"))
    (link,) = Path("out").rglob("05.png")
    assert os.readlink(link) == str(Path("elsewhere.png").resolve())  # noqa: PTH115


def test_copies_do_not_need_the_images(run):
    before = {row["path"]: Path(row["path"]).read_bytes() for row in table_of(run)}
    assert "24 copies in 3 folders" in export(run, "folders", Path("out"), copy=True)
    shutil.rmtree("in")
    for row in table_of(run):
        copy = Path("out", str(row["cluster"]), Path(row["path"]).name)
        assert not copy.is_symlink()
        assert copy.read_bytes() == before[row["path"]]


def test_names_and_junk_of_clusters(run):
    edit(run, edits.Name(0, "red/vans"), edits.Name(1, "../.."), edits.Junk(2), edits.Name(2, "x"))
    export(run, "folders", Path("out"))
    assert {parts[:-1] for parts in below(Path("out"))} == {("0_red_vans",), ("1__",), ("junk", "2_x")}


def listed(root, names):
    """A run of images with such names, given as a list of paths from several folders."""
    paths = []
    for i, name in enumerate(names):
        folder = os.path.join(os.fsencode(root / f"in{i}"))  # noqa: PTH118
        os.mkdir(folder)  # noqa: PTH102
        path = os.path.join(folder, name if isinstance(name, bytes) else name.encode())  # noqa: PTH118
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(png(i))
        paths.append(path)
    (root / "list.txt").write_bytes(b"\n".join(paths))
    run = finished(root / "run", "list.txt", k=2)
    everything = outputs.read_assignments(run)
    column = everything.column_names.index("cluster")
    in_one = everything.set_column(column, "cluster", [[0] * len(names)])
    results.write_table(run / "assignments.parquet", in_one)
    return run


def test_images_of_one_name_keep_apart_also_where_letters_have_no_case(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a.png", "A.png", "a.PNG", "a~2.png", "a.png", "\u00e9.png", "e\u0301.png", "\u00df.png", "ss.png"]
    run = listed(tmp_path, names)
    export(run, "folders", Path("out"))
    found = {path.name: path.resolve() for path in Path("out/0").iterdir()}
    assert len({unicodedata.normalize("NFC", name.casefold()) for name in found}) == len(names)
    assert len(set(found.values())) == len(names)
    assert {"a.png", "A~2.png", "a~3.PNG", "\u00e9.png"} <= set(found)


HOSTILE = [
    b"\xff\xfe.png", b"tab\tand\x1besc.png", b"-rf.png", b"..\\..\\up.png", b"nul:.png", "rtl \u202egnp.exe.png",
    "\U0001f984" * 60 + ".png", b"....png", b"a b ' \".png", b" .png", b"x" * 251 + b".png",
]  # fmt: skip


@pytest.mark.parametrize("copy", [False, True])
def test_hostile_names_stay_inside(tmp_path, monkeypatch, copy):
    monkeypatch.chdir(tmp_path)
    run = listed(tmp_path, HOSTILE)
    before = {path.name for path in tmp_path.iterdir()}
    assert f"{len(HOSTILE)} {'copies' if copy else 'links'}" in export(run, "folders", tmp_path / "out", copy=copy)
    assert {path.name for path in tmp_path.iterdir()} - before == {"out"}
    made = list(Path("out/0").iterdir())
    assert len(made) == len(HOSTILE)
    assert {path.read_bytes() for path in made} == {png(i) for i in range(len(HOSTILE))}
    for path in made:
        assert path.name.encode().decode() == path.name
        assert not re.search(r'[\x00-\x1f/\\:*?"<>|\u202e]', path.name)
        assert len(path.name.encode()) <= 210
        assert path.suffix == ".png"
        assert not path.name.startswith(".")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("..", "_"), ("", "_"), (".", "_"), ("...a", "_.a"), (".png", "_.png"), ("a.b.png", "a.b.png"),
        ("a/b\\c", "a_b_c"), ("a\nb\0c", "a_b_c"),
        ("a. ", "a"), ("\udcff.png", "_.png"), ("x" * 300 + ".jpeg", "x" * 195 + ".jpeg"),
        ("\u00e9" * 150, "\u00e9" * 100), ("." + "y" * 300, "y" * 200), ("plain.png", "plain.png"),
    ],
)  # fmt: skip
def test_safe_names(text, expected):
    assert safe(text) == expected


def test_many_images_of_one_name_are_quick():
    taken = {}
    names = [free("image.png", taken) for _ in range(20_000)]
    assert len(set(names)) == 20_000
    assert names[:3] == ["image.png", "image~2.png", "image~3.png"]


def array(root):
    np.save(root / "x.npy", np.stack([pixels(i) for i in range(N)]))
    return "x.npy"


def tar(root):
    with tarfile.open(root / "s.tar", "w") as file:
        for i in range(N):
            member = tarfile.TarInfo(f"deep/../{i:02d}.png")
            member.size = len(png(i))
            file.addfile(member, io.BytesIO(png(i)))
    return "s.tar"


def parquet(root):
    rows = [{"bytes": png(i), "path": "../../same.png"} for i in range(N)]
    import pyarrow as pa

    pq.write_table(pa.table({"image": rows}), root / "t.parquet")
    return "t.parquet"


@pytest.mark.parametrize("source", [array, tar, parquet])
def test_images_that_are_no_files_are_written(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    run = finished(Path("run"), source(tmp_path))
    assert "24 copies in 3 folders (these images are no files of their own" in export(run, "folders", Path("out"))
    made = [path for path in Path("out").rglob("*") if path.is_file() and path.suffix]
    assert all(path.suffix == ".png" and len(path.relative_to("out").parts) == 2 for path in made)
    seen = {opened(path).tobytes() for path in made}
    assert seen == {pixels(i).tobytes() for i in range(N)}
    if source is not array:
        assert {path.read_bytes() for path in made} == {png(i) for i in range(N)}


def test_images_that_are_gone_are_left_out(run, caplog):
    Path("in/03.png").unlink()
    assert "23 links" in export(run, "folders", Path("out"))
    assert "1 of 24 images cannot be read any more" in caplog.text
    shutil.rmtree("in")
    with pytest.raises(ValueError, match="in does not exist"):
        export(run, "folders", Path("again"))
    Path("in").mkdir()
    Path("in/new.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="none of the images"):
        export(run, "folders", Path("again"))
    assert not Path("again").exists()


def test_a_file_that_vanishes_or_cannot_be_read_meanwhile(run):
    class Broken:
        def read(self, i):
            if i == 0:
                raise EOFError("truncated shard")
            return Path("in/gone.png")

    images = Images(Broken(), [0, 1], ["", ""])
    assert images.data(0) is None
    assert images.lost == 1
    assert images.data(1) is None
    assert images.lost == 2


@pytest.mark.parametrize("copy", [False, True])
def test_a_link_to_nowhere_is_left_out(run, copy, monkeypatch, caplog):
    real = Images.item
    monkeypatch.setattr(Images, "item", lambda self, row: Path("in/gone.png") if row == 3 else real(self, row))
    assert "23 " in export(run, "folders", Path("out"), copy=copy)
    assert "1 of 24 images cannot be read any more" in caplog.text


def test_vectors_have_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("f.npy", np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32))
    with pytest.raises(ValueError, match="holds vectors, not images"):
        export(finished(Path("run"), "f.npy"), "folders", Path("out"))


def test_where_links_cannot_be_made(run, monkeypatch):
    def symlink(path, place):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", symlink)
    with pytest.raises(ValueError, match="add --copy"):
        export(run, "folders", Path("out"))
    assert not Path("out").exists()


def test_an_export_that_became_the_source_is_not_replaced(run):
    export(run, "folders", Path("out"), copy=True)
    Path("list.txt").write_text("\n".join(map(str, Path("out").rglob("*.png"))))
    second = finished(Path("second"), "list.txt")
    with pytest.raises(ValueError, match="which is replaced"):
        export(second, "folders", Path("out"), overwrite=True)
    assert len(below(Path("out"))) == N


def test_projector(run):
    edit(run, edits.Name(0, "a\tb\nc"))
    assert "24 points of 512 features" in export(run, "projector", Path("out"))
    x = np.load(run / "features.npy")
    assert np.allclose(np.loadtxt("out/tensors.tsv", delimiter="\t"), x, rtol=1e-5)
    head, *rows = [line.split("\t") for line in Path("out/metadata.tsv").read_text().splitlines()]
    assert head[:3] == ["path", "cluster", "name"]
    table = table_of(run)
    assert [row[0] for row in rows] == [row["path"] for row in table]
    assert [row[1] for row in rows] == [str(row["cluster"]) for row in table]
    assert {row[2] for row in rows if row[1] == "0"} == {"a\\tb\\nc"}
    assert {len(row) for row in rows} == {len(head)}
    config = Path("out/projector_config.pbtxt").read_text()
    assert re.sub(r"\s+", " ", config).strip() == (
        'embeddings { tensor_name: "features" tensor_path: "tensors.tsv" metadata_path: "metadata.tsv" '
        'sprite { image_path: "sprite.png" single_image_dim: 64 single_image_dim: 64 } }'
    )
    sprite = opened("out/sprite.png")
    assert sprite.shape == (5 * 64, 5 * 64, 3)
    for i in (0, 7, 23):
        tile = sprite[64 * (i // 5) :, 64 * (i % 5) :][:64, :64, 0]
        assert abs(tile.mean() - pixels(i).mean()) < 3
    assert (sprite[-64:, -64:] == 128).all()


def test_a_projector_of_many_shows_an_even_sample(run, monkeypatch):
    monkeypatch.setattr(tensorboard, "MOST", 5)
    monkeypatch.setattr(tensorboard, "LARGEST", 100)
    assert "5 points (an even sample of 24)" in export(run, "projector", Path("out"))
    rows = Path("out/metadata.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[0] for row in rows] == [f"in/{i:02d}.png" for i in (0, 6, 12, 17, 23)]
    assert opened("out/sprite.png").shape == (99, 99, 3)
    assert "single_image_dim: 33" in Path("out/projector_config.pbtxt").read_text()


def test_a_projector_without_images(run, caplog):
    Path("in/00.png").unlink()
    export(run, "projector", Path("out"))
    assert "1 of 24 images cannot be read" in caplog.text
    shutil.rmtree("in")
    export(run, "projector", Path("out"), overwrite=True)
    assert "points instead of images" in caplog.text
    assert "sprite" not in Path("out/projector_config.pbtxt").read_text()
    assert not Path("out/sprite.png").exists()


def test_a_copy_of_a_file_that_is_another_now_is_not_made(run, caplog):
    Path("in/03.png").write_bytes(png(200))
    assert "23 copies" in export(run, "folders", Path("out"), copy=True)
    assert "1 of 24 images cannot be read any more or are others now" in caplog.text
    assert not list(Path("out").rglob("03.png"))
