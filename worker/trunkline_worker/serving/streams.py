"""Several messages of one stream in flight, a bounded number, each answered as soon as it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar

from trunkline_wire.errors import ErrorCode, WireError

Reply = TypeVar("Reply")


class Numbered(Protocol):
    """A message of a stream: a number, and the end message among its kinds."""

    seq: int

    def WhichOneof(self, oneof_group: str) -> str | None:
        """Return which kind the message is."""


RequestT = TypeVar("RequestT", bound=Numbered)


async def pipelined(
    requests: AsyncIterator[RequestT], handle: Callable[[RequestT], Awaitable[Reply]], *, window: int
) -> AsyncIterator[Reply]:
    """Handle the messages of a stream, ``window`` at a time at most, and yield replies as they are done.

    Reading stops while the window is full, so HTTP/2 flow control holds the sender back. The caller sends its own end
    message after the last reply.

    Args:
        requests: The stream.
        handle: Turns one request into one reply. Errors that concern this message alone belong in the reply.
        window: Most messages in flight.

    Raises:
        WireError: INVALID_ARGUMENT where numbers repeat or go back, the end message counts wrong, or it is missing.
    """
    slots = asyncio.Semaphore(window)
    done: asyncio.Queue[asyncio.Task[Reply] | None] = asyncio.Queue()
    running: set[asyncio.Task[Reply]] = set()

    def finish(task: asyncio.Task[Reply]) -> None:
        running.discard(task)
        done.put_nowait(task)

    async def read() -> None:
        try:
            await _read_until_end(requests, start)
        finally:
            done.put_nowait(None)

    async def start(request: RequestT) -> None:
        await slots.acquire()
        task = asyncio.ensure_future(handle(request))
        running.add(task)
        task.add_done_callback(finish)

    reader = asyncio.ensure_future(read())
    try:
        reading = True
        while reading or running or not done.empty():
            task = await done.get()
            if task is None:
                reading = False
                continue
            reply = task.result()
            yield reply
            slots.release()
        reader.result()
    finally:
        reader.cancel()
        for task in list(running):
            task.cancel()
        await asyncio.gather(reader, *running, return_exceptions=True)


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
