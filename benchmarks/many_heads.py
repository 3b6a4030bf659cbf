"""Rows a second and memory with 1, 10, 100 and 1,000 heads behind one trunk.

One engine in this process, no wire. Every row is a request of its own, all of a round are in the line at once, and the
models take turns over them, so that with 1,000 heads every row of a batch has another head. Rounds alternate over the
numbers of heads, so that the machine's moods hit all alike. Memory is that of a process of its own for each number of
heads, after it has answered as many rows as there are models.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from common import report, summary
from torch.nn import init
from trunkline_wire.heads import CLASSIFICATION, HeadConfig
from trunkline_wire.specs import INPUT_CUT, BackboneSpec, FeatureSpace
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE, load_backbone
from trunkline_worker.engine.api import EngineStats
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock
from trunkline_worker.store.records import ModelRecord

NUM_HEADS = (1, 10, 100, 1000)
NUM_CLASSES = 10
DISTINCT_ROWS = 64
SLICES = ("pooled",)

Rows = npt.NDArray[np.generic]


def drawn_model(blobs: BlobStore, spec: BackboneSpec, seed: int) -> ModelRecord:
    """Store a linear head on ``pooled`` with drawn numbers, and return its model."""
    width = sum(one.width for one in spec.slices if one.name in SLICES)
    module = Head(HeadConfig(), [HeadInput(SLICES, (width,))], NUM_CLASSES)
    init.normal_(module.output.weight, std=width**-0.5, generator=torch.Generator().manual_seed(seed))
    names = tuple(f"class {index}" for index in range(NUM_CLASSES))
    data = head_to_bytes(TrainedHead(module.eval(), CLASSIFICATION, names))
    sha256 = hashlib.sha256(data).hexdigest()
    if not blobs.exists(head_path(sha256)):
        blobs.put(head_path(sha256), data)
    found = spec.cut(INPUT_CUT)
    assert found is not None
    return ModelRecord(
        tenant="bench",
        name=f"m{seed}",
        version=1,
        task=CLASSIFICATION,
        class_names=names,
        num_outputs=NUM_CLASSES,
        space=spec.space(found),
        embedding_fingerprint=spec.embedding_fingerprint,
        slices=SLICES,
        metrics={},
        dataset="bench@1",
        dataset_digest="",
        head_sha256=sha256,
        versions={},
        job_id="bench",
        create_time=0.0,
    )


def rows_at(spec: BackboneSpec, cut: str) -> tuple[FeatureSpace, Rows]:
    """Return some rows at a cut: pictures, or features of their shape."""
    found = spec.cut(cut)
    if found is None:
        raise SystemExit(f"no cut {cut!r}; one of {', '.join(one.name for one in spec.cuts)} is needed")
    rng = np.random.default_rng(0)
    shape = (DISTINCT_ROWS, *found.feature_shape)
    rows: Rows = (
        rng.integers(0, 256, size=shape, dtype=np.uint8)
        if cut == INPUT_CUT
        else rng.normal(size=shape).astype(np.float32)
    )
    return spec.space(found), rows


async def one_round(
    engine: LocalEngine, space: FeatureSpace, rows: Rows, models: Sequence[ModelRecord], num_rows: int
) -> tuple[float, EngineStats, EngineStats]:
    """Ask about rows one by one, all at the same time, the models in turn; return rows a second and the counters."""
    before = await engine.stats()
    started = time.perf_counter()
    answers = await asyncio.gather(
        *(engine.predict(space, rows[row % len(rows)][None], models[row % len(models)]) for row in range(num_rows))
    )
    seconds = time.perf_counter() - started
    assert not any(one.row_errors for one in answers)
    return num_rows / seconds, before, await engine.stats()


def make_engine(backbone: Backbone, blobs: BlobStore) -> LocalEngine:
    """Return the engine that is measured."""
    return LocalEngine(backbone, blobs, clock=SystemClock(), device="cpu")


async def measure_speed(
    backbone: Backbone, blobs: BlobStore, cuts: Sequence[str], num_rows: int, rounds: int
) -> list[tuple[str, ...]]:
    """Return the rows of the table of speeds."""
    spec = await asyncio.to_thread(backbone.describe, 0)
    models = [drawn_model(blobs, spec, seed) for seed in range(max(NUM_HEADS))]
    table: list[tuple[str, ...]] = []
    engine = make_engine(backbone, blobs)
    await engine.start(prepare=False)
    try:
        for cut in cuts:
            space, rows = rows_at(spec, cut)
            for start in range(0, len(models), num_rows):  # the runtime chosen, all heads in memory
                await one_round(engine, space, rows, models[start : start + num_rows], num_rows)
            speeds: dict[int, list[float]] = {number: [] for number in NUM_HEADS}
            passes: dict[int, list[int]] = {number: [] for number in NUM_HEADS}
            heads: dict[int, list[int]] = {number: [] for number in NUM_HEADS}
            for _ in range(rounds):
                for number in NUM_HEADS:
                    speed, before, after = await one_round(engine, space, rows, models[:number], num_rows)
                    assert after.trunk_rows - before.trunk_rows == num_rows
                    assert after.head_loads == before.head_loads
                    speeds[number].append(speed)
                    passes[number].append(after.trunk_calls - before.trunk_calls)
                    heads[number].append(after.head_calls - before.head_calls)
            for number in NUM_HEADS:
                ratios = [mine / one for mine, one in zip(speeds[number], speeds[1], strict=True)]
                table.append(
                    (
                        cut,
                        f"{number:,}",
                        f"{statistics.median(speeds[number]):.0f}",
                        summary(ratios),
                        f"{statistics.median(passes[number]):.0f}",
                        f"{statistics.median(heads[number]):.0f}",
                    )
                )
    finally:
        await engine.close()
    return table


async def resident_bytes(backbone: Backbone, blobs: BlobStore, num_heads: int) -> tuple[int, int]:
    """Return the memory of this process with so many heads in use, and what the heads say that they take."""
    spec = await asyncio.to_thread(backbone.describe, 0)
    space, rows = rows_at(spec, INPUT_CUT)
    models = [drawn_model(blobs, spec, seed) for seed in range(num_heads)]
    engine = make_engine(backbone, blobs)
    await engine.start()
    try:
        for start in range(0, max(NUM_HEADS), 50):  # as many rows whatever the number of heads
            some = [models[index % num_heads] for index in range(start, start + 50)]
            await one_round(engine, space, rows, some, len(some))
        gc.collect()
        stats = await engine.stats()
        assert stats.heads_kept == num_heads
        return resident_now(), stats.head_bytes
    finally:
        await engine.close()


def resident_now() -> int:
    """Return the resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not say how much memory a process has")


def memory_in_a_process(folder: str, num_heads: int) -> tuple[int, int]:
    """Return what ``resident_bytes`` says in a process of its own."""
    command = [sys.executable, __file__, "--storage", folder, "--memory-of", str(num_heads)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    resident, heads = out.split()[-2:]
    return int(resident), int(heads)


def measure_memory(folder: str) -> list[str]:
    """Return a sentence on each number of heads."""
    memory_in_a_process(folder, 1)  # chooses the runtime, which later ones find in storage
    found = {number: memory_in_a_process(folder, number) for number in NUM_HEADS}
    return [
        f"{number:,} heads: {resident / 2**20:.0f} MiB resident, {resident / found[1][0]:.3f} of one head's process; "
        f"the heads' own numbers are {heads / 2**20:.1f} MiB."
        for number, (resident, heads) in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1000, help="a round, at every cut")
    parser.add_argument("--cuts", nargs="+", default=[INPUT_CUT, "blocks.5"])
    parser.add_argument("--storage", help="folder for the chosen runtimes and the heads; else a temporary one")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trunkline-heads-") as temporary:
        folder = arguments.storage or temporary
        backbone, blobs = load_backbone(DEFAULT_BACKBONE), BlobStore(f"file://{Path(folder).absolute()}")
        if arguments.memory_of:
            print(*asyncio.run(resident_bytes(backbone, blobs, arguments.memory_of)))
            return
        speed = asyncio.run(measure_speed(backbone, blobs, arguments.cuts, arguments.rows, arguments.rounds))
        memory = measure_memory(folder)
    report(
        "many_heads",
        "Many heads on one trunk",
        [("cut", "heads", "rows/s", "of one head's rows/s", "trunk passes", "heads run"), *speed],
        [
            f"{DEFAULT_BACKBONE}, linear heads of {NUM_CLASSES} classes on {SLICES[0]}; {arguments.rows} rows a round, "
            f"each a request of its own; {arguments.rounds} rounds, median (least to most).",
            "Ratios are within a round. Trunk passes and heads run are those of one round.",
            "",
            *(f"- {line}" for line in memory),
        ],
    )


if __name__ == "__main__":
    main()
