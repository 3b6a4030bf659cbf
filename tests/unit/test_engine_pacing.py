"""When a batch that could run waits for more rows, and when it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline_worker.engine.pacing import MAX_WAIT_S, BatchCost, Pace

FIXED_S, ROW_S = 0.008, 0.0001
ROOM = 256


def learnt(
    *, returning: int = 63, of: int = 64, after_s: float = 0.0008, fixed_s: float = FIXED_S, row_s: float = ROW_S
) -> tuple[Pace, float]:
    """Return a pace that has seen batches of which so many rows came back, and the end of its last one."""
    pace, now = Pace(), 0.0
    for sizes in [(of, 1)] * 20 + [(of,)]:
        for size in sizes:
            seconds = fixed_s + row_s * size
            now += seconds
            pace.ended(size, seconds, now)
            if size == of:
                pace.arrived(returning, now + after_s)
    # A last one, none of whose rows are back yet.
    now += 1.0
    pace.ended(of, fixed_s + row_s * of, now)
    return pace, now


class TestCost:
    def test_a_fixed_cost_and_one_per_row_are_told_apart(self) -> None:
        cost = BatchCost()
        for size in [1, 8, 64, 3, 17, 40, 5, 9, 33, 12]:
            cost.add(size, FIXED_S + ROW_S * size)
        assert (cost.fixed_s, cost.row_s) == (pytest.approx(FIXED_S, rel=1e-3), pytest.approx(ROW_S, rel=1e-3))
        assert cost.seconds(10) == pytest.approx(FIXED_S + 10 * ROW_S, rel=1e-3)

    def test_a_few_batches_say_nothing(self) -> None:
        cost = BatchCost()
        for size in [1, 8, 64]:
            cost.add(size, FIXED_S + ROW_S * size)
        assert (cost.fixed_s, cost.row_s) == (0.0, 0.0)

    def test_noise_on_a_cost_that_is_linear_hardly_ever_looks_like_a_fixed_cost(self) -> None:
        generator, mistaken = np.random.default_rng(7), 0
        for _ in range(100):
            cost = BatchCost()
            for _ in range(60):
                size = int(generator.integers(12, 33))
                cost.add(size, 0.03 * size * float(generator.normal(1.0, 0.1)))
            mistaken += cost.fixed_s > 0.25 * cost.row_s
        assert mistaken < 10

    def test_batches_that_are_all_alike_change_nothing_that_is_known(self) -> None:
        cost = BatchCost()
        for size in [1, 8, 64, 3, 17, 40, 5, 9, 33, 12] * 3:
            cost.add(size, FIXED_S + ROW_S * size)
        for _ in range(1000):
            cost.add(64, FIXED_S + ROW_S * 64)
        assert cost.fixed_s == pytest.approx(FIXED_S, rel=0.05)

    def test_another_machine_is_learnt_anew(self) -> None:
        cost = BatchCost()
        for fixed_s in (0.05, FIXED_S):
            for size in [1, 8, 64, 3, 17, 40, 5, 9, 33, 12] * 30:
                cost.add(size, fixed_s + ROW_S * size)
        assert cost.fixed_s == pytest.approx(FIXED_S, rel=0.05)

    @given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0.0, 100.0)), max_size=60))
    def test_costs_are_finite_and_not_negative(self, batches: list[tuple[int, float]]) -> None:
        cost = BatchCost()
        for size, seconds in batches:
            cost.add(size, seconds)
            assert 0 <= cost.fixed_s < math.inf
            assert 0 <= cost.row_s < math.inf


class TestWait:
    def test_without_knowledge_nothing_waits(self) -> None:
        pace = Pace()
        pace.arrived(1, 0.0)
        assert pace.wait_s(1, ROOM, 0.0) == 0.0
        pace.ended(64, 0.1, 1.0)
        assert pace.wait_s(1, ROOM, 1.0) == 0.0

    def test_the_first_row_back_waits_for_the_others(self) -> None:
        pace, end = learnt()
        pace.arrived(1, end + 0.0002)
        wait_s = pace.wait_s(1, ROOM, end + 0.0002)
        # The others usually need 0.8 ms; half as much again is allowed, 0.2 ms of it are over.
        assert wait_s == pytest.approx(1.5 * 0.0008 - 0.0002, rel=0.1)

    def test_the_last_of_them_is_not_waited_for(self) -> None:
        pace, end = learnt()
        pace.arrived(59, end + 0.0003)
        # 59 rows would wait up to 0.9 ms to save four of them the 8 ms of a batch of their own.
        assert pace.wait_s(59, ROOM, end + 0.0003) == 0.0
        assert pace.wait_s(20, ROOM, end + 0.0003) > 0.0

    def test_all_being_back_nothing_waits(self) -> None:
        pace, end = learnt()
        pace.arrived(64, end + 0.0001)
        assert pace.wait_s(64, ROOM, end + 0.0001) == 0.0

    def test_the_wait_ends_when_rows_have_usually_come_back(self) -> None:
        pace, end = learnt()
        pace.arrived(1, end + 0.0002)
        assert pace.wait_s(1, ROOM, end + 0.0013) == 0.0

    def test_a_full_batch_does_not_wait(self) -> None:
        pace, end = learnt()
        assert pace.wait_s(ROOM, ROOM, end) == 0.0
        assert pace.wait_s(1, 1, end) == 0.0
        assert pace.wait_s(1, ROOM, end) > 0.0

    @pytest.mark.parametrize("fixed_s", [0.0, 0.004])
    def test_where_batches_bring_next_to_nothing_nothing_waits(self, fixed_s: float) -> None:
        pace, end = learnt(fixed_s=fixed_s, row_s=0.02)
        pace.arrived(1, end)
        assert pace.wait_s(1, ROOM, end) == 0.0

    @pytest.mark.parametrize("returning", [0, 32])
    def test_where_many_do_not_come_back_nobody_is_waited_for(self, returning: int) -> None:
        pace, end = learnt(returning=returning)
        pace.arrived(1, end)
        assert pace.wait_s(1, ROOM, end) == 0.0

    def test_callers_who_pause_first_are_not_waited_for(self) -> None:
        pace, end = learnt(after_s=0.02)
        pace.arrived(1, end)
        assert pace.wait_s(1, ROOM, end) == 0.0

    def test_a_row_long_after_the_last_batch_runs_at_once(self) -> None:
        pace, end = learnt()
        pace.arrived(1, end + 1.0)
        assert pace.wait_s(1, ROOM, end + 1.0) == 0.0

    def test_a_single_caller_who_sends_one_row_after_another_never_waits(self) -> None:
        pace, end = learnt(returning=1, of=1)
        for size in (2, 7, 30, 4):  # so that costs are known
            pace.ended(size, FIXED_S + ROW_S * size, end)
        now = end
        for _ in range(50):
            pace.arrived(1, now + 0.0005)
            assert pace.wait_s(1, ROOM, now + 0.0005) == 0.0
            now += 0.0005 + FIXED_S + ROW_S
            pace.ended(1, FIXED_S + ROW_S, now)

    def test_callers_who_have_gone_are_soon_not_waited_for(self) -> None:
        pace, end = learnt()
        now, waits = end, 0
        for _ in range(20):
            pace.arrived(1, now + 0.0001)
            waits += pace.wait_s(1, ROOM, now + 0.0001) > 0
            now += 1.0
            pace.ended(64, FIXED_S + ROW_S * 64, now)  # of which none but one comes back
        assert 0 < waits < 15

    def test_rows_whose_deadline_is_near_do_not_wait(self) -> None:
        pace, end = learnt()
        needed = pace.cost.seconds(ROOM)
        assert pace.wait_s(1, ROOM, end, end + needed) == 0.0
        assert pace.wait_s(1, ROOM, end, end + needed + 0.1) > 0.0

    @given(
        n=st.integers(1, ROOM),
        returning=st.integers(0, 64),
        after_s=st.floats(0.0, 0.01),
        fixed_s=st.floats(0.0, 0.1),
        since_s=st.floats(0.0, 0.01),
    )
    def test_waits_are_bounded_and_pay(
        self, n: int, returning: int, after_s: float, fixed_s: float, since_s: float
    ) -> None:
        pace, end = learnt(returning=returning, after_s=after_s, fixed_s=fixed_s)
        wait_s = pace.wait_s(n, ROOM, end + since_s)
        assert wait_s >= 0.0
        assert wait_s == 0.0 or since_s + wait_s <= min(MAX_WAIT_S, pace.cost.fixed_s) + 1e-9
        assert n * wait_s <= 64 * pace.cost.fixed_s
