"""Every runtime of four backbones on this machine, as an engine measures them when it is told to tune again.

Each backbone first starts on empty storage, as on a machine that has never run it, with the runtimes that are quick to
make; then all of them are tried, compiled ones too.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import tempfile
import time

from common import report
from trunkline_wire.specs import RuntimeResult, Tuning
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock

BACKBONES = ("efficientnet_lite0", "resnet50", "resnet18", "vit_b_16")


async def tuned(name: str, device: str, num_threads: int) -> tuple[float, Tuning, float, Tuning]:
    """Return seconds and result of the first start, and of tuning again."""
    backbone = load_backbone(name, allow_untrained=True)
    with tempfile.TemporaryDirectory(prefix="trunkline-bench-") as folder:
        engine = LocalEngine(
            backbone, BlobStore(f"file://{folder}"), clock=SystemClock(), device=device, num_threads=num_threads
        )
        started = time.perf_counter()
        await engine.start()
        start_s = time.perf_counter() - started
        first = await engine.tune()
        started = time.perf_counter()
        every = await engine.tune(again=True)
        again_s = time.perf_counter() - started
        await engine.close()
    return start_s, first, again_s, every


def line(tuning: Tuning, result: RuntimeResult, sizes: list[int]) -> tuple[str, ...]:
    """Return one line of the table."""
    speeds = {one.batch_rows: one.rows_per_s for one in result.speeds}
    chosen = f"chosen, in batches of {tuning.batch_rows}" if result.runtime == tuning.chosen else ""
    return (
        tuning.backbone,
        result.runtime,
        f"{result.error:.1e}" if result.speeds or result.error else "",
        *(f"{speeds[size]:.1f}" if size in speeds else "" for size in sizes),
        f"{result.load_s:.1f}" if result.load_s else "",
        chosen or result.refused,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backbone", action="append", help="may be repeated; left out: all four")
    arguments = parser.parse_args()
    logging.getLogger("trunkline_worker").setLevel(logging.ERROR)  # what is refused is in the table
    found, notes = [], []
    for name in arguments.backbone or BACKBONES:
        start_s, first, again_s, every = asyncio.run(tuned(name, arguments.device, arguments.threads))
        found.append(every)
        best, plain = (every.runtime(one) for one in (every.chosen, "torch-fp32"))
        assert best is not None and plain is not None
        gain = best.best.rows_per_s / plain.best.rows_per_s
        notes.append(
            f"{name}: first start {start_s:.0f} s, {first.chosen} chosen; all runtimes {again_s:.0f} s, {every.chosen} "
            f"chosen, {gain:.2f} times as fast as torch-fp32, each at its best size."
        )
    sizes = sorted({speed.batch_rows for tuning in found for one in tuning.runtimes for speed in one.speeds})
    header = ("backbone", "runtime", "error", *(f"rows/s at {one}" for one in sizes), "load, s", "")
    libraries = ", ".join(f"{name} {version}" for name, version in found[0].libraries)
    report(
        "runtime_tuning",
        "Runtimes of four backbones, 224 pixels",
        [header, *(line(tuning, one, sizes) for tuning in found for one in tuning.runtimes)],
        [
            *notes,
            f"{found[0].device}, {found[0].num_threads} threads; {libraries}.",
            "Error: to torch-fp32, of the worst slice of the embedding on 8 sample pictures; at most 0.02, exact up to",
            "0.001. One that is not exact is chosen if it is 1.25 times as fast as the fastest exact one.",
            "Empty: given up, for it was far behind at a smaller size or a batch would have taken 2 s.",
            "Backbones whose weights are not at hand are untrained: right for speeds, not typical for errors.",
        ],
    )


if __name__ == "__main__":
    main()
