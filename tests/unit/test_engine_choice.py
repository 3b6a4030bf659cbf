"""Runtimes: the choice between them, what is remembered, what happens when one cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_backbones import SIZE as SMALL
from small_backbones import small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import SliceSpec
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine import choice
from trunkline_worker.engine.choice import Measurement, RuntimeChooser, choose, embedding_error, trunk_slices
from trunkline_worker.engine.exports import STEMS, ExportStore
from trunkline_worker.engine.runtimes import (
    ONNX_FP32,
    TORCH_BF16,
    TORCH_FP32,
    OnnxRuntime,
    TorchRuntime,
    place,
    torch_candidates,
    torch_runtime,
)
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock

CPU = torch.device("cpu")
NAME, SIZE = "squeezenet1_1", 64


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return place(load_backbone(NAME, allow_untrained=True), CPU)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path}/store")


def _chooser(backbone: Backbone, blobs: BlobStore, *, num_threads: int = 1, use_onnx: bool = True) -> RuntimeChooser:
    return RuntimeChooser(
        backbone, backbone, blobs, device=CPU, num_threads=num_threads, clock=SystemClock(), use_onnx=use_onnx
    )


def _m(name: str, error: float, rows_per_s: float) -> Measurement:
    return Measurement(name, error, rows_per_s)


@pytest.mark.parametrize(
    ("measurements", "expected"),
    [
        ([_m("fp32", 0, 10), _m("bf16", 0.01, 30), _m("onnx", 1e-6, 20)], "bf16"),
        ([_m("fp32", 0, 10), _m("bf16", 0.01, 24), _m("onnx", 1e-6, 20)], "onnx"),  # not by a clear margin
        ([_m("fp32", 0, 10), _m("bf16", 0.021, 99), _m("onnx", 1e-6, 5)], "fp32"),  # over the bound
        ([_m("fp32", 0, 10), _m("bf16", float("inf"), 99)], "fp32"),
        ([_m("fp32", 0, 10), _m("bf16", float("nan"), 99)], "fp32"),
        ([_m("fp32", 0, 10)], "fp32"),
    ],
)
def test_the_fastest_within_the_bound_is_chosen(measurements: list[Measurement], expected: str) -> None:
    assert choose(measurements).runtime == expected


def test_the_error_is_that_of_the_worst_slice() -> None:
    slices = [SliceSpec("a", 5, 7), SliceSpec("b", 7, 8)]
    expected = torch.tensor([[30.0, 40.0, 1.0]])
    assert embedding_error(expected, expected, slices) == 0
    assert embedding_error(torch.tensor([[30.0, 40.0, 1.1]]), expected, slices) == pytest.approx(0.1, rel=1e-4)
    assert embedding_error(torch.tensor([[35.0, 40.0, 1.0]]), expected, slices) == pytest.approx(0.1, rel=1e-4)
    assert embedding_error(torch.tensor([[30.0, float("nan"), 1.0]]), expected, slices) == float("inf")


def test_runtimes_agree_and_take_read_only_half_precision_and_strided_rows(
    backbone: Backbone, blobs: BlobStore
) -> None:
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


@pytest.mark.parametrize("cut", ["patch", "norm", "blocks.1", "flatten", "mean"])
def test_rows_of_every_rank_enter_every_runtime(cut: str, blobs: BlobStore) -> None:
    # (C, H, W), (H, W, C), (H, W, C), (T, C), a vector that is only passed on.
    small = place(small_backbone(), CPU)
    chooser = _chooser(small, blobs)
    candidates = chooser.candidates(cut, SMALL)
    assert [one.name for one in candidates] == [*torch_candidates(CPU), ONNX_FP32]
    with torch.inference_mode():
        features = small.stem(cut)(sample_images(3, SMALL, seed=7))
        expected = small.trunk(cut)(features)
    for runtime in candidates:
        tolerance = 1e-4 if runtime.name in (TORCH_FP32, ONNX_FP32) else 2e-2
        got = runtime.run(features.contiguous().numpy())
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert chooser.measure(cut, SMALL, candidates).error <= 0.02


def test_only_features_with_their_channels_first_are_laid_out_anew() -> None:
    class Strides(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x.stride()
            return x.flatten(1)

    trunk = Strides()
    rows = np.zeros((2, 5, 6, 7), np.float32)
    TorchRuntime(trunk, TORCH_FP32, CPU, channels_first=True).run(rows)
    assert trunk.seen == (210, 1, 35, 5)
    TorchRuntime(trunk, TORCH_FP32, CPU, channels_first=False).run(rows)
    assert trunk.seen == (210, 42, 7, 1)
    small = small_backbone()
    spec = small.describe()
    for cut, first in (("patch", True), ("norm", False)):
        found = spec.cut(cut)
        assert found is not None
        assert torch_runtime(small, found, TORCH_FP32, CPU)._channels_first is first


def test_the_choice_is_measured_once_and_remembered(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser = _chooser(backbone, blobs)
    assert chooser.remembered("input", SIZE) is None
    candidates = chooser.candidates("input", SIZE)
    assert [one.name for one in candidates] == [*torch_candidates(CPU), ONNX_FP32]
    chosen = chooser.measure("input", SIZE, candidates)
    images = sample_images(3, SIZE, seed=5)
    with torch.inference_mode():
        expected = backbone.trunk("input")(images)
    onnx = next(one for one in candidates if isinstance(one, OnnxRuntime))
    torch.testing.assert_close(onnx.run(images.numpy()), expected, rtol=1e-4, atol=1e-5)

    # A second engine on the same storage neither exports nor measures.
    monkeypatch.setattr(choice, "export_module", lambda *_args, **_options: pytest.fail("exported again"))
    again = _chooser(backbone, blobs).remembered("input", SIZE)
    assert again is not None
    assert (again.runtime.name, again.error) == (chosen.runtime.name, chosen.error)
    assert _chooser(backbone, blobs).candidates("input", SIZE)[-1].name == ONNX_FP32
    # Another number of threads, or another size, is another machine or network.
    assert _chooser(backbone, blobs, num_threads=2).remembered("input", SIZE) is None
    assert _chooser(backbone, blobs).remembered("input", 96) is None


def test_the_runtime_of_a_map_is_chosen_and_remembered_by_its_tap(blobs: BlobStore) -> None:
    small = place(small_backbone(), CPU)
    chooser = _chooser(small, blobs)
    taps = ("blocks.1", "blocks.3", "")
    with torch.inference_mode():
        features = small.stem("norm")(sample_images(3, SMALL, seed=7))
    for number, tap in enumerate(taps):
        assert [chooser.remembered("norm", SMALL, one) is None for one in taps] == [at >= number for at in range(3)]
        candidates = chooser.candidates("norm", SMALL, tap)
        assert [one.name for one in candidates] == [*torch_candidates(CPU), ONNX_FP32]
        chosen = chooser.measure("norm", SMALL, candidates, tap)
        found = chooser.remembered("norm", SMALL, tap)
        assert found is not None
        assert (found.runtime.name, found.error) == (chosen.runtime.name, chosen.error)
        expected = small.trunk("norm", tap)(features)
        got = found.runtime.run(features.contiguous().numpy())
        torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_the_error_of_a_map_is_measured_on_all_of_it() -> None:
    spec = small_backbone().describe()
    assert trunk_slices(spec, "norm", "blocks.3") == [SliceSpec("blocks.3.map", 0, 16 * 64)]
    assert [one.name for one in trunk_slices(spec, "blocks.3", "")] == [
        "blocks.3.mean",
        "blocks.3.std",
        "blocks.3.grid",
        "pooled",
    ]


def test_without_an_export_torch_serves(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_args: object, **_options: object) -> bytes:
        raise WireError(ErrorCode.UNSUPPORTED, "no such operator")

    monkeypatch.setattr(choice, "export_module", fails)
    chooser = _chooser(backbone, blobs)
    candidates = chooser.candidates("input", SIZE)
    assert [one.name for one in candidates] == list(torch_candidates(CPU))
    assert chooser.measure("input", SIZE, candidates).runtime.name in (TORCH_FP32, TORCH_BF16)
    assert "no such operator" in caplog.text


def test_a_runtime_that_computes_something_else_is_not_chosen(backbone: Backbone, blobs: BlobStore) -> None:
    width = backbone.describe(SIZE).slices[-1].stop

    class Wrong:
        name = "wrong"

        def run(self, features: np.ndarray) -> torch.Tensor:
            return torch.ones(len(features), width)

    chooser = _chooser(backbone, blobs, use_onnx=False)
    fp32 = TorchRuntime(backbone.trunk("input"), TORCH_FP32, CPU)
    assert chooser.measure("input", SIZE, [fp32, Wrong()]).runtime is fp32


def test_a_note_that_is_damaged_or_names_what_is_not_here_is_measured_again(
    backbone: Backbone, blobs: BlobStore
) -> None:
    chooser = _chooser(backbone, blobs, use_onnx=False)
    path = chooser._note_path(backbone.describe(SIZE), "input")
    for note in (b"\x00not json", b"[]", b"{}", json.dumps({"runtime": "tpu", "error": 0}).encode()):
        blobs.put(path, note)
        assert chooser.remembered("input", SIZE) is None
    blobs.put(path, json.dumps({"runtime": TORCH_FP32, "error": 0}).encode())
    assert chooser.remembered("input", SIZE) is not None


def test_a_full_storage_costs_the_note_not_the_service(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise WireError(ErrorCode.STORAGE_FULL, "full")

    monkeypatch.setattr(BlobStore, "put", full)
    chooser = _chooser(backbone, blobs)
    chooser.measure("input", SIZE, chooser.candidates("input", SIZE))


def test_a_damaged_export_is_not_found(blobs: BlobStore) -> None:
    exports = ExportStore(blobs)
    assert exports.find(STEMS, "ab12") is None
    stored = exports.put(STEMS, "ab12", b"the file")
    assert exports.find(STEMS, "ab12") == (stored, b"the file")
    blobs.put(stored.path, b"the filf")
    assert exports.find(STEMS, "ab12") is None
    exports.put(STEMS, "ab12", b"the file")
    blobs.put("stems/ab12.json", json.dumps({"sha256": "../../x", "size_bytes": 1}).encode())
    assert exports.find(STEMS, "ab12") is None


def test_memory_that_runs_out_is_tried_in_halves_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
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
