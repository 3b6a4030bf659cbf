"""Encoded rows through decoder and batcher: decoding the next ones while the trunk runs on the last ones."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_BATCH_ROWS
from trunkline_wire.quantise import PackedRows
from trunkline_wire.specs import INPUT_CUT, Timings

from trunkline_worker.engine.api import Payload
from trunkline_worker.engine.batcher import Batcher, BatchResult, Hold, Monotonic, Rows, expired
from trunkline_worker.engine.compute import Work
from trunkline_worker.engine.decoding import DecodedRows
from trunkline_worker.engine.targets import Target

SLICES_IN_FLIGHT = 2
"""Slices of a request that are decoded, or wait decoded, at a time."""

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
        finite = np.isfinite(self.values)
        if finite.all():
            return
        finite_B = finite.all(axis=1)
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


def memory_of(
    rows: Payload,
    more_BE: npt.NDArray[np.float32] | None = None,
    target: Target | None = None,
    *,
    slice_rows: int = MAX_BATCH_ROWS,
) -> int:
    """Return the bytes that a request takes while it waits: what came, and what of it is decoded at a time.

    Args:
        rows: What came.
        more_BE: What goes past the trunk.
        target: Where the rows enter the network. None: they enter none.
        slice_rows: As for ``DecodingPipeline.process``.
    """
    num_bytes = 0 if more_BE is None else more_BE.nbytes
    if isinstance(rows, np.ndarray | PackedRows):
        num_bytes += rows.nbytes
        is_ready = isinstance(rows, np.ndarray) and (target is None or target.bottleneck is None)
    else:
        num_bytes += sum(map(len, rows))
        is_ready = False
    if is_ready or target is None:
        return num_bytes
    values = math.prod(target.cut.feature_shape)
    row_bytes = values if target.cut.name == INPUT_CUT else 4 * values  # pictures are uint8, features float32
    return num_bytes + row_bytes * min(len(rows), SLICES_IN_FLIGHT * slice_rows)


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
        firsts = iter(range(0, num_rows, slice_rows))

        async def slice_by_slice() -> None:
            for first in firsts:  # shared by all who run this
                start = self._clock.monotonic()
                if deadline is not None and start >= deadline:
                    raise expired(start - deadline)
                decoded = await decode(slice(first, min(first + slice_rows, num_rows)))
                collected.decode_s += self._clock.monotonic() - start
                collected.errors.update({first + row: error for row, error in decoded.errors.items()})
                if decoded.good:
                    numbers = [first + row for row in decoded.good]
                    rows = Rows(decoded.rows, None if more_BE is None else more_BE[numbers])
                    collected.add(await self._batcher.submit(key, rows, work, deadline=deadline, hold=hold), numbers)

        if num_rows <= slice_rows:  # most requests: no tasks for these
            await slice_by_slice()
            return collected
        tasks = [asyncio.ensure_future(slice_by_slice()) for _ in range(SLICES_IN_FLIGHT)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return collected
