"""The link that benchmarks bring up, and what is made of the numbers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def link(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("link")


@pytest.fixture
def slow_link(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("slow_link")


def test_packets_leave_one_after_another_and_arrive_a_delay_later(link):
    shaper = link.Shaper(link.LinkSpec(rtt_s=0.040, bits_per_s=8e6))  # a byte a microsecond
    assert shaper.is_free(100.0)
    assert shaper.take(100.0, 1500) == pytest.approx(100.0 + 0.020)
    # What had been saved up is used up by the second packet.
    assert shaper.take(100.0, 1500) == pytest.approx(100.001 + 0.020)
    assert not shaper.is_free(100.0)
    assert shaper.is_free(100.001)
    assert shaper.take(100.001, 1000) == pytest.approx(100.002 + 0.020)


def test_a_link_that_was_looked_at_late_catches_up_but_saves_nothing(link):
    shaper = link.Shaper(link.LinkSpec(rtt_s=0.0, bits_per_s=8e6))

    def carried(now):
        count = 0
        while shaper.is_free(now):
            shaper.take(now, 1000)
            count += 1
        return count

    first = carried(50.0)
    assert sum(carried(50.0 + tick / 1000) for tick in range(1, 101)) == 100
    # After a second of silence no more than the burst may go at once.
    assert carried(51.1) <= first <= round(link.BURST_S * 1000) + 1


def test_the_queue_holds_what_drains_in_its_time(link):
    assert link.LinkSpec(bits_per_s=12e6, queue_s=0.1, mtu=1500).queue_packets == 100
    assert link.LinkSpec(bits_per_s=1e3).queue_packets == 2


def test_counters_are_those_of_the_interface(link):
    table = (
        "Inter-|   Receive                      |  Transmit\n"
        " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier\n"
        "    lo:       1       1    0    0    0     0          0         0        2       1    0    0    0     0   0\n"
        " slow0:  126725    2382    0    0    0     0          0         0 40275724    4485    0   18    0     0   0\n"
    )
    assert link._counters(table, "slow0") == (40275724, 126725)
    with pytest.raises(OSError, match="no interface slow1"):
        link._counters(table, "slow1")


def test_the_share_and_what_bounds_follow_from_bytes_and_time(slow_link):
    over_link = slow_link.Run(num_rows=100, seconds=2.0, sent=1_000_000, received=0)

    def result(rows_per_s_here):
        here = slow_link.Run(num_rows=rows_per_s_here, seconds=1.0)
        return slow_link.Result(slow_link.Way("blocks.0", "int8"), over_link, here, None)

    assert over_link.rows_per_s == 50
    assert over_link.bytes_per_row == 10_000
    assert result(200).share(1_000_000) == 0.5
    # A link of 1 MB a second carries 100 rows a second.
    assert result(150).is_bound_by_link(1_000_000)
    assert not result(149).is_bound_by_link(1_000_000)


def test_time_without_rows_on_the_link_is_not_time_of_sending(slow_link):
    waiting = [(0.0, 500), (1.0, 500), (1.5, 540)]
    sending = [(2.0, 300_000), (3.0, 700_000), (4.0, 1_000_000)]
    answers = [(5.0, 1_000_100), (6.0, 1_002_000)]
    assert slow_link.sending_seconds(waiting + sending + answers) == 2.5
    assert slow_link.sending_seconds([(0.0, 7), (3.0, 7)]) == 0.0


def test_rows_fill_the_time_in_whole_batches(slow_link):
    assert slow_link.rows_for(2.0, 100.0, 64) == 192
    assert slow_link.rows_for(0.1, 1.0, 13) == 39


def test_pictures_are_all_different(slow_link):
    files = [slow_link.jpeg_file(one) for one in slow_link.photographs(8)]
    assert len(set(files)) == 8


CARRIED = """
import json, multiprocessing, socket, sys
import link

def call(namespace):
    link.enter(namespace)
    before = link.passed_bytes()
    with socket.create_connection((link.FAR, 9000), timeout=20) as connection:
        connection.sendall(bytes(100_000))
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(16)
    after = link.passed_bytes()
    return answer.decode(), after[0] - before[0], after[1] - before[1]

if __name__ == "__main__":
    with link.slow_link(link.LinkSpec(rtt_s=0.002, bits_per_s=100e6)) as up:
        link.enter(up.far)
        with socket.create_server((link.FAR, 9000)) as server, multiprocessing.get_context("spawn").Pool(1) as pool:
            called = pool.apply_async(call, (up.near,))
            connection, peer = server.accept()
            received = 0
            while data := connection.recv(65536):
                received += len(data)
            connection.sendall(b"thanks")
            connection.close()
            print(json.dumps([received, peer[0], *called.get(20), up.near]))
"""


def test_a_link_carries_bytes_counts_them_and_is_gone_at_the_end(link, tmp_path):
    lacking = link.missing()
    if lacking:
        pytest.skip(lacking)
    script = tmp_path / "carried.py"
    script.write_text(CARRIED)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": str(BENCHMARKS), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    received, peer, answer, sent_bytes, received_bytes, namespace = json.loads(done.stdout)
    assert (received, peer, answer) == (100_000, link.NEAR, "thanks")
    assert 100_000 < sent_bytes < 130_000
    assert 0 < received_bytes < 30_000
    # The process that held the namespaces has ended.
    assert not Path(namespace).exists()


def test_who_may_not_make_a_link_is_told(link, monkeypatch):
    monkeypatch.setattr(link.os, "geteuid", lambda: 1000)
    assert "root" in link.missing()
    monkeypatch.setattr(link.os, "geteuid", lambda: 0)
    monkeypatch.setattr(link.shutil, "which", lambda name: None)
    assert "iproute2" in link.missing()


def test_without_what_a_link_needs_the_benchmark_says_so(slow_link, monkeypatch, capsys):
    monkeypatch.setattr(slow_link, "missing", lambda: "it needs root")
    monkeypatch.setattr(sys, "argv", ["slow_link.py"])
    with pytest.raises(SystemExit) as left:
        slow_link.main()
    assert left.value.code == 2
    assert "it needs root" in capsys.readouterr().err
