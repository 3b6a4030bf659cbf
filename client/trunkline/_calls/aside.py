"""Streams that are read aside, so that an interrupt never strikes inside gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

_NOTICE_S = 0.5
"""Longest wait at a time, in seconds. An interrupt just before a wait does not end it, and is noticed after it."""


@dataclass(frozen=True)
class _End:
    error: Exception | None = None


def _next(messages: SimpleQueue[Any]) -> Any:
    while True:
        try:
            return messages.get(timeout=_NOTICE_S)
        except Empty:
            continue


def read_aside(open_call: Callable[[], Any]) -> Iterator[Any]:
    """Open a call in a thread of its own and yield the messages that it reads; leaving ends the call.

    Whoever waits for long is interrupted by Ctrl-C, which strikes the main thread between any two instructions. gRPC's
    client holds its channel's locks in Python: struck between taking one and the block that gives it back, every later
    call of that channel hangs. A ``SimpleQueue`` has no such place.

    Args:
        open_call: Returns a call that streams messages.

    Raises:
        Exception: What opening or reading raised.
    """
    messages: SimpleQueue[Any] = SimpleQueue()
    calls: list[Any] = []
    has_left = threading.Event()

    def read() -> None:
        try:
            call = open_call()
            calls.append(call)
            if has_left.is_set():
                call.cancel()
            for message in call:
                messages.put(message)
            messages.put(_End())
        except Exception as error:
            messages.put(_End(error))

    try:
        # In here: starting one waits for it, and may be interrupted as well.
        threading.Thread(target=read, name="trunkline-read", daemon=True).start()
        while not isinstance(message := _next(messages), _End):
            yield message
        if message.error is not None:
            raise message.error
    finally:
        has_left.set()
        for call in calls:
            call.cancel()
