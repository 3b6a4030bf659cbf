"""What the batcher adds to one row on an idle server: everything but the batch itself.

A batcher whose batches take no time at all, and an engine that runs one row of the built-in backbone after another.
Of the engine the time in the line is what its answers say of themselves; what else it adds is the call less trunk and
head.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from common import report
from many_heads import drawn_model, make_engine, rows_at
from trunkline_wire.specs import INPUT_CUT
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE, load_backbone
from trunkline_worker.engine.batcher import Batcher, Part, PartResult, Rows
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock

PAUSE_S = 0.002
"""Between calls: the server is idle when one comes."""


async def bare(num_calls: int) -> tuple[list[float], list[float]]:
    """Return the seconds of calls of a runner that does nothing, by itself and behind a batcher."""

    async def run(key: object, parts: Sequence[Part[None]]) -> Sequence[PartResult]:
        return [PartResult(np.zeros((len(part.rows.features), 1), np.float32)) for part in parts]

    batcher: Batcher[None] = Batcher(run, clock=SystemClock(), max_rows=lambda key: 32, max_queued_rows=8192, depth=2)
    batcher.start()
    rows = Rows(np.zeros((1, 8), np.float32))
    alone, behind = [], []
    for _ in range(num_calls):
        await asyncio.sleep(PAUSE_S)
        started = time.perf_counter()
        await run(None, [Part(rows, None)])
        middle = time.perf_counter()
        await batcher.submit("group", rows, None)
        alone.append(middle - started)
        behind.append(time.perf_counter() - middle)
    await batcher.close()
    return alone, behind


async def engine(num_calls: int) -> tuple[list[float], list[float]]:
    """Return the seconds that one row waits in an engine's line, and all that is neither trunk nor head."""
    backbone = load_backbone(DEFAULT_BACKBONE)
    with tempfile.TemporaryDirectory(prefix="trunkline-bench-") as folder:
        blobs = BlobStore(f"file://{folder}")
        spec = await asyncio.to_thread(backbone.describe, 0)
        model = drawn_model(blobs, spec, 0)
        space, rows = rows_at(spec, INPUT_CUT)
        served = make_engine(backbone, blobs)
        await served.start()
        waited, added = [], []
        for call in range(num_calls + 20):
            await asyncio.sleep(PAUSE_S)
            started = time.perf_counter()
            answer = await served.predict(space, rows[call % len(rows)][None], model)
            seconds = time.perf_counter() - started
            if call >= 20:  # the head is in memory by then, the threads are warm
                waited.append(answer.timings.queue_s)
                added.append(seconds - answer.timings.trunk_s - answer.timings.head_s)
        await served.close()
        return waited, added


def _row(what: str, seconds: Sequence[float]) -> tuple[str, str, str]:
    return what, f"{1e3 * statistics.median(seconds):.3f}", f"{1e3 * float(np.percentile(seconds, 99)):.3f}"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    arguments = parser.parse_args()
    alone, behind = asyncio.run(bare(arguments.calls))
    waited, added = asyncio.run(engine(arguments.calls))
    report(
        "batcher_latency",
        "What the batcher adds to one row on an idle server",
        [
            ("", "median, ms", "99th percentile, ms"),
            _row("a runner that does nothing, by itself", alone),
            _row("the same behind a batcher", behind),
            _row("engine: time in the line", waited),
            _row("engine: all but trunk and head (line, two threads' hand-over, futures)", added),
        ],
        [f"{arguments.calls} calls of one row, {1e3 * PAUSE_S:.0f} ms apart."],
    )


if __name__ == "__main__":
    main()
