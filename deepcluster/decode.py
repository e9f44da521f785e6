"""Bytes, files and arrays -> square uint8 pixels, whatever the format, with one exception for all that can go wrong.

JPEG, PNG, WebP, BMP, TIFF, GIF (first frame), PPM and PGM. Transparent pixels are laid over white, EXIF orientation is
applied, CMYK becomes RGB. Deep images are mapped to 8 bits by a fixed line, never by their own extremes, so that two
images of one data set stay comparable: 16 bits 0..65535 -> 0..255; floats 0..1 -> 0..255 if no value passes 1, else
they are taken as 0..255 already.
"""

import contextlib
import ctypes
import io
import os
import stat
import struct
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

VERSION = 1  # part of the key of every cached store: raise it whenever the pixels that decode() returns change
MAX_PIXELS = 178_956_970  # where Pillow itself refuses; a 16k x 11k photograph passes
MAX_BYTES = 2**31  # a file is read whole; no image under MAX_PIXELS needs more
LARGE = 2**25  # pixels above which one image at a time is decoded: it takes up to 20 bytes a pixel

Item = bytes | str | os.PathLike | np.ndarray

# Opened by their first bytes and not through Image.open: its size check warns on a process-wide threshold, and it would
# also try formats that start other programs (EPS). MPO files open as the JPEG they begin with.
READERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF8", GifImageFile),
    (b"BM", BmpImageFile),
    *((magic, TiffImageFile) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((b"P%d" % kind, PpmImageFile) for kind in range(1, 7)),
)
RGB = ("RGB", "BGR", "RGBX", "BGRX")  # palettes, an entry after the other
# The turn that undoes each EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Set once: warnings.catch_warnings is not thread-safe, and a damaged tag is no news to someone with a million files.
warnings.filterwarnings("ignore", module=r"PIL\.")
_alone = threading.Lock()
with contextlib.suppress(OSError, AttributeError):  # where libtiff is a library of its own, it would write to stderr
    _tiff = ctypes.CDLL(Image.core.__file__)  # through what Pillow has loaded: the same one
    _tiff.TIFFSetErrorHandler(None)
    _tiff.TIFFSetWarningHandler(None)


class BadImage(ValueError):
    """This item cannot become pixels; the message is a short reason such as "truncated"."""


def read_bytes(path: str | os.PathLike) -> bytes:
    """The whole file.

    Raises:
        BadImage: it is not there, not a regular file, too large or may not be read.
    """
    try:
        _check_file(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"cannot read: {(error.strerror or str(error)).lower()}") from None


def _check_file(path: str | os.PathLike) -> None:
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise BadImage("not a regular file")
    if status.st_size > MAX_BYTES:
        raise BadImage(f"too large: {status.st_size} bytes")


def decode(data: Item, size: int, channels: int) -> np.ndarray:
    """The centre square of one image, its shorter side resized to ``size`` with antialiasing.

    Args:
        data: the bytes of an image file, a path, or an array (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4 and
            dtype bool, integer or float (scaled as the module says). An array may be read either way: C last wins.
        size: pixels of a side of the result, > 0.
        channels: 1 (luma, ITU-R 601) or 3 (RGB).

    Returns:
        (channels, size, size) uint8, contiguous.

    Raises:
        BadImage: anything about this image, with a short reason.
        ValueError: channels is neither 1 nor 3, or size is not positive.
    """
    if channels not in (1, 3) or size < 1:
        raise ValueError(f"channels must be 1 or 3 and size at least 1; got channels={channels}, size={size}")
    mode = "L" if channels == 1 else "RGB"
    try:
        if isinstance(data, np.ndarray):
            image = Image.fromarray(_eight_bit_image(data))
            large, turn = False, 1  # it is in memory anyhow
        else:
            image = _open(data if isinstance(data, bytes) else read_bytes(data))
            whole = image.width * image.height
            image.draft(mode, (size, size))  # JPEG only: decoded at 1/2, 1/4, 1/8 while no side falls below size
            held = whole if "progressive" in image.info else image.width * image.height  # its scans are kept whole
            large, turn = held > LARGE, 0
        with _alone if large else contextlib.nullcontext():
            turn = turn or _loaded(image)
            image = _flat(image).convert(mode)
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
        if turn in TURNS:  # after the crop, which a turn leaves in the centre, because there is less to turn
            image = image.transpose(TURNS[turn])
        pixels = np.asarray(image).reshape(size, size, channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    except Exception as error:  # decoders fed with damaged data raise anything, from struct.error to MemoryError
        raise BadImage(_reason(error)) from None


def header(data: Item) -> tuple[int, int, int]:
    """(width, height, channels) of one image as it will be seen, upright, mostly from its first bytes.

    Channels are 1 for grey images, grey palettes included, else 3.

    Raises:
        BadImage: as decode does, for what the header can tell.
    """
    try:
        if isinstance(data, np.ndarray):
            pixels = _channels_last(data)
            return pixels.shape[1], pixels.shape[0], 1 if pixels.ndim == 2 else 3
        if isinstance(data, bytes):
            return _describe(_open(data))
        _check_file(data)
        with Path(data).open("rb") as file:
            return _describe(_open(file))
    except Exception as error:  # as in decode
        raise BadImage(_reason(error)) from None


def about(data: bytes | os.PathLike) -> tuple[int, int, str, str, str]:
    """(width, height, format, camera, time it was taken) of one image by its header, "" where that is silent.

    Raises:
        BadImage: as ``header``.
    """
    try:
        if not isinstance(data, bytes):
            _check_file(data)
        with contextlib.nullcontext(data) if isinstance(data, bytes) else Path(data).open("rb") as file:
            image = _open(file)
            exif = Image.Exif() if isinstance(image, PngImageFile) and "exif" not in image.info else image.getexif()
            tags = exif.get(0x010F), exif.get(0x0110), exif.get_ifd(0x8769).get(0x9003) or exif.get(0x0132)
            maker, model, taken = (str(tag or "").strip("\0 ")[:80] for tag in tags)
            return *_describe(image)[:2], str(image.format), f"{maker} {model}".strip(), taken
    except Exception as error:  # as in decode
        raise BadImage(_reason(error)) from None


def picture(path: str | os.PathLike) -> Image.Image:
    """The image in a file as RGB, for code of others that would try every format and any size; raises as ``header``."""
    try:
        return _open(read_bytes(path)).convert("RGB")
    except Exception as error:  # as in decode
        raise BadImage(_reason(error)) from None


def _loaded(image: Image.Image) -> int:
    """Decode the pixels; returns the orientation."""
    image.load()
    return _orientation(image)


def _open(data: bytes | io.BufferedReader) -> Image.Image:
    """The image with its header read, its pixels not yet."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    start = file.read(30)
    file.seek(0)
    if not start:
        raise BadImage("empty file")
    reader = next((reader for magic, reader in READERS if start.startswith(magic)), None)
    if reader is None:
        raise BadImage("not an image")
    if reader is WebPImageFile and start[12:16] == b"VP8X":  # its decoder takes memory for the canvas when it is made
        _check_size(*(1 + int.from_bytes(start[i : i + 3], "little") for i in (24, 27)))
    image = reader(file)
    _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"too large: {width} x {height} pixels")


def _describe(image: Image.Image) -> tuple[int, int, int]:
    width, height = image.size
    if _orientation(image) >= 5 and not isinstance(image, TiffImageFile):  # Pillow has swapped the sides of a TIFF
        width, height = height, width
    grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    if image.mode in ("P", "PA") and image.palette and (layout := image.palette.rawmode or image.palette.mode) in RGB:
        colours = np.frombuffer(bytes(image.palette.palette), np.uint8).reshape(-1, len(layout))[:, :3]
        grey = bool((colours == colours[:, :1]).all())  # not by getpalette, which would decode the pixels
    return width, height, 1 if grey else 3


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8; 1 where there is none or it is damaged, which is no reason to lose the image."""
    if isinstance(image, PngImageFile) and "exif" not in image.info:
        return 1  # getexif would decode the pixels to look behind them
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:  # damaged tags raise as freely as damaged pixels
        return 1
    return turn if isinstance(turn, int) else 1


def _flat(image: Image.Image) -> Image.Image:
    """L, RGB or CMYK without transparency, 8 bits a channel."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bit(np.asarray(image), bits=16))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode == "P" else image


def _eight_bit_image(pixels: np.ndarray) -> np.ndarray:
    pixels = _eight_bit(_channels_last(pixels), bits=16 if pixels.dtype.itemsize == 2 else 8)
    if pixels.size == 0:
        raise BadImage("no pixels")
    return np.ascontiguousarray(pixels)


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3 or 4), whichever way the array came."""
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] in (3, 4)):
        raise BadImage(f"not an image: array of shape {pixels.shape}")
    return pixels


def _eight_bit(pixels: np.ndarray, bits: int) -> np.ndarray:
    """The fixed lines of the module's header; ``bits`` is the depth of the integers."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    values = pixels.astype(np.float32)
    if not np.isfinite(values).all():
        raise BadImage("not finite: has nan or infinite pixels")
    if pixels.dtype.kind == "f":
        scale = 255.0 if values.size and values.max() <= 1 else 1.0
    else:
        scale = 255 / (2**bits - 1)
    return (values * scale).round().clip(0, 255).astype(np.uint8)


def _reason(error: Any) -> str:
    """A few words for a list of skipped images."""
    text = str(error).lower()
    if isinstance(error, BadImage):
        return str(error)
    if isinstance(error, Image.DecompressionBombError | MemoryError | OverflowError):
        return "too large"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read: {error.strerror.lower()}"
    if isinstance(error, EOFError | struct.error) or any(
        word in text for word in ("truncat", "unexpected end", "requires a buffer")
    ):
        return "truncated"
    return f"damaged: {' '.join(text.split())[:80] or type(error).__name__}"
