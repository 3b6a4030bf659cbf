"""Room that callers share, in rows and in bytes: who is let in, who waits for room, and in which order.

Where it is used up, a caller may be refused or wait. Those who wait take turns by caller, so that one who waits with a
thousand requests does not keep out another who waits with one; and whoever has next to nothing in there is let in a
little beyond the limit, so that one who fills it does not keep out those who need little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from trunkline_wire.errors import ErrorCode, WireError

_SMALL = 64
"""A caller who has less than this fraction of the room, one to so many, is let in beyond the limit,"""

_BEYOND = 4
"""but only up to another fraction of the room, one to so many."""


class Monotonic(Protocol):
    """The part of a clock that is needed here."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment."""


class Timer(Protocol):
    """A call that was ordered for later."""

    def cancel(self) -> None:
        """Order it off."""


CallLater = Callable[[float, Callable[[], None]], Timer]
"""Orders a call after so many seconds, from the event loop."""


def call_later(delay_s: float, callback: Callable[[], None]) -> Timer:
    """Order a call from the running event loop."""
    return asyncio.get_running_loop().call_later(delay_s, callback)


class _Waiter:
    """A request that waits for room. ``future`` ends without a result once it has been counted."""

    __slots__ = ("future", "num_bytes", "num_rows")

    def __init__(self, num_rows: int, num_bytes: int, future: asyncio.Future[None]) -> None:
        self.num_rows = num_rows
        self.num_bytes = num_bytes
        self.future = future


class Admission:
    """Counts what is inside, by caller. Used from one event loop.

    Attributes:
        max_rows: Most rows inside. A single larger request is let in when nothing else is inside.
        max_bytes: Most bytes inside, likewise.
        num_rows: Rows inside.
        num_bytes: Bytes inside.
    """

    def __init__(self, max_rows: int, max_bytes: int, *, clock: Monotonic, later: CallLater = call_later) -> None:
        """Start empty.

        Args:
            max_rows: See above.
            max_bytes: See above.
            clock: Deadlines are readings of this.
            later: Wakes up those whose deadline passes while they wait.
        """
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.num_rows = 0
        self.num_bytes = 0
        self._clock = clock
        self._later = later
        self._inside: dict[str, list[int]] = {}
        # Dictionaries for their order and their cheap removal: callers in turn, and each one's requests.
        self._waiting: dict[str, dict[_Waiter, None]] = {}
        self._closed: WireError | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return sum(len(waiters) for waiters in self._waiting.values())

    def enter(self, caller: str, num_rows: int, num_bytes: int) -> bool:
        """Count a request as inside if there is room for it, and say whether there was.

        Raises:
            WireError: What ``close`` was given.
        """
        if self._closed is not None:
            raise self._closed
        fits = (not self._waiting and self._fits(num_rows, num_bytes)) or self._is_small(caller, num_rows, num_bytes)
        if fits:
            self._count(caller, num_rows, num_bytes)
        return fits

    async def wait(self, caller: str, num_rows: int, num_bytes: int, deadline: float | None = None) -> None:
        """Count a request as inside once there is room for it.

        Raises:
            WireError: DEADLINE_EXCEEDED if there was none in time; what ``close`` was given.
        """
        if self.enter(caller, num_rows, num_bytes):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(num_rows, num_bytes, future)
        timer = None
        if deadline is not None:
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0:
                raise _expired()
            timer = self._later(left_s, lambda: self._expire(caller, waiter))
        self._waiting.setdefault(caller, {})[waiter] = None
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(caller, num_rows, num_bytes)  # let in and cancelled at the same moment
            else:
                self._forget(caller, waiter)
                self._let_in()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def leave(self, caller: str, num_rows: int, num_bytes: int) -> None:
        """Count rows and bytes as gone, and let in who waits."""
        self.num_rows -= num_rows
        self.num_bytes -= num_bytes
        own = self._inside[caller]
        own[0] -= num_rows
        own[1] -= num_bytes
        if own[0] <= 0 and own[1] <= 0:
            del self._inside[caller]
        if self._waiting:
            self._let_in()

    def swap(self, caller: str, old_bytes: int, new_bytes: int) -> None:
        """Count other bytes in place of some, whether there is room or not: they are there."""
        if old_bytes != new_bytes:
            self.num_bytes += new_bytes - old_bytes
            self._inside.setdefault(caller, [0, 0])[1] += new_bytes - old_bytes
            if self._waiting:
                self._let_in()

    def close(self, error: WireError) -> None:
        """Let nobody in any more; those who wait are told so."""
        self._closed = error
        waiting, self._waiting = self._waiting, {}
        for waiters in waiting.values():
            for waiter in waiters:
                if not waiter.future.done():
                    waiter.future.set_exception(error)

    def _fits(self, num_rows: int, num_bytes: int) -> bool:
        rows, held = self.num_rows + num_rows, self.num_bytes + num_bytes
        return (rows <= self.max_rows and held <= self.max_bytes) or not (self.num_rows or self.num_bytes)

    def _is_small(self, caller: str, num_rows: int, num_bytes: int) -> bool:
        own = self._inside.get(caller, (0, 0))
        return (
            own[0] + num_rows <= self.max_rows // _SMALL
            and own[1] + num_bytes <= self.max_bytes // _SMALL
            and self.num_rows + num_rows <= self.max_rows + self.max_rows // _BEYOND
            and self.num_bytes + num_bytes <= self.max_bytes + self.max_bytes // _BEYOND
        )

    def _count(self, caller: str, num_rows: int, num_bytes: int) -> None:
        self.num_rows += num_rows
        self.num_bytes += num_bytes
        own = self._inside.get(caller)
        if own is None:
            self._inside[caller] = [num_rows, num_bytes]
        else:
            own[0] += num_rows
            own[1] += num_bytes

    def _let_in(self) -> None:
        """Let in those who wait, each caller in turn, until the next one does not fit.

        A large request is not passed by smaller ones: it would wait for ever.
        """
        while self._waiting:
            caller = next(iter(self._waiting))
            waiter = next(iter(self._waiting[caller]))
            if not self._fits(waiter.num_rows, waiter.num_bytes):
                return
            waiters = self._waiting.pop(caller)
            del waiters[waiter]
            if waiters:
                self._waiting[caller] = waiters
            if not waiter.future.done():
                self._count(caller, waiter.num_rows, waiter.num_bytes)
                waiter.future.set_result(None)

    def _expire(self, caller: str, waiter: _Waiter) -> None:
        self._forget(caller, waiter)
        if not waiter.future.done():
            waiter.future.set_exception(_expired())
        self._let_in()

    def _forget(self, caller: str, waiter: _Waiter) -> None:
        waiters = self._waiting.get(caller)
        if waiters is not None:
            waiters.pop(waiter, None)
            if not waiters:
                del self._waiting[caller]


def _expired() -> WireError:
    return WireError(
        ErrorCode.DEADLINE_EXCEEDED,
        "the deadline passed while the rows waited for room: the cluster has more to do than it can. Allow more time "
        "or send less at once",
    )
