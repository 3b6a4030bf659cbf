"""Room that is used up: who is let in, who waits, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manual_timers import ManualTimers
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.engine.admission import Admission
from trunkline_worker.store.clock import ManualClock


def run(
    test: Callable[[Admission, ManualTimers], Coroutine[Any, Any, None]], rows: int = 128, size: int = 1280
) -> None:
    async def main() -> None:
        clock = ManualClock()
        timers = ManualTimers(clock)
        async with asyncio.timeout(60):
            await test(Admission(rows, size, clock=clock, later=timers.later), timers)

    asyncio.run(main())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def waiting(admission: Admission, caller: str, rows: int, deadline: float | None = None) -> asyncio.Task[None]:
    return asyncio.ensure_future(admission.wait(caller, rows, 0, deadline))


def test_rows_and_bytes_are_both_bounded() -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        assert admission.enter("a", 100, 100)
        assert not admission.enter("b", 29, 0)
        assert not admission.enter("b", 20, 1181)
        assert admission.enter("b", 20, 1180)
        assert (admission.num_rows, admission.num_bytes) == (120, 1280)
        admission.leave("a", 100, 100)
        admission.leave("b", 20, 1180)
        assert (admission.num_rows, admission.num_bytes) == (0, 0)

    run(test)


def test_a_single_larger_one_is_let_in_when_nothing_else_is_there() -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        assert admission.enter("a", 1000, 10_000)
        assert not admission.enter("b", 3, 0)
        admission.leave("a", 1000, 10_000)
        assert admission.enter("b", 3, 0)
        assert not admission.enter("a", 1000, 10_000)

    run(test)


def test_who_needs_next_to_nothing_is_let_in_beyond_the_limit_which_has_an_end() -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        assert admission.enter("flood", 128, 0)
        assert not admission.enter("flood", 1, 0)
        for caller in range(16):
            assert admission.enter(str(caller), 2, 20)
            assert not admission.enter(str(caller), 1, 0)
        assert admission.num_rows == 160
        assert not admission.enter("one more", 1, 0)

    run(test)


def test_small_in_rows_but_not_in_bytes_is_not_small() -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        assert admission.enter("flood", 128, 0)
        assert not admission.enter("other", 1, 21)
        assert admission.enter("other", 1, 20)

    run(test)


def test_callers_who_wait_take_turns() -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        admission.enter("flood", 128, 0)
        order: list[str] = []

        async def wait(caller: str, name: str) -> None:
            await admission.wait(caller, 64, 0)
            order.append(name)

        tasks = [asyncio.ensure_future(wait("flood", f"flood{one}")) for one in range(4)]
        await settle()
        tasks += [asyncio.ensure_future(wait("other", f"other{one}")) for one in range(2)]
        await settle()
        assert admission.num_waiting == 6
        admission.leave("flood", 128, 0)
        await settle()
        assert order == ["flood0", "other0"]
        for caller in ("flood", "other", "flood", "other"):
            admission.leave(caller, 64, 0)
            await settle()
        assert order == ["flood0", "other0", "flood1", "other1", "flood2", "flood3"]

    run(test)


def test_nobody_passes_those_who_wait_and_a_large_one_is_not_passed_by_small_ones() -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        admission.enter("a", 100, 0)
        large = waiting(admission, "b", 100)
        small = waiting(admission, "c", 10)
        await settle()
        assert not admission.enter("d", 10, 0)  # there is room for it
        assert not small.done()
        admission.leave("a", 72, 0)
        await settle()
        assert large.done()
        assert not small.done()
        admission.leave("a", 28, 0)
        await settle()
        assert small.done()

    run(test)


def test_those_whose_deadline_passes_are_told_and_stand_in_nobodys_way() -> None:
    async def test(admission: Admission, timers: ManualTimers) -> None:
        admission.enter("a", 100, 0)
        large = waiting(admission, "b", 100, timers.clock.monotonic() + 2.0)
        small = waiting(admission, "c", 10)
        await settle()
        timers.advance(1.9)
        await settle()
        assert not large.done()
        timers.advance(0.2)
        await settle()
        error = large.exception()
        assert isinstance(error, WireError)
        assert error.code is ErrorCode.DEADLINE_EXCEEDED
        assert small.done()
        with pytest.raises(WireError) as caught:
            await admission.wait("b", 100, 0, timers.clock.monotonic())
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
        assert (admission.num_rows, admission.num_waiting, timers.next_s()) == (110, 0, None)

    run(test)


@pytest.mark.parametrize("let_in_first", [False, True])
def test_who_is_cancelled_is_not_counted(let_in_first: bool) -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        admission.enter("a", 128, 0)
        gone, stays = waiting(admission, "b", 100), waiting(admission, "c", 100)
        await settle()
        if let_in_first:
            admission.leave("a", 128, 0)
            gone.cancel()
        else:
            gone.cancel()
            admission.leave("a", 128, 0)
        await settle()
        assert gone.cancelled()
        assert stays.done()
        assert (admission.num_rows, admission.num_waiting) == (100, 0)

    run(test)


def test_closing_tells_those_who_wait_and_those_who_come() -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        admission.enter("a", 128, 0)
        waits = waiting(admission, "b", 100)
        await settle()
        admission.close(WireError(ErrorCode.UNAVAILABLE, "over"))
        await settle()
        assert isinstance(waits.exception(), WireError)
        with pytest.raises(WireError, match="over"):
            admission.enter("c", 1, 0)
        admission.leave("a", 128, 0)
        assert admission.num_rows == 0

    run(test)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(0, 600), st.booleans()), max_size=40),
    st.randoms(use_true_random=False),
)
def test_what_is_counted_is_what_is_inside_and_everyone_gets_in(
    requests: list[tuple[str, int, int, bool]], random: Any
) -> None:
    async def test(admission: Admission, _timers: ManualTimers) -> None:
        inside: list[tuple[str, int, int]] = []

        async def wait(caller: str, rows: int, size: int) -> None:
            await admission.wait(caller, rows, size)
            inside.append((caller, rows, size))

        tasks = []
        for caller, rows, size, cancelled in requests:
            tasks.append(asyncio.ensure_future(wait(caller, rows, size)))
            await asyncio.sleep(0)
            if cancelled and not tasks[-1].done():
                tasks.pop().cancel()
        while not all(one.done() for one in tasks) or inside:
            await settle()
            assert admission.num_rows == sum(rows for _, rows, _ in inside) <= 160
            assert admission.num_bytes == sum(size for _, _, size in inside) <= 1600
            admission.leave(*inside.pop(random.randrange(len(inside))))
        assert (admission.num_rows, admission.num_bytes, admission.num_waiting) == (0, 0, 0)

    run(test)
