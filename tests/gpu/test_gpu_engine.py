"""The engine on CUDA: the same answers and costs as on the CPU, memory that runs out named."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline_wire.quantise import PackedRows, pack, unpack
from trunkline_wire.specs import INPUT_CUT
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine.choice import MAX_RUNTIME_ERROR, embedding_error
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("cut", [INPUT_CUT, "blocks.2"])
def test_the_gpu_gives_the_cpus_embedding(cut: str, tmp_path: Path) -> None:
    backbone = load_backbone("efficientnet_lite0")
    spec = backbone.describe()
    images = sample_images(16, 224)
    with torch.inference_mode():
        features = images if cut == INPUT_CUT else backbone.stem(cut)(images)
        expected = backbone.trunk(cut)(features)

    async def main() -> None:
        engine = LocalEngine(backbone, BlobStore(f"file://{tmp_path}"), clock=SystemClock(), device="cuda")
        await engine.start()
        found = spec.cut(cut)
        assert found is not None
        result = await engine.extract(spec.space(found), features.contiguous().numpy())
        slices = [one for one in spec.slices if one.name in found.slices]
        assert embedding_error(torch.from_numpy(result.embedding_BD), expected, slices) <= MAX_RUNTIME_ERROR
        assert (await engine.describe()).device == "cuda"
        # Stems are exported on the CPU copy while the GPU serves.
        assert (await engine.stem("blocks.0")).size_bytes > 0
        await engine.close()

    asyncio.run(main())


def test_codecs_cost_on_the_gpu_what_they_cost_on_the_cpu(tmp_path: Path) -> None:
    backbone = load_backbone("efficientnet_lite0")
    spec = backbone.describe(96)
    found = spec.cut("blocks.2")
    assert found is not None
    with torch.inference_mode():
        features = backbone.stem("blocks.2")(sample_images(4, 96)).contiguous().numpy()
    rows = pack(features, "int4", found.channel_axis)
    assert isinstance(rows, PackedRows)
    with torch.inference_mode():
        expected = backbone.trunk("blocks.2")(torch.from_numpy(unpack(rows)))

    async def main() -> None:
        costs = []
        for device in ("cpu", "cuda"):
            blobs = BlobStore(f"file://{tmp_path}/{device}")
            engine = LocalEngine(backbone, blobs, clock=SystemClock(), device=device)
            await engine.start(prepare=False)
            costs.append(await engine.cut_cost("blocks.2", 96))
            result = await engine.extract(spec.space(found), rows)
            slices = [one for one in spec.slices if one.name in found.slices]
            assert embedding_error(torch.from_numpy(result.embedding_BD), expected, slices) <= MAX_RUNTIME_ERROR
            cost = costs[-1].codec("int4")
            assert cost is not None
            assert result.codec_use.embedding_error == cost.embedding_error
            await engine.close()
        for on_cpu, on_gpu in zip(costs[0].codecs, costs[1].codecs, strict=True):
            # The GPU may multiply in TF32, which is as coarse as float16.
            assert on_gpu.embedding_error == pytest.approx(on_cpu.embedding_error, rel=0.2, abs=2e-3)
        for on_cpu_stem, on_gpu_stem in zip(costs[0].stems, costs[1].stems, strict=True):
            assert on_gpu_stem.embedding_error == pytest.approx(on_cpu_stem.embedding_error, rel=0.2, abs=2e-3)
            assert on_gpu_stem.refused == on_cpu_stem.refused == ""

    asyncio.run(main())


def test_a_batch_too_large_for_the_memory_is_halved(tmp_path: Path) -> None:
    backbone = load_backbone("efficientnet_lite0")
    spec = backbone.describe()

    async def main() -> None:
        engine = LocalEngine(
            backbone, BlobStore(f"file://{tmp_path}"), clock=SystemClock(), device="cuda", max_rows=512
        )
        await engine.start()
        images = np.repeat(sample_images(4, 224).numpy(), 128, axis=0)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + 600 * 2**20) / total)
        try:
            result = await engine.extract(spec.space(spec.cuts[0]), images, ["pooled"])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert np.isfinite(result.embedding_BD).all()
        await engine.close()

    asyncio.run(main())
