"""Trunkline and the servers that people would pick instead, side by side: one machine, one model, one load.

    python benchmarks/peers/run.py --setup      # once: an environment for each peer
    python benchmarks/peers/run.py              # a quarter of an hour on two cores
    python benchmarks/peers/run.py --quick      # four minutes, one round: whether everything works

All serve the same network and the same head, take the same pictures, and are asked by the same process. Before anybody
is timed the answers are compared with the reference. Rounds alternate between the contestants, in another order each
time. Whoever is not measured is frozen or stopped: nothing else runs on the cores that are shared by server and caller.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))  # what all benchmarks share

import model as peer_model  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import setup_venvs  # noqa: E402
import tables  # noqa: E402
import trunkline_side  # noqa: E402
from compare import tolerance, what_is_wrong  # noqa: E402
from contestants import LOADS, OURS, PEERS, SHARES, Contestant, Peer, contestants  # noqa: E402
from plan import Plan, make_plan, order  # noqa: E402
from processes import Server, busy_seconds, free_port  # noqa: E402
from publish import Results, publish  # noqa: E402
from targets import IN_PROCESS  # noqa: E402
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE  # noqa: E402

ROWS = 128
"""Pictures that are sent, in turn."""

CHECKED_ROWS = 32
READY_S = 180.0
_TRY_S = 10.0


class Failed(Exception):
    """A contestant is out; the text says why."""


class LoadProcess:
    """The load generator, in a process of its own."""

    def __init__(self, images: Path, log: Path) -> None:
        """Start it."""
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "load.py"), str(images)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out.

        Raises:
            Failed: It cannot be.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise Failed(answer["error"])
        if "not_there" in answer:
            raise Failed(answer["not_there"])
        return answer

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed("the load generator has ended; see its log")
        answer: dict[str, Any] = json.loads(line)
        return answer


class HasCpu(Protocol):
    """What tells the CPU time of a server."""

    def cpu_seconds(self) -> float:
        """Return seconds used so far."""


class NoServer:
    """Stands for the server of what runs in the load generator's own process."""

    def cpu_seconds(self) -> float:
        """Return 0."""
        return 0.0


class Run:
    """One run of the benchmark."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        """Choose who takes part."""
        self.folder, self.arguments = folder, arguments
        self.threads = os.cpu_count() or 1
        self.field = contestants([one for one in arguments.only.split(",") if one])
        self.status: dict[str, str] = {}
        self.closed: list[tables.Closed] = []
        self.open: list[tables.Open] = []
        self.cluster = trunkline_side.TrunklineServer(folder / "trunkline", arguments.backbone)
        self.images, self.log = folder / "images.npy", folder / "load.txt"
        self._servers: dict[str, Server] = {}
        self._targets: dict[str, dict[str, Any]] = {}
        self._generators: dict[str, LoadProcess] = {}
        self._warm: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._ours: dict[str, Any] = {}
        self.expected_BK: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._plan = Plan(0.0, 0.0)

    # --- before ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Train the model, and write down what everybody serves and what must be answered."""
        onnx, size = trunkline_side.export_embedding(self.arguments.backbone)
        images_NHWC, labels = trunkline_side.pictures(ROWS, size, seed=0)
        np.save(self.images, images_NHWC)
        say("training the model that everybody serves")
        cluster = self.cluster.start()
        try:
            self._ours = trunkline_side.train(self.cluster, cluster, images_NHWC, labels)
        finally:
            self.cluster.stop()
        weight_KD, bias_K = trunkline_side.head_of(self.cluster.data, self._ours["head_sha256"])
        parts = self.folder / "model"
        peer_model.save_parts(parts, self.arguments.backbone, size, onnx, weight_KD, bias_K)
        self.expected_BK = trunkline_side.reference(parts, images_NHWC[:CHECKED_ROWS], self.threads)

    @property
    def runtime(self) -> str:
        """The runtime that the cluster chose."""
        return str(self._ours["runtime"])

    @property
    def open_s(self) -> float:
        """Seconds of an open loop."""
        return self._plan.open_s

    def start_resting(self) -> None:
        """Start every server that may be frozen, and freeze it once it answers."""
        for one in self.field:
            if one.peer is None or not one.peer.rests:
                continue
            with self._recording(one):
                say(f"starting {one.label}, {one.variant}")
                self._servers[one.id], self._targets[one.id] = self._start(one, one.peer)
                self._servers[one.id].freeze()

    # --- measuring ------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Run all rounds."""
        rounds, with_open = self.arguments.rounds, not self.arguments.no_open
        blocks = [one for one in self.field if not one.is_ours]
        ours = OURS[0]  # stands for the whole cluster
        in_open = [one for one in blocks if one.peer] if with_open else []
        shares = SHARES[-1:] if self.arguments.quick else SHARES
        ours_in_open = 1 if self.arguments.quick else 2
        self._plan = make_plan(
            self.arguments.minutes,
            rounds=rounds,
            num_contestants=len(self.field),
            num_loads=len(LOADS),
            num_resting=len(self._servers),
            num_restarting=sum(1 for one in blocks if one.peer and not one.peer.rests),
            num_open=len(in_open) * len(shares) * (1 + ours_in_open),
        )
        say(f"closed loops of {self._plan.closed_s:.1f} s, open loops of {self._plan.open_s:.1f} s")
        for number in range(rounds):
            is_last = number == rounds - 1
            for one in order([*blocks, ours], number, rounds, last=ours):
                say(f"round {number + 1} of {rounds}: {one.label}" + ("" if one is ours else f", {one.variant}"))
                if one is ours:
                    self._visit_ours(in_open if is_last else [], shares, ours_in_open)
                else:
                    with self._recording(one):
                        self._visit(one, shares if is_last and one in in_open else ())

    def _visit(self, one: Contestant, shares: tuple[float, ...]) -> None:
        if self.status.get(one.id):
            return
        if one.peer is None:
            load = self._generators.get(one.id)
            if load is None:
                load = self._generators[one.id] = LoadProcess(self.images, self.log)
                load.ask("open", target=self._alone(one))
            self._loops(one, load, NoServer(), shares)
            return
        with self._up(one, one.peer) as (server, target):
            load = self._generator()
            load.ask("open", target=target)
            try:
                self._loops(one, load, server, shares)
            except Failed as error:
                raise Failed(f"{error}; its last words: {server.last_words()[-300:]}") from error
            finally:
                load.ask("close")

    def _visit_ours(self, in_open: list[Contestant], shares: tuple[float, ...], ours_in_open: int) -> None:
        cluster = self.cluster.start()
        load = self._generator()
        try:
            for one in OURS:
                with self._recording(one):
                    if not self.status.get(one.id):
                        load.ask("open", target=self._our_target(one, cluster))
                        self._loops(one, load, self.cluster, ())
            able = [one for one in OURS[:2] if not self.status.get(one.id)]
            for one in able[-ours_in_open:]:
                with self._recording(one):
                    load.ask("open", target=self._our_target(one, cluster))
                    for peer in in_open:
                        self._arrivals(one, peer, load, shares)
            load.ask("close")
        finally:
            self.cluster.stop()

    def _loops(self, one: Contestant, load: LoadProcess, server: HasCpu, shares: tuple[float, ...]) -> None:
        if one.id not in self._warm:
            self._check(one, load)
            # BentoML learns from its first calls how long to wait; all get the same.
            self._closed(one, load, server, callers=1, rows=1, seconds=0.5)
            self._warm.add(one.id)
        self._closed(one, load, server, callers=8, rows=1, seconds=0.3)
        for each in LOADS:
            callers, rows = (1, each.in_process_rows) if one.group == IN_PROCESS else (each.callers, each.rows_per_call)
            found = self._closed(one, load, server, callers=callers, rows=rows, seconds=self._plan.closed_s)
            self.closed.append(dataclasses.replace(found, load=each.name))
        self._arrivals(one, one, load, shares)

    def _check(self, one: Contestant, load: LoadProcess) -> None:
        uses_ours = one.is_ours or one.id == "in-process/chosen"
        allowed = tolerance(self.runtime if uses_ours else one.runtime)
        for rows, rows_per_call in ((8, 1), (CHECKED_ROWS, CHECKED_ROWS)):
            answer = load.ask("probabilities", rows=rows, rows_per_call=rows_per_call, timeout_s=READY_S)
            got_BK = np.array(answer["probabilities"], dtype=np.float32)
            if wrong := what_is_wrong(got_BK, self.expected_BK[:rows], allowed):
                raise Failed(f"wrong: {wrong}")

    def _closed(
        self, one: Contestant, load: LoadProcess, server: HasCpu, *, callers: int, rows: int, seconds: float
    ) -> tables.Closed:
        before_s, busy_s = server.cpu_seconds(), busy_seconds()
        started = time.monotonic()
        answer = load.ask("closed", callers=callers, rows_per_call=rows, seconds=seconds)
        used_s, busy_s = server.cpu_seconds() - before_s, busy_seconds() - busy_s
        others = max(0.0, busy_s - used_s - answer["cpu_s"]) / (time.monotonic() - started)
        seen = answer["window"]
        return tables.Closed(
            one.id,
            "",
            seen["rows"] / seen["seconds"],
            seen["p50_s"],
            seen["p99_s"],
            seen["rows"],
            seen["failures"],
            used_s,
            answer["cpu_s"],
            others,
        )

    def _arrivals(self, one: Contestant, peer: Contestant, load: LoadProcess, shares: tuple[float, ...]) -> None:
        best = tables.best_rate(self.closed, peer.id)
        for share in shares if best else ():
            # The same moments for whoever is measured at this rate.
            answer = load.ask("arrivals", rate=best * share, seconds=self._plan.open_s, seed=int(share * 100))
            seen = answer["window"]
            self.open.append(
                tables.Open(
                    peer.id,
                    share,
                    best * share,
                    one.id,
                    seen["calls"],
                    seen["p50_s"],
                    seen["p99_s"],
                    seen["failures"],
                )
            )

    # --- servers and targets --------------------------------------------------------------------------------------

    def _generator(self) -> LoadProcess:
        if "" not in self._generators:
            self._generators[""] = LoadProcess(self.images, self.log)
        return self._generators[""]

    def _alone(self, one: Contestant) -> dict[str, Any]:
        more = {"data": str(self.cluster.data), "space": self._ours["space"], "chosen": self.runtime}
        return {**one.target, "folder": str(self.folder / "model"), "threads": self.threads, **more}

    def _our_target(self, one: Contestant, cluster: Any) -> dict[str, Any]:
        record = json.loads((cluster.state_dir / "cluster.json").read_text())
        token = Path(record["token_file"]).read_text().split()[0]
        named = {"model": self._ours["model"], "space": self._ours["space"]}
        return {**one.target, "address": record["address"], "token": token, **named}

    @contextlib.contextmanager
    def _up(self, one: Contestant, peer: Peer) -> Iterator[tuple[Server, dict[str, Any]]]:
        """Have a peer's server run for a while."""
        if one.id in self._servers:
            server, target = self._servers[one.id], self._targets[one.id]
            server.thaw()
            try:
                yield server, target
            finally:
                server.freeze()
            return
        server, target = self._start(one, peer)
        try:
            yield server, target
        finally:
            server.stop()

    def _start(self, one: Contestant, peer: Peer) -> tuple[Server, dict[str, Any]]:
        python, port = setup_venvs.python(peer.package), free_port()
        if not python.exists():
            raise Failed("no environment for it: run with --setup")
        own = self.folder / "servers" / one.id.replace("/", "-")
        paths = [str(HERE), str(HERE / "servers"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TMPDIR": str(own),
            "HOME": str(own),
            "BENTOML_DO_NOT_TRACK": "True",
            "RAY_USAGE_STATS_ENABLED": "0",
            peer_model.FOLDER_VARIABLE: str(self.folder / "model"),
            peer_model.RUNTIME_VARIABLE: one.runtime,
            peer_model.THREADS_VARIABLE: str(self.threads),
            peer_model.PORT_VARIABLE: str(port),
        }
        short = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="tlb-", dir="/tmp", ignore_cleanup_errors=True)
        )
        filled = [part.format(servers=HERE / "servers", port=port, short=short) for part in peer.arguments]
        server = Server([str(python), *filled], environment, own)
        target = {**one.target, "address": f"127.0.0.1:{port}"}
        try:
            self._wait(server, target)
        except BaseException:
            server.stop()
            raise
        return server, target

    def _wait(self, server: Server, target: dict[str, Any]) -> None:
        """Wait until a server answers: there is no other sign that all of them give."""
        load, deadline = self._generator(), time.monotonic() + READY_S
        load.ask("open", target=target)
        try:
            while True:
                try:
                    load.ask("probabilities", rows=1, rows_per_call=1, timeout_s=_TRY_S)
                    return
                except Failed as error:
                    if not server.is_alive:
                        raise Failed(f"its server has ended: {server.last_words()}") from error
                    if time.monotonic() > deadline:
                        raise Failed(f"no answer in {READY_S:.0f} s ({error}): {server.last_words()}") from error
                    time.sleep(0.2)
        finally:
            load.ask("close")

    @contextlib.contextmanager
    def _recording(self, one: Contestant) -> Iterator[None]:
        """Go on without a contestant that fails, and remember why."""
        try:
            yield
        except Failed as error:
            words = " ".join(str(error).split())
            self.status[one.id] = words if words.startswith("wrong") else f"not run: {words[:400]}"
            say(f"{one.label}, {one.variant}: {self.status[one.id]}")

    def close(self) -> None:
        """End everything that was started."""
        for server in self._servers.values():
            server.stop()
        for load in self._generators.values():
            load.stop()
        self._stack.close()


def say(text: str) -> None:
    """Tell whoever waits what goes on."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the peers' environments, and end")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="without weights it is untrained")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="what the run may take on two cores; default 15, quick 4")
    parser.add_argument("--quick", action="store_true", help="one round, four minutes")
    parser.add_argument("--no-open", action="store_true", help="leave the open loops out")
    names = ", ".join(peer.key for peer in PEERS)
    parser.add_argument("--only", default="", help=f"some of {names}, {IN_PROCESS}, with commas between")
    arguments = parser.parse_args()
    if arguments.setup:
        setup_venvs.main()
        return
    arguments.rounds = 1 if arguments.quick else arguments.rounds
    arguments.minutes = arguments.minutes or (4.0 if arguments.quick else 15.0)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trunkline-peers-") as folder:
        run = Run(Path(folder), arguments)
        try:
            run.prepare()
            run.start_resting()
            run.measure()
        finally:
            run.close()
        publish(
            Results(
                arguments.backbone,
                arguments.rounds,
                time.monotonic() - started,
                run.runtime,
                run.open_s,
                run.field,
                run.status,
                run.closed,
                run.open,
            )
        )


if __name__ == "__main__":
    main()
