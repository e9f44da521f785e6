"""Images as small pictures: sheets of all images on the map, larger ones of the cards, heat-maps, filters.

Shapes: B images, C channels, s pixels of a side.
"""

import base64
import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from deepcluster.cam import heat
from deepcluster.classifier import Classifier
from deepcluster.store import Store

COLUMNS = 32  # tiles of a sheet, and lines
SHEETS = 22_000_000  # characters of all sheets together
CARDS = 7_500_000  # of all pictures on cards
TILES = ((48, 75), (40, 70), (32, 70), (32, 50), (24, 50), (24, 25), (16, 25), (12, 10))  # pixels, quality
SIZES = ((96, 80), (80, 70), (64, 70), (48, 60), (32, 50), (24, 40), (16, 25))
SHARP = 48  # below this side a picture is kept without loss where there is room
STEP = 64  # images that are held at a time
FILTERS = 64
HEAT = 24  # pixels of a heat-map
WARM = np.array([[40, 14, 84], [120, 28, 109], [194, 59, 79], [243, 120, 25], [252, 222, 110]], np.float64)


class Pictures:
    """The pixels of a run's images, found in ``store`` by their place, or by their path if it has others."""

    def __init__(self, store: Store, paths: list[str]):
        self.store, self.row = store, np.arange(len(paths))
        if store.names != paths:
            place = {name: i for i, name in enumerate(store.names)}
            self.row = np.array([place.get(path, -1) for path in paths], np.int64)

    def take(self, rows: np.ndarray) -> Tensor:
        """(B, C, H, W) uint8 on the CPU; images that the store does not have are black."""
        place = self.row[rows]
        order = np.argsort(place, kind="stable")  # as they lie on the disk
        found = self.store.take(torch.from_numpy(np.maximum(place[order], 0))).cpu()
        found[torch.from_numpy(place[order] < 0)] = 0
        return found[torch.from_numpy(np.argsort(order))]

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(B,) bool, whether the store has them."""
        return self.row[rows] >= 0

    def small(self, rows: np.ndarray, side: int) -> np.ndarray:
        """(B, s, s, 3) uint8, s at most ``side``."""
        parts = [_small(self.take(rows[i : i + STEP]), side) for i in range(0, len(rows), STEP)]
        return np.concatenate(parts)

    def sheets(self, rows: np.ndarray) -> tuple[int, Iterator[str]]:
        """Side of a tile, and sheets of COLUMNS x COLUMNS tiles in the order of ``rows``, as data: addresses."""
        side, quality = self._fitting(rows, TILES, SHEETS)

        def sheets() -> Iterator[str]:
            for start in range(0, len(rows), COLUMNS**2):
                part = rows[start : start + COLUMNS**2]
                yield address(_side_by_side(self.small(part, side), COLUMNS), quality)

        return side, sheets()

    def each(self, rows: np.ndarray) -> list[str]:
        """One data: address an image, "" for those the store does not have."""
        if not len(rows):
            return []
        side, quality = self._fitting(rows, SIZES, CARDS)
        known = self.known(rows)
        out: list[str] = []
        for start in range(0, len(rows), STEP):
            out += [address(one, quality) for one in self.small(rows[start : start + STEP], side)]
        return [one if there else "" for one, there in zip(out, known.tolist(), strict=True)]

    def _fitting(self, rows: np.ndarray, ways: Sequence[tuple[int, int]], room: int) -> tuple[int, int | None]:
        """The first way in which pictures of ``rows`` take no more than ``room`` characters, by a sample of them."""
        own = max(self.store.shape[1:])
        sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), 96)).astype(int)]
        sharp: list[tuple[int, int | None]] = [(own, None)] if own < SHARP else []
        tried = [*sharp, *((side, quality) for side, quality in ways if side <= own or side == ways[-1][0])]
        together = ways is TILES
        for side, quality in tried:
            tiles = self.small(sample, side)
            made = [_side_by_side(tiles, COLUMNS)] if together else list(tiles)
            if sum(len(address(one, quality)) for one in made) * len(rows) <= room * len(sample):
                break
        return min(side, own), quality

    def heats(self, classifier: Classifier, rows: np.ndarray, cluster: np.ndarray) -> list[str]:
        """Pictures to lay over these images (B,): warm and opaque where the classifier looks for its cluster (B,)."""
        out = []
        for start in range(0, len(rows), STEP):
            part = slice(start, start + STEP)
            found = heat(classifier, self.take(rows[part]), torch.from_numpy(cluster[part]))
            found = F.interpolate(found[:, None], size=(HEAT, HEAT), mode="bilinear", antialias=True)[:, 0]
            out += [address(_warm(one), 60) for one in found.numpy()]
        return out


def _small(images: Tensor, side: int) -> np.ndarray:
    """(B, C, H, W) uint8 -> (B, s, s, 3), never larger than it was."""
    side = min(side, *images.shape[2:])
    if images.shape[2:] != (side, side):
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _side_by_side(tiles: np.ndarray, columns: int) -> np.ndarray:
    """(B, s, s, 3) -> (lines * s, columns * s, 3), black where there is none left."""
    n, side = tiles.shape[:2]
    columns = min(columns, n)
    lines = -(-n // columns)
    sheet = np.zeros((lines * columns, *tiles.shape[1:]), np.uint8)
    sheet[:n] = tiles
    return sheet.reshape(lines, columns, side, side, 3).swapaxes(1, 2).reshape(lines * side, columns * side, 3)


def _warm(values: np.ndarray) -> np.ndarray:
    """(s, s) in [0, 1] -> (s, s, 4) uint8: the larger the lighter, the warmer and the less transparent."""
    values = np.nan_to_num(values).clip(0, 1)  # a damaged network gives no numbers
    at = values * (len(WARM) - 1)
    low = np.minimum(at.astype(int), len(WARM) - 2)
    colour = WARM[low] + (at - low)[..., None] * (WARM[low + 1] - WARM[low])
    return np.concatenate([colour, 40 + 160 * values[..., None]], 2).astype(np.uint8)


def address(pixels: np.ndarray, quality: int | None) -> str:
    """A data: address of a WebP picture, without loss where ``quality`` is None."""
    file = io.BytesIO()
    options = {"lossless": True} if quality is None else {"quality": quality}
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "webp", method=2, **options)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def filters(classifier: Classifier) -> tuple[str, int] | None:
    """The filters of the first convolution as one picture, and how many; None without one.

    Those of one or three channels are shown as they are, others plane by plane; all at one scale, grey is 0.
    """
    first = next((m for m in classifier.backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return None
    weight = first.weight.detach().float().cpu()
    planes = weight if weight.shape[1] in (1, 3) else weight.flatten(0, 1)[:, None]
    planes = planes[:FILTERS]
    most = planes.abs().amax().clamp_min(1e-12)
    pixels = ((planes / most + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
    framed = F.pad(pixels, (0, 1, 0, 1), value=128).permute(0, 2, 3, 1).numpy()
    if framed.shape[1] != framed.shape[2]:
        return None
    return address(_side_by_side(framed, 16), None), len(planes)
