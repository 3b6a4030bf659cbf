"""Encoded images to the array that enters the network: in threads of their own, each row failing by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import decode_image, preprocess_image
from trunkline_wire.specs import Preprocessing


@dataclass(frozen=True)
class DecodedImages:
    """The rows that could be decoded.

    Attributes:
        images_BHWC: uint8, the good rows side by side.
        good: Their indices in what was given.
        errors: Index to error, for the others.
    """

    images_BHWC: npt.NDArray[np.uint8]
    good: list[int]
    errors: dict[int, WireError]


class ImageDecoder:
    """A bounded pool of threads that decode and preprocess."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="trunkline-decode")

    def close(self) -> None:
        """Wait for what is running and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def decode(self, images: Sequence[bytes], preprocessing: Preprocessing) -> DecodedImages:
        """Decode a bounded number of images: all of them are in memory at once."""
        loop = asyncio.get_running_loop()
        outcomes = await asyncio.gather(
            *(loop.run_in_executor(self._pool, _decode_one, image, preprocessing) for image in images)
        )
        size = preprocessing.input_size
        decoded = {index: one for index, one in enumerate(outcomes) if not isinstance(one, WireError)}
        errors = {index: one for index, one in enumerate(outcomes) if isinstance(one, WireError)}
        stacked = np.empty((len(decoded), size, size, 3), dtype=np.uint8)
        for position, image in enumerate(decoded.values()):
            stacked[position] = image
        return DecodedImages(stacked, list(decoded), errors)


def _decode_one(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.uint8] | WireError:
    try:
        return preprocess_image(decode_image(data), preprocessing)
    except WireError as error:
        return error
    except Exception:  # a picture that decodes and still cannot be resized is one bad row, not a bad batch
        return WireError(ErrorCode.CORRUPT_IMAGE, "the picture was read but cannot be resized or converted")
