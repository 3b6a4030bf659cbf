"""From a picture to the array that enters a network."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from trunkline_wire import preprocess
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from trunkline_wire.specs import Preprocessing


def preprocessing(size: int = 32, crop: float = 0.875, interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(size, crop, interpolation, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (32, 32), (8, 8), (1, 1), (3, 900), (33, 32), (2000, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_any_picture_becomes_a_square(size: tuple[int, int], interpolation: str, crop: float) -> None:
    array = preprocess.preprocess_image(photo(*size), preprocessing(32, crop, interpolation))
    assert array.shape == (32, 32, 3)
    assert array.dtype == np.uint8


def test_the_shorter_side_is_resized_and_the_centre_kept() -> None:
    # Black, white, black: the middle third is exactly what a crop of 1.0 keeps of a picture three times as wide.
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 255
    square = preprocess.preprocess_image(Image.fromarray(array), preprocessing(40, 1.0, "nearest"))
    assert (square == 255).all()
    upright = preprocess.preprocess_image(Image.fromarray(array.transpose(1, 0, 2)), preprocessing(40, 1.0, "nearest"))
    assert (upright == 255).all()


def test_it_is_the_usual_resize_and_crop() -> None:
    image = photo(100, 80)
    expected = image.resize((round(100 * 37 / 80), 37), Image.Resampling.BICUBIC)
    left, top = (expected.width - 32) // 2, (37 - 32) // 2
    expected = expected.crop((left, top, left + 32, top + 32))
    np.testing.assert_array_equal(preprocess.preprocess_image(image, preprocessing(32)), np.asarray(expected))


def test_the_way_for_long_thin_pictures_gives_nearly_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(900, 31)
    usual = preprocess.preprocess_image(image, preprocessing(64))
    monkeypatch.setattr(preprocess, "MAX_IMAGE_PIXELS", 1000)
    boxed = preprocess.preprocess_image(image, preprocessing(64))
    assert np.abs(usual.astype(int) - boxed.astype(int)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read(kind: str) -> None:
    image = preprocess.decode_image(saved(photo(40, 30), kind, **({} if kind == "PNG" else {"quality": 95})))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo(40, 30)).astype(int)).mean() < 6


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "PDF"])
def test_every_other_format_is_refused(kind: str) -> None:
    with pytest.raises(WireError, match="JPEG, PNG, WEBP") as caught:
        preprocess.decode_image(saved(photo(16, 16), kind))
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_refused(kind: str) -> None:
    data = saved(photo(64, 64), kind)
    for damaged in (b"", data[:3], data[:20], data[: len(data) // 2], b"\0" * 100, b"<svg/>"):
        with pytest.raises(WireError) as caught:
            preprocess.decode_image(damaged)
        assert caught.value.code is ErrorCode.CORRUPT_IMAGE
        # Neither the parser's words nor the file's reach the caller.
        assert caught.value.message == "not a readable JPEG, PNG, WEBP file"


def test_flipped_bits_never_escape_as_another_error() -> None:
    data = saved(photo(24, 24), "PNG")
    for position in range(0, len(data) * 8, 37):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << (position % 8)
        try:
            preprocess.decode_image(bytes(damaged))
        except WireError as error:
            assert error.code in (ErrorCode.CORRUPT_IMAGE, ErrorCode.PAYLOAD_TOO_LARGE)


def test_a_file_that_is_too_long_is_not_even_opened() -> None:
    with pytest.raises(WireError) as caught:
        preprocess.decode_image(bytes(MAX_IMAGE_BYTES + 1))
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


def test_the_pixel_cap_names_what_was_got_and_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(WireError, match="image of 10 x 10 pixels; at most 99") as caught:
        preprocess.decode_image(saved(photo(10, 10)))
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert (Image.MAX_IMAGE_PIXELS or 0) > MAX_IMAGE_PIXELS, "our cap comes before Pillow's"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_once(orientation: int) -> None:
    # Four colours in the corners tell the eight orientations apart.
    corners = np.zeros((16, 24, 3), np.uint8)
    corners[:8, :12], corners[:8, 12:] = (255, 0, 0), (0, 255, 0)
    corners[8:, :12], corners[8:, 12:] = (0, 0, 255), (255, 255, 255)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.fromarray(corners)
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = preprocess.decode_image(saved(stored, exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), corners)
    # The worker decodes, then preprocesses: the second step must not turn it again. Nor must the client's way.
    small = preprocessing(16, 1.0, "nearest")
    from_file = preprocess.preprocess_image(decoded, small)
    with Image.open(io.BytesIO(saved(stored, exif=exif))) as opened:
        np.testing.assert_array_equal(from_file, preprocess.preprocess_image(opened, small))
        resent = preprocess.decode_image(preprocess.encode_image(opened))
    np.testing.assert_array_equal(np.asarray(resent), corners)


def pixel(image: Image.Image) -> tuple[int, ...]:
    return tuple(int(value) for value in np.asarray(image)[0, 0])


@pytest.mark.filterwarnings("error")
def test_every_mode_of_a_file_becomes_rgb() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 10, 200, 30])
    cases = {
        "gray": (saved(Image.new("L", (4, 4), 90)), (90, 90, 90)),
        "black and white": (saved(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        "gray and alpha": (saved(Image.new("LA", (4, 4), (90, 128))), (90, 90, 90)),
        "alpha": (saved(Image.new("RGBA", (4, 4), (1, 2, 3, 0))), (1, 2, 3)),
        "palette": (saved(palette), (10, 200, 30)),
        "palette, one transparent": (saved(palette, transparency=1), (10, 200, 30)),
        "palette, alpha each": (saved(palette, transparency=bytes([0, 128])), (10, 200, 30)),
        "16 bits of gray": (saved(Image.fromarray(np.full((4, 4), 30_000, np.uint16))), (117, 117, 117)),
        "WebP with alpha": (saved(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "WEBP", lossless=True), (9, 8, 7)),
        "CMYK": (saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
    }
    for name, (data, expected) in cases.items():
        image = preprocess.decode_image(data)
        assert image.mode == "RGB", name
        assert pixel(image) == expected, name


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_client_and_worker_see_the_same_pixels(mode: str) -> None:
    image = Image.new(mode, (40, 30)) if mode in ("I", "I;16", "LA") else photo(40, 30).convert(mode)
    here = preprocess.preprocess_image(image, preprocessing())
    there = preprocess.preprocess_image(preprocess.decode_image(preprocess.encode_image(image)), preprocessing())
    np.testing.assert_array_equal(here, there)


def test_floating_point_pictures_have_no_range() -> None:
    with pytest.raises(WireError, match="convert them to uint8") as caught:
        preprocess.encode_image(Image.new("F", (4, 4), 0.5))
    assert caught.value.code is ErrorCode.DTYPE_MISMATCH


def test_the_callers_picture_is_left_as_it_was() -> None:
    image = photo(20, 10)
    before = image.tobytes()
    exif = image.getexif()
    exif[0x0112] = 6
    assert preprocess.preprocess_image(image, preprocessing(8)).shape == (8, 8, 3)
    assert (image.size, image.tobytes()) == ((20, 10), before)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_arrays_become_pictures(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    image = preprocess.image_from_array(array)
    assert (image.mode, image.size) == ("RGB", (4, 5))
    expected = array if shape[-1] == 3 else np.repeat(array.reshape(5, 4, 1), 3, axis=2)
    np.testing.assert_array_equal(np.asarray(image), expected)
    flipped = preprocess.image_from_array(array[::-1])
    np.testing.assert_array_equal(np.asarray(flipped), expected[::-1])


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.zeros((4, 4), np.float32), ErrorCode.DTYPE_MISMATCH),
        (np.zeros((4, 4), np.int64), ErrorCode.DTYPE_MISMATCH),
        (np.zeros(4, np.uint8), ErrorCode.SHAPE_MISMATCH),
        (np.zeros((3, 4, 4), np.uint8), ErrorCode.SHAPE_MISMATCH),
        (np.zeros((4, 4, 4), np.uint8), ErrorCode.SHAPE_MISMATCH),
        (np.zeros((2, 4, 4, 3), np.uint8), ErrorCode.SHAPE_MISMATCH),
        (np.zeros((0, 4, 3), np.uint8), ErrorCode.SHAPE_MISMATCH),
        (np.zeros((0, 4), np.uint8), ErrorCode.SHAPE_MISMATCH),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, code: ErrorCode) -> None:
    with pytest.raises(WireError) as caught:
        preprocess.image_from_array(array)
    assert caught.value.code is code
