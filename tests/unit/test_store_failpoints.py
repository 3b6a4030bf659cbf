"""Failpoints do nothing unless armed, and the clock stands still unless moved."""

import pickle  # noqa: TID251 - whether an armed set survives the trip to a worker
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trunkline_worker.store as store
from trunkline_worker.store.clock import ManualClock, SystemClock
from trunkline_worker.store.failpoints import EXIT_STATUS, Action, Failpoints, SimulatedKill
from trunkline_worker.store.ids import random_id


def test_unarmed_failpoints_do_nothing() -> None:
    failpoints = Failpoints()
    seen = failpoints.record()
    failpoints.hit("a")
    failpoints.hit("b")
    assert seen == ["a", "b"]


def test_an_armed_failpoint_fires_once_after_its_skips() -> None:
    failpoints = Failpoints()
    failpoints.arm("a", skip=2)
    failpoints.hit("a")
    failpoints.hit("b")
    failpoints.hit("a")
    with pytest.raises(SimulatedKill, match="a"):
        failpoints.hit("a")
    failpoints.hit("a")


def test_disarm() -> None:
    failpoints = Failpoints({"a": Action.RAISE})
    failpoints.disarm()
    failpoints.hit("a")


def test_a_simulated_kill_passes_handlers_of_exceptions() -> None:
    assert not issubclass(SimulatedKill, Exception)


def test_from_text() -> None:
    failpoints = Failpoints.from_text(" a=raise:1, b=raise ,")
    failpoints.hit("a")
    with pytest.raises(SimulatedKill, match="b"):
        failpoints.hit("b")
    with pytest.raises(SimulatedKill, match="a"):
        failpoints.hit("a")
    Failpoints.from_text("").hit("a")
    with pytest.raises(ValueError, match="explode"):
        Failpoints.from_text("a=explode")


def test_armed_failpoints_can_be_pickled() -> None:
    copy = pickle.loads(pickle.dumps(Failpoints({"a": Action.RAISE})))
    with pytest.raises(SimulatedKill):
        copy.hit("a")


def test_exit_ends_the_process_at_once() -> None:
    code = (
        "from trunkline_worker.store.failpoints import Failpoints\n"
        "try:\n    Failpoints.from_text('a=exit').hit('a')\nfinally:\n    print('cleaned up')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_STATUS
    assert done.stdout == ""


def test_manual_clock() -> None:
    clock = ManualClock(100.0)
    clock.advance(2.5)
    assert (clock.now(), clock.monotonic()) == (102.5, 2.5)
    clock.set_wall(50.0)
    assert (clock.now(), clock.monotonic()) == (50.0, 2.5)
    with pytest.raises(ValueError, match="go back"):
        clock.advance(-1)


def test_system_clock_moves_forward() -> None:
    clock = SystemClock()
    assert clock.now() > 1.7e9
    before = clock.monotonic()
    assert clock.monotonic() >= before


def test_random_ids_differ_and_fit_a_storage_path() -> None:
    ids = {random_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def test_nothing_in_the_store_reads_a_clock_or_makes_randomness_of_its_own() -> None:
    allowed = {"clock.py": ("time.time", "time.monotonic"), "ids.py": ("uuid",)}
    pattern = re.compile(r"\btime\.(?:time|monotonic|sleep)|\bdatetime\b|\brandom\.|\buuid\b|\bsecrets\b")
    for path in Path(store.__path__[0]).glob("*.py"):
        for found in pattern.findall(path.read_text()):
            assert found in allowed.get(path.name, ()), f"{path.name} uses {found}"
