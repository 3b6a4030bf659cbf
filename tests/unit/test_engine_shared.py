"""Results made once: shared while they are made, kept up to a number, failures tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from trunkline_worker.engine.shared import Shared


class Maker:
    """Makes results when it is let to, and counts."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.free = asyncio.Event()
        self.free.set()
        self.fail = False

    async def __call__(self, key: str) -> str:
        self.made.append(key)
        await self.free.wait()
        if self.fail:
            raise ValueError(key)
        return key.upper()


def _run(test: Callable[[Maker, Shared[str, str]], Awaitable[None]], capacity: int = 2) -> None:
    async def main() -> None:
        problems: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
        maker = Maker()
        async with asyncio.timeout(60):
            await test(maker, Shared(maker, capacity=capacity))
        assert problems == []

    asyncio.run(main())


def test_callers_share_what_is_being_made_and_one_may_give_up() -> None:
    async def test(maker: Maker, shared: Shared[str, str]) -> None:
        maker.free.clear()
        tasks = [asyncio.ensure_future(shared.get("a")) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert "a" in shared
        assert shared.known("a") is None
        maker.free.set()
        assert await asyncio.gather(*tasks[1:]) == ["A"] * 3
        assert (maker.made, shared.known("a")) == (["a"], "A")

    _run(test)


def test_those_used_last_are_kept() -> None:
    async def test(maker: Maker, shared: Shared[str, str]) -> None:
        for key in "abacab":
            assert await shared.get(key) == key.upper()
        assert maker.made == ["a", "b", "c", "b"]
        assert ["a" in shared, "b" in shared, "c" in shared] == [True, True, False]

    _run(test)


def test_a_capacity_of_nothing_shares_only_what_is_being_made() -> None:
    async def test(maker: Maker, shared: Shared[str, str]) -> None:
        assert await asyncio.gather(shared.get("a"), shared.get("a")) == ["A", "A"]
        await asyncio.sleep(0)
        assert "a" not in shared
        assert await shared.get("a") == "A"
        assert maker.made == ["a", "a"]

    _run(test, capacity=0)


def test_what_is_being_made_is_not_dropped_for_what_is_done() -> None:
    async def test(maker: Maker, shared: Shared[str, str]) -> None:
        maker.free.clear()
        slow = asyncio.ensure_future(shared.get("slow"))
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(shared.get(key)) for key in "abc"]
        await asyncio.sleep(0)
        assert all(key in shared for key in ("slow", "a", "b", "c"))
        maker.free.set()
        await asyncio.gather(slow, *others)
        await asyncio.sleep(0)
        assert ["slow" in shared, "a" in shared, "b" in shared, "c" in shared] == [False, False, True, True]

    _run(test)


def test_a_failure_is_told_to_all_and_not_kept() -> None:
    async def test(maker: Maker, shared: Shared[str, str]) -> None:
        maker.fail = True
        results = await asyncio.gather(shared.get("a"), shared.get("a"), return_exceptions=True)
        assert [type(one) for one in results] == [ValueError, ValueError]
        assert shared.known("a") is None
        maker.fail = False
        assert await shared.get("a") == "A"
        assert maker.made == ["a", "a"]

    _run(test)


def test_a_caller_without_time_is_told_and_the_result_is_made_all_the_same() -> None:
    async def test(maker: Maker, shared: Shared[str, str]) -> None:
        maker.free.clear()
        with pytest.raises(TimeoutError):
            await shared.get("a", 0.0)
        maker.free.set()
        assert await shared.get("a") == "A"
        assert await shared.get("a", 0.0) == "A"  # there already: no time is needed
        assert maker.made == ["a"]

    _run(test)


def test_a_failure_that_nobody_waits_for_is_no_mishap() -> None:
    async def test(maker: Maker, shared: Shared[str, str]) -> None:
        maker.fail = True
        shared.start("a")
        while "a" in shared:
            await asyncio.sleep(0)
        maker.free.clear()
        shared.start("b")
        await asyncio.sleep(0)
        shared.cancel()
        while "b" in shared:
            await asyncio.sleep(0)

    _run(test)
