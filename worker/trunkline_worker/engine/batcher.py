"""A row-aware batcher: requests of any number of rows in, batches of bounded rows out.

Rows leave the queue only when the runner is free, so that everything that arrives while a batch runs is in the next
one. Times come from a clock that is passed in; the batcher never sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError

Context = TypeVar("Context")

_SMOOTHING = 0.3
_FIRST_GUESS_ROWS_PER_S = 50.0
_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 30.0


class Monotonic(Protocol):
    """The part of a clock that is needed here."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment."""


@dataclass(frozen=True)
class Rows:
    """What enters for some rows.

    Attributes:
        features: (rows, ...).
        more_BE: Columns that go past the trunk to the head, (rows, E). None: there are none.
    """

    features: npt.NDArray[np.generic]
    more_BE: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.features)

    def take(self, index: slice) -> Rows:
        """Return some of the rows, in the same memory."""
        return Rows(self.features[index], None if self.more_BE is None else self.more_BE[index])


@dataclass(frozen=True)
class Part(Generic[Context]):
    """Rows of one request in a batch, and what is wanted of them."""

    rows: Rows
    context: Context


@dataclass(frozen=True)
class PartResult:
    """What came of a part: ``values``, one per row; or ``error``, which fails this part's request only."""

    values: npt.NDArray[np.float32] | None
    error: WireError | None = None
    trunk_s: float = 0.0
    head_s: float = 0.0


@dataclass(frozen=True)
class BatchResult:
    """What came of a request: one value per row, and where the time went, in seconds."""

    values: npt.NDArray[np.float32]
    queue_s: float
    trunk_s: float
    head_s: float


Run = Callable[[Hashable, Sequence[Part[Context]]], Awaitable[Sequence[PartResult]]]
"""Runs a batch of one group; answers in the order of the parts."""


@dataclass
class Hold:
    """Rows that were admitted and are not in the line yet."""

    num_rows: int


@dataclass(eq=False)
class _Request(Generic[Context]):
    """A request in the queue. ``next_row`` is the first row that has not been taken yet."""

    key: Hashable
    rows: Rows
    context: Context
    deadline: float | None
    arrival: float
    future: asyncio.Future[BatchResult]
    next_row: int = 0
    queue_s: float | None = None
    results: list[PartResult] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.rows) - self.next_row


class Batcher(Generic[Context]):
    """Coalesces requests that share a group key, runs one batch at a time.

    The group of the request at the head of the line goes next, with rows from every waiting request of that group.
    A request that is larger than a batch runs in slices and goes to the back of the line between them, so that
    small ones do not wait for all of it.
    """

    def __init__(
        self,
        run: Run[Context],
        *,
        clock: Monotonic,
        max_rows: Callable[[Hashable], int],
        max_queued_rows: int,
    ) -> None:
        """Prepare; ``start`` begins.

        Args:
            run: Runs one batch. What it raises fails the requests of that batch only.
            clock: Deadlines are readings of this.
            max_rows: Most rows in a batch, by group key.
            max_queued_rows: Most rows that wait. A single larger request is taken when nothing else waits.
        """
        self._run = run
        self._clock = clock
        self._max_rows = max_rows
        self._max_queued_rows = max_queued_rows
        # A dictionary for its order and its cheap removal; the values mean nothing.
        self._queue: dict[_Request[Context], None] = {}
        self._queued_rows = 0
        self._held_rows = 0
        self._rows_per_s = 0.0
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait, those still in preparation included."""
        return self._queued_rows + self._held_rows

    def start(self) -> None:
        """Begin to run batches."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._loop())

    async def close(self) -> None:
        """Take nothing new, run what waits, end."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    @contextlib.contextmanager
    def hold(self, num_rows: int) -> Iterator[Hold]:
        """Count rows as waiting while something else is done with them before they are submitted.

        Closing waits for them, and submitting them afterwards is not refused.

        Raises:
            WireError: OVERLOADED, UNAVAILABLE.
        """
        self._admit(num_rows)
        hold = Hold(num_rows)
        self._held_rows += num_rows
        try:
            yield hold
        finally:
            self._held_rows -= hold.num_rows
            self._wake.set()

    async def submit(
        self,
        key: Hashable,
        rows: Rows,
        context: Context,
        *,
        deadline: float | None = None,
        hold: Hold | None = None,
    ) -> BatchResult:
        """Wait in line and return what came of the rows.

        Cancelling this takes the rows out of the line.

        Args:
            key: The group: only requests of equal keys share a batch.
            rows: One or more.
            context: Handed to the runner with the rows.
            deadline: A reading of the clock after which the rows are dropped unrun.
            hold: What these rows were held under: they were admitted then.

        Raises:
            WireError: OVERLOADED with a delay after which to retry, DEADLINE_EXCEEDED, UNAVAILABLE while closing, or
                what the runner raised.
        """
        if hold is None:
            self._admit(len(rows))
        now = self._clock.monotonic()
        if deadline is not None and now >= deadline:
            raise _expired(now - deadline)
        future: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()
        request = _Request(key, rows, context, deadline, now, future)
        self._queue[request] = None
        self._queued_rows += len(rows)
        if hold is not None:
            self._held_rows -= len(rows)
            hold.num_rows -= len(rows)
        self._wake.set()
        try:
            return await future
        finally:
            self._remove(request)

    def _admit(self, num_rows: int) -> None:
        if self._closing:
            raise WireError(
                ErrorCode.UNAVAILABLE, "this replica is shutting down; the same call will reach another one"
            )
        if self.queued_rows and self.queued_rows + num_rows > self._max_queued_rows:
            self._drop_expired()
        waiting = self.queued_rows
        if waiting and waiting + num_rows > self._max_queued_rows:
            delay_s = self._retry_delay_s(waiting + num_rows - self._max_queued_rows)
            raise WireError(
                ErrorCode.OVERLOADED,
                f"{waiting} rows are waiting and {num_rows} more do not fit: at most {self._max_queued_rows}. "
                f"Retry in {delay_s:.2f} s",
                retry_delay_s=delay_s,
            )

    def _retry_delay_s(self, num_rows: int) -> float:
        rate = self._rows_per_s or _FIRST_GUESS_ROWS_PER_S
        return min(max(num_rows / rate, _MIN_RETRY_S), _MAX_RETRY_S)

    def _remove(self, request: _Request[Context]) -> None:
        """Take a request out of the line, if it still stands there."""
        if request in self._queue:
            del self._queue[request]
            self._queued_rows -= request.num_left

    def _drop_expired(self) -> None:
        """Fail the requests whose deadline has passed, before they cost anything."""
        now = self._clock.monotonic()
        for request in list(self._queue):
            if request.deadline is not None and now >= request.deadline:
                self._fail(request, _expired(now - request.deadline))

    def _fail(self, request: _Request[Context], error: WireError) -> None:
        self._remove(request)
        if not request.future.done():
            request.future.set_exception(error)

    async def _loop(self) -> None:
        while True:
            self._drop_expired()
            if not self._queue:
                if self._closing and not self._held_rows:
                    return
                self._wake.clear()
                await self._wake.wait()
                # Let everything that is ready to arrive do so: it belongs in the same batch.
                await asyncio.sleep(0)
                continue
            key, taken = self._take()
            await self._run_batch(key, taken)

    def _take(self) -> tuple[Hashable, list[tuple[_Request[Context], int, int]]]:
        """Take rows of the group at the head of the line, up to a batch's worth."""
        now = self._clock.monotonic()
        key = next(iter(self._queue)).key
        room = max(1, self._max_rows(key))
        taken = []
        for request in [one for one in self._queue if one.key == key]:
            start, stop = request.next_row, min(request.next_row + room, len(request.rows))
            if request.queue_s is None:
                request.queue_s = now - request.arrival
            request.next_row = stop
            self._queued_rows -= stop - start
            del self._queue[request]
            if request.num_left:
                self._queue[request] = None
            taken.append((request, start, stop))
            room -= stop - start
            if not room:
                break
        return key, taken

    async def _run_batch(self, key: Hashable, taken: list[tuple[_Request[Context], int, int]]) -> None:
        start = self._clock.monotonic()
        parts = [Part(request.rows.take(slice(first, last)), request.context) for request, first, last in taken]
        try:
            results = await self._run(key, parts)
            if len(results) != len(parts):
                raise RuntimeError(f"{len(results)} results for {len(parts)} parts")
        except WireError as error:
            results = [PartResult(None, error)] * len(parts)
        except Exception as error:
            for request, _, _ in taken:
                self._remove(request)
                if not request.future.done():
                    request.future.set_exception(error)
            return
        self._note_speed(sum(last - first for _, first, last in taken), self._clock.monotonic() - start)
        for (request, _, _), result in zip(taken, results, strict=True):
            self._deliver(request, result)

    def _note_speed(self, num_rows: int, elapsed_s: float) -> None:
        if elapsed_s <= 0:
            return
        rate = num_rows / elapsed_s
        self._rows_per_s = rate if not self._rows_per_s else (1 - _SMOOTHING) * self._rows_per_s + _SMOOTHING * rate

    def _deliver(self, request: _Request[Context], result: PartResult) -> None:
        if result.error is not None or result.values is None:
            self._fail(request, result.error or WireError(ErrorCode.INTERNAL, "a batch ended without a result"))
            return
        request.results.append(result)
        if request.num_left or request.future.done():
            return
        values = [one.values for one in request.results if one.values is not None]
        request.future.set_result(
            BatchResult(
                values=values[0] if len(values) == 1 else np.concatenate(values),
                queue_s=request.queue_s or 0.0,
                trunk_s=sum(one.trunk_s for one in request.results),
                head_s=sum(one.head_s for one in request.results),
            )
        )


def _expired(late_s: float) -> WireError:
    return WireError(
        ErrorCode.DEADLINE_EXCEEDED,
        f"the deadline passed {max(late_s, 0.0):.2f} s ago while the rows waited; they were dropped. Allow more "
        "time or send fewer rows at once",
    )
