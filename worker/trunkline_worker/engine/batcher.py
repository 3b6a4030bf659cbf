"""A row-aware batcher: requests of any number of rows in, batches of bounded rows out.

Rows leave the line only when the runner is free, so that everything that arrives while a batch runs is in the next
one. Callers share each batch fairly, groups take turns, and the line is bounded in rows and in bytes. What a request
costs here does not grow with the length of the line. Times come from a clock and timers that are passed in.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, NamedTuple

import numpy as np
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.engine.admission import Admission, CallLater, Monotonic, Timer, call_later
from trunkline_worker.engine.line import MANY_LANES, NO_ROWS, BatchResult, Context, Line, PartResult, Request, Rows

MAX_QUEUED_BYTES = 2**30
"""Bytes of rows that may wait, unless told otherwise."""

_SMOOTHING = 0.3
_FIRST_GUESS_ROWS_PER_S = 50.0
_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 30.0

_KNOWN_GROUPS = 256
"""Groups without rows whose costs are remembered."""

_GROUPS_ASKED = 16
"""Groups that are asked in turn whether a batch of theirs should run now."""

__all__ = ["Batcher", "BatchResult", "Hold", "Monotonic", "Part", "PartResult", "Rows", "expired"]


class Part(NamedTuple, Generic[Context]):
    """Rows of one request in a batch, and what is wanted of them."""

    rows: Rows
    context: Context


Run = Callable[[Hashable, Sequence[Part[Context]]], Awaitable[Sequence[PartResult]]]
"""Runs a batch of one group; answers in the order of the parts."""


class Hold:
    """Rows that were let in and are not in the line yet. Leaving its ``with`` block gives up what was not submitted."""

    __slots__ = ("_give_up", "caller", "num_bytes", "num_rows")

    def __init__(self, caller: str, num_rows: int, num_bytes: int, give_up: Callable[[Hold], None]) -> None:
        """Keep what is held, and whom to tell when it no longer is."""
        self.caller = caller
        self.num_rows = num_rows
        self.num_bytes = num_bytes
        self._give_up = give_up

    def __enter__(self) -> Hold:
        """Hold on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give up the rest."""
        self._give_up(self)


class Batcher(Generic[Context]):
    """Coalesces requests that share a group key, and runs one batch at a time, or a few.

    Groups with rows take turns. Within a batch the callers of the group share equally, see ``Line``. A request that is
    larger than a batch runs in slices. A batch that is not full may wait for rows that are about to come, see
    ``pacing``.
    """

    def __init__(
        self,
        run: Run[Context],
        *,
        clock: Monotonic,
        max_rows: Callable[[Hashable], int],
        max_queued_rows: int,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        depth: int = 1,
        later: CallLater = call_later,
    ) -> None:
        """Prepare; ``start`` begins.

        Args:
            run: Runs one batch. What it raises fails the requests of that batch only.
            clock: Deadlines are readings of this.
            max_rows: Most rows in a batch, by group key.
            max_queued_rows: Most rows that wait. A single larger request is taken when nothing else waits.
            max_queued_bytes: Most bytes of theirs, likewise.
            depth: Batches that the runner has at a time. It gets one more than it has only if that one is full: what is
                not would grow while it waits there.
            later: Orders calls for later, by the same clock.
        """
        self._run = run
        self._clock = clock
        self._max_rows = max_rows
        self._depth = depth
        self._later = later
        self._room = Admission(max_queued_rows, max_queued_bytes, clock=clock, later=later)
        # Groups with rows, the one whose turn it is first; and those without, of which the costs are remembered.
        self._active: dict[Hashable, Line[Context]] = {}
        self._idle: dict[Hashable, Line[Context]] = {}
        self._num_requests = 0
        self._deadlines: list[tuple[float, int, Request[Context]]] = []
        self._count = itertools.count()
        self._rows_per_s = 0.0
        self._running = 0
        self._last_end = -math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: Timer | None = None
        self._pump_ordered = False
        self._started = False
        self._closing = False
        self._empty: asyncio.Future[None] | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait, those still in preparation included."""
        return self._room.num_rows

    @property
    def queued_bytes(self) -> int:
        """Bytes of these rows."""
        return self._room.num_bytes

    def start(self) -> None:
        """Begin to run batches."""
        self._started = True
        self._order_pump()

    async def close(self) -> None:
        """Take nothing new, run what waits, end. Requests that wait for room are told to go elsewhere."""
        self._closing = True
        self._room.close(_closing())
        self._order_pump()
        while self._started and (self._room.num_rows or self._running):
            self._empty = asyncio.get_running_loop().create_future()
            await self._empty

    def hold(self, num_rows: int, num_bytes: int = 0, *, caller: str = "") -> Hold:
        """Count rows as waiting while something else is done with them before they are submitted.

        Closing waits for them, and submitting them afterwards is not refused.

        Args:
            num_rows: How many.
            num_bytes: Of the memory that they take while they wait.
            caller: Whose they are.

        Raises:
            WireError: OVERLOADED, UNAVAILABLE.
        """
        self._enter(caller, num_rows, num_bytes)
        return Hold(caller, num_rows, num_bytes, self._give_up)

    async def hold_in_turn(
        self, num_rows: int, num_bytes: int = 0, *, caller: str = "", deadline: float | None = None
    ) -> Hold:
        """Do as ``hold`` does, but wait for room where there is none.

        Raises:
            WireError: DEADLINE_EXCEEDED, UNAVAILABLE.
        """
        self._drop_expired(self._clock.monotonic())
        await self._room.wait(caller, num_rows, num_bytes, deadline)
        return Hold(caller, num_rows, num_bytes, self._give_up)

    async def submit(
        self,
        key: Hashable,
        rows: Rows,
        context: Context,
        *,
        caller: str = "",
        deadline: float | None = None,
        hold: Hold | None = None,
    ) -> BatchResult:
        """Wait in line and return what came of the rows.

        Cancelling this takes the rows out of the line.

        Args:
            key: The group: only requests of equal keys share a batch.
            rows: One or more.
            context: Handed to the runner with the rows.
            caller: Whose they are: a tenant, or a tenant, ``/`` and one of its connections.
            deadline: A reading of the clock after which the rows are dropped unrun.
            hold: What these rows were held under: they were let in then, and are its caller's.

        Raises:
            WireError: OVERLOADED with a delay after which to retry, DEADLINE_EXCEEDED, UNAVAILABLE while closing, or
                what the runner raised.
        """
        now = self._clock.monotonic()
        if deadline is not None and now >= deadline:
            raise expired(now - deadline)
        num_rows, num_bytes = len(rows.features), rows.nbytes
        if hold is None:
            self._enter(caller, num_rows, num_bytes)
        else:
            caller = hold.caller
            freed = min(hold.num_bytes, num_bytes)
            hold.num_rows -= num_rows
            hold.num_bytes -= freed
            self._room.swap(caller, freed, num_bytes)
        line = self._active.get(key)
        if line is None:
            known = self._idle.pop(key, None)
            line = self._active[key] = Line(key) if known is None else known
        request = Request(rows, num_bytes, context, deadline, now, line.lane(caller))
        line.add(request)
        line.pace.arrived(num_rows, now)
        self._num_requests += 1
        if deadline is not None:
            self._note_deadline(deadline, request)
        if self._running < self._depth and not self._pump_ordered:
            self._order_pump()
        try:
            return await request.future
        except asyncio.CancelledError:
            self._drop(request)
            raise

    def _enter(self, caller: str, num_rows: int, num_bytes: int) -> None:
        if self._room.enter(caller, num_rows, num_bytes):
            return
        self._drop_expired(self._clock.monotonic())
        if not self._room.enter(caller, num_rows, num_bytes):
            raise self._overloaded(num_rows, num_bytes)

    def _overloaded(self, num_rows: int, num_bytes: int) -> WireError:
        room = self._room
        # Bytes too many, as rows of the size of those that wait.
        bytes_over = room.num_bytes + num_bytes - room.max_bytes
        over = max(room.num_rows + num_rows - room.max_rows, bytes_over * room.num_rows / max(room.num_bytes, 1), 0)
        delay_s = min(max(over / (self._rows_per_s or _FIRST_GUESS_ROWS_PER_S), _MIN_RETRY_S), _MAX_RETRY_S)
        of_bytes = f" and {room.max_bytes / 2**20:.0f} MiB" if bytes_over > 0 else ""
        return WireError(
            ErrorCode.OVERLOADED,
            f"{room.num_rows} rows are waiting and {num_rows} more do not fit: at most {room.max_rows}{of_bytes}. "
            f"Retry in {delay_s:.2f} s",
            retry_delay_s=delay_s,
        )

    def _give_up(self, hold: Hold) -> None:
        if hold.num_rows or hold.num_bytes:
            self._room.leave(hold.caller, hold.num_rows, hold.num_bytes)
            hold.num_rows = hold.num_bytes = 0
        self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        if self._empty is not None and not self._empty.done() and not (self._room.num_rows or self._running):
            self._empty.set_result(None)

    def _note_deadline(self, deadline: float, request: Request[Context]) -> None:
        heapq.heappush(self._deadlines, (deadline, next(self._count), request))
        if len(self._deadlines) > 2 * self._num_requests + MANY_LANES:  # most are of requests that have left the line
            self._deadlines = [one for one in self._deadlines if one[2].next_row < one[2].num_rows]
            heapq.heapify(self._deadlines)

    def _drop_expired(self, now: float) -> None:
        """Fail the requests whose deadline has passed, before they cost anything."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, _, request = heapq.heappop(self._deadlines)
            if request.next_row < request.num_rows:
                self._fail(request, expired(now - deadline))

    def _drop(self, request: Request[Context]) -> None:
        """Take a request out of the line, if it still stands there."""
        line = request.lane.line
        num_rows = line.drop(request)
        if not num_rows:
            return
        request.rows = NO_ROWS  # the request itself may stay in its lane for a while
        self._num_requests -= 1
        if not line.num_rows:
            self._to_idle(line)
        self._room.leave(request.lane.caller, num_rows, request.left_bytes)
        self._tell_if_empty()

    def _fail(self, request: Request[Context], error: Exception) -> None:
        self._drop(request)
        if not request.future.done():
            request.future.set_exception(error)

    def _to_idle(self, line: Line[Context]) -> None:
        del self._active[line.key]
        self._idle[line.key] = line
        if len(self._idle) > _KNOWN_GROUPS:
            del self._idle[next(iter(self._idle))]

    def _order_pump(self) -> None:
        """Look for a batch once everything that is ready to arrive has done so: it belongs in the same one."""
        self._pump_ordered = True
        asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_ordered = False
        self._hand_over(only_full=False)

    def _on_timer(self) -> None:
        self._timer = None
        self._hand_over(only_full=False)

    def _hand_over(self, *, only_full: bool) -> None:
        """Hand batches to the runner, as long as it takes some and there are some to run now."""
        if not self._started:
            return
        now = self._clock.monotonic()
        self._drop_expired(now)
        while self._active and self._running < self._depth:
            found = self._next(now, only_full or self._running > 0)
            if found is None:
                return
            line, room = found
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._launch(line, room, now)

    def _next(self, now: float, only_full: bool) -> tuple[Line[Context], int] | None:
        """Return the group whose turn it is, and the most rows that it may run; None: nothing runs now."""
        shortest_s = math.inf
        for line in itertools.islice(self._active.values(), _GROUPS_ASKED):
            room = max(1, self._max_rows(line.key))
            if line.num_rows >= room:
                return line, room
            if only_full:  # it runs next, though others be full
                return None
            earliest = self._deadlines[0][0] if self._deadlines else None
            wait_s = 0.0 if self._closing else line.pace.wait_s(line.num_rows, room, now, earliest)
            if wait_s <= 0.0:
                return line, room
            shortest_s = min(shortest_s, wait_s)
        if self._timer is None:
            self._timer = self._later(shortest_s, self._on_timer)
        return None

    def _launch(self, line: Line[Context], room: int, now: float) -> None:
        taken = line.take(room)
        del self._active[line.key]
        self._active[line.key] = line  # behind the other groups
        if not line.num_rows:
            self._to_idle(line)
        parts = []
        for request, first, last in taken:
            if first == 0:
                request.queue_s = now - request.arrival
            if last - first == request.num_rows:
                parts.append(Part(request.rows, request.context))
            else:
                parts.append(Part(request.rows.take(slice(first, last)), request.context))
            num_bytes = request.left_bytes
            if last < request.num_rows:
                num_bytes = num_bytes * (last - first) // (request.num_rows - first)
            else:
                self._num_requests -= 1
            request.left_bytes -= num_bytes
            self._room.leave(request.lane.caller, last - first, num_bytes)
        self._running += 1
        task = asyncio.get_running_loop().create_task(self._run_batch(line, parts, taken, now))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_batch(
        self,
        line: Line[Context],
        parts: list[Part[Context]],
        taken: list[tuple[Request[Context], int, int]],
        start: float,
    ) -> None:
        try:
            results = await self._run(line.key, parts)
            if len(results) != len(parts):
                raise RuntimeError(f"{len(results)} results for {len(parts)} parts")
            self._note_speed(line, sum(last - first for _, first, last in taken), start)
            failed = any(one.error is not None for one in results)
        except WireError as error:
            results, failed = [PartResult(None, error)] * len(parts), True
        except Exception as error:
            for request, _, _ in taken:
                self._fail(request, error)
            results, taken, failed = [], [], True
        finally:
            self._running -= 1
        if not failed:  # what failed may have rows in the line that are to leave it first
            self._hand_over(only_full=True)
        for (request, first, last), result in zip(taken, results, strict=True):
            self._deliver(request, first, last, result)
        self._tell_if_empty()
        if self._active and not self._pump_ordered:
            self._order_pump()

    def _note_speed(self, line: Line[Context], num_rows: int, start: float) -> None:
        now = self._clock.monotonic()
        # A batch that was handed over early began when the one before it ended.
        elapsed_s = now - max(start, self._last_end)
        self._last_end = now
        line.pace.ended(num_rows, elapsed_s, now)
        if elapsed_s > 0:
            rate = num_rows / elapsed_s
            self._rows_per_s += (_SMOOTHING if self._rows_per_s else 1.0) * (rate - self._rows_per_s)

    def _deliver(self, request: Request[Context], first: int, last: int, result: PartResult) -> None:
        if request.future.done():
            return
        if result.error is not None or result.values is None:
            self._fail(request, result.error or WireError(ErrorCode.INTERNAL, "a batch ended without a result"))
            return
        if last - first == request.num_rows:
            request.future.set_result(BatchResult(result.values, request.queue_s, result.trunk_s, result.head_s))
            return
        request.results.append((first, result))
        request.num_done += last - first
        if request.num_done < request.num_rows:
            return
        # With several batches at a time, a later slice may be back first.
        results = [one for _, one in sorted(request.results, key=lambda pair: pair[0])]
        request.future.set_result(
            BatchResult(
                np.concatenate([one.values for one in results if one.values is not None]),
                request.queue_s,
                sum(one.trunk_s for one in results),
                sum(one.head_s for one in results),
            )
        )


def _closing() -> WireError:
    return WireError(ErrorCode.UNAVAILABLE, "this replica is shutting down; the same call will reach another one")


def expired(late_s: float) -> WireError:
    """Return what is said of rows whose deadline passed ``late_s`` seconds ago, before they were run."""
    return WireError(
        ErrorCode.DEADLINE_EXCEEDED,
        f"the deadline passed {max(late_s, 0.0):.2f} s ago while the rows waited; they were dropped. Allow more "
        "time or send fewer rows at once",
    )
