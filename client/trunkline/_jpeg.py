"""How many bytes pictures need as JPEG files: what sending features has to be compared with."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from trunkline_wire.specs import Preprocessing

from trunkline.images import pictures

if TYPE_CHECKING:
    from trunkline.images import Picture

QUALITY = 90
"""Of JPEG files."""

MAX_PICTURES = 100
"""Most pictures of the user's that are read."""


@dataclass(frozen=True)
class JpegSize:
    """Mean size of a picture as a file, in bytes.

    Attributes:
        resized: After resizing and cropping to the input size, as a JPEG file of quality 90.
        own: The user's files as they are; None if none were given.
        source: Which pictures.
    """

    resized: float
    own: float | None
    source: str

    @property
    def smallest(self) -> float:
        """The smaller of both: what features have to beat."""
        return self.resized if self.own is None else min(self.own, self.resized)


def measure_jpeg(images: Any, preprocessing: Preprocessing) -> JpegSize:
    """Measure pictures of the user's, evenly spread where there are many.

    Args:
        images: As in ``trunkline.images.pictures``.
        preprocessing: How they are resized and cropped.

    Raises:
        CorruptImageError: One cannot be decoded.
    """
    found = pictures(images)
    chosen = spread(found, MAX_PICTURES)
    own = sum(len(one.encoded()) for one in chosen) / len(chosen)
    resized = sum(_jpeg_bytes(one, preprocessing) for one in chosen) / len(chosen)
    number = f"{len(chosen)}" if len(chosen) == len(found) else f"{len(chosen)} of your {len(found)}"
    return JpegSize(resized, own, f"{number} pictures")


def spread(rows: Sequence[Picture], most: int) -> list[Picture]:
    """Return so many rows at most, evenly spread over all."""
    count = min(most, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _jpeg_bytes(picture: Picture, preprocessing: Preprocessing) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture.preprocessed(preprocessing)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.tell()
