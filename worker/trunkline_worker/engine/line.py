"""The rows of one group that wait: start-time fair queueing over their callers."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import WireError

from trunkline_worker.engine.pacing import Pace

Context = TypeVar("Context")

MANY_LANES = 64
"""Lanes, or deadlines, up to which nobody asks whether they are still needed."""


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

    @property
    def nbytes(self) -> int:
        """Return the bytes of all of them."""
        return self.features.nbytes + (0 if self.more_BE is None else self.more_BE.nbytes)

    def take(self, index: slice) -> Rows:
        """Return some of the rows, in the same memory."""
        return Rows(self.features[index], None if self.more_BE is None else self.more_BE[index])


class PartResult(NamedTuple):
    """What came of a part: ``values``, one per row; or ``error``, which fails this part's request only."""

    values: npt.NDArray[np.float32] | None
    error: WireError | None = None
    trunk_s: float = 0.0
    head_s: float = 0.0


class BatchResult(NamedTuple):
    """What came of a request: one value per row, and where the time went, in seconds."""

    values: npt.NDArray[np.float32]
    queue_s: float
    trunk_s: float
    head_s: float


NO_ROWS = Rows(np.empty((0,), np.uint8))
"""What is left of a request that has ended: it may stay in its lane for a while."""


class Request(Generic[Context]):
    """A request. Rows from ``next_row`` on are in the line; ``num_done`` of the others are back."""

    __slots__ = (
        "arrival",
        "context",
        "deadline",
        "future",
        "lane",
        "left_bytes",
        "next_row",
        "num_done",
        "num_rows",
        "queue_s",
        "results",
        "rows",
    )

    def __init__(
        self, rows: Rows, num_bytes: int, context: Context, deadline: float | None, arrival: float, lane: Lane[Context]
    ) -> None:
        self.rows = rows
        self.num_rows = len(rows.features)
        self.left_bytes = num_bytes
        self.context = context
        self.deadline = deadline
        self.arrival = arrival
        self.lane = lane
        self.future: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()
        self.next_row = 0
        self.num_done = 0
        self.queue_s = 0.0
        self.results: list[tuple[int, PartResult]] = []


class Lane(Generic[Context]):
    """The requests of one caller in one group. ``served`` is virtual: it says who has had least of the device."""

    __slots__ = ("caller", "is_in_order", "line", "num_rows", "requests", "served", "tenant")

    def __init__(self, caller: str, line: Line[Context]) -> None:
        self.caller = caller
        self.tenant = caller.partition("/")[0]
        self.line = line
        # May hold requests that have ended: they are passed over when their turn comes.
        self.requests: deque[Request[Context]] = deque()
        self.num_rows = 0
        self.served = 0.0
        self.is_in_order = False


class Line(Generic[Context]):
    """The requests of one group: start-time fair queueing over its callers.

    Whoever has been served least goes next. A caller who comes, or comes back, starts where the others are: nobody
    saves up time. Served rows of a caller count as often as its tenant has callers in the line, so that tenants share
    equally, whatever the number of their connections.
    """

    __slots__ = ("_lanes", "_max_lanes", "_order", "_served", "_tenants", "_turns", "key", "num_rows", "pace")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.pace = Pace()
        self.num_rows = 0
        self._lanes: dict[str, Lane[Context]] = {}
        self._max_lanes = MANY_LANES
        # (served, turn, lane). Lanes that have lost their rows meanwhile are passed over.
        self._order: list[tuple[float, int, Lane[Context]]] = []
        self._tenants: dict[str, int] = {}
        self._turns = 0
        self._served = 0.0

    def lane(self, caller: str) -> Lane[Context]:
        """Return the lane of a caller."""
        lane = self._lanes.get(caller)
        if lane is None:
            if len(self._lanes) >= self._max_lanes:
                self._forget_lanes()
            lane = self._lanes[caller] = Lane(caller, self)
        return lane

    def add(self, request: Request[Context]) -> None:
        """Put a request into its lane."""
        lane = request.lane
        lane.requests.append(request)
        if not lane.num_rows:
            self._tenants[lane.tenant] = self._tenants.get(lane.tenant, 0) + 1
            lane.served = max(lane.served, self._served)
            if not lane.is_in_order:
                self._line_up(lane)
        lane.num_rows += request.num_rows
        self.num_rows += request.num_rows

    def drop(self, request: Request[Context]) -> int:
        """Take what is left of a request out of the line, and return its number of rows."""
        num_rows = request.num_rows - request.next_row
        request.next_row = request.num_rows
        if num_rows:
            self._leave(request.lane, num_rows)
        return num_rows

    def take(self, room: int) -> list[tuple[Request[Context], int, int]]:
        """Take rows out of the line, a batch's worth at most: requests with the first row and the one behind the last.

        Requests stay whole where they can: two callers of 32 rows get a batch each, not half of two.
        """
        taken: list[tuple[Request[Context], int, int]] = []
        while room and self.num_rows:
            lane = heapq.heappop(self._order)[2]
            lane.is_in_order = False
            if not lane.num_rows:
                continue
            weight = self._tenants[lane.tenant]
            least = self._order[0][0] if self._order else math.inf
            while room and lane.num_rows and lane.served <= least:
                request = lane.requests.popleft()
                start = request.next_row
                if start == request.num_rows:
                    continue  # it has ended
                stop = min(start + room, request.num_rows)
                request.next_row = stop
                if stop < request.num_rows:  # behind the caller's others, which need not wait for all of it
                    lane.requests.append(request)
                taken.append((request, start, stop))
                room -= stop - start
                self._served = max(self._served, lane.served)
                lane.served += (stop - start) * weight
                self._leave(lane, stop - start)
            if lane.num_rows:
                self._line_up(lane)
        return taken

    def _line_up(self, lane: Lane[Context]) -> None:
        self._turns += 1
        lane.is_in_order = True
        heapq.heappush(self._order, (lane.served, self._turns, lane))

    def _leave(self, lane: Lane[Context], num_rows: int) -> None:
        self.num_rows -= num_rows
        lane.num_rows -= num_rows
        if lane.num_rows:
            return
        lane.requests.clear()
        others = self._tenants[lane.tenant] - 1
        if others:
            self._tenants[lane.tenant] = others
        else:
            del self._tenants[lane.tenant]
        if not self.num_rows:  # nobody is owed anything any more
            self._lanes.clear()
            self._order.clear()
            self._served = 0.0

    def _forget_lanes(self) -> None:
        """Forget lanes without rows that are not behind: they start where the others are in any case."""
        for lane in list(self._lanes.values()):
            if not (lane.num_rows or lane.is_in_order or lane.served > self._served):
                del self._lanes[lane.caller]
        self._max_lanes = 2 * len(self._lanes) + MANY_LANES
