"""The state of a numbered exchange over one connection or several at a time. No gRPC here.

Each connection has at most ``window`` requests unanswered, and takes the next one when it has room: a slow one takes
fewer. Whatever is unanswered when a connection ends is sent again on another. A request gets a new number each time it
is sent: on a stream numbers only grow. Each connection has a thread that sends (gRPC's) and one that takes replies.
"""

from __future__ import annotations

import heapq
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Connection:
    """An open connection.

    Attributes:
        window: Most requests without an answer.
        keys: The requests under way, by number.
        is_asking: Whether its sender waits for a request, and has room for one.
        is_retired: Whether it takes no more requests.
        paused_until_s: It takes none before.
    """

    window: int
    keys: dict[int, int] = field(default_factory=dict)
    is_asking: bool = False
    is_retired: bool = False
    paused_until_s: float = 0.0


class Exchange(Generic[T]):
    """Numbered requests from a source, each to be answered once.

    Attributes:
        failure: Why no more requests can be made.
    """

    def __init__(self, source: Iterator[T], window: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; nothing is taken from the source yet.

        Args:
            source: Where the requests come from; ``operator.length_hint`` may say how many. Pulled by the sending
                threads, so that making one and sending another overlap; never by two threads at once.
            window: Most requests without an answer on each connection, and on the average of all of them most that
                are unanswered or answered and not taken yet.
            clock: Monotonic clock, for requests put off.
        """
        self._num_requests = operator.length_hint(source, 0)
        self.failure: BaseException | None = None
        self._source = source
        self._window = window
        self._clock = clock
        self._changed = threading.Condition()
        # Requests have a key for as long as they are unanswered, and a number for each time they are sent.
        self._pending: dict[int, T] = {}
        self._connections: dict[int, _Connection] = {}
        self._connection_by_seq: dict[int, int] = {}
        self._attempts: dict[int, int] = {}
        self._resend: deque[int] = deque()
        self._put_off: list[tuple[float, int]] = []
        self._untaken = 0
        self._last_connection = 0
        self._last_key = 0
        self._last_seq = 0
        self._pulling = False
        self._exhausted = False

    def open(self, window: int | None = None) -> int:
        """Start a connection and return its number.

        Args:
            window: Most requests without an answer on it; at most, and by default, that of the exchange.
        """
        with self._changed:
            self._last_connection += 1
            most = self._window if window is None else min(window, self._window)
            self._connections[self._last_connection] = _Connection(most)
            # What was put off waited for the others: a new connection has refused nothing.
            self._resend.extend(key for _, key in sorted(self._put_off))
            self._put_off.clear()
            self._changed.notify_all()
            return self._last_connection

    def close(self, connection: int) -> None:
        """End a connection: whoever sends on it stops, and what is unanswered there is sent on another."""
        with self._changed:
            ended = self._connections.pop(connection, None)
            if ended is None:
                return
            for seq in ended.keys:
                del self._connection_by_seq[seq]
            unanswered = [key for key in ended.keys.values() if key in self._pending]
            self._resend = deque(sorted([*self._resend, *unanswered]))
            self._changed.notify_all()

    def retire(self, connection: int) -> None:
        """Send nothing more on a connection. It ends when what is under way there is answered."""
        with self._changed:
            one = self._connections.get(connection)
            if one is not None:
                one.is_retired = True
                self._changed.notify_all()

    def outgoing(self, connection: int) -> Iterator[tuple[int, T]]:
        """Yield what is to be sent on a connection, waiting for room, until all is answered, or it ends or retires."""
        while (item := self._next(connection)) is not None:
            yield item

    def may_end(self, connection: int) -> bool:
        """Whether a connection that sends nothing more ends as it should: all that was sent there is answered."""
        with self._changed:
            one = self._connections.get(connection)
            return one is not None and self.failure is None and not one.keys

    def answered(self, seq: int, *, untaken: bool = False) -> T | None:
        """Take an answered request off the list. None if no such number is under way.

        Args:
            seq: Its number.
            untaken: Whether it counts until ``taken`` is called.
        """
        with self._changed:
            connection = self._connection_by_seq.pop(seq, None)
            key = None if connection is None else self._connections[connection].keys.pop(seq)
            item = None if key is None else self._pending.pop(key, None)
            if untaken and item is not None:
                self._untaken += 1
            self._changed.notify_all()
            return item

    def taken(self) -> None:
        """Note that the caller has taken an answer: there is room for another request."""
        with self._changed:
            self._untaken -= 1
            self._changed.notify_all()

    def put_off(self, seq: int, delay_s: float) -> None:
        """Send a request again: at once on another connection, if there is one, else on the same after a delay.

        Either way the connection takes nothing else during that time, unless it is the only one.
        """
        with self._changed:
            connection = self._connection_by_seq.pop(seq)
            key = self._connections[connection].keys.pop(seq)
            until_s = self._clock() + delay_s
            if self._num_open() > 1:
                self._connections[connection].paused_until_s = until_s
                self._resend.appendleft(key)
            else:
                heapq.heappush(self._put_off, (until_s, key))
            self._changed.notify_all()

    def count_attempt(self, seq: int) -> int:
        """Return how many answers to a request have asked for another try, this one included. 0: not under way.

        Counted once for all connections: each of them may refuse it.
        """
        with self._changed:
            connection = self._connection_by_seq.get(seq)
            if connection is None:
                return 0
            key = self._connections[connection].keys[seq]
            self._attempts[key] = self._attempts.get(key, 0) + 1
            return 1 + (self._attempts[key] - 1) // max(1, self._num_open())

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
            for one in self._connections.values():
                for seq in [seq for seq, other in one.keys.items() if other == key]:
                    del one.keys[seq], self._connection_by_seq[seq]
            self._changed.notify_all()

    @property
    def finished(self) -> bool:
        """Whether the source is empty, and everything is answered and taken."""
        with self._changed:
            return self._is_answered() and not self._untaken

    @property
    def is_answered(self) -> bool:
        """Whether the source is empty and everything is answered, taken or not."""
        with self._changed:
            return self._is_answered()

    def num_left(self) -> int | None:
        """Return how many requests are left to be sent or answered, at most; None if that is not known."""
        with self._changed:
            if self._exhausted:
                return len(self._pending)
            return self._num_requests - self._last_key + len(self._pending) if self._num_requests else None

    def _is_answered(self) -> bool:
        return self._exhausted and not self._pending and not self._pulling

    def _num_open(self) -> int:
        return sum(not one.is_retired for one in self._connections.values())

    def _next(self, connection: int) -> tuple[int, T] | None:
        while True:
            with self._changed:
                while True:
                    one = self._connections.get(connection)
                    if one is None or self.failure is not None:
                        return None
                    if self._is_answered() or (one.is_retired and not one.keys):
                        return None
                    now = self._clock()
                    one.is_asking = not one.is_retired and len(one.keys) < one.window and now >= one.paused_until_s
                    if one.is_asking and self._is_least_busy(one):
                        key = self._due(now)
                        if key is not None:
                            return self._number(connection, one, key)
                        if self._may_pull():
                            one.is_asking = False
                            self._pulling = True
                            break
                    self._changed.wait(self._until_due(one, now))
            self._pull()

    def _is_least_busy(self, one: _Connection) -> bool:
        """Whether no other connection that wants a request has fewer under way."""
        return not any(other.is_asking and len(other.keys) < len(one.keys) for other in self._connections.values())

    def _may_pull(self) -> bool:
        most = self._window * max(1, len(self._connections))
        return not self._exhausted and not self._pulling and len(self._pending) + self._untaken < most

    def _number(self, connection: int, one: _Connection, key: int) -> tuple[int, T]:
        self._last_seq += 1
        self._connection_by_seq[self._last_seq] = connection
        one.keys[self._last_seq] = key
        one.is_asking = False
        # Others may have stood back for this one.
        self._changed.notify_all()
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
                # Sent by whoever has room now: this connection may have been closed meanwhile.
                self._resend.append(self._last_key)
                self._changed.notify_all()

    def _due(self, now: float) -> int | None:
        while self._resend:
            key = self._resend.popleft()
            if key in self._pending:
                return key
        while self._put_off and self._put_off[0][0] <= now:
            _, key = heapq.heappop(self._put_off)
            if key in self._pending:
                return key
        return None

    def _until_due(self, one: _Connection, now: float) -> float | None:
        due = [when for when, _ in self._put_off[:1]]
        if one.paused_until_s > now:
            due.append(one.paused_until_s)
        return max(0.0, min(due) - now) if due else None
