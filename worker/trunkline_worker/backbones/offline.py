"""Keeps code that builds a network off the network of the machine: weights come from the file that was named.

Not a sandbox: the code is the operator's own, and other threads and processes are not watched.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

_LOOK_UPS = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"})
_MESSAGES = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})

_watched = threading.local()
_lock = threading.Lock()
_is_installed = False


class NetworkUsedError(BaseException):
    """Code that is watched tried to reach another machine. No ``Exception``: it is not for that code to handle."""


@contextlib.contextmanager
def offline() -> Iterator[list[str]]:
    """Refuse this thread the network for a while, and keep a list of what it tried to reach.

    What is tried raises ``NetworkUsedError`` in the code that tries.
    """
    _install()
    tried: list[str] = []
    _watched.tried = tried
    try:
        yield tried
    finally:
        del _watched.tried


def _install() -> None:
    global _is_installed
    with _lock:
        if not _is_installed:
            sys.addaudithook(_audit)  # stays as long as the process does: there is no way to remove one
            _is_installed = True


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    tried: list[str] | None = getattr(_watched, "tried", None)
    if tried is None:
        return
    if event in _LOOK_UPS:
        target = arguments[0]
    elif event in _MESSAGES and not isinstance(arguments[1], (str, bytes, type(None))):
        target = arguments[1]  # a path would be a socket of this machine, and None one that is connected already
    else:
        return
    tried.append(str(target)[:120])
    raise NetworkUsedError(f"{event}: {target}")
