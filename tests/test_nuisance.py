"""Whether something else explains the clusters: planted splits are found, clean sets stay unsuspected."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import store_of

from deepcluster import decode, nuisance
from deepcluster.nuisance import effects, explaining, measure
from deepcluster.report.causes import causes
from deepcluster.sources import open_source
from deepcluster.store import open_store


def drawings(n=240, kinds=4, channels=3, seed=0, side=16):
    """(n, channels, side, side) uint8 of stripes of several directions, more or less bright; their kinds."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, kinds, n)
    y, x = np.mgrid[:side, :side]
    angle = np.pi * kind / kinds
    phase = rng.uniform(0, 2 * np.pi, n)
    wave = np.sin(1.2 * (np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y) + phase[:, None, None])
    grey = 110 + 30 * wave + rng.normal(0, 15, (n, 1, 1)) + rng.normal(0, 5, (n, side, side))
    tint = rng.normal(0, 8, (n, channels, 1, 1))
    return torch.from_numpy((grey[:, None] + tint).clip(0, 255).astype(np.uint8)), kind


def found(images, cluster):
    return {one.factor: one for one in effects(measure(store_of(images)), np.asarray(cluster))}


def suspects(images, cluster, fine=True):
    some = effects(measure(store_of(images)), np.asarray(cluster))
    return [one.factor for one in explaining(some, len(np.unique(cluster)), fine)]


def planted(images, half, by):
    return torch.where(torch.from_numpy(half)[:, None, None, None], (images.float() + by).clamp(0, 255).byte(), images)


def test_a_planted_brightness_split_is_found():
    images, kind = drawings()
    half = np.arange(len(images)) % 2 == 1
    bright = planted(images, half, 90)
    assert "brightness" in suspects(bright, half.astype(int))
    assert "brightness" in suspects(bright, 2 * kind + half), "each kind, split by brightness"
    effect = found(bright, half.astype(int))["brightness"]
    assert effect.each[1] > 2
    assert effect.each[0] < -2
    assert "brightness" in nuisance.said(effect)
    assert effect.advice in nuisance.said(effect)


def test_it_is_not_the_split_but_clusters_that_follow_it():
    images, kind = drawings()
    half = np.random.default_rng(1).random(len(images)) < 0.5
    assert suspects(planted(images, half, 90), kind) == []


@pytest.mark.parametrize("seed", range(10))
def test_clean_sets_stay_unsuspected(seed):
    images, kind = drawings(seed=seed, kinds=2 + seed, channels=1 if seed % 2 else 3)
    assert suspects(images, kind) == []


def test_colour_and_sharpness():
    images, _ = drawings()
    half = np.arange(len(images)) % 2 == 1
    red = images.clone()
    red[half, 0] = (red[half, 0].float() + 60).byte()
    assert "hue" in suspects(red, half.astype(int))
    noisy = images.clone().float()
    noisy[half] += 40 * torch.randn(noisy[half].shape, generator=torch.Generator().manual_seed(0))
    assert "sharpness" in suspects(noisy.clamp(0, 255).byte(), half.astype(int))


def test_share_of_variance_by_hand():
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 3, 200)
    x = rng.normal(size=200) + np.array([0, 0.7, 2])[cluster]
    clipped = np.clip(x, *np.quantile(x, [0.01, 0.99]))
    within = sum(((clipped[cluster == c] - clipped[cluster == c].mean()) ** 2).sum() for c in range(3)) / (200 - 3)
    effect = nuisance._of_numbers("brightness", [x], cluster)
    assert effect.size == pytest.approx(1 - within / clipped.var(ddof=1))
    inside, outside = clipped[cluster == 2], clipped[cluster != 2]
    spread = np.sqrt((len(inside) * inside.var() + len(outside) * outside.var()) / 200)
    assert effect.each[2] == pytest.approx((inside.mean() - outside.mean()) / spread)


def test_association_of_words_by_hand():
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 3, 300)
    word = np.where(rng.random(300) < 0.7, cluster, rng.integers(0, 3, 300)).astype(str).astype(object)
    table = np.array([[((cluster == c) & (word == str(w))).sum() for w in range(3)] for c in range(3)])
    expected = np.outer(table.sum(1), table.sum(0)) / 300
    phi = ((table - expected) ** 2 / expected).sum() / 300 - 2 * 2 / 299
    effect = nuisance._of_words("camera", word, cluster)
    assert effect.size == pytest.approx(phi / (3 - 4 / 299 - 1))
    assert effect.word == {0: "0", 1: "1", 2: "2"}
    shares = table[1, 1] / table[1].sum(), (table[:, 1].sum() - table[1, 1]) / (300 - table[1].sum())
    assert effect.each[1] == pytest.approx(2 * np.arcsin(np.sqrt(shares[0])) - 2 * np.arcsin(np.sqrt(shares[1])))


def test_chance_is_taken_out():
    rng = np.random.default_rng(0)
    sizes = [nuisance._of_numbers("date", [rng.normal(size=60)], rng.integers(0, 20, 60)).size for _ in range(50)]
    assert np.mean(sizes) < 0.06  # not 19 / 59
    assert min(sizes) == 0, "what is below 0 counts as 0"
    words = [nuisance._of_words("type", rng.integers(0, 3, 60).astype(str).astype(object), rng.integers(0, 9, 60))
             for _ in range(50)]  # fmt: skip
    assert np.mean([one.size for one in words]) < 0.06


def files(folder, images, where, **options):
    """Images as JPEG files in the folders ``where``; the source of all of them."""
    for i, (image, place) in enumerate(zip(images, where, strict=True)):
        path = folder / place / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x010F], exif[0x0110] = "Maker", "One" if options.get("old", [False] * 999)[i] else "Two"
        exif[0x0132] = f"20{10 if options.get('old', [False] * 999)[i] else 20}:01:{1 + i % 28:02d} 10:00:00"
        side = options.get("side", [16] * 999)[i]
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, 16)).save(path, exif=exif, quality=90)
    return open_source(str(folder))


def test_a_planted_source_folder_is_found(tmp_path):
    images, kind = drawings(120)
    folder = np.arange(120) % 2
    source = files(tmp_path, images, [f"camera{f}" for f in folder])
    store = open_store(source, size=16, channels=3)
    rows = np.argsort([name.split("/")[-1] for name in store.names])  # row of image i
    table, where = measure(store), np.empty(120, int)
    for cluster, fine, expected in [
        (2 * kind + folder, True, True),  # fewer folders than clusters, which follow them
        (folder, False, True),
        (folder, True, False),  # taken for labels, and found again
        (kind, True, False),
        (kind, False, False),
    ]:
        where[rows] = cluster
        some = effects(table, where)
        assert ("folder" in {one.factor for one in explaining(some, len(np.unique(cluster)), fine)}) == expected
    where[rows] = folder
    effect = next(one for one in effects(table, where) if one.factor == "folder")
    assert effect.word == {0: "camera0", 1: "camera1"}
    assert effect.size > 0.95


def test_headers_of_files(tmp_path):
    images, _ = drawings(60)
    old = (np.arange(60) % 2 == 0).tolist()
    source = files(tmp_path, images, [""] * 60, old=old, side=[16 if o else 32 for o in old])
    table = measure(store := open_store(source, size=16, channels=3))
    assert set(table["type"].to_pylist()) == {"JPEG"}
    assert table["camera"].to_pylist() == ["Maker One" if o else "Maker Two" for o in old]
    assert np.allclose(np.exp(table["width"].to_numpy()), [16 if o else 32 for o in old])
    assert np.allclose(np.exp(table["aspect"].to_numpy()), [1 if o else 2 for o in old])
    assert np.allclose(np.exp(table["bytes"].to_numpy()), [Path(n).stat().st_size for n in store.names])
    assert table["date"][0].as_py() == pytest.approx(14610 + 10 / 24)  # 2010-01-01
    strong = {one.factor for one in explaining(effects(table, np.array(old, int)), 2, True)}
    assert strong >= {"camera", "date", "width", "aspect"}
    assert "height" not in strong, "the same of all"
    (tmp_path / "0000.jpg").unlink()
    assert measure(store)["camera"][0].as_py() is None


def test_levels_of_folders():
    first, second = nuisance._folders(["r/a/x/1", "r/a/y/2", "r/b/x/3", "r/b/4"])
    assert first == ["a", "a", "b", "b"]
    assert second == ["x", "y", "x", None]
    assert nuisance._folders(["1", "2"]) == ([None, None], [None, None])
    assert nuisance._folders(["r\\a\\1", "r\\b\\2"]) == (["a", "b"], [None, None])


def test_the_sample_is_bounded_and_in_order():
    rows = nuisance.sample(1_000_000)
    assert len(rows) == 4096
    assert (np.diff(rows) > 0).all()
    assert rows[0] == 0
    assert rows[-1] == 999_999
    assert np.array_equal(nuisance.sample(100), np.arange(100))


def test_features_have_no_factors():
    table = measure(store_of(torch.randn(50, 6)))
    assert effects(table, np.arange(50) % 3) == []


def test_a_run_says_it(tmp_path, caplog):
    from deepcluster import DeepCluster

    images, _ = drawings(96, channels=1)
    half = np.arange(96) % 2 == 1
    source = planted(images, half, 120)[:, 0].numpy()
    with caplog.at_level(logging.WARNING, "deepcluster"):
        model = DeepCluster(2, method="deepcluster", epochs=1, out=str(tmp_path / "run")).fit(source)
    agrees = max((model.labels_ == half).mean(), (model.labels_ != half).mean())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What else could explain the clusters" in page
    warned = "brightness may explain the clusters" in caplog.text
    assert warned == ("Brightness may explain the clusters" in page)
    assert warned == (agrees > 0.95), "an untrained network sees brightness first"
    (tmp_path / "run" / "factors.parquet").write_bytes(b"damaged")
    model.report()
    assert "What else could" not in (tmp_path / "run" / "report.html").read_text()


def test_what_headers_say(tmp_path):
    """The time of the shot before that of the last change; sides as the image is shown; PNG as well; silence."""
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112] = "Maker\0", " One ", 6  # lies on its side
    exif[0x0132] = "2021:05:06 07:08:09"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    image.save(tmp_path / "a.jpg", exif=exif)
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.png")
    del exif.get_ifd(0x8769)[0x9003], exif[0x0110]
    exif[0x010F] = "M" * 200
    image.save(tmp_path / "c.jpg", exif=exif)
    assert decode.about(tmp_path / "a.jpg") == (20, 30, "JPEG", "Maker One", "2020:01:02 03:04:05")
    assert decode.about((tmp_path / "a.png").read_bytes()) == (20, 30, "PNG", "Maker One", "2020:01:02 03:04:05")
    assert decode.about(tmp_path / "b.png") == (30, 20, "PNG", "", "")
    assert decode.about(tmp_path / "c.jpg") == (20, 30, "JPEG", "M" * 80, "2021:05:06 07:08:09")
    (tmp_path / "d.jpg").write_bytes(b"nothing")
    for bad in (tmp_path / "d.jpg", tmp_path / "e.jpg", tmp_path):
        with pytest.raises(decode.BadImage):
            decode.about(bad)


def test_dates_that_are_none_and_dates_with_more(tmp_path):
    for i, taken in enumerate(["2020:01:02 00:00:00.25", "0000:00:00 00:00:00", "yesterday"]):
        exif = Image.Exif()
        exif[0x0132] = taken
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.jpg", exif=exif)
    table = measure(open_store(open_source(str(tmp_path)), size=8, channels=3))
    assert table["date"].to_pylist() == [18263.0, None, None]


def test_what_can_be_read_from_pixels():
    x = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    x[1] = 255
    x[2, 0] = 255  # red
    x[3, :, :, ::2] = 255  # black and white stripes
    found = nuisance._pixels(x)
    assert found["brightness"] == pytest.approx([0, 1, 1 / 3, 0.5])
    assert found["contrast"] == pytest.approx([0, 0, 0, 0.5])
    assert found["saturation"] == pytest.approx([0, 0, 1, 0])
    assert found["hue_x"] == pytest.approx([0, 0, 1, 0])
    assert found["hue_y"] == pytest.approx([0] * 4, abs=1e-6)
    assert nuisance._pixels(x[2:3].roll(1, 1))["hue_y"] == pytest.approx([0.75**0.5])  # green
    assert found["sharpness"] == pytest.approx([0, 0, 0, 2 / 0.51])  # each pixel beside two of the other colour
    assert set(nuisance._pixels(x[:, :1])) == {"brightness", "contrast", "sharpness"}
    assert nuisance._pixels(x[3:, :, :2, :2])["sharpness"] == pytest.approx([0])
    big, small = (
        nuisance._pixels(torch.full((1, 1, 8, 8), v, dtype=torch.uint8) + 9 * x[3:, :1] // 255) for v in (200, 20)
    )
    assert big["sharpness"] == pytest.approx(small["sharpness"]), "of light it knows nothing"


def test_no_single_image_decides():
    cluster = np.arange(400) % 2
    x = np.zeros(400)
    x[::7] = 1.0
    x[1] = 1e6
    assert nuisance._of_numbers("date", [x], cluster).size < 0.05
    assert abs(nuisance._of_numbers("date", [x], cluster).each[1]) < 0.2


def test_little_is_not_spoken_of():
    rng = np.random.default_rng(0)
    x, kind = rng.normal(size=100), np.r_[[2] * 4, np.arange(96) % 2]
    assert set(nuisance._of_numbers("date", [x], kind).each) == {0, 1}, "a cluster of four"
    assert nuisance._of_numbers("date", [np.ones(100)], kind) is None
    assert nuisance._of_numbers("date", [x], np.zeros(100, int)) is None
    assert nuisance._of_numbers("date", [x[:5]], np.arange(5)) is None
    words = np.array(["a", "b"] * 48 + ["c"] * 4, object)
    effect = nuisance._of_words("type", words, np.array(["ab".find(w) + 1 for w in words]))
    assert (effect.n_words, set(effect.each)) == (3, {1, 2})
    assert effect.size == pytest.approx(1, abs=0.02)
    assert nuisance._of_words("type", words[:1].repeat(100), kind) is None, "all alike"
    assert nuisance._of_words("type", np.arange(100).astype(str).astype(object), kind) is None, "each its own"
    assert nuisance._of_words("type", words, np.zeros(100, int)) is None
    many = np.array(["a"] * 50 + ["b"] * 29 + [f"c{i}" for i in range(21)], object)
    assert nuisance._of_words("camera", many, kind) is None, "a word for every five images"
    rare = np.array(["a"] * 60 + ["b"] * 34 + ["c", "d", "e"] * 2, object)
    effect = nuisance._of_words("camera", rare, np.r_[[0] * 94, [1] * 6])
    assert (effect.n_words, effect.word[1]) == (3, ""), "rare words are one"
    wide = nuisance._of_numbers("hue", [np.where(kind == 1, -1.0, 1), x], kind)
    assert min(wide.each.values()) > 1, "of two numbers a distance has no sign"


def test_factors_that_are_unknown_of_most_images_and_small_sets_are_left_out():
    kind = np.arange(100) % 2
    date = [float(k) if i > 50 else None for i, k in enumerate(kind)]  # so that rows and places are apart
    table = pa.table({"row": np.arange(100), "date": pa.array(date, pa.float64()), "bytes": kind.astype(float)})
    assert [one.factor for one in effects(table, kind)] == ["file size"]
    assert explaining(effects(table, kind), 2, False) == [], "what an image shows sets the size of its file"
    date[50] = 0.0
    table = table.set_column(1, "date", pa.array(date, pa.float64()))
    assert {one.factor: one.size for one in effects(table, kind)} == pytest.approx({"date": 1, "file size": 1})
    table = table.append_column("camera", pa.array([None if x is None else str(x) for x in date], pa.string()))
    shuffled = np.random.default_rng(0).permutation(kind)
    by_hand = {
        "date": nuisance._of_numbers("date", [np.array(date[50:])], shuffled[50:]),
        "camera": nuisance._of_words("camera", np.array([str(x) for x in date[50:]], object), shuffled[50:]),
    }
    assert {name: one for one in effects(table, shuffled) if (name := one.factor) in by_hand} == by_hand
    assert effects(table.slice(0, 49), kind) == []
    assert len(effects(table.slice(0, 50), kind)) > 0
    weak = pa.table({"row": np.arange(100), "date": np.where(np.arange(100) < 30, kind, kind[::-1]).astype(float),
                     "bytes": kind.astype(float)})  # fmt: skip
    sizes = [one.size for one in effects(weak, kind)]
    assert sizes == sorted(sizes, reverse=True)


class Run:
    """As much of ``report.found.Found`` as ``causes`` reads."""

    def __init__(self, folder, cluster, labels="none", names=None):
        self.folder, self.cluster, self.config = folder, np.asarray(cluster), {"data": {"labels": labels}}
        ids = np.unique(self.cluster).tolist()
        self.clusters = [{"id": c, "name": (names or {}).get(c, "")} for c in ids]

    def __len__(self):
        return len(self.cluster)


def test_the_page_shows_each_cluster_and_warns(tmp_path):
    kind = np.arange(120) % 3
    camera = np.array(["<b>One", "Two", "Two"], object)[kind]
    table = pa.table({"row": np.arange(120), "brightness": np.where(kind == 1, 0.2, 0.8) + 0.01 * (np.arange(120) % 7),
                      "camera": pa.array(camera, pa.string())})  # fmt: skip
    pq.write_table(table, tmp_path / "factors.parquet")
    page = causes(Run(tmp_path, kind, names={0: "<i>"}))
    assert "Cluster 0 · &lt;i&gt;" in page
    assert "<bdi>&lt;b&gt;One</bdi>" in page
    assert "<b>" not in page.lower().replace("<bdi>", "")
    assert page.count('<th scope="row">') == 4  # all, and three clusters
    found = {one.factor: one for one in effects(table, kind)}
    assert page.count('<p class="odd">') == sum(one.size >= 0.6 for one in found.values()) >= 1
    assert "Brightness may explain the clusters" in page
    assert "your kinds may differ in it themselves" in page.lower()
    assert f"<td>{found['brightness'].size:.2f}</td>" in page
    assert f"+{found['brightness'].each[0]:.1f}" in page
    assert f">{found['brightness'].each[1]:.1f}" in page, "a minus of its own"
    assert "+" not in page.split("Cluster 1")[1].split("<td")[2], "how much a word stands out has no sign"
    assert "--v:1.000" in page


def test_the_page_is_silent_where_it_knows_nothing(tmp_path):
    kind = np.arange(120) % 3
    assert causes(Run(tmp_path, kind)) == ""
    table = pa.table({"row": np.arange(120), "brightness": np.random.default_rng(0).normal(size=120)})
    pq.write_table(table, tmp_path / "factors.parquet")
    assert '<p class="odd">' not in causes(Run(tmp_path, kind))
    assert causes(Run(tmp_path, kind[:119])) == "", "of another run"
    assert causes(Run(tmp_path, kind * 0)) == "", "one cluster"
    many = np.arange(120) % 40
    page = causes(Run(tmp_path, many))
    assert page.count('<th scope="row">') == 31
    assert "The 30 largest clusters are shown." in page
    assert page.count("<td>–</td>") == 30, "three images each: too few"
    pq.write_table(table.slice(0, 0), tmp_path / "factors.parquet")
    assert causes(Run(tmp_path, kind)) == ""


def test_folders_that_were_taken_for_labels_are_no_suspects_on_the_page(tmp_path):
    kind = np.arange(120) % 3
    folder = pa.array([f"f{k}" for k in kind], pa.string())
    pq.write_table(pa.table({"row": np.arange(120), "folder": folder}), tmp_path / "factors.parquet")
    assert "Folder may explain" in causes(Run(tmp_path, kind))
    assert "Folder may explain" not in causes(Run(tmp_path, kind, "auto"))
    assert "Folder may explain" in causes(Run(tmp_path, 2 * kind + np.arange(120) % 2, "none"))


def test_the_most_telling_word_is_named():
    cluster = np.arange(200) // 100
    word = np.array((["usual"] * 60 + ["special"] * 40) + (["usual"] * 90 + ["other"] * 10), object)
    assert nuisance._of_words("camera", word, cluster).word == {0: "special", 1: "usual"}


def test_a_sample_of_files_some_of_which_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(nuisance, "RUNS", 3)
    monkeypatch.setattr(nuisance, "LENGTH", 4)
    images, _ = drawings(60)
    files(tmp_path, images, [f"{i // 10}" for i in range(60)], old=[i % 2 == 0 for i in range(60)])
    (tmp_path / "0" / "0000.jpg").write_bytes(b"broken")
    store = open_store(open_source(str(tmp_path)), size=16, channels=3)
    assert len(store) == 59
    table, rows = measure(store), nuisance.sample(59)
    assert len(rows) == 12
    assert table["row"].to_pylist() == rows.tolist()
    assert table["folder"].to_pylist() == [str((i + 1) // 10) for i in rows]
    assert table["camera"].to_pylist() == [f"Maker {'Two' if i % 2 == 0 else 'One'}" for i in rows]
    own = store.take(torch.from_numpy(rows)).float().mean((1, 2, 3)) / 255
    assert table["brightness"].to_numpy() == pytest.approx(own.numpy(), abs=1e-5)


def test_it_is_looked_for_warned_of_and_kept(tmp_path, caplog):
    images, _ = drawings(120)
    source = files(tmp_path / "images", images, [f"camera{i % 2}" for i in range(120)])
    store = open_store(source, size=16, channels=3)
    folder = np.array([name.split("/")[-2] == "camera1" for name in store.names]).astype(int)
    for cluster, warned in [(folder + 2 * (np.arange(120) % 2), True), (folder, False)]:  # folders taken for kinds
        caplog.clear()
        with caplog.at_level(logging.WARNING, "deepcluster"):
            nuisance.look(tmp_path, store, cluster, True)
        assert ("folder may explain the clusters: 98 %" in caplog.text) == warned
        assert nuisance.read(tmp_path).equals(measure(store))
    for damaged in (pa.table({"x": [1]}), pa.table({"row": ["0"]})):
        pq.write_table(damaged, tmp_path / "factors.parquet")
        assert nuisance.read(tmp_path) is None
    (tmp_path / "factors.parquet").write_bytes(b"no table")
    assert nuisance.read(tmp_path) is None
    (tmp_path / "factors.parquet").unlink()
    assert nuisance.read(tmp_path) is None


def test_headers_alone_are_read_and_of_files_only(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda *_: pytest.fail("pixels are decoded"))
        assert decode.about(tmp_path / "a.png")[:2] == (30, 20)

    def refuse(path):
        raise decode.BadImage("not a file")

    monkeypatch.setattr(decode, "_check_file", refuse)
    assert decode.about((tmp_path / "a.png").read_bytes())[2] == "PNG"
    with pytest.raises(decode.BadImage, match="not a file"):
        decode.about(tmp_path / "a.png")
