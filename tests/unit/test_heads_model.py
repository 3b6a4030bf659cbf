import numpy as np
import pytest
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_worker.heads.artefact import head_from_bytes, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead

INPUTS = (HeadInput(("a/mean", "pooled"), (2, 3)),)
LOCAL = HeadInput(("edge",), (4,))
MAP = HeadInput(("blocks.4.map",), (18,), (2, 3, 3))


def make_head(
    config: HeadConfig | None = None, *, task: str = "classification", names: tuple[str, ...] = ("cat", "dog", "hen")
) -> TrainedHead:
    """Return a head on 2 + 3 columns with drawn parameters."""
    config = config or HeadConfig()
    head = Head(config, INPUTS, 3)
    draw = torch.Generator().manual_seed(1)
    head.reset_parameters(draw)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    head.mean = torch.arange(5.0)
    head.scale = torch.arange(1.0, 6.0)
    return TrainedHead(head.eval(), task, names if task == "classification" else ())


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
        {"kind": "mlp", "hidden": (8,), "activation": "tanh"},
        {"kind": "mlp", "hidden": (8,), "channels": (4,)},
        {"kind": "mlp", "hidden": (8,), "tap": "blocks.4"},
        {"kind": "linear", "batch_norm": True},
        {"kind": "conv"},
        {"kind": "conv", "channels": (0,)},
        {"kind": "conv", "channels": (4,) * 9},
        {"kind": "prototype", "hidden": (8,)},
        {"kind": "prototype", "fuse": "add"},
        {"fuse": "multiply"},
        {"fuse": "concat", "fuse_width": 8},
        {"fuse": "add", "fuse_width": -1},
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
    head = make_head(HeadConfig("mlp", (7, 4), dropout=0.5), task="regression")
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
    head = make_head(HeadConfig("mlp", (4000,), dropout=0.25))
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
    Head(HeadConfig("mlp", (6,), dropout=0.5), INPUTS, 2).reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_are_drawn_within_their_bounds_and_outputs_start_at_zero() -> None:
    config = HeadConfig("conv", (300,), batch_norm=True, channels=(40,), fuse="gate", fuse_width=200)
    head = drawn(config, (MAP, LOCAL))
    head.reset_parameters(torch.Generator().manual_seed(0))
    assert head.convolutions is not None
    assert head.fusion is not None
    bounds = {  # sqrt(6 / fan in) before an activation, sqrt(3 / fan in) in a projection
        head.convolutions.convs[0]: (6 / 18) ** 0.5,
        head.fusion.projections[0]: (3 / 40) ** 0.5,
        head.fusion.projections[1]: (3 / 4) ** 0.5,
        head.linears[0]: (6 / 200) ** 0.5,
    }
    for layer, bound in bounds.items():
        assert 0.97 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()
    for layer in (head.output, head.fusion.gate):
        assert not layer.weight.any()
        assert not layer.bias.any()
    for norm in (head.convolutions.norms[0], head.norms[0]):
        assert (norm.weight == 1).all()
        assert (norm.running_var == 1).all()
        assert not norm.bias.any()
        assert not norm.running_mean.any()


@pytest.mark.parametrize(
    ("config", "inputs", "width"),
    [
        (HeadConfig(fuse="add"), (*INPUTS, LOCAL), 5),
        (HeadConfig(fuse="add", fuse_width=9), (*INPUTS, LOCAL), 9),
        (HeadConfig(fuse="gate"), (HeadInput(("wide",), (1000,)), LOCAL), 256),
        (HeadConfig("conv", channels=(3,), fuse="gate"), (MAP, LOCAL), 4),
    ],
)
def test_inputs_are_fused_at_the_largest_width_up_to_a_limit(config: HeadConfig, inputs: tuple, width: int) -> None:
    assert Head(config, inputs, 2).output.in_features == width


def test_training_mode_matters_to_batch_normalisation_alone() -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    plain = drawn(HeadConfig("mlp", (6,), dropout=0.5), INPUTS)
    torch.testing.assert_close(plain.eval()(x), plain.train()(x), rtol=0, atol=0)
    normed = drawn(HeadConfig("mlp", (6,), batch_norm=True), INPUTS)
    before = normed.norms[0].running_mean.clone()
    assert not torch.allclose(normed.eval()(x), normed.train()(x))
    assert not torch.equal(normed.norms[0].running_mean, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "ranking"),
        ("class_names", ("cat", "dog")),
        ("class_names", ("cat", "dog", "dog")),
        ("class_names", ("cat", "dog", "")),
    ],
)
def test_parts_that_contradict_each_other_are_refused(field: str, value: object) -> None:
    good = make_head()
    parts = {name: getattr(good, name) for name in ("head", "task", "class_names")}
    with pytest.raises(WireError) as caught:
        TrainedHead(**{**parts, field: value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "parts",
    [
        (("pooled",), (2, 3)),
        (("pooled", "pooled"), (2, 3)),
        (("a", "pooled"), (5, 0)),
        ((), ()),
        (("a.map",), (18,), (2, 3)),
        (("a.map",), (17,), (2, 3, 3)),
        (("a.map", "b"), (18, 1), (2, 3, 3)),
    ],
)
def test_an_input_that_makes_no_sense_is_refused(parts: tuple) -> None:
    with pytest.raises(WireError) as caught:
        HeadInput(*parts)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (HeadConfig("conv", channels=(4,)), INPUTS, "reads a map"),
        (HeadConfig(), (MAP,), "kind 'linear'"),
        (HeadConfig("conv", channels=(4,)), (MAP, MAP), "only the first"),
        (HeadConfig(), (), "at least one"),
    ],
)
def test_a_head_whose_inputs_do_not_fit_is_refused(config: HeadConfig, inputs: tuple, message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        Head(config, inputs, 2)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def drawn(config: HeadConfig, inputs: tuple[HeadInput, ...], outputs: int = 3) -> Head:
    """Return a head in which every number matters."""
    head = Head(config, inputs, outputs)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, one in head.state_dict().items():
            values = torch.randn(one.shape, generator=draw)
            one.copy_(values.abs() + 0.5 if name.endswith(("scale", "running_var")) else values)
    return head.eval()


def test_added_inputs_are_what_numpy_computes() -> None:
    head = drawn(HeadConfig("mlp", (6,), fuse="add", fuse_width=7), (*INPUTS, LOCAL))
    state = {name: one.numpy() for name, one in head.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    z = (x - state["mean"]) / state["scale"]
    added = sum(
        part @ state[f"fusion.projections.{index}.weight"].T + state[f"fusion.projections.{index}.bias"]
        for index, part in enumerate((z[:, :5], z[:, 5:]))
    )
    hidden = np.maximum(added @ state["layers.0.weight"].T + state["layers.0.bias"], 0)
    expected = hidden @ state["layers.1.weight"].T + state["layers.1.bias"]
    np.testing.assert_allclose(head(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_gate_starts_even_and_its_weights_add_up_to_one() -> None:
    head = Head(HeadConfig("linear", fuse="gate", fuse_width=6), (*INPUTS, LOCAL), 2)
    head.reset_parameters(torch.Generator().manual_seed(0))
    left, right = torch.randn(3, 5), torch.randn(3, 4)
    projections = head.fusion.projections
    even = (projections[0](left) + projections[1](right)) / 2
    torch.testing.assert_close(head.fusion([left, right]), even)
    with torch.no_grad():
        head.fusion.gate.bias[:6] = 50.0  # all of the weight to the first input
    torch.testing.assert_close(head.fusion([left, right]), projections[0](left))


def test_a_fusion_of_a_single_input_is_none() -> None:
    assert Head(HeadConfig("mlp", (6,), fuse="add"), INPUTS, 2).fusion is None


def test_a_convolutional_head_is_what_torch_computes() -> None:
    head = drawn(HeadConfig("conv", channels=(5, 4), hidden=(3,), batch_norm=True, activation="gelu"), (MAP, LOCAL))
    x = torch.randn(2, 22, generator=torch.Generator().manual_seed(0))
    state = head.state_dict()
    image = x[:, :18].view(2, 2, 3, 3)
    image = (image - state["mean"][:2, None, None]) / state["scale"][:2, None, None]

    def norm(value: torch.Tensor, name: str) -> torch.Tensor:
        shape = (-1, *(1,) * (value.ndim - 2))
        mean, var, weight, bias = (
            state[f"{name}.{one}"].view(shape) for one in ("running_mean", "running_var", "weight", "bias")
        )
        return (value - mean) / (var + 1e-5).sqrt() * weight + bias

    for index in range(2):
        weight, bias = (state[f"convolutions.convs.{index}.{one}"] for one in ("weight", "bias"))
        image = torch.nn.functional.conv2d(image, weight, bias, padding=1)
        image = torch.nn.functional.gelu(norm(image, f"convolutions.norms.{index}"))
    local = (x[:, 18:] - state["mean"][2:]) / state["scale"][2:]
    joined = torch.cat([image.mean(dim=(2, 3)), local], dim=1)
    hidden = torch.nn.functional.linear(joined, state["layers.0.weight"], state["layers.0.bias"])
    hidden = torch.nn.functional.gelu(norm(hidden, "norms.0"))
    expected = torch.nn.functional.linear(hidden, state["layers.1.weight"], state["layers.1.bias"])
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-4)


def test_a_prototype_head_looks_at_directions_alone() -> None:
    head = drawn(HeadConfig("prototype"), INPUTS)
    with torch.no_grad():
        head.mean.zero_()
    x = torch.randn(3, 5)
    torch.testing.assert_close(head(x), head(7.0 * x))
    assert torch.isfinite(head(torch.zeros(1, 5))).all()


CONFIGS = [
    (HeadConfig(kind, hidden, activation, batch_norm, 0.2 if hidden else 0.0, channels, fuse=fuse), inputs)
    for kind, hidden, channels, inputs in (
        ("linear", (), (), (*INPUTS, LOCAL)),
        ("mlp", (6, 5), (), (*INPUTS, LOCAL)),
        ("conv", (6,), (4,), (MAP, LOCAL)),
        ("prototype", (), (), (*INPUTS, LOCAL)),
    )
    for fuse in (("concat",) if kind == "prototype" else ("concat", "add", "gate"))
    for activation in ("relu", "gelu")
    for batch_norm in ((False, True) if hidden else (False,))
]


@pytest.mark.parametrize(("config", "inputs"), CONFIGS)
def test_rows_do_not_influence_one_another(config: HeadConfig, inputs: tuple[HeadInput, ...]) -> None:
    head = TrainedHead(drawn(config, inputs), "multi_label", ("a", "b", "c"))
    x = torch.randn(5, head.num_features, generator=torch.Generator().manual_seed(1))
    together = head.predict(x)
    torch.testing.assert_close(torch.cat([head.predict(row[None]) for row in x]), together, rtol=0, atol=1e-6)
    assert ((together >= 0) & (together <= 1)).all()


@pytest.mark.parametrize(("config", "inputs"), CONFIGS)
def test_a_head_of_any_kind_survives_the_round_trip(config: HeadConfig, inputs: tuple[HeadInput, ...]) -> None:
    head = TrainedHead(drawn(config, inputs), "regression", ())
    back = head_from_bytes(head_to_bytes(head))
    x = torch.randn(3, head.num_features, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back.predict(x), head.predict(x))
    assert (back.config, back.inputs, back.more_width) == (head.config, head.inputs, 4)


@pytest.mark.parametrize(("config", "inputs"), CONFIGS)
def test_every_weight_is_penalised_and_every_number_is_float32(
    config: HeadConfig, inputs: tuple[HeadInput, ...]
) -> None:
    head = Head(config, inputs, 2)
    weights = {id(one) for name, one in head.named_parameters() if one.ndim > 1}
    assert {id(one) for one in head.penalised} == weights
    assert {one.dtype for one in head.state_dict().values()} == {torch.float32}


def test_multi_label_needs_a_name_for_each_output() -> None:
    with pytest.raises(WireError, match="2 class names do not fit 3"):
        TrainedHead(drawn(HeadConfig(), INPUTS), "multi_label", ("a", "b"))
    assert TrainedHead(drawn(HeadConfig(), INPUTS, 1), "multi_label", ("a",)).num_outputs == 1
