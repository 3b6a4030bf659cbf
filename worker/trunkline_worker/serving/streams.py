"""Several messages of one stream in flight, a bounded number, each answered as soon as it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.serving.budget import Held, size_of
from trunkline_worker.serving.draining import Draining, ending

Reply = TypeVar("Reply")
T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a message of a stream without any deadline waits for an engine that is elsewhere and full, in seconds."""

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.05, 2.0


class Numbered(Protocol):
    """A message of a stream: a number, and the end message among its kinds."""

    @property
    def seq(self) -> int:
        """Its number."""

    def WhichOneof(self, oneof_group: str) -> str | None:
        """Return which kind the message is."""


RequestT = TypeVar("RequestT", bound=Numbered)


@dataclass(frozen=True)
class Room(Generic[RequestT, Reply]):
    """Where the messages of a stream find room in memory.

    Attributes:
        reserve: Waits for room for a request.
        refuse: Makes the reply to a request for which there was none.
    """

    reserve: Callable[[RequestT], Awaitable[Held]]
    refuse: Callable[[RequestT, WireError], Reply]


async def pipelined(
    requests: AsyncIterator[RequestT],
    handle: Callable[[RequestT], Awaitable[Reply]],
    *,
    window: int,
    draining: Draining,
    room: Room[RequestT, Reply] | None = None,
) -> AsyncIterator[Reply]:
    """Handle the messages of a stream, ``window`` at a time at most, and yield replies as they are done.

    Reading stops while the window is full, or while a message waits for room, so HTTP/2 flow control holds the sender
    back. A message is in flight until its reply was taken, so a caller who does not read is sent no more than a window
    of replies. The caller of this sends its own end message after the last reply.

    Args:
        requests: The stream.
        handle: Turns one request into one reply. Errors that concern this message alone belong in the reply.
        window: Most messages in flight.
        draining: Once the server is about to end, no more is read.
        room: Where a request has its place until it was handled, and then its reply until it was taken. Replies are
            protobuf messages then. None: nobody counts.

    Raises:
        WireError: INVALID_ARGUMENT where numbers repeat or go back, the end message counts wrong, or it is missing;
            UNAVAILABLE where the server is about to end, once what was read has been answered.
    """
    slots = asyncio.Semaphore(window)
    done: asyncio.Queue[asyncio.Task[Reply] | None] = asyncio.Queue()
    running: set[asyncio.Task[Reply]] = set()
    held: dict[asyncio.Task[Reply], Held] = {}

    def finish(task: asyncio.Task[Reply]) -> None:
        running.discard(task)
        if task in held and not task.cancelled() and task.exception() is None:
            held[task].resize(size_of(task.result()))  # type: ignore[arg-type]
        done.put_nowait(task)

    async def start(request: RequestT) -> None:
        await slots.acquire()
        place = None
        work: Awaitable[Reply]
        try:
            if room is not None:
                place = await room.reserve(request)
            work = handle(request)
        except WireError as error:
            assert room is not None
            work = _at_once(room.refuse(request, error))
        task = asyncio.ensure_future(work)
        if place is not None:
            held[task] = place
        running.add(task)
        task.add_done_callback(finish)

    reader = asyncio.ensure_future(_read_until_end(requests, start))
    reader.add_done_callback(lambda _: done.put_nowait(None))
    try:
        with draining.watched(reader.cancel):
            reading = True
            while reading or running or not done.empty():
                task = await done.get()
                if task is None:
                    reading = False
                    continue
                try:
                    yield task.result()
                finally:
                    if task in held:
                        held.pop(task).release()
                slots.release()
        if reader.cancelled():
            raise ending()
        reader.result()
    finally:
        reader.cancel()
        for task in list(running):
            task.cancel()
        await asyncio.gather(reader, *running, return_exceptions=True)
        for place in held.values():
            place.release()


async def until_room(
    call: Callable[[], Awaitable[T]],
    *,
    left_s: Callable[[], float | None],
    draining: Draining,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:
    """Make a call to an engine, and again after a pause each time that it is told OVERLOADED.

    Args:
        call: Makes it. It has done nothing where it raises OVERLOADED.
        left_s: Returns the time left in seconds; raises where none is left. None: there is no deadline, and this gives
            up after ``PATIENCE_S``.
        draining: Once the server is about to end, nothing waits.
        sleep: Waits for so many seconds.

    Raises:
        WireError: What the call raises; what ``left_s`` raises.
    """
    waited_s, growing_s = 0.0, _MIN_PAUSE_S
    while True:
        try:
            return await call()
        except WireError as error:
            if error.code is not ErrorCode.OVERLOADED or draining.begun:
                raise
            left = left_s()
            if left is None and waited_s >= PATIENCE_S:
                raise
            # Engines say when there will be room for this one; others wait too, so pauses grow.
            pause_s = min(max(error.retry_delay_s, growing_s), _MAX_PAUSE_S if left is None else left)
            growing_s = min(1.5 * growing_s, _MAX_PAUSE_S)
        await sleep(pause_s)
        waited_s += pause_s


async def _at_once(reply: Reply) -> Reply:
    return reply


async def _read_until_end(requests: AsyncIterator[RequestT], start: Callable[[RequestT], Awaitable[None]]) -> None:
    count, last = 0, -1
    async for request in requests:
        kind = request.WhichOneof("kind")
        if kind == "end":
            if request.end.num_messages != count:  # type: ignore[attr-defined]
                raise WireError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"the end message counts {request.end.num_messages} messages; {count} arrived",  # type: ignore[attr-defined]
                )
            return
        if kind is None:
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"message {request.seq} of the stream is empty")
        if request.seq <= last:
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"seq {request.seq} after {last}: numbers must grow")
        last = request.seq
        count += 1
        await start(request)
    raise WireError(ErrorCode.INVALID_ARGUMENT, "the stream ended without its end message")
