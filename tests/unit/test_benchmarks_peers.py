"""The pure parts of the side-by-side benchmark: load arithmetic, statistics, comparison of answers, report."""

from __future__ import annotations

import asyncio
import json
import math
import os
import selectors
import statistics
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = [str(ROOT / "benchmarks" / "peers"), str(ROOT / "benchmarks")]

sys.path[:0] = FOLDERS
try:
    import compare
    import contestants
    import measure
    import model
    import oip
    import plan
    import plots
    import processes
    import publish
    import tables
finally:
    sys.path[:] = [path for path in sys.path if path not in FOLDERS]


# --- time that passes only when everybody waits -----------------------------------------------------------------------


class _Instant(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        return found


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._instant = _Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now

    def block(self, seconds: float) -> None:
        """Let time pass while nobody else gets his turn."""
        self._instant.now += seconds


def virtual(run: Coroutine[Any, Any, measure.Window]) -> measure.Window:
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(run)


# --- load -------------------------------------------------------------------------------------------------------------


def test_a_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [measure.percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50.0, 95.0, 99.0, 100.0]
    assert measure.percentile([7.0], 0.99) == 7.0
    assert measure.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    with pytest.raises(ValueError, match="no values"):
        measure.percentile([], 0.5)


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    times = measure.poisson_arrivals(50.0, 200.0, seed=3)
    assert times == measure.poisson_arrivals(50.0, 200.0, seed=3)
    assert times != measure.poisson_arrivals(50.0, 200.0, seed=4)
    assert times == sorted(times)
    assert times[-1] < 200.0
    assert len(times) == pytest.approx(10_000, rel=0.05)
    pauses = np.diff(times)
    assert pauses.std() == pytest.approx(pauses.mean(), rel=0.05)  # as only the exponential distribution has it
    assert measure.poisson_arrivals(0.001, 1.0, seed=0) == [0.0]
    with pytest.raises(ValueError, match="above 0"):
        measure.poisson_arrivals(0.0, 1.0, seed=0)


def test_a_closed_loop_counts_what_its_callers_got() -> None:
    seen: list[int] = []

    async def call(number: int) -> int:
        seen.append(number)
        await asyncio.sleep(0.1)
        return 2

    found = virtual(measure.closed_loop(call, callers=4, seconds=0.95, timeout_s=9.0))
    # Ten calls of each of four callers: the last ones start at 0.9 s and are waited for.
    assert found.calls == len(seen) == 40
    assert sorted(seen) == list(range(40))
    assert found.rows == 80
    assert found.seconds == pytest.approx(1.0)
    assert found.rows_per_s == pytest.approx(80.0)
    assert found.p50_s == pytest.approx(0.1)
    assert found.failures == {}


def test_failures_are_counted_and_endless() -> None:
    class Refused(Exception):
        status = 503

    async def call(number: int) -> int:
        await asyncio.sleep(5.0 if number == 1 else 0.1)
        if number == 2:
            raise Refused
        return 1

    found = virtual(measure.closed_loop(call, callers=1, seconds=3.0, timeout_s=1.0))
    assert found.failures == {measure.TIMED_OUT: 1, "HTTP 503": 1}
    assert found.num_failed == 2
    assert found.rows == found.calls - 2
    assert math.isinf(found.p99_s)
    assert found.p50_s == pytest.approx(0.1)


def _one_at_a_time(service_s: float, stall_at: int, stall_s: float) -> measure.Call:
    """Return a server that answers one call after another and stalls once."""
    free_at = 0.0

    async def call(number: int) -> int:
        nonlocal free_at
        loop = asyncio.get_running_loop()
        free_at = max(free_at, loop.time()) + service_s + (stall_s if number == stall_at else 0.0)
        await asyncio.sleep(free_at - loop.time())
        return 1

    return call


def test_an_open_loop_charges_a_stall_to_every_call_that_waited() -> None:
    arrivals = [number * 0.1 for number in range(100)]
    run = measure.open_loop(_one_at_a_time(0.01, 10, 2.0), arrivals, max_in_flight=1000, timeout_s=60.0)
    found = virtual(run)
    assert found.calls == found.rows == 100
    # The stall of 2 s holds up twenty calls: all of them waited, not just the one that met it.
    assert found.p99_s == pytest.approx(1.92, abs=0.02)
    assert found.p95_s > 1.4
    closed = virtual(measure.closed_loop(_one_at_a_time(0.01, 10, 2.0), callers=1, seconds=10.0, timeout_s=60.0))
    assert closed.p99_s < 0.02  # what the caller who waits never sees


def test_a_load_generator_that_is_late_itself_counts_from_when_calls_were_due() -> None:
    async def call(number: int) -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, _VirtualLoop)
        if number == 0:
            loop.block(1.0)
        return 1

    found = virtual(measure.open_loop(call, [0.0, 0.2, 0.4, 2.0], max_in_flight=9, timeout_s=60.0))
    assert found.failures == {}
    assert found.p50_s == pytest.approx(0.6)  # due at 0.4 s, made at 1 s; the others took 1, 0.8 and 0 s
    assert found.p99_s == pytest.approx(1.0)


def test_an_open_loop_has_an_end_and_says_what_was_not_sent() -> None:
    arrivals = [number * 0.01 for number in range(50)]
    found = virtual(measure.open_loop(_one_at_a_time(1.0, -1, 0.0), arrivals, max_in_flight=5, timeout_s=60.0))
    assert found.calls == 50
    assert found.failures == {measure.NOT_SENT: 45}
    assert math.isinf(found.p50_s)


def test_a_call_that_starts_late_has_less_time_left() -> None:
    async def never(number: int) -> int:
        await asyncio.sleep(100.0)
        return 1

    found = virtual(measure.open_loop(never, [0.0, 0.5], max_in_flight=9, timeout_s=2.0))
    assert found.failures == {measure.TIMED_OUT: 2}
    assert found.seconds == pytest.approx(2.5)


# --- the model --------------------------------------------------------------------------------------------------------


def test_a_folded_head_is_the_same_function() -> None:
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=6).astype(np.float32), rng.uniform(0.5, 2, size=6).astype(np.float32)
    weight, bias = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    x_BD = rng.normal(size=(5, 6)).astype(np.float32)
    served = model.PeerModel(lambda images: x_BD, *model.fold(mean, scale, weight, bias))
    logits = ((x_BD - mean) / scale) @ weight.T + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(served(np.zeros((5, 1, 1, 3), dtype=np.uint8)), expected, rtol=1e-4)


def test_requests_of_a_batch_get_their_own_answers() -> None:
    batches = []

    def double(images: Any) -> Any:
        batches.append(len(images))
        return images.reshape(len(images), -1)[:, :1] * 2.0

    parts = [np.full((count, 2, 2, 3), value, dtype=np.uint8) for count, value in ((1, 3), (4, 5), (2, 7))]
    answers = model.joined(parts, double)
    assert batches == [7]
    assert [one[:, 0].tolist() for one in answers] == [[6.0], [10.0] * 4, [14.0] * 2]
    assert [len(one) for one in model.joined(parts[:1], double)] == [1]


def test_a_body_of_half_a_picture_is_refused() -> None:
    assert model.images_of(bytes(2 * 12), (2, 2, 3)).shape == (2, 2, 2, 3)
    with pytest.raises(ValueError, match="reshape"):
        model.images_of(bytes(18), (2, 2, 3))


# --- comparison -------------------------------------------------------------------------------------------------------

RIGHT = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=np.float32)


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (RIGHT[:1], "was expected"),
        (np.where(RIGHT == 0.8, np.nan, RIGHT), "NaN"),
        (RIGHT[:, ::-1], "another class in 2 of 2"),
        (RIGHT + 2e-4, "differs by 2.0e-04"),
    ],
)
def test_a_wrong_answer_is_found(got: Any, words: str) -> None:
    assert words in compare.what_is_wrong(got.astype(np.float32), RIGHT, compare.EXACT_TOLERANCE)


def test_a_right_answer_is_right() -> None:
    assert compare.what_is_wrong(RIGHT + np.float32(5e-5), RIGHT, compare.EXACT_TOLERANCE) == ""
    assert compare.what_is_wrong(RIGHT + np.float32(2e-4), RIGHT, compare.INEXACT_TOLERANCE) == ""


@pytest.mark.parametrize(
    ("runtime", "allowed"),
    [("torch", 1e-4), ("onnxruntime-fp32", 1e-4), ("torch-bf16", 1e-2), ("openvino-fp16", 1e-2), ("x-int8", 1e-2)],
)
def test_runtimes_of_fewer_bits_may_differ_more(runtime: str, allowed: float) -> None:
    assert compare.tolerance(runtime) == allowed


# --- the open inference protocol --------------------------------------------------------------------------------------


def test_a_request_has_the_fields_of_the_protocol() -> None:
    images = np.arange(2 * 12, dtype=np.uint8).reshape(2, 2, 2, 3)
    tensor = b"\x0a\x06images" + b"\x12\x05BYTES" + b"\x1a\x02\x02\x01"  # name, datatype, shape
    rows = b"".join((12).to_bytes(4, "little") + one.tobytes() for one in images)
    expected = b"\x0a\x01m" + b"\x2a" + bytes([len(tensor)]) + tensor + b"\x3a" + bytes([len(rows)]) + rows
    assert oip.request("m", images) == expected


@pytest.mark.parametrize("is_raw", [True, False])
def test_an_answer_is_read_raw_or_not(is_raw: bool) -> None:
    values = np.arange(6, dtype="<f4").tobytes()
    contents = b"" if is_raw else b"\x2a\x1a\x32\x18" + values
    tensor = b"\x1a\x02\x02\x03" + contents  # shape 2 x 3
    answer = b"\x2a" + bytes([len(tensor)]) + tensor + (b"\x32\x18" + values if is_raw else b"")
    np.testing.assert_array_equal(oip.outputs(answer), np.arange(6, dtype=np.float32).reshape(2, 3))


# --- the plan ---------------------------------------------------------------------------------------------------------


def _plan(minutes: float, rounds: int = 3) -> plan.Plan:
    return plan.make_plan(
        minutes,
        rounds=rounds,
        num_contestants=17,
        num_loads=4,
        num_resting=10,
        num_restarting=2,
        num_open=72,
    )


def test_a_longer_run_measures_longer_and_none_is_endless_or_empty() -> None:
    short, standard, long = _plan(1), _plan(15), _plan(60)
    assert 0 < short.closed_s <= standard.closed_s < long.closed_s
    assert 0 < short.open_s < standard.open_s < long.open_s
    assert 3 * 17 * 4 * long.closed_s + 72 * long.open_s < 60 * 60


def test_everybody_comes_once_a_round_and_ours_last_in_the_last() -> None:
    blocks = [*list("abcdef"), "ours"]
    rounds = [plan.order(blocks, number, 3, last="ours") for number in range(3)]
    assert all(sorted(one) == sorted(blocks) for one in rounds)
    assert len({one[0] for one in rounds}) == 3
    assert rounds[-1][-1] == "ours"
    assert plan.order(blocks, 0, 1, last="ours")[-1] == "ours"


def test_only_those_asked_for_take_part_and_ours_always_does() -> None:
    assert [one.id for one in contestants.contestants(["mosec"])] == [
        "mosec/torch",
        "mosec/onnx",
        "trunkline/gateway",
        "trunkline/direct",
        "trunkline/sdk",
    ]
    everybody = [one.id for one in contestants.contestants()]
    assert len(everybody) == len(set(everybody)) == 2 + 2 * len(contestants.PEERS) + 3
    with pytest.raises(ValueError, match="'triton' is not one of litserve"):
        contestants.contestants(["triton"])


# --- the report -------------------------------------------------------------------------------------------------------

FIELD = contestants.contestants(["mosec"])
LOAD = contestants.LOADS[0].name


def _closed(who: str, rows_per_s: float, load: str = LOAD, **changes: Any) -> tables.Closed:
    values = {
        "contestant": who,
        "load": load,
        "rows_per_s": rows_per_s,
        "p50_s": 0.010,
        "p99_s": 0.020,
        "rows": 100,
        "failures": {},
        "server_cpu_s": 0.5,
        "client_cpu_s": 0.1,
        "others": 0.02,
    }
    return tables.Closed(**{**values, **changes})


def _open(who: str, p99_s: float, share: float = 0.8, **changes: Any) -> tables.Open:
    values = {"peer": "mosec/torch", "share": share, "rate": 40.0, "calls": 9, "p50_s": 0.03, "failures": {}}
    return tables.Open(**{**values, "contestant": who, "p99_s": p99_s, **changes})


CLOSED = [
    _closed("mosec/torch", 50.0),
    _closed("mosec/torch", 60.0),
    _closed("mosec/torch", 40.0, failures={"HTTP 503": 2}, p99_s=math.inf),
    _closed("trunkline/gateway", 100.0),
    _closed("trunkline/direct", 125.0),
]


def _cells(table: str, label: str, variant: str) -> list[str]:
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == [label, variant]:
            return cells[2:]
    raise AssertionError(f"no row of {label}, {variant}")


def test_the_table_of_rates_has_medians_spreads_failures_and_who_is_missing() -> None:
    table = tables.rate_table(FIELD, CLOSED, {"mosec/onnx": "wrong: another class in 1 of 8 rows"})
    assert _cells(table, "mosec", "as documented") == ["50 (40 to 60)", "-", "-", "-", "2 HTTP 503"]
    assert _cells(table, "mosec", "our runtime") == ["-", "-", "-", "-", "see below"]
    assert _cells(table, "Trunkline", "gateway, bare stub")[0] == "100"


def test_the_table_of_ratios_divides_ours_by_theirs() -> None:
    table = tables.ratio_table(FIELD, CLOSED)
    assert "1 caller: gateway / direct" in table
    assert _cells(table, "mosec", "as documented") == ["2.00 / 2.50", "- / -", "- / -", "- / -"]


def test_a_call_without_an_answer_shows_in_the_latencies() -> None:
    table = tables.latency_table(FIELD, [CLOSED[2]])
    assert _cells(table, "mosec", "as documented")[0] == "10 / failed"


def test_the_best_rate_is_the_highest_median_of_calls_of_one_row() -> None:
    many = contestants.LOADS[-1]
    assert many.rows_per_call > 1
    records = [
        *CLOSED,
        _closed("mosec/torch", 55.0, contestants.LOADS[1].name),
        _closed("mosec/torch", 999.0, many.name),
    ]
    assert tables.best_rate(records, "mosec/torch") == statistics.median([55.0])
    assert tables.best_rate(records, "nobody") == 0.0


def test_the_open_table_puts_both_sides_at_one_load_in_one_row() -> None:
    records = [_open("mosec/torch", math.inf, failures={"timed out": 3}), _open("trunkline/direct", 0.045)]
    cells = _cells(tables.open_table(FIELD, records), "mosec", "as documented")
    assert cells == ["40.0 (80%)", "30 / failed", "30 / 45", "mosec/torch: 3 timed out of 9"]


def test_cpu_is_for_each_row() -> None:
    assert _cells(tables.cpu_table(FIELD, CLOSED), "mosec", "as documented")[0] == "5.0 / 1.0"


def test_figures_of_a_busy_machine_say_so() -> None:
    quiet, busy = tables.disturbance(CLOSED), tables.disturbance([_closed("mosec/torch", 1.0, others=0.9), CLOSED[0]])
    assert "0.02 cores" in quiet
    assert "do not quote" not in quiet
    assert "0.46 cores" in busy
    assert "do not quote" in busy
    assert busy in publish.report(
        replace(_results(), closed=[_closed("mosec/torch", 1.0, others=0.9), CLOSED[0]]), "", {}
    )


def test_busy_time_leaves_out_idling_and_waiting() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = "cpu  " + " ".join(str(ticks * value) for value in (1, 2, 4, 1000, 2000, 8, 16, 32, 4000, 8000)) + "\ncpu0 1"
    assert processes.busy_seconds(stat) == 63.0


def _results() -> publish.Results:
    status = {"mosec/onnx": "wrong: another class in 1 of 8 rows"}
    opened = [_open("mosec/torch", math.inf), _open("trunkline/direct", 0.045)]
    return publish.Results("net", 3, 600.0, "onnxruntime-fp32", 4.0, FIELD, status, CLOSED, opened)


def test_the_report_names_machine_versions_and_who_was_wrong() -> None:
    text = publish.report(_results(), "2 cores", {"torch": "2", "mosec": "0.9"})
    for words in ("2 cores", "mosec 0.9", "onnxruntime-fp32", "our runtime: wrong: another class in 1 of 8 rows"):
        assert words in text
    assert contestants.PEERS[3].advice in text


def test_raw_results_are_lines_of_json_for_any_reader() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = publish.raw(_results(), "2 cores", {})
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [one["kind"] for one in lines] == ["run", *["closed"] * len(CLOSED), "open", "open"]
    assert lines[3]["p99_s"] is None
    assert lines[0]["status"] == {"mosec/onnx": "wrong: another class in 1 of 8 rows"}


def test_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    plots.bars(tmp_path / "x.svg", "<rows>", [plots.Bar("a & b", 50.0), plots.Bar("c", 100.0, marked=True)])
    tree = ElementTree.parse(tmp_path / "x.svg")
    rects = [one for one in tree.iter("{http://www.w3.org/2000/svg}rect") if one.get("fill") != "#fff"]
    short, long = (float(one.get("width") or 0) for one in rects)
    assert long == pytest.approx(2 * short, abs=0.2)
    assert rects[0].get("fill") != rects[1].get("fill")


# --- processes --------------------------------------------------------------------------------------------------------

CHILDREN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[processes.Server]:
    started = processes.Server([sys.executable, "-c", CHILDREN], dict(os.environ), tmp_path / "server")
    yield started
    started.stop()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_server_is_frozen_and_stopped_with_all_that_it_started(server: processes.Server) -> None:
    while not server.last_words():
        assert server.is_alive
    child = int(server.last_words())
    while child not in server.pids():  # before it has become what it is started as
        assert server.is_alive
    pids = server.pids()
    assert len(pids) == 2
    server.freeze()
    while not all(_state(pid) == "T" for pid in pids):
        assert len(server.pids()) == 2
    server.thaw()
    server.stop()
    assert server.pids() == []
    assert not server.is_alive
    assert not Path(f"/proc/{child}").exists() or _state(child) == "Z"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_cpu_time_is_that_of_the_processes() -> None:
    before_s, started_s = processes.cpu_seconds([os.getpid()]), time.process_time()
    while time.process_time() < started_s + 0.2:
        pass
    used_s = processes.cpu_seconds([os.getpid()]) - before_s
    assert used_s == pytest.approx(time.process_time() - started_s, abs=0.05)  # the system counts in ticks
    assert processes.cpu_seconds([2**22 + 1]) == 0.0  # one that has ended
