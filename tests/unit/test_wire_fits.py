"""What training minimises, as it is declared."""

from __future__ import annotations

import re
from typing import Any

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import (
    BATCH_NORM_ADAPT,
    HIGHER_IS_BETTER,
    LOSSES,
    LOWER_IS_BETTER,
    FineTuneConfig,
    LossConfig,
    OptimiserConfig,
    check_metric,
    goodness,
    is_metric,
)
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, REGRESSION, TASKS
from trunkline_wire.job_messages import fine_tune_from_proto, fine_tune_to_proto
from trunkline_wire.v1 import training_pb2 as pb

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"kind": "l1"}, "one of auto, cross_entropy"),
        ({"huber_delta": 0.0}, "above 0"),
        ({"huber_delta": NAN}, "above 0"),
        ({"quantile": 0.0}, "below 1"),
        ({"quantile": NAN}, "below 1"),
        ({"focal_gamma": -1.0}, "0 to 10"),
        ({"label_smoothing": 1.0}, "below 1"),
        ({"class_weights": (1.0, -1.0)}, "got -1.0"),
        ({"class_weights": (1.0, NAN)}, "got nan"),
        ({"class_weights": (INFINITY,)}, "got inf"),
        ({"class_weights": (0.0, 0.0)}, "no row would count"),
        ({"class_weights": (1.0,), "balanced": True}, "not both"),
        ({"class_order": ("a", "b", "a")}, "twice"),
        ({"class_order": ("a", "b")}, "at least 3"),
        ({"class_order": ("a", "b", "c"), "kind": "focal"}, "no focal loss"),
        ({"class_order": ("a", "b", "c"), "label_smoothing": 0.1}, "no label smoothing"),
    ],
    ids=str,
)
def test_losses_that_cannot_be(values: dict[str, Any], what: str) -> None:
    with pytest.raises(WireError, match=re.escape(what)) as caught:
        LossConfig(**values)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"warmup": 1.0}, "below 1"),
        ({"warmup": NAN}, "below 1"),
        ({"clip_norm": -1.0}, "0 for any"),
        ({"ema": 1.0}, "below 1"),
        ({"precision": "int8"}, "one of float32, bfloat16, float16"),
        ({"patience": -1}, "number of epochs"),
    ],
    ids=str,
)
def test_optimisers_that_cannot_be(values: dict[str, Any], what: str) -> None:
    with pytest.raises(WireError, match=re.escape(what)):
        OptimiserConfig(**values)


@pytest.mark.parametrize(
    ("task", "known"),
    [
        (CLASSIFICATION, {"auto": "cross_entropy", "cross_entropy": "cross_entropy", "focal": "focal"}),
        (MULTI_LABEL, {"auto": "cross_entropy", "cross_entropy": "cross_entropy", "focal": "focal"}),
        (ORDINAL, {"auto": "cross_entropy", "cross_entropy": "cross_entropy"}),
        (REGRESSION, {"auto": "mse", "mse": "mse", "huber": "huber", "quantile": "quantile"}),
    ],
)
def test_a_loss_is_one_of_its_task(task: str, known: dict[str, str]) -> None:
    for kind in LOSSES:
        if kind in known:
            assert LossConfig(kind).kind_for(task) == known[kind]
        else:
            with pytest.raises(WireError, match=f"'{kind}' is not one for"):
                LossConfig(kind).kind_for(task)


@pytest.mark.parametrize("values", [{"balanced": True}, {"class_weights": (1.0,)}, {"label_smoothing": 0.1}], ids=str)
def test_numbers_have_no_classes_to_weigh(values: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="are for classes"):
        LossConfig(**values).kind_for(REGRESSION)


def test_metrics() -> None:
    for task in TASKS:
        names = [*HIGHER_IS_BETTER[task], *LOWER_IS_BETTER[task]]
        assert len(set(names)) == len(names)
        for name in names:
            check_metric(name, task)
            assert is_metric(name)
            assert goodness(name, task, 0.5) == (0.5 if name in HIGHER_IS_BETTER[task] else -0.5)
    check_metric("", CLASSIFICATION)
    with pytest.raises(WireError, match="'rmse' is not a metric of classes; one of accuracy"):
        check_metric("rmse", CLASSIFICATION)
    assert not is_metric("luck")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"lora_rank": -1}, "the rank"),
        ({"epochs": 100_000}, "epochs"),
        ({"batch_size": -1}, "batches"),
        ({"learning_rate": NAN}, "learning rate"),
        ({"layer_decay": 1.5}, "from stage to stage"),
        ({"weight_decay": -0.1}, "weight decay"),
        ({"batch_norm": "off"}, "frozen, adapt"),
        ({"min_workers": 0}, "workers"),
        ({"min_workers": 3, "max_workers": 2}, "3 to 2"),
    ],
)
def test_fine_tuning_that_cannot_be(values: dict[str, Any], what: str) -> None:
    with pytest.raises(WireError, match=what) as error:
        FineTuneConfig(**values)
    assert error.value.code is ErrorCode.INVALID_ARGUMENT


def test_fine_tuning_goes_through_its_message() -> None:
    for one in (
        FineTuneConfig(),
        FineTuneConfig("blocks.4", 8, 10, 64, 1e-3, 0.5, 0.1, BATCH_NORM_ADAPT, 2, 4),
    ):
        message = fine_tune_to_proto(one)
        assert message is not None
        assert fine_tune_from_proto(message) == one
    assert fine_tune_to_proto(None) is None
    assert fine_tune_from_proto(pb.FineTuneConfig(min_workers=3)) == FineTuneConfig(min_workers=3, max_workers=3)
    with pytest.raises(WireError) as error:
        fine_tune_from_proto(pb.FineTuneConfig(batch_norm=9))  # type: ignore[arg-type]
    assert error.value.code is ErrorCode.UNSUPPORTED
