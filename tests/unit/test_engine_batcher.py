"""The batcher: what is served together, in which order, what leaves the line before it costs anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.engine.batcher import Batcher, Part, PartResult, Rows
from trunkline_worker.store.clock import ManualClock


class Runner:
    """Runs batches when it is let to. A row's value is itself times two."""

    def __init__(self, clock: ManualClock, seconds_per_row: float = 0.01) -> None:
        self.batches: list[tuple[Hashable, list[int]]] = []
        self.started = asyncio.Event()
        self.free = asyncio.Event()
        self.free.set()
        self.fail: Callable[[list[int]], Exception | None] = lambda _rows: None
        self._clock = clock
        self._seconds_per_row = seconds_per_row

    async def __call__(self, key: Hashable, parts: Sequence[Part[Any]]) -> list[PartResult]:
        rows = [int(one) for part in parts for one in part.rows.features[:, 0]]
        self.batches.append((key, rows))
        self.started.set()
        await self.free.wait()
        self._clock.advance(self._seconds_per_row * len(rows))
        error = self.fail(rows)
        if error is not None:
            raise error
        return [
            PartResult(None, part.context)
            if isinstance(part.context, WireError)
            else PartResult((part.rows.features * 2).astype(np.float32), None, 0.5, 0.25)
            for part in parts
        ]

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for _, rows in self.batches]


def _rows(*values: int) -> Rows:
    return Rows(np.array(values, dtype=np.int64)[:, None])


async def _settle() -> None:
    """Let every task that can run do so, as far as it gets."""
    for _ in range(10):
        await asyncio.sleep(0)


def _run(
    test: Callable[[Batcher[Any], Runner, ManualClock], Coroutine[Any, Any, None]],
    *,
    max_rows: int = 32,
    max_queued_rows: int = 10_000,
) -> None:
    async def main() -> None:
        clock = ManualClock()
        runner = Runner(clock)
        batcher: Batcher[Any] = Batcher(
            runner, clock=clock, max_rows=lambda _key: max_rows, max_queued_rows=max_queued_rows
        )
        batcher.start()
        async with asyncio.timeout(20):
            await test(batcher, runner, clock)
            runner.free.set()
            await batcher.close()
        assert batcher.queued_rows == 0

    asyncio.run(main())


async def _occupy(batcher: Batcher[Any], runner: Runner) -> asyncio.Task[Any]:
    """Start a batch that runs until the runner is freed."""
    runner.free.clear()
    runner.started.clear()
    task = asyncio.ensure_future(batcher.submit("blocker", _rows(-1), None))
    await runner.started.wait()
    return task


def test_arrivals_during_a_slow_run_share_the_fewest_batches() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        await _occupy(batcher, runner)
        tasks = []
        for value in range(200):  # one after another, each in a task of its own, none at once
            tasks.append(asyncio.ensure_future(batcher.submit("a", _rows(value), None)))
            await asyncio.sleep(0)
        assert batcher.queued_rows == 200
        runner.free.set()
        results = await asyncio.gather(*tasks)
        assert [float(one.values[0, 0]) for one in results] == [2.0 * value for value in range(200)]
        assert runner.sizes == [1, 32, 32, 32, 32, 32, 32, 8]

    _run(test)


def test_arrivals_at_once_on_an_idle_batcher_share_one_batch() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        await asyncio.gather(*(batcher.submit("a", _rows(value), None) for value in range(20)))
        assert runner.sizes == [20]

    _run(test)


def test_groups_do_not_mix_and_the_head_of_the_line_goes_first() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        order = ["b", "a", "b", "a", "c"]
        tasks = [asyncio.ensure_future(batcher.submit(key, _rows(index), None)) for index, key in enumerate(order)]
        await _settle()
        runner.free.set()
        await asyncio.gather(blocker, *tasks)
        assert runner.batches[1:] == [("b", [0, 2]), ("a", [1, 3]), ("c", [4])]

    _run(test)


def test_a_large_request_runs_in_slices_and_lets_small_ones_through() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        large = asyncio.ensure_future(batcher.submit("a", _rows(*range(100)), None))
        await _settle()
        small = asyncio.ensure_future(batcher.submit("a", _rows(1000), None))
        await _settle()
        runner.free.set()
        result = await large
        await asyncio.gather(blocker, small)
        assert result.values[:, 0].tolist() == [2.0 * value for value in range(100)]
        assert runner.sizes[1:] == [32, 32, 32, 5]
        assert 1000 in runner.batches[2][1]  # the second batch, not the last
        assert (result.trunk_s, result.head_s) == (4 * 0.5, 4 * 0.25)

    _run(test)


def test_times_in_the_line_are_counted() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, clock: ManualClock) -> None:
        await _occupy(batcher, runner)
        task = asyncio.ensure_future(batcher.submit("a", _rows(1), None))
        await _settle()
        clock.advance(3.0)
        runner.free.set()
        assert (await task).queue_s == pytest.approx(3.01)

    _run(test)


def test_expired_requests_never_run() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, clock: ManualClock) -> None:
        await _occupy(batcher, runner)
        late = asyncio.ensure_future(batcher.submit("a", _rows(1), None, deadline=clock.monotonic() + 1.0))
        in_time = asyncio.ensure_future(batcher.submit("a", _rows(2), None, deadline=clock.monotonic() + 9.0))
        await _settle()
        clock.advance(2.0)
        runner.free.set()
        with pytest.raises(WireError) as caught:
            await late
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
        await in_time
        assert runner.batches[1:] == [("a", [2])]
        with pytest.raises(WireError) as caught:
            await batcher.submit("a", _rows(3), None, deadline=clock.monotonic())
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED

    _run(test)


def test_a_large_request_that_expires_between_its_slices_stops() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, clock: ManualClock) -> None:
        with pytest.raises(WireError) as caught:  # 0.32 s a batch
            await batcher.submit("a", _rows(*range(500)), None, deadline=clock.monotonic() + 0.5)
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
        assert runner.sizes == [32, 32]

    _run(test)


def test_cancelled_requests_leave_the_line() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        gone = asyncio.ensure_future(batcher.submit("a", _rows(1, 2), None))
        stays = asyncio.ensure_future(batcher.submit("a", _rows(3), None))
        await _settle()
        assert batcher.queued_rows == 3
        gone.cancel()
        await _settle()
        assert batcher.queued_rows == 1
        runner.free.set()
        await asyncio.gather(blocker, stays)
        assert runner.batches[1:] == [("a", [3])]
        assert gone.cancelled()

    _run(test)


def test_a_request_cancelled_while_it_runs_harms_nobody() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        runner.free.clear()
        pair = [asyncio.ensure_future(batcher.submit("a", _rows(value), None)) for value in (1, 2)]
        await runner.started.wait()
        pair[0].cancel()
        await _settle()
        runner.free.set()
        assert (await pair[1]).values[0, 0] == 4.0

    _run(test)


def test_a_full_line_says_when_to_come_back() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        await batcher.submit("a", _rows(*range(32)), None)  # 100 rows/s by the runner's clock
        blocker = await _occupy(batcher, runner)
        waiting = [asyncio.ensure_future(batcher.submit("a", _rows(*range(30)), None)) for _ in range(2)]
        await _settle()
        with pytest.raises(WireError) as caught:
            await batcher.submit("a", _rows(*range(60)), None)
        assert caught.value.code is ErrorCode.OVERLOADED
        assert caught.value.retry_delay_s == pytest.approx(0.2)  # 60 + 60 - 100 rows at 100 rows/s
        runner.free.set()
        await asyncio.gather(blocker, *waiting)
        await batcher.submit("a", _rows(*range(60)), None)

    _run(test, max_queued_rows=100)


def test_expired_rows_make_room() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, clock: ManualClock) -> None:
        await _occupy(batcher, runner)
        late = asyncio.ensure_future(batcher.submit("a", _rows(*range(9)), None, deadline=clock.monotonic() + 1))
        await _settle()
        clock.advance(2.0)
        fresh = asyncio.ensure_future(batcher.submit("a", _rows(*range(9)), None))
        await _settle()
        assert isinstance(late.exception(), WireError)
        runner.free.set()
        await fresh

    _run(test, max_queued_rows=10)


def test_a_request_larger_than_the_line_is_taken_when_nothing_waits() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        assert len((await batcher.submit("a", _rows(*range(50)), None)).values) == 50
        with batcher.hold(50) as hold:
            assert batcher.queued_rows == 50
            with pytest.raises(WireError):
                await batcher.submit("a", _rows(1), None)
            await batcher.submit("a", _rows(*range(25)), None, hold=hold)
            assert batcher.queued_rows == 25

    _run(test, max_queued_rows=10)


@pytest.mark.parametrize("error", [ValueError("broken"), WireError(ErrorCode.WORKER_OOM, "no memory")])
def test_a_failing_batch_fails_its_own_requests_only(error: Exception) -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        runner.fail = lambda rows: error if 13 in rows else None
        blocker = await _occupy(batcher, runner)
        tasks = [
            asyncio.ensure_future(batcher.submit(key, _rows(value), None))
            for key, value in (("a", 13), ("a", 14), ("b", 15))
        ]
        large = asyncio.ensure_future(batcher.submit("c", _rows(*range(100)), None))
        await _settle()
        runner.free.set()
        results = await asyncio.gather(*tasks, large, return_exceptions=True)
        await blocker
        assert results[0] is error
        assert results[1] is error
        assert results[2].values[0, 0] == 30.0  # type: ignore[union-attr]
        assert results[3] is error
        assert runner.sizes.count(32) == 1  # the rest of the large one was not run in vain
        assert (await batcher.submit("a", _rows(1), None)).values[0, 0] == 2.0

    _run(test)


def test_a_failing_part_fails_its_request_only() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        error = WireError(ErrorCode.CORRUPT_DATA, "that head is damaged")
        results = await asyncio.gather(
            batcher.submit("a", _rows(1), error), batcher.submit("a", _rows(2), None), return_exceptions=True
        )
        assert results[0] is error
        assert results[1].values[0, 0] == 4.0  # type: ignore[union-attr]
        assert runner.sizes == [2]

    _run(test)


def test_a_runner_that_loses_a_part_is_found_out() -> None:
    async def main() -> None:
        async def run(_key: Hashable, _parts: Sequence[Part[None]]) -> list[PartResult]:
            return []

        batcher: Batcher[None] = Batcher(run, clock=ManualClock(), max_rows=lambda _key: 4, max_queued_rows=10)
        batcher.start()
        with pytest.raises(RuntimeError, match="0 results for 1 parts"):
            await batcher.submit("a", _rows(1), None)
        await batcher.close()

    asyncio.run(main())


def test_closing_runs_what_waits_and_takes_nothing_new() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        await _occupy(batcher, runner)
        waiting = [asyncio.ensure_future(batcher.submit("a", _rows(value), None)) for value in range(5)]
        with batcher.hold(2) as hold:
            await _settle()
            closing = asyncio.ensure_future(batcher.close())
            await _settle()
            with pytest.raises(WireError) as caught:
                await batcher.submit("a", _rows(9), None)
            assert caught.value.code is ErrorCode.UNAVAILABLE
            runner.free.set()
            await asyncio.gather(*waiting)
            await _settle()
            assert not closing.done()  # what is held was promised a place
            await batcher.submit("a", _rows(7), None, hold=hold)
        await closing

    _run(test)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 20), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 16),
)
def test_every_request_gets_its_own_rows_back(requests: list[tuple[str, int, bool]], max_rows: int) -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        tasks = []
        start = 0
        for key, count, pause in requests:
            tasks.append(
                (start, count, asyncio.ensure_future(batcher.submit(key, _rows(*range(start, start + count)), None)))
            )
            start += count
            if pause:
                await asyncio.sleep(0)
        for first, count, task in tasks:
            assert (await task).values[:, 0].tolist() == [2.0 * one for one in range(first, first + count)]
        assert sorted(row for _, rows in runner.batches for row in rows) == list(range(start))
        assert max(runner.sizes) <= max_rows

    _run(test, max_rows=max_rows)
