"""Runtimes: what goes in, what comes out, in whose memory, and what this machine has."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from small_backbones import SIZE as SMALL
from small_backbones import small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine import building, onnx_runtime, openvino_runtime, runtime_names
from trunkline_worker.engine.building import Builder, reason_of
from trunkline_worker.engine.cuda_runtimes import bucket_of
from trunkline_worker.engine.exports import STEMS, ExportStore
from trunkline_worker.engine.onnx_runtime import OnnxRowsRuntime
from trunkline_worker.engine.runtime_names import (
    COMPILE_FP32,
    FROM_ONNX,
    GRAPH_FP16,
    ONNX_FP32,
    ONNX_FP32_ROWS,
    OPENVINO_BF16,
    OPENVINO_FP32,
    OPENVINO_FP32_ROWS,
    ROWWISE,
    RUNTIMES,
    SLOW_TO_MAKE,
    TENSORRT_FP16,
    TORCH_BF16_PURE,
    TORCH_FP16,
    TORCH_FP32,
    TORCH_FP32_LAST,
    check_runtime,
)
from trunkline_worker.engine.torch_runtimes import RECIPES, TorchRuntime, Weights, place, torch_runtime
from trunkline_worker.engine.trunk_exports import TrunkExports
from trunkline_worker.store.blobs import BlobStore

CPU = torch.device("cpu")
SIZE = 64
EXACT = (TORCH_FP32, TORCH_FP32_LAST, ONNX_FP32, ONNX_FP32_ROWS, OPENVINO_FP32, OPENVINO_FP32_ROWS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path}/store")


def test_rows_may_be_read_only_half_precision_and_strided() -> None:
    resnet = place(load_backbone("resnet18", allow_untrained=True), CPU)
    with torch.inference_mode():
        features = resnet.stem("layer4")(sample_images(4, SIZE))
        expected = resnet.trunk("layer4")(features)
    runtime = TorchRuntime(resnet.trunk("layer4"), TORCH_FP32, CPU)
    array = features.contiguous().numpy()
    array.flags.writeable = False
    torch.testing.assert_close(runtime.run(array), expected)
    torch.testing.assert_close(runtime.run(array[::-1]), expected.flip(0))
    half = runtime.run(array.astype(np.float16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("cut", ["input", "patch", "norm", "blocks.1", "flatten", "mean"])
def test_rows_of_every_rank_enter_every_runtime(cut: str, blobs: BlobStore) -> None:
    # Pictures, (C, H, W), (H, W, C), (H, W, C), (T, C), a vector that is only passed on.
    small = place(small_backbone(), CPU)
    spec = small.describe()
    found = spec.cut(cut)
    assert found is not None
    builder = Builder(small, device=CPU, num_threads=2, most_rows=32)
    data = TrunkExports(small, blobs).get(spec, cut)
    images = sample_images(3, SMALL, seed=7)
    with torch.inference_mode():
        features = images if cut == "input" else small.stem(cut)(images)
        expected = small.trunk(cut)(features)
    names = [one for one in RUNTIMES if not builder.why_not(one) and one not in SLOW_TO_MAKE]
    assert set(EXACT) <= set(names)
    for name in names:
        runtime = builder.build(name, found, SMALL, onnx=data)
        assert runtime.name == name
        tolerance = 1e-4 if name in EXACT else 3e-2
        for num_rows in (3, 1):
            got = runtime.run(features[:num_rows].contiguous().numpy())
            assert (got.shape, got.dtype) == (expected[:num_rows].shape, torch.float32)
            torch.testing.assert_close(
                got, expected[:num_rows], rtol=0, atol=tolerance * float(expected.abs().max()), msg=name
            )


def test_a_compiled_trunk_takes_any_number_of_rows_without_compiling_again() -> None:
    small = place(small_backbone(), CPU)
    found = small.describe().cut("input")
    assert found is not None
    runtime = torch_runtime(small, found, COMPILE_FP32, CPU)
    images = sample_images(9, SMALL, seed=7)
    with torch.inference_mode():
        expected = small.trunk("input")(images)
    torch.testing.assert_close(runtime.run(images[:4].numpy()), expected[:4], rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_rows in (9, 1, 2, 5):
            torch.testing.assert_close(
                runtime.run(images[:num_rows].numpy()), expected[:num_rows], rtol=1e-4, atol=1e-4
            )


def test_features_and_weights_lie_as_the_recipe_says() -> None:
    class Strides(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x.stride()
            return x.flatten(1)

    trunk = Strides()
    rows = np.zeros((2, 5, 6, 7), np.float32)
    for name, channels_first, expected in (
        (TORCH_FP32_LAST, True, (210, 1, 35, 5)),
        (TORCH_FP32, True, (210, 42, 7, 1)),
        (TORCH_FP32_LAST, False, (210, 42, 7, 1)),
    ):
        TorchRuntime(trunk, name, CPU, channels_first=channels_first).run(rows)
        assert trunk.seen == expected
    small = place(small_backbone("deep"), CPU)
    found = small.describe().cut("input")
    assert found is not None
    for name, layout in ((TORCH_FP32, torch.contiguous_format), (TORCH_FP32_LAST, torch.channels_last)):
        seen: list[torch.Tensor] = []
        runtime = torch_runtime(small, found, name, CPU)
        for part in runtime._trunk.modules():  # type: ignore[attr-defined]
            if isinstance(part, torch.nn.Conv2d):
                assert part.weight.is_contiguous(memory_format=layout)
                part.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        runtime.run(sample_images(2, SMALL).numpy())
        assert seen and all(one.is_contiguous(memory_format=layout) for one in seen)
    spec = small_backbone().describe()
    for cut, first in (("patch", True), ("norm", False)):
        found = spec.cut(cut)
        assert found is not None
        assert torch_runtime(small_backbone(), found, TORCH_FP32, CPU)._channels_first is first


def test_runtimes_share_converted_weights_and_leave_those_of_the_backbone_alone() -> None:
    resnet = place(load_backbone("resnet18", allow_untrained=True), CPU)
    own = {id(one) for part in resnet.modules() for one in part.parameters()}
    before = [one.clone() for part in resnet.modules() for one in part.parameters()]
    weights = Weights()
    early, late = (weights.converted(resnet.trunk(cut), RECIPES[TORCH_BF16_PURE]) for cut in ("layer1", "layer3"))
    mine = {id(one): one for one in early.parameters()}
    assert mine and not own & set(mine) and all(id(one) in mine for one in late.parameters())
    assert {one.dtype for one in early.parameters()} == {torch.bfloat16}
    plain = weights.converted(resnet.trunk("layer1"), RECIPES[TORCH_FP32])
    assert all(id(one) in own for one in plain.parameters())
    # Layouts: only what has four axes is kept twice.
    last = weights.converted(resnet.trunk("layer1"), RECIPES[TORCH_FP32_LAST])
    assert all((one.ndim == 4) == (id(one) not in own) for one in last.parameters() if one.shape[-2:] != (1, 1))
    for part in resnet.modules():
        for one in part.parameters():
            assert one.dtype == torch.float32 and torch.equal(one, before.pop(0))
    gone = weakref.ref(next(late.parameters()))
    del early, late, mine
    gc.collect()
    assert gone() is None


def test_a_processor_has_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder(small_backbone(), device=CPU, num_threads=2, most_rows=32)
    assert [builder.why_not(one) for one in EXACT] == [""] * len(EXACT)
    assert "CUDA" in builder.why_not(GRAPH_FP16) and "CUDA" in builder.why_not(TENSORRT_FP16)
    monkeypatch.setattr(building, "has_fast_fp16", lambda _device: False)
    monkeypatch.setattr(building, "has_fast_bf16", lambda _device: False)
    assert "float16" in builder.why_not(TORCH_FP16) and "bfloat16" in builder.why_not(TORCH_BF16_PURE)
    monkeypatch.setattr(openvino_runtime, "_capabilities", lambda: ("FP32",))
    assert "BF16" in builder.why_not(OPENVINO_BF16) and not builder.why_not(OPENVINO_FP32)
    monkeypatch.setattr(openvino_runtime.importlib.util, "find_spec", lambda _name: None)
    assert "not installed" in builder.why_not(OPENVINO_FP32)
    without = Builder(small_backbone(), device=CPU, num_threads=2, most_rows=32, use_onnx=False)
    assert all("switched off" in without.why_not(one) for one in FROM_ONNX)
    on_gpu = Builder(small_backbone(), device=torch.device("cuda"), num_threads=2, most_rows=32)
    assert "CPU" in on_gpu.why_not(ONNX_FP32) and "torch_tensorrt" in on_gpu.why_not(TENSORRT_FP16)


def test_names() -> None:
    constants = {value for name, value in vars(runtime_names).items() if name.isupper() and isinstance(value, str)}
    assert constants == set(RUNTIMES) and len(set(RUNTIMES)) == len(RUNTIMES)
    assert RUNTIMES[0] == TORCH_FP32
    check_runtime(ONNX_FP32)
    with pytest.raises(WireError, match="openvino-fp32") as caught:
        check_runtime("tpu")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_reasons_are_one_line_and_name_no_path() -> None:
    error = RuntimeError("\ncannot open /usr/lib/x86_64/libfoo-1.so: no such file\n  at line 7\n")
    assert reason_of(error) == "RuntimeError: cannot open ...: no such file"
    assert reason_of(WireError(ErrorCode.UNSUPPORTED, "no such operator")) == "no such operator"
    assert reason_of(ValueError()) == "ValueError"
    assert len(reason_of(ValueError("x" * 5000))) < 300


def test_graphs_have_powers_of_two_rows() -> None:
    assert [bucket_of(one, 48) for one in (1, 2, 3, 4, 5, 32, 33, 48)] == [1, 2, 4, 4, 8, 32, 48, 48]


def test_a_damaged_export_is_not_found(blobs: BlobStore) -> None:
    exports = ExportStore(blobs)
    assert exports.find(STEMS, "ab12") is None
    stored = exports.put(STEMS, "ab12", b"the file")
    assert exports.find(STEMS, "ab12") == (stored, b"the file")
    blobs.put(stored.path, b"the filf")
    assert exports.find(STEMS, "ab12") is None
    exports.put(STEMS, "ab12", b"the file")
    blobs.put("stems/ab12.json", b'{"sha256": "../../x", "size_bytes": 1}')
    assert exports.find(STEMS, "ab12") is None


def test_memory_that_runs_out_is_tried_in_halves_then_named() -> None:
    class Trunk(torch.nn.Module):
        limit = 2
        calls: list[int] = []  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.append(len(x))
            if len(x) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x * 2

    trunk = Trunk()
    runtime = TorchRuntime(trunk, TORCH_FP32, CPU)
    rows = np.arange(7, dtype=np.float32)[:, None]
    assert runtime.run(rows)[:, 0].tolist() == [2.0 * one for one in range(7)]
    assert trunk.calls[0] == 7
    trunk.limit = 0
    with pytest.raises(WireError) as caught:
        runtime.run(rows)
    assert caught.value.code is ErrorCode.WORKER_OOM


@pytest.mark.parametrize("name", [ONNX_FP32_ROWS, OPENVINO_FP32_ROWS])
@pytest.mark.parametrize("num_threads", [2, 5, 12])
def test_a_row_alone_is_the_row_in_any_batch(name: str, num_threads: int, blobs: BlobStore) -> None:
    small = place(small_backbone(), CPU)
    spec = small.describe()
    found = spec.cut("input")
    assert found is not None
    builder = Builder(small, device=CPU, num_threads=num_threads, most_rows=32)
    runtime = builder.build(name, found, SMALL, onnx=TrunkExports(small, blobs).get(spec, "input"))
    images = sample_images(17, SMALL, seed=3).numpy()
    whole = runtime.run(images)
    assert whole.shape[0] == 17
    for rows in ([16], [4, 2, 9], [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]):
        torch.testing.assert_close(runtime.run(images[rows]), whole[rows], rtol=1e-5, atol=1e-5)
    # Side by side or not: the same bits.
    assert torch.equal(runtime.run(images[:9]), whole[:9])


def test_a_row_that_fails_fails_its_batch(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    small = place(small_backbone(), CPU)
    spec = small.describe()
    runtime = OnnxRowsRuntime(TrunkExports(small, blobs).get(spec, "input"), num_threads=2)
    images = sample_images(8, SMALL, seed=3).numpy()
    expected = runtime.run(images)
    real = onnx_runtime._embedding
    for bad in range(8):

        def failing(session: object, features: np.ndarray, bad: int = bad) -> np.ndarray:
            if np.array_equal(features[0], images[bad]):
                raise RuntimeError("this row")
            return real(session, features)

        monkeypatch.setattr(onnx_runtime, "_embedding", failing)
        with pytest.raises(RuntimeError, match="this row"):
            runtime.run(images)
    monkeypatch.undo()
    assert torch.equal(runtime.run(images), expected)


def test_rows_run_side_by_side_on_several_threads_only() -> None:
    small = place(small_backbone(), CPU)
    for name in ROWWISE:
        assert "one thread" in Builder(small, device=CPU, num_threads=1, most_rows=32).why_not(name)
    assert not Builder(small, device=CPU, num_threads=2, most_rows=32).why_not(ONNX_FP32_ROWS)
