"""The load: callers that wait for their answers, and callers that do not; and what follows from what was seen.

Closed loop: so many callers, each with one call at a time. Open loop: calls start when a Poisson process says so,
whether or not earlier ones were answered, and a call's time counts from when it should have started: a server that
stalls pays for every call that it kept waiting (no coordinated omission). What fails is counted, never left out: in the
percentiles it stands as endless.

No network in here: a call is any coroutine function, and time is that of the running event loop.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

Call = Callable[[int], Awaitable[int]]
"""Makes the call of that number, and returns how many rows were answered."""

NOT_SENT = "not sent: too many calls without an answer"
TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Outcome:
    """One call. Times in seconds of the event loop; ``error`` is empty for one that was answered."""

    intended_s: float
    ended_s: float
    rows: int
    error: str = ""

    @property
    def latency_s(self) -> float:
        """From when it should have started to its answer; endless if it failed."""
        return math.inf if self.error else self.ended_s - self.intended_s


@dataclass(frozen=True)
class Window:
    """What one stretch of load gave.

    Attributes:
        seconds: From the first call to the last answer.
        rows: That were answered.
        calls: That were made, or should have been.
        p50_s, p95_s, p99_s: Latency of calls, failed ones at infinity.
        failures: How often each failure happened.
    """

    seconds: float
    rows: int
    calls: int
    p50_s: float
    p95_s: float
    p99_s: float
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def rows_per_s(self) -> float:
        """Rows that were answered in a second."""
        return self.rows / self.seconds

    @property
    def num_failed(self) -> int:
        """Calls without an answer."""
        return sum(self.failures.values())


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least that share of all values do not exceed (nearest rank).

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    rank = max(1, math.ceil(share * len(values)))
    return sorted(values)[rank - 1]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return when calls start, in seconds from 0 on: ``rate`` a second on average, the same ones for a seed.

    Raises:
        ValueError: The rate is not above 0.
    """
    if rate <= 0:
        raise ValueError(f"a rate must be above 0; got {rate}")
    generator, times, now = random.Random(seed), [], 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        times.append(now)
    # At least one call, or a slow server's window would have nothing in it.
    return times or [0.0]


def window(outcomes: Sequence[Outcome]) -> Window:
    """Sum up what was seen.

    Raises:
        ValueError: Nothing was.
    """
    latencies = [one.latency_s for one in outcomes]
    answered = [one for one in outcomes if not one.error]
    started, ended = min(one.intended_s for one in outcomes), max(one.ended_s for one in outcomes)
    return Window(
        seconds=max(ended - started, 1e-9),
        rows=sum(one.rows for one in answered),
        calls=len(outcomes),
        p50_s=percentile(latencies, 0.50),
        p95_s=percentile(latencies, 0.95),
        p99_s=percentile(latencies, 0.99),
        failures=dict(Counter(one.error for one in outcomes if one.error)),
    )


async def closed_loop(call: Call, *, callers: int, seconds: float, timeout_s: float) -> Window:
    """Let callers make one call after the other.

    Args:
        call: What to call.
        callers: How many at a time.
        seconds: After this no call is made any more; those under way are waited for.
        timeout_s: After this a call has failed.
    """
    loop = asyncio.get_running_loop()
    started, outcomes, numbers = loop.time(), list[Outcome](), iter(range(10**9))

    async def caller() -> None:
        while loop.time() < started + seconds:
            outcomes.append(await _made(call, next(numbers), loop.time(), timeout_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return window(outcomes)


async def open_loop(call: Call, arrivals: Sequence[float], *, max_in_flight: int, timeout_s: float) -> Window:
    """Make each call when it is due.

    Args:
        call: What to call.
        arrivals: When, in seconds from now on, ascending.
        max_in_flight: Calls without an answer at which a further one is not sent, and has failed: memory has an end.
        timeout_s: After this a call has failed.
    """
    loop = asyncio.get_running_loop()
    started, outcomes, under_way = loop.time(), list[Outcome](), set[asyncio.Task[None]]()

    async def one(number: int, intended_s: float) -> None:
        outcomes.append(await _made(call, number, intended_s, timeout_s))

    for number, arrival in enumerate(arrivals):
        intended_s = started + arrival
        if (early_s := intended_s - loop.time()) > 0:
            await asyncio.sleep(early_s)
        if len(under_way) >= max_in_flight:
            outcomes.append(Outcome(intended_s, max(loop.time(), intended_s), 0, NOT_SENT))
            continue
        task = asyncio.create_task(one(number, intended_s))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    if under_way:
        await asyncio.wait(under_way)
    return window(outcomes)


async def _made(call: Call, number: int, intended_s: float, timeout_s: float) -> Outcome:
    loop = asyncio.get_running_loop()
    try:
        # Counted from when it should have started: one that starts late has less time left.
        async with asyncio.timeout_at(intended_s + timeout_s):
            rows = await call(number)
    except TimeoutError:
        return Outcome(intended_s, loop.time(), 0, TIMED_OUT)
    except Exception as error:
        return Outcome(intended_s, loop.time(), 0, _words(error))
    return Outcome(intended_s, loop.time(), rows)


def _words(error: Exception) -> str:
    """Return a failure in few words, the same for the same kind of failure."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if callable(code) and callable(details):  # gRPC's
        # The id of the request tells two failures of one kind apart.
        return f"{code().name}: {str(details()).partition(' (request')[0][:80]}"
    status = getattr(error, "status", None)
    return f"HTTP {status}" if status else type(error).__name__
