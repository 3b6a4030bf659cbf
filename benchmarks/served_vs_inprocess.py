"""Served rows a second over gRPC, over the same runtime called in this process with the same threads.

In one run, in turn: a round served, a round in-process, and again, so that the machine's moods hit both alike. Served
means: the client's own stream, the gateway, a Serve handle, the batcher, the trunk and a head. In-process means: the
trunk's runtime on batches of the same rows, nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import trunkline
from common import embedded_cluster, report, summary
from trunkline_wire.specs import FeatureSpace
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE, load_backbone
from trunkline_worker.engine.prepared import Runtimes
from trunkline_worker.engine.runtimes import Runtime, max_rows_of
from trunkline_worker.engine.targets import TrunkKey
from trunkline_worker.engine.tuning import RuntimeChooser
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock

T = TypeVar("T")

CPU = torch.device("cpu")


class Here:
    """Runs everything on this thread, on which the runtime is called afterwards."""

    async def compute(self, call: Callable[..., T], *args: Any) -> T:
        """See ``Places``."""
        return call(*args)

    async def export(self, call: Callable[..., T], *args: Any) -> T:
        """See ``Places``."""
        return call(*args)


def in_process(runtime: Runtime, rows: npt.NDArray[np.generic], batch_rows: int) -> float:
    """Return rows a second of the bare runtime, called with full batches one after another."""
    started = time.perf_counter()
    for start in range(0, len(rows), batch_rows):
        runtime.run(rows[start : start + batch_rows])
    return len(rows) / (time.perf_counter() - started)


def served(model: trunkline.Model, space: FeatureSpace, rows: npt.NDArray[np.generic]) -> float:
    """Return rows a second of predictions, several batches in flight."""
    started = time.perf_counter()
    prediction = model.predict_features(rows, space=space)
    seconds = time.perf_counter() - started
    assert len(prediction.labels) == len(rows) and not prediction.errors
    return len(rows) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=384)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    table: list[tuple[str, ...]] = [
        ("cut", "input", "runtime", "in-process rows/s", "served rows/s", "served / in-process")
    ]
    with embedded_cluster() as cluster, cluster.connect() as client:
        backbone = load_backbone(DEFAULT_BACKBONE)
        # The very storage of the cluster: the runtime it chose is the one that is used here.
        blobs = BlobStore(f"file://{Path(cluster.state_dir) / 'data'}")
        torch.set_num_threads(os.cpu_count() or 1)
        chooser = RuntimeChooser(
            backbone,
            backbone,
            blobs,
            device=CPU,
            num_threads=os.cpu_count() or 1,
            most_rows=max_rows_of(CPU),
            clock=SystemClock(),
        )
        for cut, size in (("input", 224), ("blocks.2", 224), ("blocks.2", 96)):
            spec = client.describe(DEFAULT_BACKBONE, input_size=size)
            found = spec.cut(cut)
            assert found is not None
            space = spec.space(found)
            if space.is_input:
                rows = rng.integers(0, 256, size=(arguments.rows, *found.feature_shape), dtype=np.uint8)
            else:
                rows = rng.normal(size=(arguments.rows, *found.feature_shape)).astype(np.float16)
            labels = np.arange(64) % 2
            data = client.upload_features(rows[:64], labels, name=f"bench-{cut}-{size}", space=space)
            model = client.train(data, name=f"bench-{cut}-{size}", embedding="pooled").result(progress=False)
            ratios, ours, theirs = [], [], []
            served(model, space, rows[:64])  # both sides warm; the cluster has chosen its runtime by now
            key = TrunkKey(cut, size)
            assert chooser.noted(key) == client.tune(DEFAULT_BACKBONE, cut=cut, input_size=size)
            chosen = asyncio.run(Runtimes(chooser, Here()).get(key))
            in_process(chosen.runtime, rows[:64], chosen.batch_rows)
            for _ in range(arguments.rounds):
                theirs.append(in_process(chosen.runtime, rows, chosen.batch_rows))
                ours.append(served(model, space, rows))
                ratios.append(ours[-1] / theirs[-1])
            table.append(
                (
                    cut,
                    f"{size} px",
                    chosen.runtime.name,
                    f"{statistics.median(theirs):.0f}",
                    f"{statistics.median(ours):.0f}",
                    summary(ratios),
                )
            )
    report(
        "served_vs_inprocess",
        "Served over gRPC, against the same runtime in-process",
        table,
        [
            f"{DEFAULT_BACKBONE}; {arguments.rows} rows a round, {arguments.rounds} rounds; median (least to most).",
            "Client, gateway and backbone share the machine's cores with each other; in-process has them for itself.",
            "Quote the ratio: the rows a second are those of a shared machine.",
        ],
    )


if __name__ == "__main__":
    main()
