"""Copies of images are found, and nothing else is called one."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from tiny import store_of

from deepcluster import oddities
from deepcluster.decode import decode
from deepcluster.oddities import duplicates

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
    shadowed = (245 + 0.3 * noise[:20]).round().byte()
    shadowed[:, :, 8:24, 8:24] -= 7  # the same faint shadow on all
    assert set(found(shadowed)) == {-1}


def test_features_must_agree(album):
    taken, images = album
    both = torch.cat([images, torch.stack([CHANGES["smaller"](taken[i]) for i in range(2)])])
    told = features(both)
    told[-1] *= -1
    assert duplicates(store_of(both), told).tolist() == [-1] * 120 + [0, -1]


def test_colours_must_agree(album):
    _, images = album
    grey = images.float().mean(1, keepdim=True)
    faint, fainter, other = ((grey + w * (images - grey)).byte() for w in (0.2, 0.15, -0.2))
    told = np.concatenate([features(grey)] * 2)
    assert duplicates(store_of(torch.cat([faint, fainter])), told).tolist() == [-1] * 120 + list(range(120))
    assert set(duplicates(store_of(torch.cat([faint, other])), told).tolist()) == {-1}


def test_contrast_in_one_colour_suffices(album):
    images = album[1].clone()
    images[:, 1:] = 90
    assert found(torch.cat([images, images[:5] + (images[:5] < 255)])) == [-1] * 120 + list(range(5))


def test_pictures_that_share_much_are_no_copies(album):
    _, images = album
    mixed = images[:10].float().lerp(images[10:20].float(), 0.3).byte()
    assert set(found(torch.cat([images[:10], mixed]))) == {-1}


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
    near = oddities._unlike(small[:1].expand_as(small), small) <= oddities.SAME
    assert near.sum() > 5
    assert (first[near][1:] == 0).all()


def test_a_copy_belongs_to_the_lowest_first_it_is_close_to():
    a, b = photos(2, seed=3, side=32).float()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    film = torch.stack([a + (b - a) * w for w in torch.linspace(0, 1, 60)])[order].byte()
    first = np.array(duplicates(store_of(film), np.linspace([0, 1], [1, 0], 60)[order.numpy()]))
    small = F.adaptive_avg_pool2d(film.float(), 16).byte()
    heads = np.flatnonzero(first < 0)
    for copy in np.flatnonzero(first >= 0):
        close = oddities._unlike(small[heads], small[copy].expand(len(heads), -1, -1, -1)) <= oddities.SAME
        assert first[copy] <= heads[close & (heads < copy)].min(initial=60)


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


def test_a_few_images_that_are_all_copies(album):
    taken, images = album
    copies = [CHANGES[name](taken[9]) for name in ("smaller", "brighter", "cropped")]
    assert found(torch.stack([images[9], *copies])) == [-1, 0, 0, 0]


def test_equal_vectors_are_copies_near_ones_are_not():
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    x[7], x[8] = x[2], x[2] + 1e-6
    assert duplicates(store_of(x), x.numpy()).tolist() == [-1] * 7 + [2] + [-1] * 12
