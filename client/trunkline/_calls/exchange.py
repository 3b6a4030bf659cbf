"""The state of a numbered exchange that may span several connections. No gRPC here.

At most ``window`` requests are unanswered, and whatever is unanswered when a connection breaks is sent again on the
next. A request gets a new number each time it is sent: on a stream numbers only grow. One thread sends (gRPC's), one
takes the replies (the caller's).
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
        # Requests have a key for as long as they are unanswered, and a number for each time they are sent.
        self._pending: dict[int, T] = {}
        self._key_by_seq: dict[int, int] = {}
        self._attempts: dict[int, int] = {}
        self._resend: deque[int] = deque()
        self._put_off: list[tuple[float, int]] = []
        self._last_key = 0
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
            self._key_by_seq.clear()
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
        """Take an answered request off the list. None if no such number is under way."""
        with self._changed:
            key = self._key_by_seq.pop(seq, None)
            item = None if key is None else self._pending.pop(key, None)
            self._changed.notify_all()
            return item

    def put_off(self, seq: int, delay_s: float) -> None:
        """Send a request again on this connection, after a delay."""
        with self._changed:
            key = self._key_by_seq.pop(seq)
            heapq.heappush(self._put_off, (self._clock() + delay_s, key))
            self._changed.notify_all()

    def count_attempt(self, seq: int) -> int:
        """Return how many answers to a request have asked for another try, this one included. 0: not under way."""
        with self._changed:
            key = self._key_by_seq.get(seq)
            if key is None:
                return 0
            self._attempts[key] = self._attempts.get(key, 0) + 1
            return self._attempts[key]

    def fail(self, error: BaseException) -> None:
        """Record that requests cannot be made any more, and stop sending."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def pending(self) -> dict[int, T]:
        """Return the unanswered requests by key."""
        with self._changed:
            return dict(self._pending)

    def drop(self, key: int) -> None:
        """Take a request off the list that needs no answer any more."""
        with self._changed:
            self._pending.pop(key, None)
            self._changed.notify_all()

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
                    key = self._due()
                    if key is not None:
                        return self._number(key)
                    if not self._exhausted and not self._pulling and len(self._pending) < self._window:
                        self._pulling = True
                        break
                    if self._exhausted and not self._pending:
                        return None
                    self._changed.wait(self._until_due())
            self._pull()

    def _number(self, key: int) -> tuple[int, T]:
        self._last_seq += 1
        self._key_by_seq[self._last_seq] = key
        return self._last_seq, self._pending[key]

    def _pull(self) -> None:
        """Take one from the source, outside the lock: making it may take long."""
        try:
            item = next(self._source)
        except StopIteration:
            with self._changed:
                self._pulling, self._exhausted = False, True
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._pulling, self.failure = False, self.failure or error
                self._changed.notify_all()
        else:
            with self._changed:
                self._pulling = False
                self._last_key += 1
                self._pending[self._last_key] = item
                # Sent by whoever is connected now: this connection may have been closed meanwhile.
                self._resend.append(self._last_key)
                self._changed.notify_all()

    def _due(self) -> int | None:
        while self._resend:
            key = self._resend.popleft()
            if key in self._pending:
                return key
        while self._put_off and self._put_off[0][0] <= self._clock():
            _, key = heapq.heappop(self._put_off)
            if key in self._pending:
                return key
        return None

    def _until_due(self) -> float | None:
        return max(0.0, self._put_off[0][0] - self._clock()) if self._put_off else None
