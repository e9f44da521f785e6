"""Copies of images are found and nothing else is called one; what is out of place is told why."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from tiny import store_of
from torch import nn

from deepcluster import oddities
from deepcluster.classifier import Classifier, Spec
from deepcluster.decode import decode
from deepcluster.oddities import duplicates, reasons, renewed

SIDE = 96  # of the photographs as they were taken; stored at 32


def photos(n, seed=0, side=SIDE):
    """(n, 3, side, side) uint8: random shapes with some texture."""
    rng = torch.Generator().manual_seed(seed)
    levels = [(5, 1.0), (10, 0.3)]
    parts = [F.interpolate(torch.randn(n, 3, s, s, generator=rng), (side, side), mode="bicubic") * w for s, w in levels]
    return (128 + 45 * sum(parts)).clamp(0, 255).byte()


def picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def stored(picture, form="PNG", **options):
    """As it is kept after a way through a file."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return torch.from_numpy(decode(file.getvalue(), 32, 3))


def marked(image):
    image = image.copy()
    ImageDraw.Draw(image).rectangle((70, 84, 92, 92), fill=(230, 230, 230))
    return image


CHANGES = {
    "saved at 60 %": lambda p: stored(p, "JPEG", quality=60),
    "smaller": lambda p: stored(p.resize((67, 67), Image.Resampling.BICUBIC), "JPEG", quality=95),
    "brighter": lambda p: stored(p.point(lambda v: min(255, round(v * 1.1))), "JPEG", quality=95),
    "cropped": lambda p: stored(p.crop((2, 2, SIDE, SIDE)), "JPEG", quality=95),
    "marked": lambda p: stored(marked(p), "JPEG", quality=95),
}


@pytest.fixture(scope="module")
def album():
    """120 photographs, and each of them as stored."""
    taken = [picture(image) for image in photos(120)]
    return taken, torch.stack([stored(one) for one in taken])


def features(images):
    """Of a network that sees shapes: near for alike images."""
    small = F.adaptive_avg_pool2d(images.float(), 4).flatten(1)
    return (small - small.mean(1, keepdim=True)).numpy()


def found(images):
    return duplicates(store_of(images), features(images)).tolist()


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(album, change):
    taken, images = album
    copies = torch.stack([CHANGES[change](taken[i]) for i in range(40, 80)])
    assert not (copies == images[40:80]).flatten(1).all(1).any()
    first = found(torch.cat([images, copies]))
    assert first[:120] == [-1] * 120
    right = [i == row for i, row in zip(first[120:], range(40, 80), strict=True)]
    assert {i for i, here in zip(first[120:], right, strict=True) if not here} <= {-1}
    assert sum(right) >= (36 if change == "marked" else 40)  # on some a mark changes what else is seen


def test_the_first_of_a_group_is_its_lowest_row(album):
    taken, images = album
    copies = torch.stack([CHANGES["smaller"](taken[i]) for i in (2, 1)])
    assert found(torch.cat([copies, images[:3]])) == [-1, -1, -1, 1, 0]


def test_equal_images_are_copies_also_of_a_copy(album):
    taken, images = album
    again = CHANGES["saved at 60 %"](taken[3])[None]
    assert found(torch.cat([images[:6], again, images[1:2], again, images[1:2]])) == [-1] * 6 + [3, 1, 3, 1]


def test_rows_are_those_of_the_store_not_of_its_data(album):
    _, images = album
    data = torch.cat([images[:3], images[1:3]])
    kept = np.array([1, 2, 3, 4])
    assert duplicates(replace(store_of(data), rows=kept), features(data[1:])).tolist() == [-1, -1, 0, 1]


def test_different_photographs_are_no_copies(album):
    assert set(found(torch.stack([stored(picture(p)) for p in photos(300, seed=1)]))) == {-1}


@pytest.mark.parametrize("side", [8, 16, 32])
def test_two_digits_in_like_handwriting_are_no_copies(side):
    digits = torch.from_numpy(load_digits().images).float()[:, None] * 255 / 16
    images = F.interpolate(digits, (side, side), mode="bilinear").round().byte()
    assert set(duplicates(store_of(images), digits.flatten(1).numpy()).tolist()) == {-1}


def test_smallest_pictures_must_be_equal(album):
    images = F.adaptive_avg_pool2d(album[1].float(), 8).byte()
    assert found(torch.cat([images, images[:1], (images[1:2].float() * 0.99).byte()])) == [-1] * 120 + [0, -1]


def test_small_pictures_must_be_nearer_than_large_ones(album):
    _, images = album
    mixed = images[:40].float().lerp(images[40:80].float(), torch.linspace(0.05, 0.2, 40)[:, None, None, None])

    def copies(side):
        both = F.adaptive_avg_pool2d(torch.cat([images.float(), mixed]), side).round().byte()
        return np.flatnonzero(np.array(found(both)[120:]) == np.arange(40))

    few, many = copies(16), copies(24)
    assert len(few) >= 5
    assert len(many) >= len(few) + 5


def test_almost_blank_pictures_must_be_equal():
    noise = torch.randn(100, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    pages = (245 + 2 * noise).byte()
    pages[60] = pages[4]
    assert np.flatnonzero(np.array(found(pages)) >= 0).tolist() == [60]
    pages[::2, :, 8:24, 8:24] -= 3  # the same faint shadow
    assert set(found(pages[:60])) == {-1}


def test_features_must_agree(album):
    taken, images = album
    both = torch.cat([images, torch.stack([CHANGES["smaller"](taken[i]) for i in range(2)])])
    told = features(both)
    told[-1] *= -1
    assert duplicates(store_of(both), told).tolist() == [-1] * 120 + [0, -1]


def test_colours_must_agree(album):
    _, images = album
    recoloured = images[:5].flip(1)  # nearly the same in grey
    assert set(found(torch.cat([images, recoloured]))) == {-1}


def test_a_negative_is_no_copy():
    one = photos(4, side=16)
    assert (oddities._unlike(one, 255 - one) == np.inf).all()
    assert oddities._unlike(one, one // 2 + 40) == pytest.approx([0] * 4, abs=0.03)


def test_a_group_of_many_has_one_first(album):
    taken, images = album
    copies = [stored(taken[7], "JPEG", quality=q) for q in range(50, 95)]
    assert set(found(torch.cat([images, torch.stack(copies)]))[120:]) == {7}


def test_a_chain_of_small_changes_is_cut():
    a, b = photos(2, seed=3, side=32).float()
    film = torch.stack([a + (b - a) * w for w in torch.linspace(0, 1, 150)]).byte()
    first = np.array(duplicates(store_of(film), np.linspace([0, 1], [1, 0], 150)))
    copies = np.flatnonzero(first >= 0)
    assert len(copies) > 60
    assert (first < 0).sum() > 3
    assert (first[first[copies]] < 0).all()
    small = F.adaptive_avg_pool2d(film.float(), 16).byte()
    assert oddities._unlike(small[first[copies]], small[copies]).max() <= oddities.UNLIKE


def test_an_index_finds_the_same(album, monkeypatch):
    taken, images = album
    more = torch.stack([stored(picture(p)) for p in photos(300, seed=1)])
    both = torch.cat([images, more, torch.stack([CHANGES["cropped"](taken[i]) for i in range(40)])])
    expected = found(both)
    assert expected == [-1] * 420 + list(range(40))
    monkeypatch.setattr(oddities, "EXACT", 100)
    assert found(both) == expected


def test_blocks_change_nothing(album, monkeypatch):
    taken, images = album
    both = torch.cat([images, torch.stack([CHANGES["cropped"](taken[i]) for i in range(20)]), images[:7]])
    expected = found(both)
    monkeypatch.setattr(oddities, "BLOCK", 16)
    assert found(both) == expected


def test_ten_thousand_equal_images_are_one_group():
    assert found(torch.full((10_000, 1, 16, 16), 7).byte()) == [-1] + [0] * 9_999
    assert found(photos(1, side=32).repeat(10_000, 1, 1, 1)) == [-1] + [0] * 9_999


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_images(n):
    assert found(photos(n, side=32)) == [-1] * n


def test_equal_vectors_are_copies_near_ones_are_not():
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    x[7], x[8] = x[2], x[2] + 1e-6
    assert duplicates(store_of(x), x.numpy()).tolist() == [-1] * 7 + [2] + [-1] * 12


class Two(nn.Module):
    """A backbone that is not used: features are given."""


def judge():
    """Three clusters at right angles, of which the last has no images."""
    self = Classifier(Spec("convnet", (3, 32, 32), "Linear", 3, "0"), Two(), Two(), 2)
    self.centroids.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.9], [0.0, 0.0]]))
    self.reach.copy_(torch.tensor([0.1, 0.1, torch.inf]))
    return self


def seen(vectors, cluster, outliers):
    unit = F.normalize(torch.tensor(vectors), dim=1)
    distance = 1 - (unit * torch.eye(2)[cluster]).sum(1)
    said = np.isin(np.arange(len(unit)), outliers)
    return {
        "features": 5 * unit.numpy(),
        "cluster": np.array(cluster),
        "distance": distance.numpy(),
        "is_outlier": said,
    }


def test_reasons_by_place():
    found = seen([[1.0, 0.2], [0.2, 1.0], [-1.0, -0.1], [0.8, 0.6], [0.6, 0.8]], [0, 0, 0, 1, 1], [1, 2, 3, 4])
    expected = ["", "nearer to cluster 1", "far from every cluster", "far from every cluster", "far from every cluster"]
    store, classifier = store_of(photos(5, side=32)), judge()
    assert reasons(store, found, classifier) == expected
    classifier.reach[0] = 0.3
    assert reasons(store, found, classifier)[3:] == ["nearer to cluster 0", "far from every cluster"]
    classifier.reach[0] = 0.5
    assert reasons(store, found, classifier)[3:] == ["nearer to cluster 0", "far from its own cluster"]
    assert reasons(store, found) == ["", *["far from its own cluster"] * 4]


def test_reasons_by_look():
    images = photos(500, side=32)
    images[3], images[4] = images[3] // 8, 255 - images[4] // 8
    images[5] = torch.tensor([200, 30, 90])[:, None, None]
    images[6] = images[6] // 8
    store, outliers = store_of(images), [3, 4, 7]
    found = seen([[1.0, 0.1]] * 500, [0] * 500, outliers)
    expected = {
        3: "among the darkest 1 %",
        4: "among the brightest 1 %",
        5: "almost blank",
        7: "far from every cluster",
    }
    classifier = judge()
    classifier.reach[:] = 0.001
    said = reasons(store, found, classifier)
    assert {i: reason for i, reason in enumerate(said) if reason} == expected
    found["is_outlier"][[4, 5, 6]] = [False, True, True]
    assert {4, 6} & {i for i, reason in enumerate(renewed(said, found, classifier)) if reason} == {6}
    assert renewed(said, found, classifier)[3] == expected[3]
    assert renewed(said, found, classifier)[5:7] == ["almost blank", "far from every cluster"]


def test_every_outlier_has_a_reason_whatever_the_batch(monkeypatch):
    rng = np.random.default_rng(0)
    found = seen(rng.normal(size=(90, 2)).astype(np.float32).tolist(), [0] * 90, range(0, 90, 2))
    said = reasons(store_of(photos(90, side=32)), found, judge())
    assert [bool(reason) for reason in said] == found["is_outlier"].tolist()
    monkeypatch.setattr(oddities, "BLOCK", 7)
    assert reasons(store_of(photos(90, side=32)), found, judge()) == said


def test_a_store_of_faint_images_is_not_blank():
    images = (photos(50, side=16) // 64) + 100
    images[9] = 100
    said = reasons(store_of(images), seen([[1.0, 0.0]] * 50, [0] * 50, []))
    assert [i for i, reason in enumerate(said) if reason] == [9]
    same = store_of(torch.full((50, 1, 16, 16), 9).byte())
    assert reasons(same, seen([[1.0, 0.0]] * 50, [0] * 50, [])) == [""] * 50


def test_vectors_have_no_looks():
    store = store_of(torch.zeros(2, 2))
    assert reasons(store, seen([[1.0, 0.0], [-1.0, 0.0]], [0, 0], [1])) == ["", "far from its own cluster"]
