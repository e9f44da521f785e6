"""Every format, mode and kind of damage an image file comes with."""

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from deepcluster.decode import MAX_PIXELS, BadImage, decode, header, read_bytes

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 40, 3), np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(40) * 6, np.arange(24)[:, None] * 10, 128), -1).astype(np.uint8)


def encoded(image, form, **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return file.getvalue()


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + struct.pack(">I", 100) + b"IDAT" + b"\0" * 100


@pytest.mark.parametrize(
    ("form", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 97, "subsampling": 0}, 6),
        ("GIF", {}, 40),  # 256 colours
    ],
)
def test_every_format_gives_the_centre_square(form, options, tolerance):
    pixels = decode(encoded(SMOOTH, form, **options), 24, 3)
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    expected = SMOOTH[:, 8:32].transpose(2, 0, 1)
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    assert header(encoded(SMOOTH, form, **options)) == (40, 24, 3)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(decode(stripes, 16, 1).astype(int) - 127.5).max() < 10


def test_one_channel_is_luma_and_three_repeat_grey():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert (decode(encoded(red, "PNG"), 8, 1) == 76).all()
    grey = NOISE[..., 0]
    pixels = decode(encoded(grey, "PNG"), 24, 3)
    assert (pixels == pixels[:1]).all()
    assert np.array_equal(pixels[0], grey[:, 8:32])
    assert header(encoded(grey, "PNG")) == (40, 24, 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode):
    image = Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).convert(mode)
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, 4:], alpha[4:, 4:] = 255, 51
    image.putalpha(Image.fromarray(alpha))
    pixels = decode(encoded(image, "PNG"), 8, 3)
    assert (pixels[:, :, :4] == 255).all()
    assert (pixels[:, :4, 4:] == 100).all()
    assert np.abs(pixels[:, 4:, 4:].astype(int) - 224).max() <= 1  # 0.2 * 100 + 0.8 * 255


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(form):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(1, (4, 0, 8, 8))
    pixels = decode(encoded(image, form, transparency=0), 8, 3)
    assert (pixels[:, :, :4] == 255).all()
    assert (pixels[:, :, 4:] == np.array([200, 10, 10])[:, None, None]).all()


def test_transparent_palette_of_many_alphas_and_grey_and_rgb_keys():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 50, 50, 50])
    assert (decode(encoded(image, "PNG", transparency=bytes([255, 0])), 8, 3) == 255).all()
    assert (decode(encoded(Image.new("L", (8, 8), 7), "PNG", transparency=7), 8, 1) == 255).all()
    assert (decode(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), 8, 3) == 255).all()


def test_grey_palette_is_one_channel():
    assert header(encoded(Image.fromarray(NOISE[..., 0]), "GIF"))[2] == 1
    assert header(encoded(Image.fromarray(NOISE).quantize(16), "PNG"))[2] == 3


def test_cmyk_bilevel_and_ycbcr():
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    for mode, form in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("YCbCr", "JPEG")):
        mean = decode(encoded(flat.convert(mode), form), 8, 3).mean((1, 2))
        assert np.abs(mean - [200, 100, 50]).max() < 6, (mode, form)
    bits = Image.fromarray(NOISE[..., 0] > 127)
    assert bits.mode == "1"
    assert np.array_equal(decode(encoded(bits, "PNG"), 24, 1)[0], (NOISE[..., 0] > 127)[:, 8:32] * 255)


def test_sixteen_bits_and_floats_follow_a_fixed_line():
    ramp = np.repeat(np.arange(0, 65536, 65535 // 15, dtype=np.uint16)[:16, None], 16, 1)
    expected = (ramp / 257).round()
    for form in ("PNG", "TIFF"):
        assert np.array_equal(decode(encoded(ramp, form), 16, 1)[0], expected), form
        assert header(encoded(ramp, form))[2] == 1
    dark = ramp // 100  # its own maximum must not be stretched to white
    assert decode(encoded(dark, "PNG"), 16, 1).max() == 3
    assert np.array_equal(decode(encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF"), 16, 1)[0], expected)
    unit = (ramp / 65535).astype(np.float32)
    assert np.array_equal(decode(encoded(unit, "TIFF"), 16, 1)[0], (unit * 255).round())
    assert np.array_equal(decode(encoded(unit * 200, "TIFF"), 16, 1)[0], (unit * 200).round())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone(form, turn):
    upright = Image.fromarray(SMOOTH)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that makes what the camera stored; 6 and 8 swap
    stored = upright.transpose(Image.Transpose(undo[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(stored, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    assert header(data) == (40, 24, 3)
    assert np.abs(decode(data, 24, 3).astype(int) - SMOOTH[:, 8:32].transpose(2, 0, 1)).max() <= 20


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as the module sets for all but pytest
def test_damaged_exif_does_not_lose_the_image():
    data = encoded(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x99" * 40)
    assert decode(data, 24, 3).shape == (3, 24, 24)


def test_gif_and_tiff_show_their_first_frame():
    frames = [Image.new("RGB", (8, 8), (v, v, v)) for v in (40, 200)]
    for form in ("GIF", "TIFF"):
        assert np.abs(decode(encoded(frames[0], form, save_all=True, append_images=frames[1:]), 8, 1) - 40.0).max() < 3


def test_large_jpeg_is_read_at_a_fraction_and_looks_the_same():
    large = np.kron(SMOOTH, np.ones((30, 30, 1), np.uint8))
    data = encoded(large, "JPEG", quality=95)
    slow = decode(encoded(Image.open(io.BytesIO(data)), "PNG"), 24, 3)
    assert np.abs(decode(data, 24, 3).astype(int) - slow).max() < 12


def test_one_pixel_and_one_row():
    assert decode(encoded(NOISE[:1, :1], "PNG"), 4, 3).shape == (3, 4, 4)
    assert decode(encoded(NOISE[:1], "PNG"), 4, 3).shape == (3, 4, 4)


@pytest.mark.parametrize(
    "array",
    [
        SMOOTH,
        SMOOTH.transpose(2, 0, 1),
        SMOOTH / 255,
        SMOOTH.astype(np.float32),
        SMOOTH.astype(np.uint16) * 257,
        SMOOTH.astype(np.int64),
        np.asfortranarray(SMOOTH),
    ],
)
def test_arrays_of_any_layout_and_type(array):
    assert np.array_equal(decode(array, 24, 3), SMOOTH[:, 8:32].transpose(2, 0, 1))
    assert header(array) == (40, 24, 3)


def test_grey_and_transparent_arrays():
    grey = SMOOTH[..., 0]
    assert np.array_equal(decode(grey, 24, 1)[0], grey[:, 8:32])
    assert np.array_equal(decode(grey[None], 24, 1)[0], grey[:, 8:32])
    assert header(grey[..., None]) == (40, 24, 1)
    clear = np.concatenate([SMOOTH, np.zeros((24, 40, 1), np.uint8)], -1)
    assert (decode(clear, 24, 3) == 255).all()


def bad(reason, data):
    with pytest.raises(BadImage, match=f"^{reason}") as error:
        decode(data, 8, 3)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 100


def test_bad_files_each_have_a_reason(tmp_path):
    bad("empty file", b"")
    bad("truncated", b"\xff\xd8\xff\xe0")
    bad("not an image", b"this is a text named .jpg")
    bad("not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start another program
    (tmp_path / "empty.png").touch()
    bad("empty file", tmp_path / "empty.png")
    bad("cannot read: no such file", tmp_path / "none.png")
    bad("not a regular file", tmp_path)
    bad("cannot read: file name too long", "x" * 5000)
    os.mkfifo(tmp_path / "pipe.jpg")
    bad("not a regular file", tmp_path / "pipe.jpg")
    bad("no pixels", np.zeros((0, 5), np.uint8))
    bad("not finite", np.full((4, 4), np.nan))
    bad("not an image", np.zeros((2, 4, 4, 3), np.uint8))
    bad("not an image", np.zeros((9, 9, 5), np.uint8))
    bad("damaged", np.array([["text"]]))


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(NOISE, "PNG"))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    bad("cannot read: permission denied", tmp_path / "a.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_truncated_anywhere_is_bad_and_never_another_exception(form):
    data = encoded(NOISE, form)
    bad("truncated|damaged", data[: len(data) // 2])
    for cut in range(0, len(data) // 2, 7):
        with pytest.raises(BadImage):
            decode(data[:cut], 8, 3)
    if form in ("JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM"):
        bad("truncated", data[: len(data) // 2])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_flipped_bytes_decode_or_are_bad(form):
    data = encoded(NOISE, form)
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(0, min(len(data), 400), 3):
            damaged[place] = generator.integers(256)
        for read in (lambda d: decode(d, 8, 3), header):
            with contextlib.suppress(BadImage):  # and nothing else
                read(bytes(damaged))


@pytest.mark.parametrize("size", [(60000, 60000), (12000, 15000)])  # far over, and where Pillow alone would only warn
def test_bombs_are_refused_by_their_header(size):
    bomb = png_header(*size)
    bad(f"too large: {size[0]} x {size[1]} pixels", bomb)
    with pytest.raises(BadImage, match="too large"):
        header(bomb)


def test_large_honest_images_pass_without_a_warning():
    assert 89_478_485 < 9500 * 9500 < MAX_PIXELS  # Pillow's own opening warns from the first number on
    assert header(png_header(9500, 9500)) == (9500, 9500, 3)


def test_header_does_not_decode(monkeypatch):
    data = {form: encoded(SMOOTH, form) for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF")}
    loaded = []
    for reader in ("PIL.ImageFile.ImageFile", "PIL.TiffImagePlugin.TiffImageFile"):
        monkeypatch.setattr(f"{reader}.load", lambda image: loaded.append(image))
    assert {header(d) for d in data.values()} == {(40, 24, 3)}
    assert loaded == []


def test_enormous_files_are_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(BadImage, match="too large: 4294967296 bytes"):
        read_bytes(tmp_path / "a.jpg")


def test_wrong_arguments_are_the_callers_fault():
    with pytest.raises(ValueError, match="channels=2") as error:
        decode(NOISE, 8, 2)
    assert not isinstance(error.value, BadImage)
