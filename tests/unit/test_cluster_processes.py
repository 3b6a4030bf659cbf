"""Only the cluster's own processes are found and ended, also those that hide their environment."""

import os
import secrets
import subprocess
import sys

import pytest
from trunkline_worker.cluster import processes

# A holder that ignores being asked, with a child whose environment is empty, as after a title was written over it.
HOLDER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN) if sys.argv[1] == "deaf" else None
child = subprocess.Popen([sys.executable, "-c", "import signal; print('child', flush=True); signal.pause()"], env={})
print("holder", child.pid, flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def start():
    running = []

    def make(cluster_id, mood):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, mood],
            env={**os.environ, processes.CLUSTER_ID_VARIABLE: cluster_id},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(holder)
        lines = sorted([holder.stdout.readline(), holder.stdout.readline()])
        assert lines[0] == "child\n"
        return holder, int(lines[1].split()[1])

    yield make
    for holder in running:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_child_that_lost_the_mark_is_found_by_its_session(start):
    cluster_id = secrets.token_hex(8)
    holder, child = start(cluster_id, "polite")
    assert processes.processes_of(cluster_id) == sorted([holder.pid, child])
    assert processes.processes_of("another") == []


@pytest.mark.parametrize("mood", ["polite", "deaf"])
def test_a_cluster_is_ended_and_its_neighbour_is_not(start, mood, monkeypatch):
    monkeypatch.setattr(processes, "CHILDREN_S", 0.2)
    mine, other = secrets.token_hex(8), secrets.token_hex(8)
    holder, child = start(mine, mood)
    neighbour, its_child = start(other, "polite")
    ended = processes.end(holder.pid, mine, patience_s=0.3)
    assert ended.left == []
    assert child in ended.forced  # nobody told it to end
    assert (holder.pid in ended.forced) == (mood == "deaf")
    assert processes.processes_of(mine) == []
    assert not processes.is_running(holder.pid)
    assert processes.processes_of(other) == sorted([neighbour.pid, its_child])


def test_a_pid_that_is_somebody_elses_by_now_is_left_alone(start):
    stranger, _ = start(secrets.token_hex(8), "polite")
    assert processes.end(stranger.pid, secrets.token_hex(8), patience_s=0.1) == processes.Ended([], [])
    assert processes.is_running(stranger.pid)
