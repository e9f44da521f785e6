"""Whether something else explains the clusters: planted splits are found, clean sets stay unsuspected."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import store_of

from deepcluster import nuisance
from deepcluster.nuisance import effects, explaining, measure
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
    assert np.mean(sizes) < 0.06  # not 19 / 59; what is below 0 counts as 0
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
