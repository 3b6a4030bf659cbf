"""Small pictures of rows, inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trunkline._report.page import Markup, tag
from trunkline._report.text import shorten
from trunkline.errors import EmptyBatchError, InvalidArgumentError, TrunklineError
from trunkline.images import Picture, pictures, read_folder

SIDE = 128
"""Longest side of a small picture, in pixels."""

_TINY = 48
"""Pictures up to so many pixels are enlarged square by square."""

_QUALITIES = (80, 60, 40)
_MOST_BYTES = 7000
"""A picture that takes more is compressed harder."""

_REASON_LENGTH = 120


class Gallery:
    """The pictures of a dataset by their rows. Only those that are shown are read, each once."""

    def __init__(self, images: Any = None) -> None:
        """Keep the pictures.

        Args:
            images: What was uploaded, in any form that ``Client.upload`` takes. None: there are none.

        Raises:
            InvalidArgumentError: They cannot be pictures.
        """
        self._pictures = None if images is None else _opened(images)
        self._drawn: dict[int, tuple[str, bool]] = {}
        self._missing: dict[int, str] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._pictures is not None

    def picture(self, row: int, words: str) -> Markup:
        """Return the picture of a row, or a box that says why there is none.

        Args:
            row: Its place in the dataset.
            words: What it shows, for those who do not see it.
        """
        self._draw(row)
        if row in self._missing:
            return tag("span", shorten(self._missing[row], _REASON_LENGTH), class_="picture missing")
        source, is_tiny = self._drawn[row]
        style = "picture small" if is_tiny else "picture"
        return tag("img", src=source, alt=words, class_=style)

    def _draw(self, row: int) -> None:
        if row in self._drawn or row in self._missing:
            return
        found = self._pictures or []
        if not 0 <= row < len(found):
            self._missing[row] = f"row {row}: only {len(found)} pictures were given"
            return
        try:
            image = found[row].decoded()
        except TrunklineError as error:
            self._missing[row] = error.message
            return
        self._drawn[row] = (_data_uri(image), max(image.size) <= _TINY)


def _opened(images: Any) -> Sequence[Picture]:
    if isinstance(images, Iterator):
        images = list(images)
    if isinstance(images, (str, Path)):
        path = Path(images).expanduser()
        if not path.exists():
            raise InvalidArgumentError(f"{path} is not there", hint="Give the pictures that were uploaded")
        images = _in_order(path) if path.is_dir() else path
    return pictures(images)


def _in_order(folder: Path) -> Any:
    """Return the pictures of a folder in the order in which an upload numbers them."""
    try:
        return read_folder(folder)[0]
    except EmptyBatchError:  # no class folders: the labels came from elsewhere
        return folder


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= _MOST_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
