"""The one way from a picture to the uint8 array that enters a network. Client and worker both use it.

Pillow and numpy only, so that the same picture gives the same numbers on either side. Normalisation is not here: it
is the first layer of the network, inside the exported stem.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from trunkline_wire.specs import Preprocessing

# Shape suffix legend: B = rows, H = height, W = width, C = channels

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""The formats that are decoded. A closed list: Pillow knows many more, each of them a way in."""

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def decode_image(data: bytes) -> Image.Image:
    """Decode one JPEG, PNG or WebP file, upright and in RGB.

    The size is read from the header and checked before any pixel is decoded.

    Raises:
        WireError: CORRUPT_IMAGE or PAYLOAD_TOO_LARGE.
    """
    # Checked here as well as on the wire: files reach this from the caller's disk too.
    if len(data) > MAX_IMAGE_BYTES:
        raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"image file of {len(data)} bytes; at most {MAX_IMAGE_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise WireError(
                    ErrorCode.PAYLOAD_TOO_LARGE,
                    f"image of {image.width} x {image.height} pixels; at most {MAX_IMAGE_PIXELS} in all",
                )
            image.load()
            return _upright_rgb(image)
    except WireError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own cap comes first where it is lower, or where a program made its warning an error.
        raise WireError(
            ErrorCode.PAYLOAD_TOO_LARGE, f"image of too many pixels; at most {MAX_IMAGE_PIXELS} in all"
        ) from error
    except Exception as error:  # Pillow raises many kinds on damaged files, SyntaxError and struct.error among them
        raise WireError(ErrorCode.CORRUPT_IMAGE, f"not a readable {', '.join(IMAGE_FORMATS)} file") from error


def encode_image(image: Image.Image) -> bytes:
    """Return the picture as a PNG file: lossless, so that the worker sees the very pixels."""
    buffer = io.BytesIO()
    _upright_rgb(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def image_from_array(array: npt.NDArray[np.generic]) -> Image.Image:
    """Turn an array into a picture.

    Shape:
        array: (H, W), (H, W, 1) or (H, W, 3), uint8.

    Raises:
        WireError: DTYPE_MISMATCH or SHAPE_MISMATCH.
    """
    if array.dtype != np.uint8:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"images must be uint8 arrays, 0 to 255; got {array.dtype}. Scale and convert: (x * 255).astype('uint8')",
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):
        if 0 in array.shape:
            raise WireError(ErrorCode.SHAPE_MISMATCH, f"image of shape {array.shape} has no pixels")
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
    raise WireError(
        ErrorCode.SHAPE_MISMATCH,
        f"an image must be (height, width), (height, width, 1) or (height, width, 3); got {array.shape}",
    )


def preprocess_image(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize the shorter side, crop the centre, convert to RGB.

    Shape:
        returns (H, W, C): (input_size, input_size, 3), uint8.
    """
    size = preprocessing.input_size
    resample = _RESAMPLING[preprocessing.interpolation]
    target = max(size, round(size / preprocessing.crop_fraction))
    image = _upright_rgb(image)
    scale = target / min(image.size)
    width = max(target, round(image.width * scale))
    height = max(target, round(image.height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > MAX_IMAGE_PIXELS:
        # A picture of 1 x 1,000,000 pixels would grow to gigabytes: compute nothing but the part that is kept.
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return np.asarray(image.resize((size, size), resample, box=box), dtype=np.uint8)
    if (width, height) != image.size:
        image = image.resize((width, height), resample)
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF data says and convert it to RGB, transparency dropped."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits at 255, which turns nearly everything white.
        array = np.asarray(image)
        return Image.fromarray((array.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise WireError(
            ErrorCode.DTYPE_MISMATCH, "pictures of floating-point pixels have no stated range; convert them to uint8"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # in one step some versions of Pillow warn
    return image.convert("RGB")
