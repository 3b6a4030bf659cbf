"""Rows as they are sent to the array that enters the network: in threads of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from trunkline_wire.bottleneck import Bottleneck
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import decode_image, preprocess_image
from trunkline_wire.quantise import PackedRows, unpack
from trunkline_wire.specs import Preprocessing

from trunkline_worker.engine.api import Payload

_SHORT_BYTES = 2**16
"""Packed rows of fewer bytes are unpacked at once: a thread would take longer to answer."""


@dataclass(frozen=True)
class DecodedRows:
    """The rows that could be decoded.

    Attributes:
        rows: The good rows side by side: (B, H, W, 3) uint8 images, or (B, ...) float32 features.
        good: Their indices in what was given.
        errors: Index to error, for the others.
    """

    rows: npt.NDArray[np.generic]
    good: list[int]
    errors: dict[int, WireError] = field(default_factory=dict)


class RowDecoder:
    """A bounded pool of threads. Takes a bounded number of rows: all of them are in memory at once."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="trunkline-decode")

    def close(self) -> None:
        """Wait for what is running and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def decode(
        self, rows: Payload, part: slice, preprocessing: Preprocessing, bottleneck: Bottleneck | None
    ) -> DecodedRows:
        """Bring some of the rows of a request to what enters the network.

        Args:
            rows: All of them, checked.
            part: Which.
            preprocessing: Of images.
            bottleneck: Whose codes the rows are. None: they are no codes.
        """
        if isinstance(rows, PackedRows):
            decoded = await self.packed(rows.take(part))
        elif isinstance(rows, np.ndarray):
            decoded = DecodedRows(rows[part], list(range(len(rows[part]))))
        else:
            decoded = await self.images(rows[part], preprocessing)
        return decoded if bottleneck is None else await self._from_codes(decoded, bottleneck)

    async def images(self, images: Sequence[bytes], preprocessing: Preprocessing) -> DecodedRows:
        """Decode and preprocess image files, each failing by itself."""
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
        return DecodedRows(stacked, list(decoded), errors)

    async def packed(self, rows: PackedRows) -> DecodedRows:
        """Unpack features to float32."""
        if rows.nbytes <= _SHORT_BYTES:
            features = unpack(rows)
        else:
            features = await asyncio.get_running_loop().run_in_executor(self._pool, unpack, rows)
        return DecodedRows(features, list(range(len(rows))))

    async def _from_codes(self, decoded: DecodedRows, bottleneck: Bottleneck) -> DecodedRows:
        codes, layer = decoded.rows.astype(np.float32, copy=False), bottleneck.decoder
        loop = asyncio.get_running_loop()
        features = await loop.run_in_executor(self._pool, layer.apply, codes, bottleneck.channel_axis)
        return replace(decoded, rows=features)


def _decode_one(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.uint8] | WireError:
    try:
        return preprocess_image(decode_image(data), preprocessing)
    except WireError as error:
        return error
    except Exception:  # a picture that decodes and still cannot be resized is one bad row, not a bad batch
        return WireError(ErrorCode.CORRUPT_IMAGE, "the picture was read but cannot be resized or converted")
