"""What is kept of a training for its report."""

from __future__ import annotations

import json

import numpy as np
import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import registry_pb2 as pb
from trunkline_worker.serving.servicers.records import evaluation_to_proto
from trunkline_worker.store import evaluations
from trunkline_worker.store.evaluations import (
    Evaluation,
    LabelSuspect,
    evaluation_from_bytes,
    evaluation_to_bytes,
    sample,
)

CURVES = {"loss": [1.0, 0.5, 0.25], "validation_loss": [1.5, 1.0]}
SUSPECTS = (LabelSuspect(7, 0, 2, 0.5), LabelSuspect(3, 1, 0, 0.25))


def evaluation(*, numbers: bool = False, num_rows: int = 6) -> Evaluation:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(num_rows, 2)) if numbers else np.arange(num_rows) % 3
    answers = draw.normal(size=(num_rows, 2 if numbers else 3)).astype(np.float32)
    return sample(np.arange(num_rows) * 2, truth, answers, CURVES, SUSPECTS)


@pytest.mark.parametrize("numbers", [False, True])
def test_there_and_back(numbers: bool) -> None:
    one = evaluation(numbers=numbers)
    data = evaluation_to_bytes(one)
    back = evaluation_from_bytes(data)
    np.testing.assert_array_equal(back.rows, one.rows)
    np.testing.assert_array_equal(back.answers, one.answers)
    assert (back.classes is None) == numbers
    assert (back.targets is None) != numbers
    assert dict(back.curves) == CURVES
    assert back.suspects == SUSPECTS
    assert back.num_held_out == 6
    assert evaluation_to_bytes(back) == data


def test_many_rows_and_points_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "MAX_ROWS", 10)
    monkeypatch.setattr(evaluations, "MAX_POINTS", 5)
    rows = np.arange(1000) * 3
    answers = np.arange(2000, dtype=np.float32).reshape(1000, 2)
    one = sample(rows, np.arange(1000), answers, {"loss": list(np.arange(100.0))}, ())
    assert len(one.rows) == 10
    assert (one.rows[0], one.rows[-1], one.num_held_out) == (0, 2997, 1000)
    assert one.classes is not None
    np.testing.assert_array_equal(one.rows, one.classes * 3)
    np.testing.assert_array_equal(one.answers[:, 0], one.classes * 2)
    assert list(one.curves["loss"]) == [0.0, 25.0, 50.0, 74.0, 99.0]
    monkeypatch.setattr(evaluations, "MAX_CELLS", 8)
    assert len(sample(rows, np.arange(1000), answers, {}, ()).rows) == 4


def test_no_rows_held_out() -> None:
    one = sample(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 1), np.float32), CURVES, ())
    back = evaluation_from_bytes(evaluation_to_bytes(one))
    assert (len(back.rows), back.num_held_out) == (0, 0)
    message = evaluation_to_proto(back)
    assert not message.HasField("answers")
    assert [curve.name for curve in message.curves] == ["loss", "validation_loss"]


def test_a_message_says_the_same() -> None:
    one = evaluation()
    message = pb.Evaluation.FromString(evaluation_to_proto(one).SerializeToString())
    assert list(message.rows) == [0, 2, 4, 6, 8, 10]
    assert list(message.classes) == [0, 1, 2, 0, 1, 2]
    assert not message.HasField("targets")
    np.testing.assert_array_equal(np.frombuffer(message.answers.data, "<f4").reshape(6, 3), one.answers)
    assert [(suspect.row, suspect.given, suspect.suggested) for suspect in message.suspects] == [(7, 0, 2), (3, 1, 0)]


@pytest.mark.parametrize("damage", ["short", "no metadata", "other metadata", "not a file"])
def test_damaged_files_are_refused(damage: str) -> None:
    data = evaluation_to_bytes(evaluation())
    if damage == "short":
        data = data[:-8]
    elif damage == "no metadata":
        header = json.dumps({"rows": {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}}).encode()
        data = len(header).to_bytes(8, "little") + header
    elif damage == "other metadata":
        data = data.replace(b"num_held_out", b"num_held_our")
    else:
        data = b"nothing"
    with pytest.raises(WireError) as caught:
        evaluation_from_bytes(data)
    assert caught.value.code is ErrorCode.CORRUPT_DATA
