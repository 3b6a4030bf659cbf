"""Servers as processes: started, frozen while others are measured, stopped; found by a mark in their environment.

The mark is inherited, so it finds whatever a server starts, daemons too; nothing is ever ended by its name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MARK_VARIABLE = "TRUNKLINE_BENCH_SERVER"

_GRACE_S = 15.0
_POLL_S = 0.05
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def new_mark() -> str:
    """Return a mark that no other process has."""
    return uuid.uuid4().hex


def marked(mark: str) -> list[int]:
    """Return the ids of all processes with a mark."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time that processes have used, user and system."""
    return sum(_cpu_ticks(pid) for pid in pids) / _TICKS_PER_S


def busy_seconds(stat: str | None = None) -> float:
    """Return the CPU time that all processes of the machine have used.

    Args:
        stat: What ``/proc/stat`` says. None: it is read.
    """
    words = (Path("/proc/stat").read_text() if stat is None else stat).split()
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, words[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / _TICKS_PER_S


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Server:
    """One server: a process, all that it starts, and a folder of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """Start it; what it prints goes to a file in its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._mark = new_mark()
        self._log = folder / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**environment, MARK_VARIABLE: self._mark},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        """Whether the process that was started still runs."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """Return the end of what it printed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-12:])

    def pids(self) -> list[int]:
        """Return the ids of all its processes."""
        return marked(self._mark)

    def cpu_seconds(self) -> float:
        """Return the CPU time that its processes have used."""
        return cpu_seconds(self.pids())

    def freeze(self) -> None:
        """Stop all its processes until ``thaw``: others have the cores for themselves."""
        _send(self.pids(), signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them run again."""
        _send(self.pids(), signal.SIGCONT)

    def stop(self) -> None:
        """End all its processes: asked first, then killed."""
        self.thaw()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        left = self.pids()
        _send(left, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        _send(left, signal.SIGKILL)
        self._process.wait()


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _cpu_ticks(pid: int) -> int:
    try:
        # After the name, which stands in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
