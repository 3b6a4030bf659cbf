"""On a device that rows must travel to, the next batch travels while one is computed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from engines import with_engine
from small_backbones import small_backbone
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.engine.torch_runtimes import TorchRuntime
from trunkline_worker.store.blobs import BlobStore

PATIENCE_S = 20.0


@pytest.fixture
def blobs(tmp_path: Any) -> BlobStore:
    return BlobStore(f"file://{tmp_path}")


@pytest.fixture
def backbone() -> Backbone:
    return small_backbone()


def test_the_next_batch_is_on_its_way_before_this_one_is_done(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchRuntime, "stages_ahead", property(lambda runtime: True))
    real_stage, real_run = TorchRuntime.stage, TorchRuntime.run_staged
    second_is_staged, threads, staged = threading.Event(), set[str](), []

    def stage(runtime: TorchRuntime, features: np.ndarray) -> Any:
        threads.add(threading.current_thread().name)
        staged.append(len(features))
        if len(staged) == 2:
            second_is_staged.set()
        return real_stage(runtime, features)

    def run_staged(runtime: TorchRuntime, rows: Any) -> Any:
        threads.add(threading.current_thread().name)
        # The first batch ends only once the second one has been staged: never, were that done one after the other.
        assert second_is_staged.wait(PATIENCE_S)
        return real_run(runtime, rows)

    async def test(engine: LocalEngine) -> None:
        spec = await engine.describe()
        found = spec.cut("input")
        assert found is not None
        space, size = spec.space(found), spec.preprocessing.input_size
        rows = np.random.default_rng(0).integers(0, 256, size=(8, size, size, 3), dtype=np.uint8)
        expected = (await engine.extract(space, rows)).embedding_BD  # the runtime is chosen, and nothing is watched yet
        monkeypatch.setattr(TorchRuntime, "stage", stage)
        monkeypatch.setattr(TorchRuntime, "run_staged", run_staged)
        found_BD = await asyncio.gather(engine.extract(space, rows[:4]), engine.extract(space, rows[4:]))
        together = np.concatenate([one.embedding_BD for one in found_BD])
        np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-5)

    with_engine(backbone, blobs, test, max_rows=1)  # of 224 px: four of these
    assert staged[:2] == [4, 4]
    assert {name.rpartition("_")[0] for name in threads} == {"trunkline-stage", "trunkline-trunk"}


def test_a_processor_does_not_send_rows_anywhere(backbone: Backbone, blobs: BlobStore) -> None:
    async def test(engine: LocalEngine) -> None:
        spec = await engine.describe()
        found = spec.cut("input")
        assert found is not None
        size = spec.preprocessing.input_size
        await engine.extract(spec.space(found), np.zeros((1, size, size, 3), np.uint8))
        assert not engine._threads._stage._threads

    with_engine(backbone, blobs, test)
