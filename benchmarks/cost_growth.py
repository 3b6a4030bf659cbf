"""How rows a second change as heads, clients, rows a call and bytes a row grow, on one embedded cluster.

A thousand heads are put into the cluster's storage and registry before it starts, by the store's own methods: training
them would take long and change nothing here. Then callers, each with a connection of its own, send one call after
another from this process over plain gRPC, so that no client library is measured. The points of an axis take turns,
round after round; ratios are to the first point of the axis, within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import torch
from common import Cluster, embedded_cluster, report, summary
from PIL import Image
from plots import Series, scatter
from trunkline_wire.codecs import encode_images, encode_rows, encoded_size
from trunkline_wire.heads import CLASSIFICATION, HeadConfig
from trunkline_wire.limits import MAX_MESSAGE_BYTES
from trunkline_wire.messages import space_to_proto
from trunkline_wire.quantise import pack
from trunkline_wire.rows import content_digest, row_id
from trunkline_wire.specs import INPUT_CUT, POOLED, BackboneSpec, FeatureSpace
from trunkline_wire.v1 import inference_pb2 as pb
from trunkline_wire.v1 import tensor_pb2
from trunkline_wire.v1.inference_pb2_grpc import InferenceServiceStub
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.cluster.processes import processes_of
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.chunks import write_chunk
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import JobSpec, ModelRecord

BACKBONE = "efficientnet_lite0"
APP = f"trunkline-backbone-{BACKBONE}"
TENANT = "default"
NUM_CLASSES = 10
PLOT = Path(__file__).parent.parent / "docs" / "images" / "cost_growth.svg"
MOST_CALLERS = 64
HEADS, CLIENTS, CALL_ROWS = (1, 10, 100, 1000), (1, 4, 16, 64), (1, 4, 16, 64, 256)
PIXELS, JPEG = "pixels", "JPEG"
PAYLOADS = (PIXELS, JPEG, "blocks.2 int8", "blocks.5 int8", "global_pool float16")
SENT = "what is sent"
DEEP, DEEPEST = PAYLOADS[3], PAYLOADS[4]


@dataclass(frozen=True)
class Load:
    """What is asked of the cluster.

    Attributes:
        payload: What is sent for a row.
        heads: Models that the calls are for, in turn.
        callers: Calls at a time.
        rows: Rows in a call.
    """

    payload: str
    heads: int
    callers: int
    rows: int


@dataclass(frozen=True)
class Axis:
    """Loads that differ in one number."""

    name: str
    points: Sequence[tuple[float, Load]]


@dataclass(frozen=True)
class Measured:
    """What came of a load in a round. The last two are means of a pass through the trunk."""

    rows_per_s: float
    calls_per_s: float
    rows_per_pass: float
    heads_per_pass: float


def axes(heads: Sequence[int], row_bytes: Mapping[str, int]) -> list[Axis]:
    """Return what is measured."""
    found = [
        Axis(f"heads, {payload}", [(count, Load(payload, count, 32, 1)) for count in heads])
        for payload in (PIXELS, DEEPEST)
    ]
    found += [
        Axis(f"callers, {payload}", [(count, Load(payload, 1, count, 1)) for count in CLIENTS])
        for payload in (PIXELS, DEEP)
    ]
    found += [
        Axis(f"rows a call, {payload}", [(rows, Load(payload, 1, 1, rows)) for rows in CALL_ROWS])
        for payload in (JPEG, DEEP)
    ]
    return [*found, Axis(SENT, [(row_bytes[one], Load(one, 1, 4, 32)) for one in PAYLOADS])]


def ratios(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the values of each point over those of the first point, round by round.

    Args:
        rounds: For each round the values of all points.
    """
    return [[one[point] / one[0] for one in rounds] for point in range(len(rounds[0]))]


def draw_head(width: int, generator: torch.Generator) -> TrainedHead:
    """Return a linear classifier of the last embedding with random weights: what it says does not matter here."""
    head = Head(HeadConfig(), [HeadInput((POOLED,), (width,))], NUM_CLASSES)
    head.output.weight.data.normal_(0.0, 0.05, generator=generator)
    return TrainedHead(head, CLASSIFICATION, tuple(f"class {index}" for index in range(NUM_CLASSES)))


def register_heads(database: Database, blobs: BlobStore, spec: BackboneSpec, space: FeatureSpace, count: int) -> None:
    """Make ``count`` models named ``head-0``, ``head-1`` ... as jobs do, but with random heads.

    Args:
        database: The cluster's.
        blobs: The cluster's.
        spec: The backbone.
        space: On what they count as trained: pictures.
        count: How many.
    """
    store = MetadataStore(database)
    rows = np.zeros((2, *spec.cuts[0].feature_shape), dtype=np.uint8)
    rows[1] = 1
    ids = [row_id(space, "uint8", content_digest(one)) for one in rows]
    store.rows.add_chunk(TENANT, write_chunk(blobs, rows), space, "uint8", ids)
    names = tuple(f"class {index}" for index in range(NUM_CLASSES))
    dataset = store.datasets.commit(TENANT, "bench", space, ids, names, [0, 1], None, "bench")
    width = spec.slice_width(POOLED)
    assert width is not None
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        job = JobSpec(f"head-{index}", dataset.reference, BACKBONE, spec.preprocessing.input_size, embedding=POOLED)
        store.jobs.submit(TENANT, job, f"bench-{index}")
        lease = store.jobs.lease("bench", 60.0)
        assert lease is not None
        head = draw_head(width, generator)
        data = head_to_bytes(head)
        sha256 = hashlib.sha256(data).hexdigest()
        blobs.put(head_path(sha256), data)
        model = ModelRecord(
            tenant=TENANT,
            name=job.model,
            version=0,
            task=head.task,
            class_names=head.class_names,
            num_outputs=head.num_outputs,
            space=space,
            embedding_fingerprint=spec.embedding_fingerprint,
            slices=(POOLED,),
            metrics={},
            dataset=dataset.reference,
            dataset_digest=dataset.digest,
            head_sha256=sha256,
            versions={},
            job_id=lease.job.id,
            create_time=0.0,
            codec="uint8",
        )
        store.jobs.succeed(lease.job.id, lease.fence, model)


class Rows:
    """Rows in every form in which they are sent."""

    def __init__(self, spec: BackboneSpec) -> None:
        """Make them. Features are noise: nothing that is measured depends on their values."""
        self._spec = spec
        self._random = np.random.default_rng(0)
        self._tensors: dict[tuple[str, int], tensor_pb2.Tensor] = {}

    def space(self, payload: str) -> FeatureSpace:
        """Return where rows of a payload live."""
        cut = self._spec.cut(INPUT_CUT if payload in (PIXELS, JPEG) else payload.split()[0])
        assert cut is not None
        return self._spec.space(cut)

    def tensor(self, payload: str, count: int) -> tensor_pb2.Tensor:
        """Return the message of some rows."""
        if (payload, count) not in self._tensors:
            self._tensors[payload, count] = self._make(payload, count)
        return self._tensors[payload, count]

    def _make(self, payload: str, count: int) -> tensor_pb2.Tensor:
        size = self._spec.preprocessing.input_size
        if payload in (PIXELS, JPEG):
            coarse = self._random.integers(0, 256, size=(count, 14, 14, 3), dtype=np.uint8)
            pictures = [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in coarse]
            if payload == PIXELS:
                return encode_rows(np.stack([np.asarray(one) for one in pictures]))
            return encode_images([_jpeg(one) for one in pictures])
        name, codec = payload.split()
        cut = self._spec.cut(name)
        assert cut is not None
        features: npt.NDArray[np.float32] = self._random.normal(size=(count, *cut.feature_shape)).astype(np.float32)
        return encode_rows(pack(features, codec, cut.channel_axis))


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


class Callers:
    """Connections to the gateway, and calls on them."""

    def __init__(self, address: str, token: str, rows: Rows) -> None:
        """Prepare one connection for each caller."""
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(MOST_CALLERS)]
        self._stubs = [InferenceServiceStub(one) for one in self._channels]
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._rows = rows

    async def close(self) -> None:
        """Close the connections."""
        for one in self._channels:
            await one.close()

    async def touch(self, heads: int) -> float:
        """Ask every model once, in turn. Returns the seconds of a call."""
        load = Load(DEEPEST, heads, 1, 1)
        started = time.perf_counter()
        for head in range(heads):
            await self._call(0, load, head)
        return (time.perf_counter() - started) / heads

    async def offer(self, load: Load, seconds: float) -> tuple[int, float]:
        """Let callers call for some time. Returns how many calls were answered, and in how many seconds."""
        turn = iter(range(10**9))
        answered = 0
        end = time.perf_counter() + seconds

        async def caller(number: int) -> None:
            nonlocal answered
            while time.perf_counter() < end:
                await self._call(number, load, next(turn) % load.heads)
                answered += 1

        started = time.perf_counter()
        await asyncio.gather(*(caller(number) for number in range(load.callers)))
        return answered, time.perf_counter() - started

    async def _call(self, caller: int, load: Load, head: int) -> None:
        request = pb.PredictRequest(
            space=space_to_proto(self._rows.space(load.payload)),
            features=self._rows.tensor(load.payload, load.rows),
            model=f"head-{head}@1",
            timeout_s=60.0,
        )
        reply = await self._stubs[caller].Predict(request, metadata=self._metadata, timeout=60.0)
        assert len(reply.labels) == load.rows and not reply.row_errors


def _join_ray(address: str, token_path: str) -> None:
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path, "RAY_USAGE_STATS_ENABLED": "0"})
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(address=address, namespace="trunkline", log_to_driver=False, logging_level=logging.ERROR)


def _leave_ray() -> None:
    import ray

    ray.shutdown()


def _engine_stats() -> tuple[int, int, int]:
    from ray import serve

    stats = serve.get_app_handle(APP).stats.remote().result(timeout_s=30)
    return stats.trunk_calls, stats.trunk_rows, stats.head_calls


@contextmanager
def ray_driver(cluster: Cluster) -> Iterator[Any]:
    """Start a process that asks the replica for its counters."""
    arguments = (gcs_address(cluster.id), str(cluster.state_dir / "ray_token"))
    with multiprocessing.get_context("spawn").Pool(1, _join_ray, arguments) as pool:
        try:
            yield pool
        finally:
            pool.apply(_leave_ray)


def gcs_address(cluster_id: str) -> str:
    """Return Ray's address, from the command line of the node that it was told to."""
    for pid in processes_of(cluster_id):
        for word in _command_line(pid):
            if word.startswith("--gcs-address="):
                return word.partition("=")[2]
    raise RuntimeError("none of the cluster's processes names Ray's address")


def replica_pid(cluster_id: str) -> int:
    """Return the process that holds the backbone."""
    title = f"ray::ServeReplica:{APP}"
    return next(pid for pid in processes_of(cluster_id) if " ".join(_command_line(pid)).startswith(title))


def resident_bytes(pid: int) -> int:
    """Return the memory of a process that is in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} does not say how much memory it has")


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return []


async def measure(callers: Callers, driver: Any, load: Load, seconds: float) -> Measured:
    """Offer a load, and count passes and heads."""
    before = await asyncio.to_thread(driver.apply, _engine_stats)
    calls, took = await callers.offer(load, seconds)
    after = await asyncio.to_thread(driver.apply, _engine_stats)
    passes, rows, heads = (late - early for early, late in zip(before, after, strict=True))
    return Measured(calls * load.rows / took, calls / took, rows / max(1, passes), heads / max(1, passes))


async def measure_all(
    callers: Callers, driver: Any, chosen: Sequence[Axis], rounds: int, seconds: float
) -> list[list[list[Measured]]]:
    """Measure every point of every axis in every round. Returns them by axis, round and point."""
    found = []
    for axis in chosen:
        for _, load in axis.points:
            await callers.offer(load, min(seconds, 0.5))  # whatever is done the first time is done now
        by_round = []
        for _ in range(rounds):
            by_round.append([await measure(callers, driver, load, seconds) for _, load in axis.points])
        found.append(by_round)
        print(axis.name, [round(one.rows_per_s, 1) for one in by_round[-1]], flush=True)
    return found


def lines(axis: Axis, by_round: Sequence[Sequence[Measured]]) -> list[tuple[str, ...]]:
    """Return the rows of the table for one axis."""
    relative = ratios([[one.rows_per_s for one in points] for points in by_round])
    found: list[tuple[str, ...]] = []
    for index, (value, load) in enumerate(axis.points):
        points = [one[index] for one in by_round]
        found.append(
            (
                axis.name,
                f"{load.payload}, {value:,.0f} bytes" if axis.name == SENT else f"{value:,.0f}",
                f"{statistics.median(one.rows_per_s for one in points):.0f}",
                summary(relative[index]),
                f"{statistics.median(one.calls_per_s for one in points):.1f}",
                f"{statistics.median(one.rows_per_pass for one in points):.1f}",
                f"{statistics.median(one.heads_per_pass for one in points):.1f}",
            )
        )
    return found


def plot(chosen: Sequence[Axis], found: Sequence[Sequence[Sequence[Measured]]]) -> None:
    series = []
    for axis, by_round in zip(chosen[:-1], found[:-1], strict=True):
        relative = ratios([[one.rows_per_s for one in points] for points in by_round])
        points = [
            (value, math.log2(statistics.median(one)), "")
            for (value, _), one in zip(axis.points, relative, strict=True)
        ]
        series.append(Series(axis.name, points))
    scatter(
        PLOT,
        f"{BACKBONE}: rows a second as heads, callers and rows a call grow",
        "heads, callers or rows a call",
        "rows a second over those of the first point, powers of 2",
        series,
    )


async def run(heads: Sequence[int], rounds: int, seconds: float) -> None:
    spec = load_backbone(BACKBONE).describe(0)
    rows = Rows(spec)
    row_bytes = {one: round(encoded_size(rows.tensor(one, 32)) / 32) for one in PAYLOADS}
    with tempfile.TemporaryDirectory(prefix="trunkline-bench-") as folder:
        database_url, storage_url = f"sqlite:///{folder}/metadata.sqlite", f"file://{folder}/data"
        started = time.perf_counter()
        database = Database(database_url)
        register_heads(database, BlobStore(storage_url), spec, rows.space(PIXELS), max(heads))
        database.close()
        print(f"registered {max(heads)} heads in {time.perf_counter() - started:.1f} s", flush=True)
        with embedded_cluster(database=database_url, storage=storage_url) as cluster, ray_driver(cluster) as driver:
            record = json.loads((cluster.state_dir / "cluster.json").read_text())
            callers = Callers(record["address"], Path(record["token_file"]).read_text().split()[0], rows)
            pid = replica_pid(cluster.id)
            chosen = axes(heads, row_bytes)
            try:
                await callers.offer(Load(PIXELS, 1, MOST_CALLERS, 1), 2.0)
                for _ in range(max(heads)):  # as many calls as will come, so that nothing but the heads is new then
                    await callers.touch(1)
                alone = resident_bytes(pid)
                cold_s = await callers.touch(max(heads))
                together = resident_bytes(pid)
                warm_s = await callers.touch(max(heads))
                found = await measure_all(callers, driver, chosen, rounds, seconds)
            finally:
                await callers.close()
    width = spec.slice_width(POOLED)
    assert width is not None
    size = draw_head(width, torch.Generator()).size_bytes
    table: list[tuple[str, ...]] = [
        ("what grows", "value", "rows/s", "over the first", "calls/s", "rows a pass", "heads a pass")
    ]
    for axis, by_round in zip(chosen, found, strict=True):
        table += lines(axis, by_round)
    grown = (together - alone) / max(1, max(heads) - 1)
    report(
        "cost_growth",
        "How cost grows with heads, callers, rows and bytes",
        table,
        [
            f"{BACKBONE} at 224 px; {rounds} rounds of {seconds:g} s a point, the points of an axis in turn; ratios "
            "are median (least to most) within a round. Callers send one call after another, from one process, and "
            "share the machine's cores with the cluster.",
            "Heads: 32 callers with one row a call, each call for the next model. Callers: one row a call. "
            "Rows a call: one caller. What is sent: 4 callers with 32 rows a call; a later cut leaves the trunk less "
            "to do.",
            "A pass is one run of the trunk; its rows may be of many callers and models, and each distinct head runs "
            "once in it. Both are the engine's own counters.",
            f"Memory of the replica: {alone / 1e6:.0f} MB with 1 head, {together / 1e6:.0f} MB with {max(heads)}: "
            f"{grown / 1e3:.0f} kB a head, whose tensors have {size / 1e3:.0f} kB ({width} columns, {NUM_CLASSES} "
            "classes).",
            f"The first call for a model took {cold_s * 1e3:.1f} ms, the next one {warm_s * 1e3:.1f} ms.",
        ],
    )
    plot(chosen, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="How long a point is measured in a round.")
    parser.add_argument("--quick", action="store_true", help="Few heads, briefly: to see that it works.")
    arguments = parser.parse_args()
    if arguments.quick:
        asyncio.run(run((1, 10, 30), 2, 0.2))
    else:
        asyncio.run(run(HEADS, arguments.rounds, arguments.seconds))


if __name__ == "__main__":
    main()
