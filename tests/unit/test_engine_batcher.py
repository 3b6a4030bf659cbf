"""The batcher: what is served together, in which order, what leaves the line before it costs anything."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from manual_timers import ManualTimers
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
    max_queued_bytes: int = 2**30,
    depth: int = 1,
) -> None:
    async def main() -> None:
        clock = ManualClock()
        runner = Runner(clock)
        batcher: Batcher[Any] = Batcher(
            runner,
            clock=clock,
            max_rows=lambda _key: max_rows,
            max_queued_rows=max_queued_rows,
            max_queued_bytes=max_queued_bytes,
            depth=depth,
        )
        batcher.start()
        async with asyncio.timeout(60):
            await test(batcher, runner, clock)
            runner.free.set()
            await batcher.close()
        assert (batcher.queued_rows, batcher.queued_bytes) == (0, 0)

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


def _submit(batcher: Batcher[Any], caller: str, *values: int, key: Hashable = "a") -> asyncio.Task[Any]:
    return asyncio.ensure_future(batcher.submit(key, _rows(*values), None, caller=caller))


def test_a_flooding_caller_and_a_quiet_one_share_the_next_batch() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        flood = [_submit(batcher, "t/flood", value) for value in range(1000)]
        await _settle()
        quiet = [_submit(batcher, "t/quiet", 5000 + value) for value in range(4)]
        await _settle()
        runner.free.set()
        await asyncio.gather(blocker, *flood, *quiet)
        assert {5000, 5001, 5002, 5003} <= set(runner.batches[1][1])
        assert runner.sizes[1:-1] == [32] * 31  # and no batch is smaller for that

    _run(test)


def test_callers_share_by_rows_not_by_requests() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        wide = [_submit(batcher, "t/wide", *range(first, first + 8)) for first in range(0, 800, 8)]
        narrow = [_submit(batcher, "t/narrow", 1000 + value) for value in range(100)]
        await _settle()
        runner.free.set()
        await asyncio.gather(blocker, *wide, *narrow)
        for _, rows in runner.batches[2:6]:
            assert sum(row >= 1000 for row in rows) == pytest.approx(16, abs=8)

    _run(test)


def test_requests_stay_whole_where_they_can() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        tasks = [_submit(batcher, caller, *range(first, first + 32)) for first, caller in ((0, "t/a"), (100, "t/b"))]
        await _settle()
        runner.free.set()
        await asyncio.gather(blocker, *tasks)
        assert [rows for _, rows in runner.batches[1:]] == [list(range(32)), list(range(100, 132))]

    _run(test)


def test_tenants_share_equally_whatever_their_connections() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        tasks = [_submit(batcher, f"many/{one % 30}", one) for one in range(900)]
        tasks += [_submit(batcher, "one/0", 1000 + one) for one in range(300)]
        await _settle()
        runner.free.set()
        await asyncio.gather(blocker, *tasks)
        shares = [sum(row >= 1000 for row in rows) for _, rows in runner.batches[3:15]]
        assert sum(shares) / len(shares) == pytest.approx(16, abs=2)

    _run(test)


def test_nobody_saves_up_turns_by_being_away_nor_pays_for_them_by_coming_back() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        stays = [_submit(batcher, "t/stays", value) for value in range(300)]
        await _settle()
        runner.free.set()
        await stays[150]
        runner.free.clear()
        late = [_submit(batcher, "t/late", 1000 + value) for value in range(100)]
        await _settle()
        seen = len(runner.batches)
        runner.free.set()
        await asyncio.gather(blocker, *stays, *late)
        assert sum(row >= 1000 for row in runner.batches[seen][1]) in (16, 17)

    _run(test)


def test_a_busy_group_does_not_keep_another_waiting() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        busy = [_submit(batcher, "t/a", value, key="busy") for value in range(200)]
        await _settle()
        other = _submit(batcher, "t/b", 1, key="other")
        await _settle()
        runner.free.set()
        await asyncio.gather(blocker, *busy, other)
        assert [key for key, _ in runner.batches[1:4]] == ["busy", "other", "busy"]

    _run(test)


def test_bytes_are_bounded_too() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        first = _submit(batcher, "t/a", *range(10))  # 8 bytes a row
        await _settle()
        assert (batcher.queued_rows, batcher.queued_bytes) == (10, 80)
        with pytest.raises(WireError, match="MiB") as caught:
            await batcher.submit("a", _rows(*range(4)), None)
        assert caught.value.code is ErrorCode.OVERLOADED
        assert caught.value.retry_delay_s > 0
        second = _submit(batcher, "t/a", 1, 2)
        await _settle()
        runner.free.set()
        await asyncio.gather(blocker, first, second)
        assert batcher.queued_bytes == 0

    _run(test, max_queued_bytes=100)


def test_the_delay_follows_the_rate_that_was_measured() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, clock: ManualClock) -> None:
        delays = []
        for seconds_per_row in (0.001, 0.1):
            runner._seconds_per_row = seconds_per_row
            for _ in range(30):
                await batcher.submit("a", _rows(*range(32)), None)
            with batcher.hold(100), pytest.raises(WireError) as caught:
                batcher.hold(90)
            delays.append(caught.value.retry_delay_s)
        assert delays == [pytest.approx(0.09, rel=0.01), pytest.approx(9.0, rel=0.01)]

    _run(test, max_queued_rows=100)


def test_bytes_that_decoding_made_are_counted_in_place_of_what_was_held() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        with batcher.hold(4, 24) as hold:
            one = asyncio.ensure_future(batcher.submit("a", _rows(1, 2), None, hold=hold))
            await _settle()
            assert (batcher.queued_rows, batcher.queued_bytes) == (4, 8 + 16)
            two = asyncio.ensure_future(batcher.submit("a", _rows(3), None, hold=hold))
            await _settle()
            assert (batcher.queued_rows, batcher.queued_bytes) == (4, 24)
        assert (batcher.queued_rows, batcher.queued_bytes) == (3, 24)
        runner.free.set()
        await asyncio.gather(blocker, one, two)
        assert (batcher.queued_rows, batcher.queued_bytes) == (0, 0)

    _run(test)


def test_a_slice_takes_its_bytes_along() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        runner.free.clear()
        large = _submit(batcher, "t/a", *range(100))
        await runner.started.wait()
        assert (batcher.queued_rows, batcher.queued_bytes) == (68, 8 * 68)
        large.cancel()
        await _settle()
        assert (batcher.queued_rows, batcher.queued_bytes) == (0, 0)

    _run(test)


def test_waiting_for_room_comes_to_an_end_when_rows_leave_the_line() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        full = _submit(batcher, "t/a", *range(10))

        async def patient(value: int) -> Any:
            with await batcher.hold_in_turn(4, caller="t/b") as hold:
                return await batcher.submit("a", _rows(*range(value, value + 4)), None, hold=hold)

        await _settle()
        waiting = [asyncio.ensure_future(patient(100 * one)) for one in range(1, 4)]
        await _settle()
        assert batcher.queued_rows == 10
        runner.free.set()
        results = await asyncio.gather(*waiting)
        assert [one.values[0, 0] for one in results] == [200.0, 400.0, 600.0]
        await asyncio.gather(blocker, full)

    _run(test, max_queued_rows=10)


def test_who_waits_for_room_when_the_batcher_closes_is_sent_elsewhere() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        full = _submit(batcher, "t/a", *range(10))
        await _settle()
        waiting = asyncio.ensure_future(batcher.hold_in_turn(4))
        await _settle()
        closing = asyncio.ensure_future(batcher.close())
        with pytest.raises(WireError) as caught:
            await waiting
        assert caught.value.code is ErrorCode.UNAVAILABLE
        runner.free.set()
        await asyncio.gather(blocker, full, closing)

    _run(test, max_queued_rows=10)


def test_a_second_batch_is_handed_over_early_only_if_it_is_full() -> None:
    async def test(batcher: Batcher[Any], runner: Runner, _clock: ManualClock) -> None:
        blocker = await _occupy(batcher, runner)
        some = [_submit(batcher, "t/a", value) for value in range(31)]
        await _settle()
        assert runner.sizes == [1]
        some += [_submit(batcher, "t/a", value) for value in range(31, 80)]
        await _settle()
        assert runner.sizes == [1, 32]
        runner.free.set()
        await asyncio.gather(blocker, *some)
        assert runner.sizes == [1, 32, 32, 16]

    _run(test, depth=2)


def test_slices_that_come_back_out_of_order_are_put_in_order() -> None:
    async def main() -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        started: list[int] = []

        async def run(_key: Hashable, parts: Sequence[Part[None]]) -> list[PartResult]:
            started.append(len(started))
            await gates[started[-1]].wait()
            return [PartResult(part.rows.features.astype(np.float32)) for part in parts]

        batcher: Batcher[None] = Batcher(run, clock=ManualClock(), max_rows=lambda _key: 4, max_queued_rows=10, depth=2)
        batcher.start()
        task = asyncio.ensure_future(batcher.submit("a", _rows(*range(8)), None))
        await _settle()
        assert len(started) == 2
        gates[1].set()
        await _settle()
        assert not task.done()
        gates[0].set()
        assert (await task).values[:, 0].tolist() == list(range(8))
        await batcher.close()

    asyncio.run(main())


class Device:
    """A device whose batches cost a fixed time and one per row, by a clock that only timers move."""

    def __init__(self, timers: ManualTimers, fixed_s: float, row_s: float) -> None:
        self.sizes: list[int] = []
        self._timers = timers
        self._fixed_s = fixed_s
        self._row_s = row_s

    async def __call__(self, _key: Hashable, parts: Sequence[Part[Any]]) -> list[PartResult]:
        self.sizes.append(len(parts))
        await self.after(self._fixed_s + self._row_s * len(parts))
        return [PartResult(np.zeros((1, 1), np.float32)) for _ in parts]

    async def after(self, seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        self._timers.later(seconds, lambda: done.set_result(None))
        await done


def _simulate(
    callers: int, *, fixed_s: float, row_s: float, pause_s: Callable[[int], float], seconds: float
) -> tuple[Device, int]:
    """Let callers send one row after another, each a pause after the last answer. Returns device and rows answered."""

    async def main() -> tuple[Device, int]:
        clock = ManualClock()
        timers = ManualTimers(clock)
        device = Device(timers, fixed_s, row_s)
        batcher: Batcher[None] = Batcher(
            device, clock=clock, max_rows=lambda _key: 256, max_queued_rows=1000, later=timers.later
        )
        batcher.start()
        answered = 0

        async def caller(number: int) -> None:
            nonlocal answered
            while clock.monotonic() < seconds:
                await device.after(pause_s(number))
                await batcher.submit("a", _rows(number), None, caller=str(number))
                answered += 1

        tasks = [asyncio.ensure_future(caller(number)) for number in range(callers)]
        while not all(task.done() for task in tasks):
            for _ in range(6):
                await asyncio.sleep(0)
            left = timers.next_s()
            if left is not None:
                timers.advance(max(left, 0.0))
        await batcher.close()
        return device, answered

    return asyncio.run(main())


def test_callers_who_come_back_over_a_network_share_full_batches() -> None:
    # 64 callers come back within a millisecond; a batch costs 10 ms, whatever its size.
    device, _ = _simulate(64, fixed_s=0.01, row_s=1e-5, pause_s=lambda number: 0.0002 + 1e-5 * number, seconds=2.0)
    later = device.sizes[len(device.sizes) // 2 :]
    assert sum(later) / len(later) > 55  # without a wait, every other batch is of a few rows


def test_two_callers_who_always_just_miss_each_other_find_together() -> None:
    device, answered = _simulate(
        2, fixed_s=0.01, row_s=1e-3, pause_s=lambda number: 0.0004 + 1e-4 * number, seconds=2.0
    )
    assert device.sizes[-2:] == [2, 2]
    assert answered > 1.5 * 2.0 / 0.011  # what one by one would give


def test_where_batches_bring_nothing_the_device_is_never_idle() -> None:
    pause_s, row_s = 0.0002, 0.001
    _, answered = _simulate(8, fixed_s=0.0, row_s=row_s, pause_s=lambda _: pause_s, seconds=2.0)
    assert answered == pytest.approx(2.0 / row_s, rel=0.03)  # all are answered at once, and away for a moment


def test_a_single_caller_is_never_kept_waiting() -> None:
    _, answered = _simulate(1, fixed_s=0.01, row_s=1e-5, pause_s=lambda _: 0.0005, seconds=2.0)
    assert answered == pytest.approx(2.0 / (0.01 + 1e-5 + 0.0005), rel=0.01)


def test_ten_thousand_requests_cost_as_much_each_as_a_hundred() -> None:
    """Counted in steps of the line, not in seconds: what was asked of it for each request."""

    def steps(num_requests: int) -> float:
        count = 0

        def note(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        async def test(batcher: Batcher[Any], runner: Runner, clock: ManualClock) -> None:
            blocker = await _occupy(batcher, runner)
            deadline = clock.monotonic() + 1e6
            tasks = [
                asyncio.ensure_future(
                    batcher.submit("a", _rows(one), None, caller=f"t/{one % 100}", deadline=deadline + one)
                )
                for one in range(num_requests)
            ]
            await _settle()
            sys.setprofile(note)
            try:
                for one in tasks[::3]:
                    one.cancel()
                runner.free.set()
                await asyncio.gather(blocker, *tasks, return_exceptions=True)
            finally:
                sys.setprofile(None)

        _run(test, max_queued_rows=20_000)
        return count / num_requests

    assert steps(10_000) < 1.5 * steps(200)
