"""Streams read in a thread of their own: everything arrives, and leaving ends the call wherever it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
from trunkline._calls.aside import read_aside

PATIENCE_S = 60


class Call:
    """Streams some messages, then waits to be cancelled."""

    def __init__(self, *messages: str, error: Exception | None = None, waits: bool = False) -> None:
        self._messages, self._error, self._waits = messages, error, waits
        self.cancelled = threading.Event()
        self.reader = ""

    def __iter__(self) -> Iterator[str]:
        self.reader = threading.current_thread().name
        yield from self._messages
        if self._error is not None:
            raise self._error
        if self._waits:
            assert self.cancelled.wait(PATIENCE_S)

    def cancel(self) -> None:
        self.cancelled.set()


def test_everything_arrives_in_order() -> None:
    call = Call("a", "b", "c")
    assert list(read_aside(lambda: call)) == ["a", "b", "c"]
    assert call.cancelled.is_set() and call.reader == "trunkline-read"


def test_errors_come_after_what_was_read() -> None:
    messages = read_aside(lambda: Call("a", error=RuntimeError("broken")))
    assert next(messages) == "a"
    with pytest.raises(RuntimeError, match="broken"):
        next(messages)

    def cannot_open() -> Call:
        raise RuntimeError("no way")

    with pytest.raises(RuntimeError, match="no way"):
        list(read_aside(cannot_open))


def test_leaving_ends_the_call() -> None:
    call = Call("a", waits=True)
    messages = read_aside(lambda: call)
    assert next(messages) == "a"
    messages.close()
    assert call.cancelled.is_set()


def test_leaving_ends_a_call_that_is_not_open_yet(terminal: None) -> None:
    call, opening, may_open = Call(waits=True), threading.Event(), threading.Event()

    def open_call() -> Call:
        opening.set()
        assert may_open.wait(PATIENCE_S)
        return call

    messages = read_aside(open_call)

    def interrupt() -> None:
        assert opening.wait(PATIENCE_S)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(messages)
    assert not call.cancelled.is_set()
    may_open.set()
    assert call.cancelled.wait(PATIENCE_S)
