"""Runtimes on CUDA: the same answers as on the CPU, through pinned memory, graphs and TensorRT."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine.building import Builder
from trunkline_worker.engine.choice import EXACT_ERROR, MAX_RUNTIME_ERROR, embedding_error, trunk_slices
from trunkline_worker.engine.cuda_runtimes import CudaGraphRuntime
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.engine.pinned import Staging
from trunkline_worker.engine.runtime_names import (
    COMPILE_FP32,
    GRAPH_BF16,
    GRAPH_FP16,
    GRAPH_FP32,
    TENSORRT_FP16,
    TORCH_FP16,
    TORCH_FP16_PURE,
    TORCH_FP32,
    TORCH_FP32_LAST,
)
from trunkline_worker.engine.torch_runtimes import TorchRuntime, place, torch_runtime
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
SIZE = 96


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", allow_untrained=True)


@pytest.fixture(scope="module")
def placed(backbone: Backbone) -> Backbone:
    return place(backbone, CUDA)


def _rows(backbone: Backbone, cut: str, num_rows: int) -> tuple[np.ndarray, torch.Tensor]:
    """Return rows and what float32 torch on the CPU makes of them."""
    images = sample_images(num_rows, SIZE, seed=3)
    with torch.inference_mode():
        features = images if cut == "input" else backbone.stem(cut)(images)
        return features.contiguous().numpy(), backbone.trunk(cut)(features)


@pytest.mark.parametrize("cut", ["input", "layer2"])
@pytest.mark.parametrize(
    "name",
    [TORCH_FP32, TORCH_FP32_LAST, TORCH_FP16, TORCH_FP16_PURE, COMPILE_FP32, GRAPH_FP32, GRAPH_FP16, GRAPH_BF16],
)
def test_every_runtime_gives_the_cpus_embedding(backbone: Backbone, placed: Backbone, cut: str, name: str) -> None:
    builder = Builder(placed, device=CUDA, num_threads=2, most_rows=8)
    if builder.why_not(name):
        pytest.skip(builder.why_not(name))
    spec = backbone.describe(SIZE)
    found = spec.cut(cut)
    assert found is not None
    runtime = builder.build(name, found, SIZE)
    bound = 5 * EXACT_ERROR if name.endswith("fp32") else MAX_RUNTIME_ERROR  # TF32 is allowed
    for num_rows in (8, 1, 3, 8, 70):
        features, expected = _rows(backbone, cut, num_rows)
        got = runtime.run(features)
        assert (got.device.type, got.dtype, got.shape) == ("cpu", torch.float32, expected.shape)
        assert embedding_error(got, expected, trunk_slices(spec, cut, "")) <= bound


def test_rows_on_their_way_do_not_overtake_one_another(backbone: Backbone, placed: Backbone) -> None:
    found = backbone.describe(SIZE).cut("input")
    assert found is not None
    runtime = torch_runtime(placed, found, TORCH_FP32, CUDA)
    batches = [sample_images(64, SIZE, seed=seed).numpy() for seed in range(6)]
    expected = [runtime.run(one) for one in batches]
    staged = runtime.stage(batches[0])
    for index, one in enumerate(expected):
        # The next batch leaves while this one is computed.
        following = runtime.stage(batches[index + 1]) if index + 1 < len(batches) else staged
        torch.testing.assert_close(runtime.run_staged(staged), one)
        staged = following


def test_a_pinned_buffer_is_not_written_to_before_its_rows_have_left() -> None:
    staging = Staging(CUDA)
    rows = [np.full((64, 224, 224, 3), value, np.uint8) for value in range(1, 9)]
    for value, one in enumerate(rows, start=1):
        assert bool((staging.start(one).take() == value).all())
    pair = [staging.start(one) for one in rows[:2]]
    assert [int(one.take().max()) for one in pair] == [1, 2]
    for dtype in (np.float16, np.float32):
        some = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)[::-1]
        assert np.array_equal(staging.start(some).take().cpu().numpy(), some)


def test_a_graph_is_captured_once_for_a_number_of_rows(backbone: Backbone, placed: Backbone) -> None:
    found = backbone.describe(SIZE).cut("layer3")
    assert found is not None
    runtime = Builder(placed, device=CUDA, num_threads=2, most_rows=8).build(GRAPH_FP32, found, SIZE)
    assert isinstance(runtime, CudaGraphRuntime)
    for num_rows in (3, 4, 3, 1, 2):
        features, expected = _rows(backbone, "layer3", num_rows)
        for _ in range(2):
            got = runtime.run(features)
            torch.testing.assert_close(got, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))
    assert sorted(key[0] for key in runtime._captured) == [1, 2, 4]


def test_tensorrt_gives_the_cpus_embedding(backbone: Backbone, placed: Backbone) -> None:
    pytest.importorskip("torch_tensorrt")
    spec = backbone.describe(SIZE)
    builder = Builder(placed, device=CUDA, num_threads=2, most_rows=8)
    for cut in ("input", "layer2"):
        found = spec.cut(cut)
        assert found is not None
        runtime = builder.build(TENSORRT_FP16, found, SIZE)
        assert isinstance(runtime, TorchRuntime)
        for num_rows in (8, 1, 70):
            features, expected = _rows(backbone, cut, num_rows)
            error = embedding_error(runtime.run(features), expected, trunk_slices(spec, cut, ""))
            assert error <= MAX_RUNTIME_ERROR


def test_runtimes_are_measured_on_the_gpu(backbone: Backbone, tmp_path: Path) -> None:
    async def main() -> None:
        engine = LocalEngine(backbone, BlobStore(f"file://{tmp_path}"), clock=SystemClock(), device="cuda")
        await engine.start(prepare=False)
        tuning = await engine.tune("", SIZE)
        assert tuning.device == "cuda" and tuning.batch_rows >= 1
        names = [one.runtime for one in tuning.runtimes if not one.refused]
        assert TORCH_FP32 in names and GRAPH_FP32 in names
        assert await engine.tune("", SIZE) == tuning
        await engine.close()

    asyncio.run(main())
