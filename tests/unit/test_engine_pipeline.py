"""Decoding slice by slice: what is decoded at a time, when it stops, and what it takes of memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import pack
from trunkline_wire.specs import INPUT_CUT, CutSpec, SliceSpec
from trunkline_worker.engine.batcher import Batcher, Part, PartResult
from trunkline_worker.engine.compute import Work
from trunkline_worker.engine.decoding import DecodedRows
from trunkline_worker.engine.multihead import Columns
from trunkline_worker.engine.pipeline import SLICES_IN_FLIGHT, Collected, DecodingPipeline, memory_of
from trunkline_worker.engine.targets import Target
from trunkline_worker.store.clock import ManualClock

SLICE_ROWS = 4
WORK = Work(None, Columns([SliceSpec("a", 0, 1)]), ())


class Decoder:
    """Decodes when it is let to. A row is its own number; odd multiples of 13 cannot be decoded."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.finished: list[int] = []
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, part: slice) -> DecodedRows:
        self.started.append(part.start)
        await self.free.wait()
        self.finished.append(part.start)
        rows = np.arange(part.start, part.stop, dtype=np.float32)[:, None]
        bad = np.flatnonzero(rows % 26 == 13).tolist()
        good = [index for index in range(len(rows)) if index not in bad]
        return DecodedRows(rows[good], good, {index: WireError(ErrorCode.CORRUPT_IMAGE, "bad") for index in bad})


def run(
    test: Callable[[Callable[..., Coroutine[Any, Any, Collected]], Decoder, Batcher[Work], ManualClock], Any],
    runner_free: bool = True,
) -> None:
    async def main() -> None:
        clock, decoder, free = ManualClock(), Decoder(), asyncio.Event()
        if runner_free:
            free.set()

        async def run_batch(_key: Hashable, parts: Sequence[Part[Work]]) -> list[PartResult]:
            await free.wait()
            return [PartResult(part.rows.features.astype(np.float32)) for part in parts]

        batcher: Batcher[Work] = Batcher(run_batch, clock=clock, max_rows=lambda _key: SLICE_ROWS, max_queued_rows=1000)
        batcher.start()
        pipeline = DecodingPipeline(batcher, clock)

        async def process(num_rows: int, deadline: float | None = None) -> Collected:
            with batcher.hold(num_rows) as hold:
                return await pipeline.process(
                    num_rows, decoder, key="a", work=WORK, hold=hold, deadline=deadline, slice_rows=SLICE_ROWS, width=1
                )

        async with asyncio.timeout(60):
            await test(process, decoder, batcher, clock)
            free.set()
            await batcher.close()
        assert (batcher.queued_rows, batcher.queued_bytes) == (0, 0)

    asyncio.run(main())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("num_rows", [1, 4, 5, 30])
def test_rows_come_back_in_their_places(num_rows: int) -> None:
    async def test(process: Any, _decoder: Decoder, _batcher: Batcher[Work], _clock: ManualClock) -> None:
        collected = await process(num_rows)
        expected = np.arange(num_rows, dtype=np.float32)
        expected[13:14] = np.nan
        np.testing.assert_array_equal(collected.values[:, 0], expected)
        assert sorted(collected.errors) == ([13] if num_rows > 13 else [])

    run(test)


def test_no_more_than_a_few_slices_are_decoded_ahead_of_the_device() -> None:
    async def test(process: Any, decoder: Decoder, batcher: Batcher[Work], _clock: ManualClock) -> None:
        task = asyncio.ensure_future(process(100))
        await settle()
        assert len(decoder.finished) == SLICES_IN_FLIGHT
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert batcher.queued_rows == 0
        assert len(decoder.started) == SLICES_IN_FLIGHT

    run(test, runner_free=False)


def test_a_request_that_is_cancelled_while_it_is_decoded_is_decoded_no_further() -> None:
    async def test(process: Any, decoder: Decoder, batcher: Batcher[Work], _clock: ManualClock) -> None:
        decoder.free.clear()
        task = asyncio.ensure_future(process(100))
        await settle()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        decoder.free.set()
        await settle()
        assert (len(decoder.started), decoder.finished, batcher.queued_rows) == (SLICES_IN_FLIGHT, [], 0)

    run(test)


@pytest.mark.parametrize("num_rows", [3, 100])
def test_a_request_whose_deadline_passes_is_decoded_no_further(num_rows: int) -> None:
    async def test(process: Any, decoder: Decoder, _batcher: Batcher[Work], clock: ManualClock) -> None:
        clock.advance(1.0)
        with pytest.raises(WireError) as caught:
            await process(num_rows, deadline=1.0)
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
        assert not decoder.started

    run(test)


def test_the_memory_of_a_request_is_what_came_and_what_is_decoded_at_a_time() -> None:
    pictures = CutSpec(INPUT_CUT, (8, 8, 3), "f", ())
    features = CutSpec("mid", (3, 2, 2), "f", ())
    rows = np.zeros((10, 3, 2, 2), np.float16)
    target = Target(None, features, "float32", ())  # type: ignore[arg-type]
    assert memory_of(rows, None, target, slice_rows=2) == rows.nbytes
    assert memory_of(rows, np.zeros((10, 5), np.float32), target, slice_rows=2) == rows.nbytes + 200
    packed = pack(rows.astype(np.float32), "int8")
    assert memory_of(packed, None, target, slice_rows=2) == packed.nbytes + 2 * SLICES_IN_FLIGHT * 12 * 4
    assert memory_of(packed, None, target, slice_rows=100) == packed.nbytes + 10 * 12 * 4
    coded = replace(target, bottleneck=object())  # type: ignore[arg-type]
    assert memory_of(rows, None, coded, slice_rows=2) == rows.nbytes + 2 * SLICES_IN_FLIGHT * 12 * 4
    files = [b"x" * 100] * 10
    assert memory_of(files, None, replace(target, cut=pictures), slice_rows=100) == 1000 + 10 * 192
    assert memory_of(packed) == packed.nbytes
