"""Exported stems: equal to torch, free in the batch, self-contained; files that are not are refused."""

from __future__ import annotations

import logging
import threading
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_backbones import small_backbone
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import map_slice
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import export_module, export_stem, sample_images, session_options
from trunkline_worker.backbones.onnx_safety import check_onnx

SIZE = 64
# Largest difference of ONNX Runtime to torch, float32, over the largest feature.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("efficientnet_lite0")


@pytest.fixture(scope="module")
def stem(lite0: Backbone) -> bytes:
    return export_stem(lite0, "blocks.0", SIZE)


def _run(data: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(data, session_options(1), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    assert [one.name for one in session.get_outputs()] == ["features"]
    return session.run(None, {"images": images})[0]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("efficientnet_lite0", "blocks.0"),
        ("efficientnet_lite0", "blocks.2"),
        ("resnet18", "layer1"),
        ("efficientnet_b0", "features.2"),
    ],
)
def test_an_exported_stem_equals_torch_for_any_number_of_rows(
    name: str, cut: str, request: pytest.FixtureRequest
) -> None:
    cached = (name, cut) == ("efficientnet_lite0", "blocks.0")
    backbone = (
        request.getfixturevalue("lite0") if name == "efficientnet_lite0" else load_backbone(name, allow_untrained=True)
    )
    data = request.getfixturevalue("stem") if cached else export_stem(backbone, cut, SIZE)
    for num_rows in (1, 2, 5):
        images = sample_images(num_rows, SIZE, seed=num_rows)
        expected = backbone.stem(cut)(images).numpy()
        got = _run(data, images.numpy())
        assert got.dtype == np.float32
        assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@torch.inference_mode()
@pytest.mark.parametrize("cut", ["patch", "norm", "flatten", "mean"])
def test_stems_of_every_rank_are_exported(cut: str) -> None:
    # (C, H, W), (H, W, C), (T, C), a vector.
    backbone = small_backbone()
    spec = backbone.describe()
    data = export_stem(backbone, cut)
    for num_rows in (1, 3):
        images = sample_images(num_rows, spec.preprocessing.input_size, seed=num_rows)
        expected = backbone.stem(cut)(images).numpy()
        got = _run(data, images.numpy())
        assert got.shape == (num_rows, *spec.cut(cut).feature_shape)  # type: ignore[union-attr]
        assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("cut", "tap"), [("input", "patch"), ("patch", "norm"), ("norm", "blocks.3"), ("norm", "norm")]
)
def test_trunks_that_end_in_a_map_are_exported(cut: str, tap: str) -> None:
    backbone = small_backbone()
    images = sample_images(3, backbone.preprocessing.input_size, seed=1)
    features = images if cut == "input" else backbone.stem(cut)(images)
    module = backbone.trunk(cut, map_slice(tap))
    expected = module(features).numpy()
    with torch.inference_mode(mode=False):
        data = export_module(module, features[:2].clone(), "features", "embedding")
    session = onnxruntime.InferenceSession(data, session_options(1), providers=["CPUExecutionProvider"])
    for rows in (features, features[:1]):
        (got,) = session.run(None, {"features": rows.contiguous().numpy()})
        assert got.shape == (len(rows), expected.shape[1])
        assert np.abs(got - expected[: len(rows)]).max() <= TOLERANCE * np.abs(expected).max()


def test_a_stem_carries_nothing_of_the_machine_it_was_exported_on(stem: bytes) -> None:
    for text in (b".py", b"site-packages", b"torch/nn", b"stack_trace"):
        assert text not in stem
    model = check_onnx(stem)
    assert {opset.domain for opset in model.opset_import} == {""}


def test_exporting_says_nothing(
    lite0: Backbone, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogger("onnxscript").level
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8), "a", "b")
    assert caplog.records == []
    assert caught == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("onnxscript").level == before


def test_a_stem_that_differs_from_torch_is_not_given_out(lite0: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    # Plant the bug: the exporter writes another network than the one that is compared.
    def wrong(module: nn.Module, example: torch.Tensor, *names: str, max_bytes: int) -> bytes:
        return export_module(nn.Sequential(module, nn.Hardtanh(-1, 1)), example, *names, max_bytes=max_bytes)

    monkeypatch.setattr("trunkline_worker.backbones.export.export_module", wrong)
    with pytest.raises(WireError, match="differs from torch") as caught:
        export_stem(lite0, "blocks.0", SIZE)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_what_cannot_be_exported_is_unsupported() -> None:
    class Depends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else x.flip(0)

    with pytest.raises(WireError, match="cannot be exported") as caught:
        export_module(Depends(), torch.ones(2, 3), "a", "b")
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_others_may_run_the_network_while_it_is_exported(lite0: Backbone) -> None:
    images = sample_images(1, SIZE)
    trunk = lite0.trunk("input")
    with torch.inference_mode():
        expected = trunk(images)
    failures: list[BaseException] = []
    runs = 0
    exporting = threading.Thread(target=export_stem, args=(lite0, "blocks.0", SIZE))
    exporting.start()
    while exporting.is_alive():
        with torch.inference_mode():
            try:
                # The exporter may switch kernels for all of the process: other roundings, the same network.
                torch.testing.assert_close(trunk(images), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
            except BaseException as error:
                failures.append(error)
        runs += 1
    exporting.join()
    assert runs > 0
    assert failures == []


def _model(**changes: object) -> onnx.ModelProto:
    node = helper.make_node(str(changes.get("op", "Add")), ["x", "w"], ["y"], domain=str(changes.get("domain", "")))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones((1, 2), np.float32), "w")
    graph = helper.make_graph([node], "g", value[:1], value[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    tensor.ClearField("raw_data")


def _external_in_branch(model: onnx.ModelProto) -> None:
    inner = _model().graph
    inner.initializer[0].external_data.add(key="location", value="secrets")
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=_model().graph))


def _external_constant(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(2, np.float32))
    tensor.data_location = TensorProto.EXTERNAL
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _foreign_in_branch(model: onnx.ModelProto) -> None:
    inner = _model(domain="evil.ops").graph
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=_model().graph))


def _function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("", "F", ["a"], ["b"], [node], [helper.make_opsetid("", 20)]))


@pytest.mark.parametrize(
    "change",
    [
        _external,
        _external_in_branch,
        _external_constant,
        _foreign_in_branch,
        _function,
        lambda model: model.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
        lambda model: model.graph.node.append(helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft")),
    ],
    ids=["external", "external in a branch", "external constant", "domain in a branch", "function", "opset", "domain"],
)
def test_files_that_reach_outside_of_themselves_are_refused(change: object) -> None:
    model = _model()
    check_onnx(model.SerializeToString())
    change(model)  # type: ignore[operator]
    with pytest.raises(WireError) as caught:
        check_onnx(model.SerializeToString())
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("data", [b"", b"\xff" * 50, b"not onnx at all"])
def test_files_that_are_not_onnx_are_corrupt(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        check_onnx(data)
    assert caught.value.code is ErrorCode.CORRUPT_DATA


def test_files_over_the_size_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(WireError) as caught:
        check_onnx(b"\xff" * 11, max_bytes=10)
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE
