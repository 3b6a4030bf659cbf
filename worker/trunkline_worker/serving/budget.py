"""A bound on what all callers together keep in a server's memory."""

from __future__ import annotations

import sys
from typing import Protocol

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.engine.admission import Admission, CallLater, Monotonic, call_later
from trunkline_worker.store.clock import SystemClock

MAX_HELD_BYTES = 2**30
"""Bytes of requests that a gateway, or a replica that listens itself, works on at a time. Callers who hold next to
nothing get up to a quarter more: see ``engine.admission``."""

RETRY_DELAY_S = 0.5


class Message(Protocol):
    """A message of a call."""

    def ByteSize(self) -> int:
        """Return its bytes on the wire."""


class Held:
    """Bytes of one request. Leaving its ``with`` block gives them back."""

    __slots__ = ("_admission", "_caller", "_num_bytes", "_num_requests")

    def __init__(self, admission: Admission, caller: str, num_bytes: int) -> None:
        """Keep what has been counted."""
        self._admission = admission
        self._caller = caller
        self._num_bytes = num_bytes
        self._num_requests = 1

    def __enter__(self) -> Held:
        """Hold on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give back."""
        self.release()

    def resize(self, num_bytes: int) -> None:
        """Hold other bytes in place of these: a reply in place of its request."""
        if self._num_requests:
            self._admission.swap(self._caller, self._num_bytes, num_bytes)
            self._num_bytes = num_bytes

    def release(self) -> None:
        """Give back. More than once does nothing more."""
        if self._num_requests:
            self._num_requests = 0
            self._admission.leave(self._caller, 1, self._num_bytes)


class ByteBudget:
    """Counts the bytes of requests in progress. Used from one event loop."""

    def __init__(
        self, limit: int = MAX_HELD_BYTES, *, clock: Monotonic | None = None, later: CallLater = call_later
    ) -> None:
        """Start with nothing held.

        Args:
            limit: Most bytes.
            clock: Deadlines are readings of this. None: the machine's.
            later: Orders calls for later, by the same clock.
        """
        self._admission = Admission(sys.maxsize // 2, limit, clock=clock or SystemClock(), later=later)

    @property
    def limit(self) -> int:
        """Most bytes that are held at a time."""
        return self._admission.max_bytes

    @limit.setter
    def limit(self, num_bytes: int) -> None:
        self._admission.max_bytes = num_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that are held now."""
        return self._admission.num_bytes

    @property
    def num_held(self) -> int:
        """Requests, and replies that nobody took yet, that are held now."""
        return self._admission.num_rows

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return self._admission.num_waiting

    def hold(self, num_bytes: int, caller: str = "") -> Held:
        """Hold a request's bytes while it is worked on.

        Raises:
            WireError: OVERLOADED where the budget is used up; nothing of the request has been worked on.
        """
        if num_bytes > self.limit or not self._admission.enter(caller, 1, num_bytes):
            raise _used_up()
        return Held(self._admission, caller, num_bytes)

    async def reserve(self, num_bytes: int, caller: str = "", deadline: float | None = None) -> Held:
        """Do as ``hold`` does, but wait for room where the budget is used up.

        Raises:
            WireError: DEADLINE_EXCEEDED; OVERLOADED for what would never fit.
        """
        if num_bytes > self.limit:
            raise _used_up()
        await self._admission.wait(caller, 1, num_bytes, deadline)
        return Held(self._admission, caller, num_bytes)


def size_of(message: Message) -> int:
    """Return the bytes that a message keeps in memory, about."""
    return message.ByteSize()


def _used_up() -> WireError:
    return WireError(ErrorCode.OVERLOADED, "this server's memory is in use; try again", retry_delay_s=RETRY_DELAY_S)
