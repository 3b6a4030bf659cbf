"""How a request comes to its turn: whose it is, by when, and whether it waits where there is no room."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from trunkline_worker.serving.boundary import Call
from trunkline_worker.serving.budget import ByteBudget, Held, Message, size_of
from trunkline_worker.serving.streams import until_room

T = TypeVar("T")


class Timed(Protocol):
    """A message that states how many seconds its sender has; 0 states nothing."""

    timeout_s: float


class Turn:
    """One request's. Made when the work on it begins: the time that it states runs from then on."""

    def __init__(self, call: Call, stated_s: float, *, wait: bool) -> None:
        """Find the deadline.

        Args:
            call: That the request belongs to.
            stated_s: Seconds that the message states; 0 for none.
            wait: Whether to wait for room, as messages of streams do, instead of answering OVERLOADED.

        Raises:
            WireError: DEADLINE_EXCEEDED where no time is left.
        """
        call.remaining_s(stated_s)
        self._call = call
        self._wait = wait
        self._deadline = call.until(stated_s)

    def keywords(self) -> dict[str, Any]:
        """Return what an engine is told of it.

        Raises:
            WireError: DEADLINE_EXCEEDED where no time is left.
        """
        return {"timeout_s": self.left_s(), "caller": self._call.caller, "wait": self._wait}

    def left_s(self) -> float | None:
        """Return the time left in seconds.

        Raises:
            WireError: DEADLINE_EXCEEDED where none is left.
        """
        return self._call.left_s(self._deadline)

    async def until_room(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call to an engine; where the request waits for room, again for as long as there is none.

        Raises:
            WireError: What the call raises.
        """
        if not self._wait:
            return await call()
        return await until_room(call, left_s=self.left_s, draining=self._call.draining)


async def reserve(budget: ByteBudget, call: Call, message: Message, timed: Timed | None = None) -> Held:
    """Wait for room for a message of a stream.

    Args:
        budget: Where.
        call: The stream.
        message: What needs room.
        timed: The part of it that states its time; the time waited is taken off.

    Raises:
        WireError: DEADLINE_EXCEEDED; OVERLOADED for what would never fit.
    """
    stated_s = 0.0 if timed is None else timed.timeout_s
    start = time.monotonic()
    held = await budget.reserve(size_of(message), call.caller, call.until(stated_s))
    if timed is not None and stated_s > 0:
        timed.timeout_s = max(stated_s - (time.monotonic() - start), 1e-6)
    return held
