"""Pictures to measure errors on and to calibrate quantised stems with: generated ones, or the operator's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_IMAGE_BYTES
from trunkline_wire.preprocess import IMAGE_FORMATS, decode_image, preprocess_image
from trunkline_wire.specs import Preprocessing

from trunkline_worker.backbones.leaves import LEAVES_VERSION, dead_leaves

# Shape suffix legend: B = pictures, H = height, W = width, C = channels

CALIBRATION_PICTURES = 32
"""Most pictures that a quantised stem is calibrated on. Errors are measured on others."""

CALIBRATION_RECIPE = 1
"""Changes whenever quantised stems do for equal pictures: those made before are then made again."""

MAX_SAMPLE_PICTURES = 64
"""Pictures of a folder that are used unless told otherwise."""

GENERATED_PICTURES = 65_536
"""Pictures that can be generated: as many as anyone asks for."""

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


@dataclass(frozen=True)
class PictureFile:
    """One picture of a folder, and the SHA-256 of the file when the folder was read."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Samples:
    """A row of pictures in a fixed order. Nothing is kept in memory: each call makes or reads them again.

    Attributes:
        digest: Hex SHA-256 of what the pictures are. Equal digests mean equal pictures.
        description: Shown to users: where the pictures come from.
        files: The operator's own pictures. Empty for generated ones.
    """

    digest: str
    description: str
    files: tuple[PictureFile, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path, max_pictures: int = MAX_SAMPLE_PICTURES) -> Samples:
        """Take the JPEG, PNG and WebP files of a folder and of those inside it. Every one that is used is decoded once.

        Of more than ``max_pictures`` every n-th by name is used, so that each subfolder has its share. They are put in
        the order of their hashes: names do not matter, and the pictures of one subfolder do not lie side by side. Equal
        files count once. Files and folders whose names start with a dot are left out.

        Raises:
            WireError: NOT_FOUND where there is no such folder or no picture in it; CORRUPT_IMAGE or PAYLOAD_TOO_LARGE,
                with the file's name.
        """
        root = Path(folder)
        if not root.is_dir():
            raise WireError(
                ErrorCode.NOT_FOUND, f"no folder {str(folder)[:200]!r}; name one with {', '.join(IMAGE_FORMATS)} files"
            )
        paths = _spread(_picture_paths(root), max_pictures)
        if not paths:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"no pictures in {str(folder)[:200]!r}; files that end in {', '.join(sorted(_SUFFIXES))} are used",
            )
        by_hash: dict[str, PictureFile] = {}
        for path in paths:
            data = _read(path)
            _decode(path, data)
            sha256 = hashlib.sha256(data).hexdigest()
            by_hash.setdefault(sha256, PictureFile(path, sha256))
        hashes = sorted(by_hash)
        digest = hashlib.sha256("\0".join(["folder-v1", *hashes]).encode()).hexdigest()
        noun = "picture" if len(hashes) == 1 else "pictures"
        return cls(digest, f"{len(hashes)} {noun} of the operator's", tuple(by_hash[one] for one in hashes))

    @property
    def num_pictures(self) -> int:
        """How many pictures there are."""
        return len(self.files) or GENERATED_PICTURES

    def pictures(self, preprocessing: Preprocessing, num: int, *, start: int = 0) -> npt.NDArray[np.uint8]:
        """Return pictures ``start`` to ``start + num`` as they enter the network; fewer where there are no more.

        Shape:
            returns (B, H, W, C): (at most num, input_size, input_size, 3), uint8.

        Raises:
            WireError: INVALID_ARGUMENT where that leaves none; NOT_FOUND, CORRUPT_IMAGE or CORRUPT_DATA where a file
                is gone, or no longer what it was when the folder was read.
        """
        indices = range(start, min(start + num, self.num_pictures))
        if start < 0 or not indices:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"sample pictures {start} to {start + num} were asked for; there are {self.num_pictures}",
            )
        return np.stack([preprocess_image(self._picture(index), preprocessing) for index in indices])

    @property
    def calibration_digest(self) -> str:
        """Return the hex SHA-256 of what quantised stems are calibrated on, and of how."""
        return hashlib.sha256(f"{self.digest}\0{CALIBRATION_PICTURES}\0{CALIBRATION_RECIPE}".encode()).hexdigest()

    def calibration(self, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
        """Return the pictures to calibrate a quantised stem on: at most ``CALIBRATION_PICTURES``, at most half of all.

        A single picture is used for both.

        Shape:
            returns (B, H, W, C): (number of pictures, input_size, input_size, 3), uint8.

        Raises:
            WireError: As ``pictures`` does.
        """
        return self.pictures(preprocessing, self._num_calibration)

    def held_out(self, preprocessing: Preprocessing, num: int) -> npt.NDArray[np.uint8]:
        """Return up to ``num`` pictures to measure errors on, none of them seen in calibration.

        A single picture is used for both.

        Shape:
            returns (B, H, W, C): (at most num, input_size, input_size, 3), uint8.

        Raises:
            WireError: As ``pictures`` does.
        """
        start = self._num_calibration if self.num_pictures > 1 else 0
        return self.pictures(preprocessing, num, start=start)

    @property
    def _num_calibration(self) -> int:
        return min(CALIBRATION_PICTURES, (self.num_pictures + 1) // 2)

    def _picture(self, index: int) -> Image.Image:
        if not self.files:
            return Image.fromarray(dead_leaves(index))
        file = self.files[index]
        data = _read(file.path)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise WireError(
                ErrorCode.CORRUPT_DATA,
                f"the sample picture {file.path.name[:200]!r} has changed since its folder was read; start again",
            )
        return _decode(file.path, data)


BUNDLED = Samples(
    hashlib.sha256(f"dead-leaves-v{LEAVES_VERSION}".encode()).hexdigest(), "generated pictures of overlapping discs"
)
"""Pictures made by rule, with the statistics of photographs: what is used where the operator names no folder."""


def _picture_paths(root: Path) -> list[Path]:
    """Return the pictures below a folder, sorted by name."""
    found = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _spread(paths: Sequence[Path], num: int) -> list[Path]:
    """Return at most ``num`` of them, evenly spaced."""
    if len(paths) <= num:
        return list(paths)
    return [paths[i * len(paths) // num] for i in range(num)]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # One byte over the bound is enough for the decoder to refuse it.
            return file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise WireError(
            ErrorCode.NOT_FOUND, f"the sample picture {path.name[:200]!r} cannot be read: {error.strerror}"
        ) from error


def _decode(path: Path, data: bytes) -> Image.Image:
    try:
        return decode_image(data)
    except WireError as error:
        raise WireError(error.code, f"the sample picture {path.name[:200]!r}: {error.message}") from error
