"""Which images report.html shows, with which pixels, where on its map, in how much room."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from report_read import Page, image, written
from report_run import a_run, plain_store, plan_of, tables
from tiny import noise, store_of

from deepcluster.landscape import landscape_of
from deepcluster.report import pictures, points


def test_images_are_chosen_by_distance_margin_and_oddity(tmp_path):
    reason = ["" if i != 11 else "very dark" for i in range(50)]
    run = a_run(tmp_path / "run", 50, 2, cluster=[0] * 40 + [1] * 10, images={"reason": reason})
    columns, _ = tables(50, 2, cluster=[0] * 40 + [1] * 10)
    page = Page(written(run))
    distance, margin = columns["distance"][:40], columns["margin"][:40]
    typical = list(np.argsort(distance)[:9])
    border = [i for i in np.argsort(margin) if i not in typical][:9]
    odd = lambda i: i % 7 == 0 or i == 11
    far = [i for i in sorted(np.argsort(-distance), key=lambda i: not odd(i)) if i not in [*typical, *border]][:9]
    assert page.shown("c0") == [f"in/{i:04d}.png" for i in [*typical, *border, *far]]
    marked = [page.path(int(a["data-i"])) for a in page.all("button") if a.get("class") == "far"]
    shown = [path for c in (0, 1) for path in page.shown(f"c{c}")]
    assert sorted(marked) == sorted(path for path in shown if odd(int(path[3:7])))
    assert {page.path(int(i)): why for i, why in page.data["odd"].items()} == {"in/0011.png": "very dark"}


def test_pictures_show_the_pixels_of_their_image_also_in_another_order(tmp_path):
    run = a_run(tmp_path / "run", 200, 2)
    columns = tables(200, 2)[0]
    names, lost = columns["path"], int(np.flatnonzero(columns["is_representative"])[0])  # cannot be read any more
    store = plain_store(names)
    kept = [i for i in reversed(range(200)) if i != lost]
    store.rows, store.names = np.array(kept), [names[i] for i in kept]
    page = Page(written(run, store))
    assert [page.path(i) for i in page.data["blank"]] == [names[lost]]
    number = [names.index(page.path(i)) for i in range(200)]
    assert len(page.gallery) == 54
    for key, address in page.gallery.items():
        i = number[int(key)]
        if i == lost:
            assert address == ""
        else:
            assert np.unique(image(address).reshape(-1, 3), axis=0).tolist() == [[i, 255 - i, 128]]
    side, width = page.data["tile"], page.data["columns"]
    sheet = image(page.scripts["sheet0"])
    assert page.data["sheets"] == 1
    for place, i in enumerate(number):
        y, x = place // width * side, place % width * side
        expected = [0, 0, 0] if i == lost else [i, 255 - i, 128]
        assert np.unique(sheet[y : y + side, x : x + side].reshape(-1, 3), axis=0).tolist() == [expected]
    typical = set(np.flatnonzero(columns["is_representative"]).tolist()) - {lost}
    assert {number[int(key)] for key in page.heats} == typical
    assert all(image(one).shape == (24, 24, 3) for one in page.heats.values())


def test_the_map_and_the_neighbours_are_those_of_the_landscape(tmp_path):
    run = a_run(tmp_path / "run", 80, 3, cluster=np.arange(80) % 3)
    page, land, columns = Page(written(run)), landscape_of(run), tables(80, 3, cluster=np.arange(80) % 3)[0]
    names = columns["path"]
    rows = np.array([names.index(page.path(i)) for i in range(80)])
    xy = page.numbers("xy", "<u2").reshape(80, 2) / 65535
    spread = (land.positions.max(0) - land.positions.min(0)).max()
    assert np.allclose(xy - xy[0], (land.positions[rows] - land.positions[rows[0]]) / spread, atol=1e-4)
    assert np.array_equal(rows[page.numbers("near", "<u2").reshape(80, 8)], land.neighbours[rows])
    assert np.allclose(page.numbers("far", "<u2").reshape(80, 8) / 32767, land.distances[rows], atol=1e-4)
    assert page.numbers("cluster", "<u2").tolist() == columns["cluster"][rows].tolist()
    apart = np.linalg.norm(np.diff(xy, axis=0), axis=1).mean()  # in the page's order near ones follow each other
    assert apart < 0.5 * np.linalg.norm(xy - xy[np.random.default_rng(0).permutation(80)], axis=1).mean()


def test_of_more_images_than_fit_those_on_cards_and_an_even_sample_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(points, "MOST", 100)
    run = a_run(tmp_path / "run", 400, 2)
    store = plain_store(tables(400, 2)[0]["path"])
    text = written(run, store)
    page = Page(text)
    assert "an even sample of 100 of the 400 images" in text
    assert page.data["m"] == len(page.data["paths"]) == len(set(page.data["paths"])) == 100
    cards = {path for c in (0, 1) for path in page.shown(f"c{c}")}
    assert len(cards) == 54
    assert all(address for address in page.gallery.values())
    others = np.setdiff1d(np.arange(400), [int(path[3:7]) for path in cards])
    rest = np.searchsorted(others, sorted(int(page.path(i)[3:7]) for i in range(100) if page.path(i) not in cards))
    assert (rest[0], rest[-1]) == (0, 345)
    assert set(np.diff(rest)) <= {7, 8}
    near = page.numbers("near", "<u2").reshape(100, 8)
    assert near.max() < 100
    assert (near != np.arange(100)[:, None]).all()


def test_paths_of_any_length_leave_the_page_small(tmp_path, monkeypatch):
    monkeypatch.setattr(points, "PATHS", 100_000)
    names = [f"{i}{'long' * 900}.png" if i % 2 else f"{i}.png" for i in range(200)]
    page = Page(written(a_run(tmp_path / "run", 200, 2, names=names)))
    assert page.data["m"] == 55  # what fits; more than the 54 on cards
    assert len(page.scripts["data"]) < 250_000


def test_pictures_keep_to_their_room_also_of_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "SHEETS", 300_000)
    monkeypatch.setattr(pictures, "CARDS", 200_000)
    run = a_run(tmp_path / "run", 600, 10, plan=plan_of(10, shape=(3, 96, 96)), model=False)
    store = store_of(noise(600, 3, 96))
    store.names = tables(600, 10)[0]["path"]
    page = Page(written(run, store))
    assert len(page.gallery) == 270
    assert 100_000 < sum(map(len, page.gallery.values())) < 1.1 * 200_000
    sheets = [text for key, text in page.scripts.items() if key.startswith("sheet")]
    assert 150_000 < sum(map(len, sheets)) < 1.1 * 300_000


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_images_have_no_map(tmp_path, n):
    run = a_run(tmp_path / "run", n, 1, cluster=[0] * n)
    page = Page(written(run, plain_store(tables(n, 1)[0]["path"]), np.zeros(n, int)))
    assert page.data["xy"] == page.data["near"] == ""
    assert "hidden" in next(a for a in page.all("section") if a["id"] == "map")
    assert len(page.gallery) == n


def test_vectors_have_no_pictures_but_a_map(tmp_path):
    run = a_run(tmp_path / "run", 20, 2, plan=plan_of(2, shape=(5,)))
    page = Page(written(run, store_of(torch.rand(20, 5))))
    assert (page.data["tile"], page.gallery, page.heats) == (0, {}, {})
    assert page.numbers("xy", "<u2").size == 40
    assert not page.all("img")


def test_copies_are_counted_and_shown_in_groups(tmp_path):
    names, sha1 = tables(30, 2)[0]["path"], tables(30, 2)[0]["sha1"]
    of = [None] * 30
    for i in (4, 9, 20):
        of[i] = names[2]
    of[8] = names[7]
    sha1[9] = sha1[2]
    run = a_run(tmp_path / "run", 30, 2, images={"duplicate_of": pa.array(of, pa.string()), "sha1": sha1})
    text = written(run)
    page = Page(text)
    assert "1 exact copy and 3 near copies of 2 images" in text
    assert page.shown("copies") == [names[i] for i in (2, 4, 9, 20, 7, 8)]
    assert re.findall("<h4>(.*?)</h4>", text[text.index('id="copies"') :]) == ["4 images", "2 images"]
    assert {page.path(int(i)): first for i, first in page.data["copies"].items()} == {
        names[4]: names[2], names[9]: names[2], names[20]: names[2], names[8]: names[7]
    }  # fmt: skip


def test_clusters_of_one_colour_lie_apart_and_differ_by_shape():
    spots = np.random.default_rng(0).random((30, 2))
    marks = points._marks(spots)
    assert [one["colour"] for one in marks[:8]] == list(range(8))
    assert len({(one["colour"], one["shape"]) for one in marks[:20]}) == 20
    colour = np.array([one["colour"] for one in marks])
    nearest = lambda c: [np.linalg.norm(spots[:c][colour[:c] == one] - spots[c], axis=1).min() for one in range(8)]
    assert all(nearest(c)[colour[c]] == max(nearest(c)) for c in range(8, 30))
    assert points._marks(np.zeros((1, 2))) == [{"colour": 0, "shape": 0}]
