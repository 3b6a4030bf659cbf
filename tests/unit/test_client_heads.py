"""Heads and jobs as they are declared and sent, and what an old cluster would make of them."""

import re
from dataclasses import replace

import pytest
import trunkline
from trunkline import errors
from trunkline._calls.heads import head_from_message, head_to_message
from trunkline._calls.training import _spec_from_message, _spec_to_message
from trunkline.heads import head_config, head_of_kind, head_summary
from trunkline.losses import loss_config
from trunkline.training import _ignored, make_spec
from trunkline_wire.fits import OptimiserConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.v1 import training_pb2 as pb

HEADS = {
    "linear": (trunkline.Linear(), HeadConfig("linear")),
    "fused": (trunkline.Linear(fuse="gate", fuse_width=32), HeadConfig("linear", fuse="gate", fuse_width=32)),
    "mlp": (trunkline.MLP(), HeadConfig("mlp", hidden=(1024,))),
    "deep": (
        trunkline.MLP([64, 32], 0.1, activation="gelu", batch_norm=True, fuse="add"),
        HeadConfig("mlp", hidden=(64, 32), dropout=0.1, activation="gelu", batch_norm=True, fuse="add"),
    ),
    "conv": (trunkline.Conv(), HeadConfig("conv", channels=(64,))),
    "convs": (
        trunkline.Conv((8, 16), tap="layer3", hidden=(4,), dropout=0.5, batch_norm=True),
        HeadConfig("conv", channels=(8, 16), tap="layer3", hidden=(4,), dropout=0.5, batch_norm=True),
    ),
    "prototype": (trunkline.Prototype(), HeadConfig("prototype")),
}


def spec(**keywords):
    values = {
        "model": "m",
        "dataset": "d@1",
        "backbones": [],
        "input_size": 0,
        "embedding": "auto",
        "head": "linear",
        "solver": "auto",
        "loss": "auto",
        "optimiser": OptimiserConfig(),
        "select_by": "",
        "calibrate": True,
        "epochs": 0,
        "batch_size": 0,
        "learning_rate": 0.0,
        "l2": None,
        "validation": 0.2,
        "refit": True,
        "seed": 0,
    }
    values |= keywords
    return make_spec(**{**values, "loss": loss_config(values["loss"])})


@pytest.mark.parametrize(("head", "config"), HEADS.values(), ids=HEADS)
def test_there_and_back(head, config):
    assert head.config == config == head_config(head)
    assert head_from_message(head_to_message(config)) == config
    assert head_summary(config).startswith(config.kind)


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "prototype"])
def test_names_stand_for_defaults(kind):
    assert head_config(kind) == HEADS[kind][1]


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("deep", "'linear', 'mlp', 'conv', 'prototype'"),
        (HeadConfig("linear"), "head is HeadConfig"),
        (trunkline.MLP(hidden=()), "at least one hidden layer"),
        (trunkline.MLP(hidden=(0,)), "1 to 65536 wide"),
        (trunkline.MLP(hidden="ab"), "widths are whole numbers"),
        (trunkline.MLP(hidden=(1.5,)), "widths are whole numbers"),
        (trunkline.MLP(hidden=7), "widths are whole numbers"),
        (trunkline.MLP(dropout=1.0), "below 1"),
        (trunkline.MLP(activation="tanh"), "activation 'tanh'"),
        (trunkline.MLP(fuse="mix"), "fusion 'mix'"),
        (trunkline.Linear(fuse_width=8), "no common width"),
        (trunkline.Conv(channels=()), "1 to 8 convolutions"),
        (trunkline.Conv(channels=(9999,)), "channels"),
    ],
    ids=str,
)
def test_what_no_head_is(head, said):
    with pytest.raises(errors.InvalidArgumentError, match=said):
        head_config(head)


def test_fields_by_name():
    assert head_of_kind("conv", {"channels": [8], "tap": "x"}) == trunkline.Conv([8], "x")
    with pytest.raises(errors.InvalidArgumentError, match="'linear' has no hidden, dropout"):
        head_of_kind("linear", {"hidden": [8], "dropout": 0.1, "fuse": "add"})
    with pytest.raises(errors.InvalidArgumentError, match="no head of kind 'deep'"):
        head_of_kind("deep", {})


@pytest.mark.parametrize(
    "message",
    [
        pb.HeadConfig(),
        pb.HeadConfig(kind=99),
        pb.HeadConfig(kind=pb.HEAD_KIND_LINEAR, activation=99),
        pb.HeadConfig(kind=pb.HEAD_KIND_LINEAR, fuse=99),
        pb.HeadConfig(kind=pb.HEAD_KIND_MLP),
    ],
    ids=str,
)
def test_head_that_this_version_does_not_know(message):
    assert head_from_message(message) is None


@pytest.mark.parametrize(
    ("head", "loss", "solver"),
    [
        ("linear", "mse", "lbfgs"),
        ("linear", "huber", "adamw"),
        (trunkline.Linear(fuse="add"), "mse", "adamw"),
        ("prototype", "mse", "lbfgs"),
        ("mlp", "mse", "adamw"),
        ("conv", "huber", "adamw"),
    ],
)
def test_solver_that_is_chosen(head, loss, solver):
    assert spec(head=head, loss=loss).fit.solver == solver


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"head": "mlp", "solver": "lbfgs"}, "linear heads on inputs side by side"),
        ({"head": "conv", "solver": "lbfgs"}, "linear heads"),
        ({"head": trunkline.Linear(fuse="gate"), "solver": "lbfgs"}, "side by side"),
        ({"head": "prototype", "solver": "adamw"}, "nothing that 'adamw' could train"),
        ({"head": "conv", "embedding": ["a"]}, "not slices of the embedding"),
        ({"loss": "l1"}, "one of auto, cross_entropy, focal, mse, huber, quantile"),
        ({"loss": trunkline.Loss("huber", huber_delta=0.0)}, "above 0"),
        ({"loss": trunkline.Loss("huber", huber_delta=float("inf"))}, "above 0"),
        ({"loss": trunkline.Loss("quantile", quantile=1.0)}, "below 1"),
        ({"loss": trunkline.Loss("focal", focal_gamma="much")}, "wrong type"),
        ({"loss": 3}, "expected one of"),
        ({"select_by": "luck"}, "no metric 'luck'"),
        ({"backbones": ["a", "b", "a"]}, "named twice"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(keywords, said):
    with pytest.raises(errors.InvalidArgumentError, match=said):
        spec(**keywords)


def test_job_there_and_back():
    asked = spec(backbones=["a", "b", "c"], input_size=64, head="conv", loss=trunkline.Loss("huber", huber_delta=2.0))
    assert [(one.backbone, one.input_size) for one in asked.more_backbones] == [("b", 64), ("c", 64)]
    assert asked.backbone == "a"
    assert _spec_from_message(_spec_to_message(asked)) == asked
    assert _ignored(asked, asked) == ""


def test_what_a_cluster_fills_in_is_not_ignored():
    asked = spec(head="conv")
    taken = replace(
        asked, head=replace(asked.head, tap="layer4"), backbone="a", input_size=8, embedding="slices", slices=("x.map",)
    )
    assert _ignored(asked, taken) == ""
    other = spec(head=trunkline.Conv(tap="layer3"))
    assert "layer3" in _ignored(other, replace(other, head=replace(other.head, tap="layer4")))


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        (spec(backbones=["a", "b"]), "more_backbones", "several backbones"),
        (
            spec(head=trunkline.MLP((8,), batch_norm=True)),
            "batch_norm",
            r"the head \(mlp, hidden 8, relu with batch norm",
        ),
        (spec(head=trunkline.MLP((8,), activation="gelu")), "activation", "gelu"),
        (spec(head=trunkline.Linear(fuse="add")), "fuse", "fused by add"),
        (spec(loss="huber"), "loss", "the loss's kind 'huber'"),
        (spec(head="mlp", optimiser=OptimiserConfig(ema=0.5)), "ema", "the optimiser's ema 0.5"),
        (spec(select_by="roc_auc"), "select_by", "choosing by roc_auc"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_old_cluster_ignores(asked, field, said):
    message = _spec_to_message(asked)
    for part in (message, message.head, message.fit):
        if field in part.DESCRIPTOR.fields_by_name:
            part.ClearField(field)
    assert re.search(said, _ignored(asked, _spec_from_message(message)))
