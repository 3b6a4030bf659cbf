"""Finds and ends the processes of an embedded cluster and no others.

Each carries the cluster's id in its environment; and all share the session of the process that holds the cluster, which
is what is left of those that wrote a title over their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

CLUSTER_ID_VARIABLE = "TRUNKLINE_CLUSTER_ID"
"""Set in the environment of every process of an embedded cluster."""

CHILDREN_S = 5.0
"""How long the processes may outlive the one that held them before they are ended by force, in seconds."""

FORCE_S = 10.0
"""How long ending by force may take, in seconds."""


def processes_of(cluster_id: str) -> list[int]:
    """Return the pids of a cluster, as far as this user may see them. Not this process, nor its session."""
    return _members(cluster_id, set())


def _members(cluster_id: str, sessions: set[int]) -> list[int]:
    """Return the pids of a cluster and of ``sessions``, to which the sessions of its marked processes are added."""
    mark = f"{CLUSTER_ID_VARIABLE}={cluster_id}".encode()
    session_of = {}
    marked = set()
    for entry in Path("/proc").glob("[0-9]*"):
        session = _session(entry)
        if session is None or int(entry.name) == os.getpid():
            continue
        session_of[int(entry.name)] = session
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                marked.add(int(entry.name))
    sessions |= {session_of[pid] for pid in marked}
    sessions.discard(os.getsid(0))
    return sorted(marked | {pid for pid, session in session_of.items() if session in sessions})


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended but was not waited for does not."""
    return _session(Path(f"/proc/{pid}")) is not None


@dataclass(frozen=True)
class Ended:
    """How a cluster ended: the pids that had to be forced, and those that are left all the same."""

    forced: list[int]
    left: list[int]


def end(pid: int, cluster_id: str, *, patience_s: float) -> Ended:
    """Ask a cluster to end, wait, then end what is left of it by force.

    Args:
        pid: The process that holds the cluster.
        cluster_id: The id that all of them carry.
        patience_s: How long to wait for an orderly end, in seconds.
    """
    sessions: set[int] = set()
    if pid in _members(cluster_id, sessions):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        give_up = time.monotonic() + patience_s
        while time.monotonic() < give_up and is_running(pid):
            time.sleep(0.05)
    # The holder takes its children along; give the kernel a moment before force is used.
    give_up = time.monotonic() + CHILDREN_S
    while (left := _members(cluster_id, sessions)) and time.monotonic() < give_up:
        time.sleep(0.05)
    # Again until none is found: a process may have started another one while it was looked for.
    forced: set[int] = set()
    give_up = time.monotonic() + FORCE_S
    while left and time.monotonic() < give_up:
        for one in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        forced.update(left)
        time.sleep(0.05)
        left = _members(cluster_id, sessions)
    return Ended(sorted(forced), left)


def _session(entry: Path) -> int | None:
    """Return the session of a process that runs, None for one that has ended."""
    try:
        words = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if words[0] in "ZX" else int(words[3])
