"""Views of pictures as rows: the picture itself, then changed ones, each made anew whenever it is needed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from trunkline_wire.limits import MAX_VIEWS
from trunkline_wire.preprocess import encode_image
from trunkline_wire.rows import content_digest
from trunkline_wire.specs import Preprocessing

from trunkline._local_inputs import GivenImages, Local, local_list
from trunkline.augment import Augment
from trunkline.errors import InvalidArgumentError
from trunkline.images import Picture
from trunkline.local_models import LocalModel

Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]
"""Makes a view of a picture, in RGB and upright, from what the generator draws."""

JPEG_QUALITY = 95
"""Of views of JPEG files, which would be many times larger as PNG."""


class View(Picture):
    """A changed view of a picture."""

    def __init__(self, picture: Picture, number: int, augment: Augmentation, seed: int) -> None:
        """Keep what it is made from.

        Args:
            picture: What it is a view of.
            number: Which view, from 1.
            augment: Makes it.
            seed: With the picture's content and the number, of everything that is drawn.
        """
        super().__init__(f"view {number} of {picture.name}")
        self._picture = picture
        self._augment = augment
        self._origin = f"view-v1\0{seed}\0{number}\0".encode()
        self._image: Image.Image | None = None

    def digest(self) -> bytes:
        """Return the digest of what it is made from, where that can be named; else of its pixels."""
        if type(self._augment) is not Augment:
            return content_digest(np.asarray(self._made()))
        numbers = json.dumps(self._augment.numbers(), sort_keys=True).encode()
        return hashlib.sha256(self._origin + numbers + b"\0" + self._picture.digest()).digest()

    def encoded(self) -> bytes:
        """Return a JPEG if the picture is one, else a PNG."""
        image = self._taken()
        if not self._picture.is_jpeg():
            return encode_image(image)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue()

    def decoded(self) -> Image.Image:
        """Return the view, which is kept until it is encoded or preprocessed."""
        self._image = self._image or self._made()
        return self._image

    def num_bytes(self) -> int:
        """Return the number of its values: a file is hardly ever larger."""
        # Views of ours are no larger than their pictures, whose size is read without decoding them.
        width, height = self._picture.size() if type(self._augment) is Augment else self._made().size
        return width * height * 3

    def preprocessed(self, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
        """Return the array that enters the network."""
        pixels_HWC = super().preprocessed(preprocessing)
        self._image = None
        return pixels_HWC

    def _taken(self) -> Image.Image:
        image, self._image = self.decoded(), None
        return image

    def _made(self) -> Image.Image:
        drawn_from = hashlib.sha256(self._origin + self._picture.digest()).digest()
        random = np.random.default_rng(int.from_bytes(drawn_from[:16], "little"))
        image = self._augment(self._picture.decoded(), random)
        if not isinstance(image, Image.Image):
            raise InvalidArgumentError(
                f"{self.name}: augment returned a {type(image).__name__}, which is no picture",
                hint="Return a PIL.Image; of an array, PIL.Image.fromarray(array)",
            )
        if not image.width or not image.height:
            raise InvalidArgumentError(f"{self.name}: augment returned a picture without pixels")
        return image if image.mode == "RGB" else image.convert("RGB")


def check_views(views: Any, augment: Any) -> Augmentation | None:
    """Check what is asked for, and return what makes views; None if there are none.

    Raises:
        InvalidArgumentError: The number is out of range, or the parts do not go together.
    """
    if isinstance(views, bool) or not isinstance(views, (int, np.integer)) or not 1 <= views <= MAX_VIEWS:
        raise InvalidArgumentError(f"views is {views!r}; expected 1 to {MAX_VIEWS}, the picture itself included")
    if views == 1:
        if augment is not None:
            raise InvalidArgumentError(
                "augment= says how changed views are made, and there are none", hint="Give views= 2 or more too"
            )
        return None
    if augment is None:
        return Augment()
    if not callable(augment):
        raise InvalidArgumentError(
            f"augment is a {type(augment).__name__}; expected trunkline.Augment(...), or a function of a picture and a "
            "numpy generator that returns a picture"
        )
    made: Augmentation = augment
    return made


def with_views(pictures: Sequence[Picture], views: int, augment: Augmentation | None, seed: int) -> list[Picture]:
    """Return each picture and behind it its changed views, ``views`` in all."""
    if augment is None:
        return list(pictures)
    return [one if number == 0 else View(one, number, augment, seed) for one in pictures for number in range(views)]


def given_views(
    given: GivenImages, views: int, augment: Any, seed: int, local: Local | Sequence[Local] | None, local_inputs: Any
) -> GivenImages:
    """Return what a caller gave as images with their views.

    Raises:
        InvalidArgumentError: What is asked for is out of range, or a local model reads what there are no views of.
    """
    made = check_views(views, augment)
    if made is None:
        return given
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InvalidArgumentError(f"seed is {seed!r}; expected a whole number")
    for one in local_list(local):
        if not isinstance(one, LocalModel) or one.input_size is None or local_inputs is not None:
            raise InvalidArgumentError(
                f"views are made of pictures, and {one.name!r} reads rows as they are",
                hint="Leave views= out, or use a local model with input_size= that takes the pictures",
            )
    return GivenImages(with_views(given.pictures, views, made, seed))
