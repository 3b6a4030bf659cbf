"""Quantised stems: the same in and out, smaller, nearly as good, and alike on every processor."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_worker.backbones import int8_stem
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import export_module, export_stem, session_options
from trunkline_worker.backbones.int8_stem import channel_scales, quantise_stem
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.engine.choice import embedding_error

CUT = "blocks.2"
SIZE = 96


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("efficientnet_lite0")


@pytest.fixture(scope="module")
def exact(lite0: Backbone) -> bytes:
    return export_stem(lite0, CUT, SIZE)


@pytest.fixture(scope="module")
def calibration(lite0: Backbone) -> np.ndarray:
    return lite0.samples.calibration(lite0.preprocessing_at(SIZE))


@pytest.fixture(scope="module")
def quantised(exact: bytes, calibration: np.ndarray) -> bytes:
    return quantise_stem(exact, calibration)


@pytest.fixture(scope="module")
def held_out(lite0: Backbone) -> np.ndarray:
    return lite0.samples.held_out(lite0.preprocessing_at(SIZE), 8)


def _run(data: bytes, images: np.ndarray, *, optimised: bool = True) -> np.ndarray:
    options = session_options(1)
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    assert [(one.name, one.type) for one in session.get_inputs()] == [("images", "tensor(uint8)")]
    assert [(one.name, one.type) for one in session.get_outputs()] == [("features", "tensor(float)")]
    return session.run(None, {"images": images})[0]


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@torch.inference_mode()
def _embedding_error(backbone: Backbone, data: bytes, exact: bytes, pictures: np.ndarray) -> float:
    spec = backbone.describe(SIZE)
    cut = spec.cut(CUT)
    assert cut is not None
    trunk = backbone.trunk(CUT)
    got, expected = (trunk(torch.from_numpy(_run(one, pictures))) for one in (data, exact))
    return embedding_error(got, expected, [one for one in spec.slices if one.name in cut.slices])


def _int8_weights(data: bytes) -> list[np.ndarray]:
    return [
        numpy_helper.to_array(one)
        for one in check_onnx(data).graph.initializer
        if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1
    ]


def _exported(network: nn.Module) -> bytes:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images.permute(0, 3, 1, 2).to(torch.float32) / 255)

    return export_module(Stem(), torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "images", "features")


def _pictures(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)


def _refused(data: bytes, pictures: np.ndarray) -> WireError:
    with pytest.raises(WireError) as caught:
        quantise_stem(data, pictures)
    return caught.value


def test_any_number_of_rows_goes_in_and_float_features_come_out(
    quantised: bytes, exact: bytes, held_out: np.ndarray
) -> None:
    for num_rows in (1, 2, 5):
        got, expected = (_run(data, held_out[:num_rows]) for data in (quantised, exact))
        assert (got.shape, got.dtype) == (expected.shape, np.float32)
        assert _relative(got, expected) < 0.1


def test_the_file_is_smaller_and_its_layers_are_int8(quantised: bytes, exact: bytes) -> None:
    assert len(quantised) < 0.55 * len(exact)
    weights = sum(one.size for one in _int8_weights(quantised))
    floats = sum(int(np.prod(one.dims)) for one in check_onnx(exact).graph.initializer)
    assert weights > 0.9 * floats


def test_the_error_stays_within_what_auto_keeps_to(
    lite0: Backbone, quantised: bytes, exact: bytes, held_out: np.ndarray
) -> None:
    assert 0 < _embedding_error(lite0, quantised, exact, held_out) <= MAX_CODEC_ERROR


def test_photographs_fare_as_the_generated_pictures_do(lite0: Backbone, quantised: bytes, exact: bytes) -> None:
    from PIL import Image
    from trunkline_wire.preprocess import preprocess_image

    datasets = pytest.importorskip("sklearn.datasets")
    photographs = [Image.fromarray(one) for one in datasets.load_sample_images().images]
    pictures = np.stack([preprocess_image(one, lite0.preprocessing_at(SIZE)) for one in photographs])
    assert _embedding_error(lite0, quantised, exact, pictures) < 1.3 * MAX_CODEC_ERROR


def test_correcting_the_biases_is_what_keeps_the_error_small(
    lite0: Backbone, exact: bytes, quantised: bytes, calibration: np.ndarray, held_out: np.ndarray, monkeypatch
) -> None:
    monkeypatch.setattr(int8_stem, "correct_biases", lambda *arguments: None)
    uncorrected = quantise_stem(exact, calibration)
    errors = [_embedding_error(lite0, data, exact, held_out) for data in (quantised, uncorrected)]
    assert errors[1] > 1.3 * errors[0]


def test_equal_arguments_give_equal_bytes(exact: bytes, quantised: bytes, calibration: np.ndarray) -> None:
    assert quantise_stem(exact, calibration) == quantised
    assert quantise_stem(exact, calibration[:3]) != quantised


def test_no_processor_overflows_on_a_pair_of_products(quantised: bytes) -> None:
    weights = _int8_weights(quantised)
    assert len(weights) == 12
    for weight in weights:
        channels = weight.astype(int).reshape(*weight.shape[:2], -1)
        for ordered in (channels, channels.transpose(0, 2, 1)):
            rows = ordered.reshape(len(channels), -1)
            pairs = rows[:, 1:] + rows[:, :-1]
            assert 255 * np.abs(pairs).max() < 2**15


def test_scales_of_channels_use_all_the_steps_that_pairs_leave() -> None:
    weight = np.zeros((4, 3, 2), np.float32)
    weight[0, 0, 0] = 2.54  # alone
    weight[1, :2, 0] = 1.27, 1.27  # beside one another over the input channels
    weight[2, 0] = -1.27, -2.54  # beside one another over the places
    weight[3, 0] = 1.27, -2.54  # of two signs: their sum is small
    np.testing.assert_allclose(channel_scales(weight, 0), np.array([2.54, 2.54, 3.81, 2.54]) / 127, rtol=1e-6)
    np.testing.assert_array_equal(channel_scales(np.moveaxis(weight, 0, 1), 1), channel_scales(weight, 0))
    np.testing.assert_array_equal(channel_scales(np.zeros((2, 1, 1)), 0), [1, 1])


def test_what_a_runtime_makes_of_the_graph_does_not_change_the_features(quantised: bytes, held_out: np.ndarray) -> None:
    # A layer left in float32 between two rounded tensors would be quantised anew, and badly, by the runtime.
    plain, optimised = (_run(quantised, held_out, optimised=one) for one in (False, True))
    assert _relative(optimised, plain) < 0.01


def test_first_narrow_layers_stay_in_float32(quantised: bytes) -> None:
    graph = check_onnx(quantised).graph
    constants = {one.name for one in graph.initializer}
    layers = [node.input[1] in constants for node in graph.node if node.op_type == "Conv"]
    assert layers == [True] * 3 + [False] * 12


def test_the_file_carries_nothing_of_the_tools_that_wrote_it(quantised: bytes) -> None:
    model = check_onnx(quantised)
    assert (model.producer_name, model.doc_string, list(model.metadata_props)) == ("", "", [])
    assert {opset.domain for opset in model.opset_import} == {""}
    for text in (b"onnx.quantize", b"onnxruntime", b"pytorch", b".py", tempfile.gettempdir().encode()):
        assert text not in quantised
    used = {name for node in model.graph.node for name in node.input}
    assert {one.name for one in model.graph.initializer} <= used


def test_quantising_says_nothing_and_leaves_nothing(
    exact: bytes,
    calibration: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantise_stem(exact, calibration[:2])
    assert (caplog.records, caught, capfd.readouterr()) == ([], [], ("", ""))
    assert list(tmp_path.iterdir()) == []


def test_logging_is_not_set_up_by_what_the_quantiser_logs(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from onnxruntime import quantization

    class Talks(quantization.QDQQuantizer):
        def quantize_model(self) -> object:
            logging.warning("much to say")
            return super().quantize_model()

    monkeypatch.setattr(quantization, "QDQQuantizer", Talks)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    quantise_stem(_exported(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 40, 3))), _pictures(2))
    assert (root.handlers, root.level) == ([], level)
    assert capfd.readouterr() == ("", "")


class _Varied(nn.Module):
    """Convolutions without bias, of groups and dilated; residual sums; branches; pooling; two kinds of activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 48, 3, stride=2, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.left = nn.Conv2d(48, 48, 3, padding=1, groups=4, bias=False)
        self.right = nn.Conv2d(48, 48, 3, padding=2, dilation=2)
        self.gate = nn.Conv2d(48, 48, 1)
        self.last = nn.Conv2d(96, 40, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.first(x).relu())
        x = (x + self.left(x)).relu()
        gate = torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.cat([x + self.right(x), nn.functional.silu(x) * gate], 1)
        return self.last(x)


class _Tokens(nn.Module):
    """Linear layers over tokens, an attention between activations, sums that stay in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, stride=8)
        self.norm = nn.LayerNorm(64)
        self.keys, self.values = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.wide, self.narrow = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.patch(x).flatten(2).permute(0, 2, 1))
        weights = (self.keys(x) @ x.transpose(1, 2) / 8).softmax(-1)
        x = x + weights @ self.values(x)
        return x + self.narrow(nn.functional.gelu(self.wide(x)))


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (_Varied, 4),
        (_Tokens, 4),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 40), nn.ReLU()), 1),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 40, 3), nn.ReLU6(), nn.MaxPool2d(2)), 1),
    ],
    ids=["varied", "tokens", "linear", "ends in an activation"],
)
def test_layers_of_other_networks_are_quantised_too(network: object, layers: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exact = _exported(network().eval())  # type: ignore[operator]
    quantised = quantise_stem(exact, _pictures(8))
    pictures = _pictures(5, seed=1)
    got, expected = _run(quantised, pictures), _run(exact, pictures)
    assert len(_int8_weights(quantised)) == layers
    assert got.shape == expected.shape
    assert 0 < _relative(got, expected) < 0.03
    assert _relative(_run(quantised, pictures, optimised=False), got) < 0.01


def test_a_stem_of_narrow_layers_is_better_left_alone() -> None:
    error = _refused(_exported(nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU())), _pictures(2))
    assert error.code is ErrorCode.UNSUPPORTED
    assert "float32 stem" in error.message
    narrow = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 3))
    assert _refused(_exported(narrow), _pictures(2)).code is ErrorCode.UNSUPPORTED


def test_what_cannot_be_quantised_is_unsupported() -> None:
    network = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3))
    with torch.no_grad():
        network[1].weight[0, 0] = float("nan")
    error = _refused(_exported(network), _pictures(2))
    assert error.code is ErrorCode.UNSUPPORTED
    assert "\n" not in error.message


def test_a_file_whose_output_became_another_is_not_given_out(
    exact: bytes, calibration: np.ndarray, monkeypatch
) -> None:
    # Plant the bug: the quantiser gives the features another name.
    strip = int8_stem._strip

    def renamed(model: onnx.ModelProto) -> None:
        strip(model)
        for node in model.graph.node:
            node.output[:] = ["others" if name == "features" else name for name in node.output]
        model.graph.output[0].name = "others"

    monkeypatch.setattr(int8_stem, "_strip", renamed)
    error = _refused(exact, calibration[:1])
    assert error.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (0, SIZE, SIZE, 3), (2, 3, SIZE, SIZE), (SIZE, SIZE, 3)])
def test_pictures_of_another_size_are_refused(shape: tuple[int, ...], exact: bytes) -> None:
    error = _refused(exact, np.zeros(shape, np.uint8))
    assert error.code is ErrorCode.SHAPE_MISMATCH
    assert str(shape) in error.message


def test_what_is_not_onnx_is_corrupt() -> None:
    assert _refused(b"not onnx at all", _pictures(1)).code is ErrorCode.CORRUPT_DATA
