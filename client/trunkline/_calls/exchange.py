"""The state of a numbered exchange that may span several connections. No gRPC here.

Requests are numbered from 1, at most ``window`` of them are unanswered, and whatever is unanswered when a connection
breaks is sent again on the next. One thread sends (gRPC's), one takes the replies (the caller's).
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Exchange(Generic[T]):
    """Numbered requests from a source, each to be answered once."""

    def __init__(self, source: Iterator[T], window: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; nothing is taken from the source yet.

        Args:
            source: Where the requests come from. Pulled by the sending thread, so that making one and sending
                another overlap; never by two threads at once.
            window: Most requests without an answer.
            clock: Monotonic clock, for requests put off.
        """
        self._source = source
        self._window = window
        self._clock = clock
        self._changed = threading.Condition()
        self._pending: dict[int, T] = {}
        self._resend: deque[int] = deque()
        self._put_off: list[tuple[float, int]] = []
        self._attempts: dict[int, int] = {}
        self._last_seq = 0
        self._connection = 0
        self._pulling = False
        self._exhausted = False
        self.failure: BaseException | None = None

    def open(self) -> int:
        """Start a connection: everything unanswered is to be sent on it. Returns the connection's number."""
        with self._changed:
            self._connection += 1
            self._resend = deque(sorted(self._pending))
            self._put_off.clear()
            self._changed.notify_all()
            return self._connection

    def close(self) -> None:
        """End the connection: whoever sends on it stops."""
        with self._changed:
            self._connection += 1
            self._changed.notify_all()

    def outgoing(self, connection: int) -> Iterator[tuple[int, T]]:
        """Yield what is to be sent on a connection, waiting for room, until all is answered or it is closed."""
        while (item := self._next(connection)) is not None:
            yield item

    def answered(self, seq: int) -> T | None:
        """Take an answered request off the list. None if it was not on it."""
        with self._changed:
            item = self._pending.pop(seq, None)
            self._attempts.pop(seq, None)
            self._changed.notify_all()
            return item

    def put_off(self, seq: int, delay_s: float) -> None:
        """Send a request again on this connection, after a delay."""
        with self._changed:
            heapq.heappush(self._put_off, (self._clock() + delay_s, seq))
            self._changed.notify_all()

    def count_attempt(self, seq: int) -> int:
        """Return how many answers to a request have asked for another try, this one included."""
        with self._changed:
            self._attempts[seq] = self._attempts.get(seq, 0) + 1
            return self._attempts[seq]

    def fail(self, error: BaseException) -> None:
        """Record that requests cannot be made any more, and stop sending."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def pending(self) -> dict[int, T]:
        """Return the unanswered requests by number."""
        with self._changed:
            return dict(self._pending)

    @property
    def finished(self) -> bool:
        """Whether the source is empty and everything is answered."""
        with self._changed:
            return self._exhausted and not self._pending and not self._pulling

    def _next(self, connection: int) -> tuple[int, T] | None:
        while True:
            with self._changed:
                while True:
                    if connection != self._connection or self.failure is not None:
                        return None
                    seq = self._due()
                    if seq is not None:
                        return seq, self._pending[seq]
                    if not self._exhausted and not self._pulling and len(self._pending) < self._window:
                        self._pulling = True
                        break
                    if self._exhausted and not self._pending:
                        return None
                    self._changed.wait(self._until_due())
            item = self._pull(connection)
            if item is not None:
                return item

    def _pull(self, connection: int) -> tuple[int, T] | None:
        """Take one from the source, outside the lock: making it may take long."""
        try:
            item = next(self._source)
        except StopIteration:
            with self._changed:
                self._pulling, self._exhausted = False, True
                self._changed.notify_all()
            return None
        except BaseException as error:
            with self._changed:
                self._pulling = False
                self.failure = error
                self._changed.notify_all()
            return None
        with self._changed:
            self._pulling = False
            self._last_seq += 1
            seq = self._last_seq
            self._pending[seq] = item
            self._changed.notify_all()
            if connection == self._connection:
                return seq, item
            # The connection was closed meanwhile; the next one sends it.
            self._resend.append(seq)
            return None

    def _due(self) -> int | None:
        while self._resend:
            seq = self._resend.popleft()
            if seq in self._pending:
                return seq
        while self._put_off and self._put_off[0][0] <= self._clock():
            _, seq = heapq.heappop(self._put_off)
            if seq in self._pending:
                return seq
        return None

    def _until_due(self) -> float | None:
        return max(0.0, self._put_off[0][0] - self._clock()) if self._put_off else None
