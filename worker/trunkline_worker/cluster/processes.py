"""Finds and ends the processes of an embedded cluster and no others, by the id that each has in its environment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

CLUSTER_ID_VARIABLE = "TRUNKLINE_CLUSTER_ID"
"""Set in the environment of every process of an embedded cluster."""


def processes_of(cluster_id: str) -> list[int]:
    """Return the pids that carry a cluster's id, as far as this user may see them."""
    mark = f"{CLUSTER_ID_VARIABLE}={cluster_id}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and _is_alive(entry):
                found.append(pid)
    return found


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _is_alive(Path(f"/proc/{pid}"))


def end(pid: int, cluster_id: str, *, patience_s: float) -> list[int]:
    """Ask a cluster to end, wait, then end what is left of it by force.

    Args:
        pid: The process that holds the cluster.
        cluster_id: The id that all of them carry.
        patience_s: How long to wait for an orderly end, in seconds.

    Returns:
        The pids that had to be ended by force.
    """
    if pid in processes_of(cluster_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up and is_running(pid):
        time.sleep(0.05)
    # The holder takes its children along; give the kernel a moment before force is used.
    give_up = time.monotonic() + 5.0
    while (left := processes_of(cluster_id)) and time.monotonic() < give_up:
        time.sleep(0.05)
    for one in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    give_up = time.monotonic() + 5.0
    while processes_of(cluster_id) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left


def _is_alive(entry: Path) -> bool:
    try:
        return entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (OSError, IndexError):
        return not Path("/proc").is_dir()
