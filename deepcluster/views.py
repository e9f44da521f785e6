"""Views: random augmentations of a whole batch, on the device where the batch lies.

All geometric parts of a view are composed into one affine map per image and one bilinear resampling, all colour parts
into one 3x3 matrix and one offset per image; values are clamped once, at the end. Parts that are off cost nothing.

Shapes: B images, C channels, H height, W width, D features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepcluster.draws import Draws, Range

Step = Callable[[Tensor, slice], Tensor]  # images and which rows of the batch they are -> images

_LUMA = torch.tensor([0.299, 0.587, 0.114])  # weights of red, green and blue in grey (ITU-R 601, as in YIQ)
_TO_GREY = _LUMA.expand(3, 3)  # every channel becomes the image's grey
_TO_CHROMA = torch.eye(3) - _TO_GREY  # and what is left of it without that
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]).double()
_QUARTER = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]).double()
_TURN_CHROMA = (_YIQ.inverse() @ _QUARTER @ _YIQ).float()  # a quarter turn of hue, with the grey part removed
_CACHED = 1 << 17  # values per thread that are worked on at a time on the CPU
_NOISE_STRIDE = 131  # from one image's noise to the next one's; a prime, so as not to be a multiple of a row


def _to(x: Tensor, like: Tensor) -> Tensor:
    """``x`` on the device of ``like``, without waiting for it."""
    return x.to(like.device, non_blocking=True)


def _centres(side: int, like: Tensor) -> Tensor:
    """(side,) pixel centres where the image spans [-1, 1]."""
    return (torch.arange(side, device=like.device) * 2 + 1) / side - 1


def _parts(images: Tensor) -> list[slice]:
    """The batch in pieces that stay in the processor's cache, several times faster at 96 pixels; whole elsewhere."""
    step = len(images)
    if images.device.type == "cpu":
        step = _CACHED * torch.get_num_threads() // max(1, images.shape[1:].numel())
    return [slice(i, i + max(1, step)) for i in range(0, len(images), max(1, step))]


@dataclass(frozen=True)
class View:
    """A random view of each image of a batch; the default is the image itself.

    Ranges are uniform, and every image draws its own numbers. Beyond the image's edge its border is repeated: zeros
    would draw a frame that betrays the transform, and would be wrong for dark ink on white.
    """

    area: Range = (1, 1)  # share of the image that is cropped and shown at full size
    cell: tuple[int, int] | None = None  # row and column in a grid of 3 x 3; `area` is then a share of this cell
    aspect: Range = (1, 1)  # width / height of the crop, 1 as the image's own; log-uniform, limited to what fits
    rotate: float = 0  # degrees, in [-rotate, rotate]
    zoom: Range = (1, 1)  # magnification about the centre
    shift: float = 0  # share of the side, in [-shift, shift] along x and along y
    shear: float = 0  # degrees along x, in [-shear, shear]
    flip: float = 0  # probability of mirroring left and right, unless the image has one channel:
    flip_grey: float = 0  # grey images are often characters, whose mirror image means something else
    quarter_turns: int = 0  # times 90 degrees counter-clockwise, all images alike, exact
    size: float | None = None  # output side: in pixels, or below 1 as a share of the input's; None keeps it
    brightness: float = 0  # factor in [1 - x, 1 + x]
    contrast: float = 0  # factor in [1 - x, 1 + x], about the image's mean grey
    saturation: float = 0  # factor in [1 - x, 1 + x]; three channels only, like hue and grey
    hue: float = 0  # turns of the chroma plane (YIQ), in [-hue, hue]
    colour: float = 1  # probability that the four above are applied
    grey: float = 0  # probability of turning grey
    blur: float = 0  # probability of Gaussian blur
    blur_sigma: Range = (0.1, 1)  # in pixels of an image whose shorter side is 32
    noise: float = 0  # additive Gaussian noise, its standard deviation in [0, noise] where the image is in [0, 1]
    vector_drop: float = 0  # feature vectors: probability that a value becomes 0
    vector_noise: float = 0  # feature vectors: standard deviation of additive noise; features have mean 0 and std 1

    def __post_init__(self) -> None:
        if self.size is not None and self.size <= 0:
            raise ValueError(f"size is a number of pixels, or a share of the side below 1; got {self.size}")
        if self.cell and not {*self.cell} <= {0, 1, 2}:
            raise ValueError(f"cell is (row, column), each 0, 1 or 2; got {self.cell}")
        for name in ("area", "aspect", "zoom", "blur_sigma"):
            low, high = getattr(self, name)
            top = 1 if name == "area" else math.inf
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {top}; got {(low, high)}")
        for name in ("flip", "flip_grey", "colour", "grey", "blur", "vector_drop"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is a probability, in [0, 1]; got {value}")

    def __call__(self, images: Tensor, rng: torch.Generator, rows: tuple[int, int] | None = None) -> Tensor:
        """One view of each image.

        Args:
            images: (B, C, H, W) uint8, or float in [0, 1]; or (B, D) float feature vectors.
            rng: CPU generator; advances equally whatever B and ``rows`` are.
            rows: (start, total) if these are rows start..start+B of a global batch of ``total``, of which every
                process sees a part: the views are those of the whole batch, however it is split.

        Returns:
            (B, C, H, W) float32 in [0, 1] on the images' device, sides by ``size`` and ``quarter_turns``; or (B, D).
        """
        n = len(images)
        start, total = rows or (0, n)
        if not 0 <= start <= start + n <= total:
            raise ValueError(f"rows {rows} do not hold a batch of {n}; they are (start, total), start + {n} <= total")
        draws = Draws(rng, start, n, total)
        if images.ndim == 2:
            return self._vectors(images, draws)
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            got = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(f"a view wants (B, C, H, W) uint8 or float images, or (B, D) float vectors; got {got}")
        if self.quarter_turns % 4:
            images = torch.rot90(images, self.quarter_turns, (2, 3))
        channels, height, width = images.shape[1:]
        h = w = int(self.size or 0)
        if h == 0:  # a share of the input's sides
            h, w = (max(1, round(side * (self.size or 1))) for side in (height, width))
        steps = [
            self._resampling(draws, images, (h, w)),
            self._recolouring(draws, images),
            self._blurring(draws, h, w),
            self._noising(draws, channels * h * w),
        ]
        out = torch.empty(n, channels, h, w, device=images.device)
        with torch.autocast(images.device.type, enabled=False):  # 8 bits of mantissa would show
            for part in _parts(images):
                x = images[part].float()
                for step in steps:
                    x = step(x, part) if step else x
                torch.clamp(x, 0, 1, out=out[part])
        return out

    def _resampling(self, draws: Draws, images: Tensor, sides: tuple[int, int]) -> Step | None:
        """(B, C, H, W) -> (B, C, h, w), all geometry at once. Shrinking is not low-pass filtered."""
        (channels, height, width), (h, w) = images.shape[1:], sides
        maps = self._maps(draws, channels, height / width)
        if maps is None:
            if sides == (height, width):
                return None
            maps = torch.eye(2, 3).expand(draws.n, 2, 3)
        # a part along x plus a part along y, coordinates first: F.affine_grid does the same 40 times slower
        to_x, to_y, origin = _to(maps, images)[:, :, None, None].unbind(-1)  # each (B, 2, 1, 1)
        along_x, along_y = to_x * _centres(w, images), to_y * _centres(h, images).view(h, 1) + origin

        def resample(x: Tensor, part: slice) -> Tensor:
            grid = (along_x[part] + along_y[part]).permute(0, 2, 3, 1)  # (B, h, w, 2)
            return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

        return resample

    def _maps(self, draws: Draws, channels: int, tall: float) -> Tensor | None:
        """(B, 2, 3) on the CPU: where in the input each output point comes from, both in [-1, 1]; None for no change.

        The image is sheared, rotated, zoomed and shifted, then cropped, then mirrored; ``tall`` is height / width.
        """
        flip = self.flip_grey if channels == 1 else self.flip
        moves = self.cell or self.rotate or self.shift or self.shear or flip
        if not moves and {*self.area, *self.aspect, *self.zoom} == {1}:
            return None
        place, shift = (-1, 1), (-2 * self.shift, 2 * self.shift)
        logs = (math.log(self.aspect[0]), math.log(self.aspect[1]))
        turns = [(-self.rotate, self.rotate), (-self.shear, self.shear), self.zoom]
        area, aspect, right, x, down, y, angle, shear, zoom = draws.uniform(
            self.area, logs, place, shift, place, shift, *turns
        )
        w, h, x, y = torch.ones(draws.n), torch.ones(draws.n), -x, -y
        if {*self.area} != {1}:
            aspect = aspect.exp().clamp(area, 1 / area)  # neither side of the crop is longer than the image's
            w, h = (area * aspect).sqrt(), (area / aspect).sqrt()
            x, y = right * (1 - w) + x, down * (1 - h) + y
        if self.cell:  # the crop and where its centre is, from the cell's units into the image's
            row, column = self.cell
            w, h, x, y = w / 3, h / 3, (x + 2 * column - 2) / 3, (y + 2 * row - 2) / 3
        if flip:
            w = torch.where(draws.chance(flip), -w, w)
        if not (self.rotate or self.shear) and {*self.zoom} == {1}:
            none = torch.zeros(draws.n)
            rows = [w, none, x, none, h, y]
        else:  # inverse of zoom x rotation x shear, in pixels; `tall` converts between the two sides' units
            shear, angle = shear.deg2rad().tan(), angle.deg2rad()
            cos, sin = angle.cos() / zoom, angle.sin() / zoom
            xx, xy, yx, yy = cos + shear * sin, (sin - shear * cos) * tall, -sin / tall, cos
            rows = [xx * w, xy * h, xx * x + xy * y, yx * w, yy * h, yx * x + yy * y]
        return torch.stack(rows, 1).view(-1, 2, 3)

    def _recolouring(self, draws: Draws, images: Tensor) -> Step | None:
        """(B, C, H, W) in [0, 1] or as bytes -> the same in [0, 1], all colour parts at once, not yet clamped."""
        channels, unit = images.shape[1], 1 if images.is_floating_point() else 255
        rgb = channels == 3
        chroma = bool(rgb and (self.saturation or self.hue or self.grey))
        if not (self.brightness or self.contrast or chroma):
            return None if unit == 1 else lambda x, part: x / unit
        spreads = [self.brightness, self.contrast, self.saturation][: 3 if chroma else 2]
        on, factors = draws.chance(self.colour), draws.uniform(*[(1 - spread, 1 + spread) for spread in spreads])
        brightness, contrast, *saturation = torch.where(on, factors, 1.0)
        brightness = brightness / unit
        gain = (brightness * contrast).view(-1, 1, 1)
        if chroma:
            strength = saturation[0].masked_fill(draws.chance(self.grey), 0)
            hue = torch.where(on, draws.uniform((-self.hue, self.hue))[0] * 2 * math.pi, 0.0)
            kept, turned = (strength * hue.cos()).view(-1, 1, 1), (strength * hue.sin()).view(-1, 1, 1)
            gain = gain * (_TO_GREY + kept * _TO_CHROMA + turned * _TURN_CHROMA)  # (B, 3, 3)
        # contrast pulls towards the mean grey, which the chroma parts leave as it is
        weights = _LUMA if rgb else torch.full((channels,), 1 / channels)
        pull = _to(((1 - contrast) * brightness)[:, None] * weights, images)  # (B, C)
        gain = _to(gain, images)

        def recolour(x: Tensor, part: slice) -> Tensor:
            pixels = x.flatten(2)
            offset = (pixels.mean(2) * pull[part]).sum(1).view(-1, 1, 1) if self.contrast else x.new_zeros(1, 1, 1)
            # without chroma in two passes: torch.addcmul does the same four times slower
            y = torch.baddbmm(offset, gain[part], pixels) if chroma else (pixels * gain[part]).add_(offset)
            return y.view_as(x)

        return recolour

    def _blurring(self, draws: Draws, height: int, width: int) -> Step | None:
        """Blur the chosen images: a matrix along each side, whose rows sum to 1 also at the border."""
        if not self.blur:
            return None
        chosen = draws.chance(self.blur)
        sigma = draws.uniform(self.blur_sigma)[0] * (min(height, width) / 32)

        def matrix(side: int, sigma: Tensor) -> Tensor:  # (B, side, side)
            pixels = torch.arange(side, device=sigma.device)
            return (-((pixels[:, None] - pixels) ** 2) / (2 * sigma.view(-1, 1, 1) ** 2)).softmax(-1)

        def blur(x: Tensor, part: slice) -> Tensor:
            which = chosen[part].nonzero()[:, 0]  # on the CPU, so the device need not wait
            wide, which = _to(sigma[part][which], x), _to(which, x)
            y = matrix(height, wide)[:, None] @ x[which] @ matrix(width, wide)[:, None].mT
            return x.index_copy(0, which, y)

        return blur

    def _noising(self, draws: Draws, count: int) -> Step | None:
        """Each image adds its own stretch of one field of noise, drawn once per call, times its own strength.

        Drawing afresh for all images of the global batch would cost more than all else; one image's noise is that of
        the next, shifted by some rows, which no comparison pixel by pixel can tell.
        """
        if not self.noise:
            return None
        field = draws.table(torch.randn, count + _NOISE_STRIDE * max(0, draws.total - 1))
        strength = draws.uniform((0, self.noise)).view(-1, 1)

        def add_noise(x: Tensor, part: slice) -> Tensor:
            noise = _to(field, x).unfold(0, count, _NOISE_STRIDE)[draws.ours][part]
            return torch.addcmul(x.flatten(1), noise, _to(strength[part], x)).view_as(x)

        return add_noise

    def _vectors(self, x: Tensor, draws: Draws) -> Tensor:
        """(B, D) with some values dropped, then noise added; parts for images do nothing here."""
        if self.quarter_turns % 4:
            raise ValueError("feature vectors cannot be rotated; choose a method without rotations")
        if self.cell:
            raise ValueError("feature vectors have no tiles; choose a method without them")
        x, shape = x.float(), (draws.total, x.shape[1])
        if self.vector_drop:
            x = x * _to(draws.table(torch.rand, *shape)[draws.ours] >= self.vector_drop, x)
        if self.vector_noise:
            x = x + _to(draws.table(torch.randn, *shape)[draws.ours] * self.vector_noise, x)
        return x


_JITTER = View(flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, vector_drop=0.2, vector_noise=0.3)
_CROP = replace(_JITTER, area=(0.2, 1), aspect=(3 / 4, 4 / 3), colour=0.8, grey=0.2)
# Jigsaw (arXiv:1603.09246): 64 of a cell's 75 pixels, anywhere in it, so that edges do not continue from tile to tile
_TILE = replace(_JITTER, area=((64 / 75) ** 2,) * 2, size=0.5, flip=0, grey=0.3)
ROTATIONS = ("rotate0", "rotate90", "rotate180", "rotate270")
VIEWS: dict[str, View] = {
    "clean": View(),
    "weak": View(area=(0.8, 1), shift=0.05, flip=0.5, vector_noise=0.1),
    "strong": replace(_JITTER, rotate=20, zoom=(0.85, 1.15), shift=0.125, grey=0.2),
    "crop": _CROP,  # SimCLR (Chen et al., ICML 2020, arXiv:2002.05709), without its blur
    "small": replace(_CROP, area=(0.05, 0.3), size=0.5),  # multi-crop (SwAV, Caron et al., 2020, arXiv:2006.09882)
    **{name: View(quarter_turns=turns) for turns, name in enumerate(ROTATIONS)},  # RotNet (arXiv:1803.07728)
    **{f"tile{i}": replace(_TILE, cell=(i // 3, i % 3)) for i in range(9)},  # row by row
}
for _name in ("weak", "strong", "crop"):  # turned and augmented, not mirrored: that would make 90 degrees 270
    VIEWS |= {f"{_name}-{v}": replace(VIEWS[_name], quarter_turns=VIEWS[v].quarter_turns, flip=0) for v in ROTATIONS}


def as_view(view: str | View) -> View:
    """The view of this name, or the view itself."""
    if isinstance(view, View):
        return view
    if view not in VIEWS:
        raise ValueError(f"no view {view!r}; choose from {', '.join(VIEWS)}, or pass a View")
    return VIEWS[view]
