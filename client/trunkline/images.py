"""Pictures in whatever form the user has them, as a list of rows that are read only when they are needed."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from trunkline_wire.errors import WireError
from trunkline_wire.limits import MAX_IMAGE_BYTES
from trunkline_wire.preprocess import IMAGE_FORMATS, decode_image, encode_image, image_from_array, preprocess_image
from trunkline_wire.rows import content_digest
from trunkline_wire.specs import Preprocessing

from trunkline.errors import (
    BadLabelsError,
    CorruptImageError,
    EmptyBatchError,
    InvalidArgumentError,
    PayloadTooLargeError,
    ShapeMismatchError,
    from_wire,
)

# Shape suffix legend: N = rows, H = height, W = width, C = channels

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Which files of a folder are pictures."""

PATH_COLUMNS = ("path", "file", "filename", "image", "image_path")
"""Names of a table's column of paths, the first that is there."""

LABEL_COLUMNS = ("label", "class", "target", "y")
"""Names of a table's column of labels, the first that is there."""


_JPEG_START = b"\xff\xd8\xff"


class Picture(ABC):
    """One picture of the user's. Every error names it."""

    def __init__(self, name: str) -> None:
        """Keep what to call it in messages: ``row 3 (cat.png)``."""
        self.name = name

    @abstractmethod
    def digest(self) -> bytes:
        """Return the digest of what the row is made from. See ``trunkline_wire.rows``."""

    @abstractmethod
    def encoded(self) -> bytes:
        """Return the picture as a file: the file itself where there is one, else a PNG."""

    @abstractmethod
    def decoded(self) -> Image.Image:
        """Return the picture."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Return about how many bytes ``encoded`` has, without encoding. Never less."""

    def size(self) -> tuple[int, int]:
        """Return width and height, upright or not."""
        return self.decoded().size

    def is_jpeg(self) -> bool:
        """Whether ``encoded`` is a JPEG file."""
        return False

    def preprocessed(self, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
        """Return the (H, W, C) array that enters the network, uint8."""
        return preprocess_image(self.decoded(), preprocessing)

    def _failed(self, error: WireError) -> Exception:
        return from_wire(error, prefix=f"{self.name}: ", hint="Leave it out or replace it")


class _EncodedPicture(Picture):
    """A picture whose encoded bytes are at hand or can be read."""

    @abstractmethod
    def encoded(self) -> bytes: ...

    def digest(self) -> bytes:
        return content_digest(self.encoded())

    def decoded(self) -> Image.Image:
        try:
            return decode_image(self.encoded())
        except WireError as error:
            raise self._failed(error) from None

    def size(self) -> tuple[int, int]:
        try:
            with Image.open(io.BytesIO(self.encoded()), formats=IMAGE_FORMATS) as image:
                return image.size
        except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            return self.decoded().size  # says what is wrong with it

    def is_jpeg(self) -> bool:
        return self.encoded().startswith(_JPEG_START)


class FilePicture(_EncodedPicture):
    """A picture in a file. Read anew whenever it is needed: a folder may be larger than memory."""

    def __init__(self, path: Path, name: str) -> None:
        """Keep the path."""
        super().__init__(name)
        self.path = path

    def encoded(self) -> bytes:
        """Return the file's bytes as they are."""
        self.num_bytes()
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise self._unreadable(error) from error

    def num_bytes(self) -> int:
        """Return the file's size.

        Raises:
            CorruptImageError: It cannot be read.
            PayloadTooLargeError: It is over the limit.
        """
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise self._unreadable(error) from error
        return _check_size(size, self.name)

    def _unreadable(self, error: OSError) -> CorruptImageError:
        return CorruptImageError(f"{self.name}: {error.strerror or error}", hint="Leave it out or replace it")


class BytesPicture(_EncodedPicture):
    """A picture as the bytes of a JPEG, PNG or WebP file."""

    def __init__(self, data: bytes, name: str) -> None:
        """Keep the bytes."""
        super().__init__(name)
        self._data = data

    def encoded(self) -> bytes:
        """Return the bytes as they are."""
        self.num_bytes()
        return self._data

    def num_bytes(self) -> int:
        """Return their number."""
        return _check_size(len(self._data), self.name)


class ArrayPicture(Picture):
    """A picture as a uint8 array of (H, W), (H, W, 1) or (H, W, 3)."""

    def __init__(self, array: npt.NDArray[np.generic], name: str) -> None:
        """Keep the array, its shape and type checked."""
        super().__init__(name)
        try:
            self._image = image_from_array(array)
        except WireError as error:
            raise from_wire(error, prefix=f"{name}: ", hint=_layout_hint(array.shape)) from None
        self._array = array

    def digest(self) -> bytes:
        """Return the digest of the array's type, shape and values."""
        return content_digest(self._array)

    def encoded(self) -> bytes:
        """Return a PNG."""
        return encode_image(self._image)

    def decoded(self) -> Image.Image:
        """Return the picture."""
        return self._image

    def num_bytes(self) -> int:
        """Return the number of its values: a PNG is hardly ever larger."""
        return self._image.width * self._image.height * 3


class PillowPicture(Picture):
    """A picture as a ``PIL.Image``."""

    def __init__(self, image: Image.Image, name: str) -> None:
        """Keep the picture, upright and in RGB."""
        super().__init__(name)
        try:
            upright = ImageOps.exif_transpose(image)
            self._image = upright if upright.mode == "RGB" else upright.convert("RGB")
        except Exception as error:  # Pillow decodes lazily, and raises many kinds on damaged files
            raise CorruptImageError(f"{name}: the picture cannot be decoded", hint="Leave it out") from error

    def digest(self) -> bytes:
        """Return the digest of its pixels."""
        return content_digest(np.asarray(self._image))

    def encoded(self) -> bytes:
        """Return a PNG."""
        return encode_image(self._image)

    def decoded(self) -> Image.Image:
        """Return the picture."""
        return self._image

    def num_bytes(self) -> int:
        """Return the number of its values: a PNG is hardly ever larger."""
        return self._image.width * self._image.height * 3


def pictures(images: Any) -> list[Picture]:
    """Return the user's pictures as rows.

    Args:
        images: A uint8 array of (N, H, W), (N, H, W, 1) or (N, H, W, 3); a list of arrays, of ``PIL.Image``, of
            paths or of encoded bytes; a path to a picture or to a folder of pictures; or a table (pandas, polars)
            with a column of paths.

    Raises:
        EmptyBatchError: There are none.
        ShapeMismatchError, DtypeMismatchError, InvalidArgumentError: They cannot be pictures.
    """
    if isinstance(images, (Image.Image, bytes)):
        images = [images]
    elif isinstance(images, (str, Path)):
        images = picture_paths(Path(images).expanduser())
    elif is_table(images):
        images = _column(images, PATH_COLUMNS, "paths")
    elif not isinstance(images, (list, tuple)):
        images = _array_rows(images)
    if len(images) == 0:
        raise EmptyBatchError("there are no images", hint="Give at least one")
    return [_picture(image, row) for row, image in enumerate(images)]


def read_folder(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Return the pictures of a folder of class folders, and the name of each one's folder as its label.

    Args:
        folder: Holds one folder for each class. Pictures may lie deeper inside.

    Raises:
        EmptyBatchError: There are no pictures in class folders.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InvalidArgumentError(f"{root} is not a folder", hint="Give a folder with one folder for each class")
    paths: list[Path] = []
    labels: list[str] = []
    for directory in sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith(".")):
        found = _pictures_below(directory)
        paths.extend(found)
        labels.extend([directory.name] * len(found))
    if not paths:
        raise EmptyBatchError(
            f"there are no pictures in class folders of {root} ({', '.join(IMAGE_SUFFIXES)})",
            hint=f"Put them in {root}/CLASS/PICTURE",
        )
    return paths, labels


def read_csv(path: str | Path) -> tuple[list[Path], list[str] | None]:
    """Return paths and labels of a CSV file with a header. Relative paths start where the file lies."""
    table = Path(path).expanduser()
    rows, columns = _read_rows(table)
    name = _column_name(columns, PATH_COLUMNS, "paths")
    label = next((one for one in LABEL_COLUMNS if one in columns), None)
    if not rows:
        raise EmptyBatchError(f"{table} has no rows", hint="Give at least one")
    labels = None if label is None else [row[label] for row in rows]
    return [table.parent / row[name] for row in rows], labels


def grouped(images: Any, groups: Any) -> Any:
    """Return the groups of rows, taken from a column of the table or CSV file where one is named.

    Raises:
        InvalidArgumentError: There is no such column.
    """
    if not isinstance(groups, str):
        return groups
    if is_table(images):
        return _column(images, (groups,), "groups")
    if isinstance(images, (str, Path)) and Path(images).suffix.lower() == ".csv":
        return _read_column(Path(images).expanduser(), groups)
    raise InvalidArgumentError(
        f"groups names a column, {groups!r}, and the images are no table",
        hint="Give a table or a CSV file, or one group for each image",
    )


def labelled(images: Any, labels: Any) -> tuple[Any, Any]:
    """Return images and labels, the labels taken from class folders or the table's column where none are given.

    Raises:
        BadLabelsError: There are none.
    """
    if isinstance(images, (str, Path)) and labels is None:
        path = Path(images).expanduser()
        found, labels = read_csv(path) if path.suffix.lower() == ".csv" else read_folder(path)
        images = found
    elif is_table(images) and (labels is None or isinstance(labels, str)):
        wanted = LABEL_COLUMNS if labels is None else (labels,)
        labels = _column(images, wanted, "labels")
    if labels is None:
        raise BadLabelsError(
            "there are no labels",
            hint="Give one for each image, or a folder of class folders, or a table with a column 'label'",
        )
    return images, labels


def _read_rows(table: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows and columns of a CSV file."""
    try:
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidArgumentError(f"{table} cannot be read: {error}", hint="Give a CSV file with a header") from error


def _read_column(table: Path, name: str) -> list[str | None]:
    """Return a column of a CSV file. What is empty is missing."""
    rows, columns = _read_rows(table)
    _column_name(columns, (name,), "groups")
    return [row[name] or None for row in rows]


def is_table(value: Any) -> bool:
    """Whether it is a table of pandas or polars, by what it can do."""
    return hasattr(value, "columns") and hasattr(value, "__getitem__") and not isinstance(value, np.ndarray)


def _picture(image: Any, row: int) -> Picture:
    if isinstance(image, Picture):
        return image
    if isinstance(image, (str, Path)):
        return FilePicture(Path(image).expanduser(), f"row {row} ({Path(image).name})")
    name = f"row {row}"
    if isinstance(image, bytes):
        return BytesPicture(image, name)
    if isinstance(image, Image.Image):
        return PillowPicture(image, name)
    if image is None:
        raise InvalidArgumentError(f"{name} is None, not an image", hint="Leave it out")
    return ArrayPicture(np.asarray(image), name)


def _array_rows(images: Any) -> Sequence[Any]:
    if isinstance(images, Iterable) and not hasattr(images, "__array__"):
        return list(images)
    array = np.asarray(images)
    if array.dtype == object:
        return list(array)
    if array.dtype.kind in "US":
        return [str(one) for one in array.ravel()]
    single = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3) and array.shape[0] > 3)
    if single:
        raise ShapeMismatchError(
            f"an array of shape {array.shape} looks like a single image", hint="Put it in a list: [image]"
        )
    if array.ndim not in (3, 4):
        raise ShapeMismatchError(
            f"images must be (N, height, width), (N, height, width, 1) or (N, height, width, 3); got {array.shape}",
            hint="Reshape the array",
        )
    return list(array)


def _layout_hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3):
        return "Channels come last: np.moveaxis(image, 0, -1)"
    if len(shape) == 3 and shape[2] == 4:
        return "Drop the fourth channel: image[..., :3]"
    return ""


def picture_paths(path: Path) -> list[Path]:
    """Return the pictures that a path stands for: of a folder, of a CSV file, or the one itself."""
    if path.is_dir():
        found = _pictures_below(path)
        if not found:
            raise EmptyBatchError(f"there are no pictures in {path} ({', '.join(IMAGE_SUFFIXES)})", hint="Give others")
        return found
    if path.suffix.lower() == ".csv":
        return read_csv(path)[0]
    return [path]


def _pictures_below(directory: Path) -> list[Path]:
    return sorted(one for one in directory.rglob("*") if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file())


def _column(table: Any, wanted: Sequence[str], what: str) -> list[Any]:
    column = table[_column_name(list(table.columns), wanted, what)]
    to_list = getattr(column, "to_list", None) or column.tolist
    return list(to_list())


def _column_name(columns: Sequence[str], wanted: Sequence[str], what: str) -> str:
    for name in wanted:
        if name in columns:
            return name
    kind = BadLabelsError if what == "labels" else InvalidArgumentError
    raise kind(
        f"the table has no column of {what}: it has {', '.join(map(str, columns))}",
        hint=f"Name the column {' or '.join(repr(one) for one in wanted[:3])}",
    )


def _check_size(size: int, name: str) -> int:
    if size > MAX_IMAGE_BYTES:
        raise PayloadTooLargeError(
            f"{name}: a file of {size} bytes; at most {MAX_IMAGE_BYTES} are accepted", hint="Scale it down"
        )
    return size
