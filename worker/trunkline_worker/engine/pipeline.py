"""Encoded rows through decoder and batcher: decoding the next ones while the trunk runs on the last ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Timings

from trunkline_worker.engine.batcher import Batcher, BatchResult, Hold, Monotonic, Rows
from trunkline_worker.engine.compute import Work
from trunkline_worker.engine.decoding import DecodedRows

_SLICES_IN_FLIGHT = 2

Decode = Callable[[slice], Awaitable[DecodedRows]]
"""Decodes some of a request's rows."""


@dataclass
class Collected:
    """Rows as they come back. ``values`` is (B, K) float32, NaN where nothing came; times are in seconds."""

    values: npt.NDArray[np.float32]
    errors: dict[int, WireError] = field(default_factory=dict)
    queue_s: float = 0.0
    decode_s: float = 0.0
    trunk_s: float = 0.0
    head_s: float = 0.0

    @classmethod
    def of(cls, result: BatchResult) -> Collected:
        """Return what came of a request whose rows needed no decoding."""
        return cls(result.values, queue_s=result.queue_s, trunk_s=result.trunk_s, head_s=result.head_s)

    def add(self, result: BatchResult, rows: Sequence[int]) -> None:
        """Put the result of some rows in its place."""
        self.values[list(rows)] = result.values
        # Slices wait side by side but run one after another.
        self.queue_s = max(self.queue_s, result.queue_s)
        self.trunk_s += result.trunk_s
        self.head_s += result.head_s

    def fail_overflown(self) -> None:
        """Turn rows whose values are not finite into errors of their own."""
        finite_B = np.isfinite(self.values).all(axis=1)
        for row in np.flatnonzero(~finite_B).tolist():
            if row not in self.errors:
                self.errors[row] = WireError(
                    ErrorCode.NOT_FINITE,
                    "the network overflows on this row: its features are far outside of what it knows",
                )
                self.values[row] = np.nan

    def timings(self, total_s: float) -> Timings:
        """Return where the time went."""
        return Timings(
            queue_s=self.queue_s,
            decode_s=self.decode_s,
            trunk_s=self.trunk_s,
            head_s=self.head_s,
            total_s=total_s,
        )


class DecodingPipeline:
    """Decodes requests slice by slice, so that decoded rows, many times as large, never fill the memory."""

    def __init__(self, batcher: Batcher[Work], clock: Monotonic) -> None:
        self._batcher = batcher
        self._clock = clock

    async def process(
        self,
        num_rows: int,
        decode: Decode,
        *,
        key: Hashable,
        work: Work,
        hold: Hold,
        deadline: float | None,
        slice_rows: int,
        width: int,
        more_BE: npt.NDArray[np.float32] | None = None,
    ) -> Collected:
        """Decode and run.

        Args:
            num_rows: Of the request.
            decode: Decodes some of them.
            key: The batcher's group.
            work: What is wanted of the rows.
            hold: The rows' place in the batcher's count.
            deadline: As for ``Batcher.submit``.
            slice_rows: Rows that are decoded together; a batch's worth.
            width: Columns of what comes back.
            more_BE: Columns of the request's rows that go past the trunk.

        Raises:
            WireError: As ``Batcher.submit`` does. A row that cannot be decoded is an error of its own only.
        """
        collected = Collected(np.full((num_rows, width), np.nan, dtype=np.float32))
        gate = asyncio.Semaphore(_SLICES_IN_FLIGHT)

        async def one_slice(first: int) -> None:
            async with gate:
                start = self._clock.monotonic()
                decoded = await decode(slice(first, min(first + slice_rows, num_rows)))
                collected.decode_s += self._clock.monotonic() - start
                collected.errors.update({first + row: error for row, error in decoded.errors.items()})
                if decoded.good:
                    numbers = [first + row for row in decoded.good]
                    rows = Rows(decoded.rows, None if more_BE is None else more_BE[numbers])
                    collected.add(await self._batcher.submit(key, rows, work, deadline=deadline, hold=hold), numbers)

        tasks = [asyncio.ensure_future(one_slice(first)) for first in range(0, num_rows, slice_rows)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return collected
