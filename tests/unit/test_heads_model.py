import numpy as np
import pytest
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.heads.config import HeadConfig
from trunkline_worker.heads.model import Head, TrainedHead


def make_head(
    config: HeadConfig | None = None, *, task: str = "classification", names: tuple[str, ...] = ("cat", "dog", "hen")
) -> TrainedHead:
    """Return a head on 2 + 3 columns with drawn parameters."""
    config = config or HeadConfig()
    head = Head(config, 5, 3)
    draw = torch.Generator().manual_seed(1)
    head.reset_parameters(draw)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    head.mean = torch.arange(5.0)
    head.scale = torch.arange(1.0, 6.0)
    return TrainedHead(head.eval(), task, names if task == "classification" else (), ("a/mean", "pooled"), (2, 3))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "forest"},
        {"kind": "linear", "hidden": (8,)},
        {"kind": "linear", "dropout": 0.1},
        {"kind": "mlp"},
        {"kind": "mlp", "hidden": (0,)},
        {"kind": "mlp", "hidden": (8,) * 9},
        {"kind": "mlp", "hidden": (8,), "dropout": 1.0},
        {"kind": "mlp", "hidden": (8,), "dropout": float("nan")},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(arguments: dict) -> None:
    with pytest.raises(WireError) as caught:
        HeadConfig(**arguments)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_linear_prediction_is_what_numpy_computes() -> None:
    head = make_head()
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    layer = head.head.linears[-1]
    logits = (x - np.arange(5)) / np.arange(1, 6) @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head.predict(torch.from_numpy(x)).numpy(), expected, rtol=1e-5)


def test_mlp_prediction_is_what_numpy_computes_and_regression_has_no_softmax() -> None:
    head = make_head(HeadConfig("mlp", (7, 4), 0.5), task="regression")
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    h = (x - np.arange(5)) / np.arange(1, 6)
    layers = [(one.weight.detach().numpy(), one.bias.detach().numpy()) for one in head.head.linears]
    for weight, bias in layers[:-1]:
        h = np.maximum(h @ weight.T + bias, 0)
    np.testing.assert_allclose(
        head.predict(torch.from_numpy(x)).numpy(), h @ layers[-1][0].T + layers[-1][1], rtol=1e-4
    )


def test_half_precision_rows_give_float32_answers() -> None:
    answer = make_head().predict(torch.zeros(2, 5, dtype=torch.float16))
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer.sum(dim=1), torch.ones(2))


def test_wrong_width_is_named() -> None:
    with pytest.raises(WireError, match=r"takes \(rows, 5\).*got \(2, 4\)") as caught:
        make_head().predict(torch.zeros(2, 4))
    assert caught.value.code is ErrorCode.SHAPE_MISMATCH


def test_dropout_leaves_out_its_share_only_when_asked_and_keeps_the_mean() -> None:
    head = make_head(HeadConfig("mlp", (4000,), 0.25))
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.head.linears[-1].weight.fill_(1.0)
        plain = head.head.forward_standardised(x)
        dropped = head.head.forward_standardised(x, torch.Generator().manual_seed(0))
        again = head.head.forward_standardised(x, torch.Generator().manual_seed(0))
    assert not torch.equal(plain, dropped)
    assert torch.equal(dropped, again)
    torch.testing.assert_close(plain, dropped, rtol=0.1, atol=0.0)


def test_drawing_parameters_does_not_touch_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    Head(HeadConfig("mlp", (6,), 0.5), 4, 2).reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "ranking"),
        ("class_names", ("cat", "dog")),
        ("class_names", ("cat", "dog", "dog")),
        ("class_names", ("cat", "dog", "")),
        ("slices", ("pooled",)),
        ("slices", ("pooled", "pooled")),
        ("slice_widths", (2, 2)),
        ("slice_widths", (5, 0)),
    ],
)
def test_parts_that_contradict_each_other_are_refused(field: str, value: object) -> None:
    good = make_head()
    parts = {name: getattr(good, name) for name in ("head", "task", "class_names", "slices", "slice_widths")}
    with pytest.raises(WireError) as caught:
        TrainedHead(**{**parts, field: value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
