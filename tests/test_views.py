"""Views against a slow reference that works pixel by pixel, and against torchvision where it does the same."""

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from deepcluster import views
from deepcluster.draws import Draws
from deepcluster.views import VIEWS, View, as_view

GEOMETRY = View(area=(0.4, 0.9), aspect=(0.9, 1.2), rotate=25, zoom=(0.8, 1.3), shift=0.1, shear=10, flip=1)
COLOUR = View(brightness=0.3, contrast=0.5, saturation=0.6, hue=0.2)
BOTH = replace(GEOMETRY, brightness=0.3, contrast=0.5, saturation=0.6, hue=0.2)
ALL = replace(BOTH, flip=0.5, flip_grey=0.5, colour=0.7, grey=0.3, blur=0.5, noise=0.1)
SHAPES = [(3, 12, 12), (1, 12, 12), (4, 9, 9), (3, 7, 16), (1, 1, 5), (3, 33, 20)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(n: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=seeded(7))


@pytest.fixture
def draw_at(monkeypatch):
    """Make every draw the same share of its range, every chance of at least a half true: no randomness is left."""

    def at(share: float) -> None:
        uniform = lambda self, *ranges: torch.stack(
            [torch.full((self.n,), float(low + share * (high - low))) for low, high in ranges]
        )
        monkeypatch.setattr(views.Draws, "uniform", uniform)
        monkeypatch.setattr(views.Draws, "chance", lambda self, p: torch.full((self.n,), p >= 0.5))

    return at


def naive(view: View, image: np.ndarray, share: float, out: tuple[int, int]) -> np.ndarray:
    """One image, (C, H, W) float64 in [0, 1]: each output pixel looks up its origin; then one colour part at a time."""
    at = lambda low, high: low + share * (high - low)
    spread = lambda x: at(-x, x)
    channels, height, width = image.shape
    area = at(*view.area)
    aspect = math.exp(at(math.log(view.aspect[0]), math.log(view.aspect[1])))
    aspect = min(max(aspect, area), 1 / area)
    crop_w, crop_h = width * math.sqrt(area * aspect), height * math.sqrt(area / aspect)
    angle, shear = math.radians(spread(view.rotate)), math.tan(math.radians(spread(view.shear)))
    flip = view.flip_grey if channels == 1 else view.flip
    moved = np.zeros((channels, *out))
    for row in range(out[0]):
        for column in range(out[1]):
            u, v = (column + 0.5) / out[1], (row + 0.5) / out[0]
            u = 1 - u if flip >= 0.5 else u
            x = share * (width - crop_w) + u * crop_w - width / 2 - spread(view.shift) * width
            y = share * (height - crop_h) + v * crop_h - height / 2 - spread(view.shift) * height
            z = complex(x, y) * complex(math.cos(angle), -math.sin(angle)) / at(*view.zoom)
            x, y = z.real - shear * z.imag + width / 2 - 0.5, z.imag + height / 2 - 0.5
            x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
            left, top = int(x), int(y)
            right, low = min(left + 1, width - 1), min(top + 1, height - 1)
            upper = (1 - x + left) * image[:, top, left] + (x - left) * image[:, top, right]
            lower = (1 - x + left) * image[:, low, left] + (x - left) * image[:, low, right]
            moved[:, row, column] = (1 - y + top) * upper + (y - top) * lower
    grey_of = lambda p: np.tensordot([0.299, 0.587, 0.114], p, 1) if channels == 3 else p.mean(0)
    p = moved
    if view.colour >= 0.5:
        p = p * (1 + spread(view.brightness))
        contrast = 1 + spread(view.contrast)
        p = contrast * p + (1 - contrast) * grey_of(p).mean()
    if channels == 3 and view.colour >= 0.5:
        saturation = 1 + spread(view.saturation)
        p = saturation * p + (1 - saturation) * grey_of(p)
        to_yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
        y, i, q = np.tensordot(to_yiq, p, 1)
        turned = (i + 1j * q) * np.exp(2j * np.pi * spread(view.hue))
        p = np.tensordot(np.linalg.inv(to_yiq), np.stack([y, turned.real, turned.imag]), 1)
    if channels == 3 and view.grey >= 0.5:
        p = np.broadcast_to(grey_of(p), p.shape)
    return p.clip(0, 1)


PARTS = [View(area=(0.2, 0.6)), View(rotate=40), View(shear=20), View(zoom=(0.7, 1.6)), View(shift=0.2)]
PARTS += [View(flip_grey=1), View(aspect=(0.3, 0.5)), View(area=(0.3, 0.5), aspect=(0.6, 1.5))]


@pytest.mark.parametrize(("share", "shape"), [*zip([0.1, 0.5, 0.8, 0.9, 0.3, 0.7], SHAPES, strict=True)])
@pytest.mark.parametrize("view", [GEOMETRY, COLOUR, BOTH, replace(COLOUR, grey=1), replace(COLOUR, colour=0), *PARTS])
def test_equals_the_pixel_by_pixel_reference(view, shape, share, draw_at):
    draw_at(share)
    images = random_images(2, *shape)
    expected = np.stack([naive(view, i.double().numpy() / 255, share, shape[1:]) for i in images])
    # 1e-4: float32 coordinates of up to 33 pixels
    np.testing.assert_allclose(view(images, seeded()).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("size", "out"), [(20, (20, 20)), (0.5, (4, 8)), (9, (9, 9)), (1, (1, 1))])
def test_size_in_pixels_or_as_a_share(size, out, draw_at):
    draw_at(0.3)
    images = random_images(2, 3, 9, 16)
    for view in (View(size=size), View(area=(0.2, 0.7), size=size)):
        expected = np.stack([naive(view, i.double().numpy() / 255, 0.3, out) for i in images])
        np.testing.assert_allclose(view(images, seeded()).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("view", "reference"),
    [
        (View(brightness=0.4), lambda x: TF.adjust_brightness(x, 1.4)),
        (View(contrast=0.4), lambda x: TF.adjust_contrast(x, 1.4)),
        (View(saturation=0.4), lambda x: TF.adjust_saturation(x, 1.4)),
        (View(grey=1), lambda x: TF.rgb_to_grayscale(x, 3)),
        (View(flip=1), TF.horizontal_flip),
        (View(size=40), lambda x: TF.resize(x, [40, 40], antialias=False)),
    ],
)
def test_equals_torchvision(view, reference, draw_at):
    draw_at(1)
    images = random_images(4, 3, 24, 24)
    # 2e-4: torchvision rounds the weight of red to 0.2989
    torch.testing.assert_close(view(images, seeded()), reference(images / 255), atol=2e-4, rtol=0)


def test_crop_and_affine_equal_torchvision_inside(draw_at):
    """Only inside: torchvision does not look beyond a crop's edge, and has no border padding."""
    draw_at(1)
    images = random_images(4, 3, 24, 24)
    ours = View(area=(0.25, 0.25))(images, seeded())
    theirs = TF.resized_crop(images / 255, 12, 12, 12, 12, [24, 24], antialias=False)
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-4, rtol=0)
    images = random_images(2, 3, 30, 40)
    ours = View(rotate=15, zoom=(1, 1.4), shift=0.05, shear=8)(images, seeded())
    theirs = TF.affine(images / 255, 15, [2, 1.5], 1.4, [-8, 0], interpolation=TF.InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours[..., 8:-8, 8:-8], theirs[..., 8:-8, 8:-8], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_is_the_image_bit_for_bit(shape):
    images, rng = random_images(5, *shape), seeded()
    before = rng.get_state()
    assert torch.equal(VIEWS["clean"](images, rng), images.float() / 255)
    floats = images.double() / 255
    assert torch.equal(View()(floats, rng), floats.float())
    assert torch.equal(rng.get_state(), before)  # nothing is drawn where nothing is random


def test_quarter_turns_are_exact_and_counter_clockwise():
    images = random_images(3, 3, 6, 9)
    turned = VIEWS["rotate90"](images, seeded())
    assert turned.shape == (3, 3, 9, 6)
    assert torch.equal(turned[:, :, 0, 0], images[:, :, 0, -1] / 255)  # the top right corner goes to the top left
    for name in ("rotate180", "rotate270", "rotate0"):
        turned = VIEWS["rotate90"](turned, seeded())
        assert torch.equal(turned, VIEWS[name](images, seeded()))


def test_grey_images_are_mirrored_only_on_request():
    grey = random_images(4, 1, 8, 8)
    assert torch.equal(View(flip=1)(grey, seeded()), grey / 255)
    torch.testing.assert_close(View(flip_grey=1)(grey, seeded()), grey.flip(3) / 255, atol=1e-5, rtol=0)
    assert torch.equal(View(flip_grey=1)(random_images(4, 3, 8, 8), seeded()), random_images(4, 3, 8, 8) / 255)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("view", [*VIEWS.values(), ALL], ids=[*VIEWS, "all"])
def test_any_size_and_number_of_channels_within_range(view, shape):
    images = random_images(6, *shape)
    before = images.clone()
    y = view(images, seeded())
    assert (y.dtype, y.shape[:2]) == (torch.float32, images.shape[:2])
    assert ((y >= 0) & (y <= 1)).all()
    assert torch.equal(images, before)
    assert torch.equal(y, view(images, seeded()))  # the generator decides
    torch.testing.assert_close(view(images / 255, seeded()), y, atol=1e-5, rtol=0)  # uint8 and float alike
    assert view(images[:0], seeded()).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("name", ["area", "rotate", "shift", "flip", "brightness", "hue", "grey", "blur", "noise"])
def test_every_image_draws_its_own_numbers(name):
    image = random_images(1, 3, 16, 16)
    y = View(**{name: getattr(ALL, name)})(image.expand(24, -1, -1, -1), seeded())
    different = len(torch.unique(y.flatten(1), dim=0))
    assert different == 2 if name in ("flip", "grey") else different > 8  # blur and the like leave some as they are
    assert not torch.equal(y, View(**{name: getattr(ALL, name)})(image.expand(24, -1, -1, -1), seeded(1)))


@pytest.mark.parametrize("name", [*VIEWS, "all"])
@pytest.mark.parametrize("splits", [[0, 3, 24], list(range(25))])
def test_the_split_of_the_batch_does_not_matter(name, splits, monkeypatch):
    monkeypatch.setattr(views, "_CACHED", 5 * 3 * 10 * 10)  # so that the whole batch is worked on in parts too
    view, images, rng = VIEWS.get(name, ALL), random_images(24, 3, 10, 10), seeded()
    whole = view(images, rng)
    for start, stop in pairwise(splits):
        ours = seeded()
        part = view(images[start:stop], ours, rows=(start, 24))
        torch.testing.assert_close(part, whole[start:stop], atol=1e-6, rtol=0)  # matrix products round by shape
        assert torch.equal(ours.get_state(), rng.get_state())
    assert name in ("clean", *(f"rotate{d}" for d in (0, 90, 180, 270))) or not torch.equal(view(images, rng), whole)


def test_probabilities_and_ranges_are_met():
    n = 4000
    image = torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1).expand(n, 3, 1, 2)
    y = View(grey=0.3)(image, seeded())
    assert (y.std(1)[:, 0, 0] < 1e-6).float().mean() == pytest.approx(0.3, abs=0.03)
    y = View(brightness=0.4, colour=0.8)(image, seeded())[:, 0, 0, 0] / 0.5
    moved = y[y != 1]
    assert len(moved) / n == pytest.approx(0.8, abs=0.03)
    assert (moved.min().item(), moved.max().item()) == pytest.approx((0.6, 1.4), abs=0.01)
    assert moved.mean().item() == pytest.approx(1, abs=0.02)
    ramp = torch.linspace(0, 1, 64).expand(n, 1, 1, 64)
    width = torch.diff(View(area=(0.25, 0.64))(ramp, seeded())[:, 0, 0, [20, 40]])[:, 0] * 63 / 20
    assert (width.min().item(), width.max().item()) == pytest.approx((0.5, 0.8), abs=0.01)


def test_crops_lie_within_the_image_and_reach_its_edges():
    """No two pixels of a ramp are equal, so what lies beyond the border shows as equal neighbours."""
    ramp = torch.linspace(0, 1, 32).expand(500, 1, 32, 32)
    view = View(area=(0.1, 1), aspect=(0.5, 2))
    for y in (view(ramp, seeded()), view(ramp.mT, seeded()).mT):
        assert (torch.diff(y[..., 16, 4:-4]) > 1e-3).all()  # magnified, half a pixel at the edge becomes up to 3
        assert (y.amin(), y.amax()) == (0, 1)
        assert y[..., 16, 16].mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 40), (3, 96, 64)])
def test_blur_keeps_constants_and_equals_a_gaussian(shape):
    constant = torch.full((3, *shape), 0.37)
    torch.testing.assert_close(View(blur=1)(constant, seeded()), constant, atol=1e-6, rtol=0)
    dot, row, column = torch.zeros(2, *shape), shape[1] // 2, shape[2] // 2
    dot[:, :, row, column] = 1
    y = View(blur=1, blur_sigma=(0.8, 0.8))(dot, seeded())
    sigma = 0.8 * min(shape[1:]) / 32  # in units of an image of 32 pixels
    weight = lambda n, centre: torch.softmax(-((torch.arange(n) - centre) ** 2) / (2 * sigma**2), 0)
    # 1e-4: next to the border the weights are rescaled, far out in the tail
    expected = (weight(shape[1], row)[:, None] * weight(shape[2], column)).expand_as(y)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)


def test_blur_changes_the_chosen_images_only():
    images = random_images(200, 1, 8, 8)
    y = View(blur=0.4, blur_sigma=(2, 2))(images, seeded())
    kept = (y == images / 255).flatten(1).all(1)
    assert kept.float().mean() == pytest.approx(0.6, abs=0.1)
    assert ((y[~kept] - images[~kept] / 255).abs().amax((1, 2, 3)) > 0.01).all()


def test_noise_is_gaussian_and_unlike_between_images():
    y = View(noise=0.1)(torch.full((400, 1, 32, 32), 0.5), seeded()) - 0.5
    strength = y.flatten(1).std(1)
    assert strength.max() == pytest.approx(0.1, abs=0.01)
    assert strength.mean() == pytest.approx(0.05, abs=0.005)
    unit = y.flatten(1) / strength[:, None]
    assert unit.mean().abs() < 0.01
    assert (unit**4).mean() == pytest.approx(3, abs=0.1)  # the kurtosis of a Gaussian
    alike = (unit @ unit.T / unit.shape[1]).fill_diagonal_(0).abs()
    assert alike.max() < 0.2  # 1 / sqrt(1024) = 0.03 is one standard deviation, of 80,000 pairs


def test_full_precision_under_autocast():
    images = random_images(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ALL(images, seeded())
    assert torch.equal(inside, ALL(images, seeded()))


@pytest.mark.parametrize("name", [*VIEWS, "all"])
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_waits_for_the_device(name, channels, monkeypatch):
    """Tensors on "meta" have no values: whatever would have to be read back from a GPU is an error there."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no "meta"
    view = VIEWS.get(name, ALL)
    for images in (random_images(6, channels, 10, 12), torch.rand(6, channels, 10, 12)):
        there, here = view(images.to("meta"), seeded()), view(images, seeded())
        assert (there.device.type, there.shape, there.dtype) == ("meta", here.shape, here.dtype)


def test_numbers_are_drawn_row_by_row_and_only_where_there_is_a_range():
    ranges, rng, one = [(1, 2), (3, 3), (-20, 20), (0.5, 0.7)], seeded(), seeded()
    together = Draws(rng, 5, 10, 40).uniform(*ranges)
    draws = Draws(one, 5, 10, 40)
    assert torch.equal(together, torch.cat([draws.uniform(r) for r in ranges]))
    assert torch.equal(together[1], torch.full((10,), 3.0))
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeded())))
    expected = [torch.rand(40, generator=own)[5:15] * (high - low) + low for low, high in ranges if low != high]
    assert torch.equal(together[[0, 2, 3]], torch.stack(expected))
    before = rng.get_state()
    assert torch.equal(Draws(rng, 0, 4, 4).uniform((2, 2)), torch.full((1, 4), 2.0))
    assert torch.equal(rng.get_state(), before)


def test_floats_given_are_not_written_to():
    """Parts are worked on in place where they are ours; test_any_size covers bytes."""
    for view in (View(), View(brightness=0.4, contrast=0.4), View(noise=0.1), View(blur=0.5), ALL):
        for channels in (1, 3):
            images = random_images(6, channels, 8, 8) / 255
            before = images.clone()
            view(images, seeded())
            assert torch.equal(images, before)


def test_vectors():
    x = torch.randn(1000, 20, generator=seeded(3))
    assert torch.equal(VIEWS["clean"](x, seeded()), x)
    assert (View(vector_noise=0.3)(x, seeded()) - x).std() == pytest.approx(0.3, abs=0.01)
    dropped = View(vector_drop=0.2)(x, seeded())
    assert torch.equal(dropped[dropped != 0], x[dropped != 0])
    assert (dropped == 0).float().mean() == pytest.approx(0.2, abs=0.01)
    for name in ("weak", "strong", "crop", "small"):
        whole, rng = VIEWS[name](x, seeded()), seeded()
        assert not torch.equal(whole, x)
        assert torch.equal(VIEWS[name](x[300:700], rng, rows=(300, 1000)), whole[300:700])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View(area=(0.5, 1.2)), "area must be"),
        (lambda: View(zoom=(1.2, 0.8)), "zoom must be"),
        (lambda: View(flip=2), "flip is a probability"),
        (lambda: View(size=-3), "size is"),
        (lambda: View()(torch.zeros(3, 8, 8), seeded()), r"\(B, C, H, W\).*got \(3, 8, 8\)"),
        (lambda: View()(torch.zeros(3, 1, 8, 8, dtype=torch.int64), seeded()), "int64"),
        (lambda: View()(torch.zeros(3, 1, 8, 8), seeded(), rows=(8, 10)), "rows"),
        (lambda: VIEWS["rotate90"](torch.zeros(3, 8), seeded()), "cannot be rotated"),
        (lambda: as_view("stronk"), "'stronk'; choose from clean, weak, strong"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert as_view("strong") is as_view(VIEWS["strong"])
