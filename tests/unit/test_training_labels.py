import numpy as np
import pytest
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.training.labels import Labels, check_embedding, check_labels

TWO = ("cat", "dog")


def classes(*values: int, names: tuple[str, ...] = TWO) -> Labels:
    return Labels(names, np.array(values))


@pytest.mark.parametrize(
    ("labels", "rows", "hold_out", "code", "words"),
    [
        (classes(0, 1), 0, False, ErrorCode.EMPTY_BATCH, "no rows"),
        (Labels(), 3, False, ErrorCode.BAD_LABELS, "no labels"),
        (Labels(TWO), 3, False, ErrorCode.BAD_LABELS, "no class per row"),
        (classes(0, 1), 3, False, ErrorCode.BAD_LABELS, r"3 rows but labels of shape \(2,\)"),
        (Labels(TWO, np.array([0.0, 1.0])), 2, False, ErrorCode.BAD_LABELS, "whole numbers"),
        (classes(0, 1, 2), 3, False, ErrorCode.BAD_LABELS, "row 2 is of class 2"),
        (classes(0, -1), 2, False, ErrorCode.BAD_LABELS, "row 1 is of class -1"),
        (classes(1, 1, 1), 3, False, ErrorCode.BAD_LABELS, "every row is of class 'dog'"),
        (classes(0, 0, 1, names=("cat", "dog", "hen")), 3, False, ErrorCode.BAD_LABELS, "'hen'"),
        (classes(0, 0, 1), 3, True, ErrorCode.BAD_LABELS, "'dog' has a single row"),
        (Labels((), None, np.zeros((2, 1), np.float32)), 3, False, ErrorCode.BAD_LABELS, "3 rows but targets"),
        (Labels((), None, np.zeros(3, np.float32)), 3, False, ErrorCode.BAD_LABELS, "outputs"),
        (Labels((), None, np.array([[0.0], [np.nan]], np.float32)), 2, False, ErrorCode.NOT_FINITE, "row 1"),
        (Labels((), None, np.zeros((2, 1), np.float32)), 2, True, ErrorCode.BAD_LABELS, "at least 3"),
        (Labels(TWO, None, np.zeros((2, 1), np.float32)), 2, False, ErrorCode.BAD_LABELS, "one column per class"),
    ],
)
def test_bad_labels_are_named(labels: Labels, rows: int, hold_out: bool, code: ErrorCode, words: str) -> None:
    with pytest.raises(WireError, match=words) as caught:
        check_labels(labels, rows, hold_out=hold_out)
    assert caught.value.code is code


def test_good_labels_pass_unsigned_ones_too() -> None:
    check_labels(Labels(TWO, np.array([0, 1], np.uint32)), 2, hold_out=False)
    check_labels(classes(0, 0, 1, 1), 4, hold_out=True)
    check_labels(Labels((), np.array([], np.uint32), np.zeros((3, 2), np.float32)), 3, hold_out=True)


def test_a_bad_row_deep_inside_an_embedding_is_named() -> None:
    embedding = torch.zeros(40_000, 500)
    embedding[38_001, 499] = float("inf")
    with pytest.raises(WireError, match="row 38001") as caught:
        check_embedding(embedding, 40_000, 500)
    assert caught.value.code is ErrorCode.NOT_FINITE


@pytest.mark.parametrize(
    ("embedding", "rows", "code"),
    [
        (torch.zeros(3), 3, ErrorCode.SHAPE_MISMATCH),
        (torch.zeros(3, 2, dtype=torch.int32), 3, ErrorCode.SHAPE_MISMATCH),
        (torch.zeros(3, 1), 3, ErrorCode.SHAPE_MISMATCH),
        (torch.zeros(3, 2), 4, ErrorCode.BAD_LABELS),
    ],
)
def test_an_embedding_of_the_wrong_shape_is_refused(embedding: torch.Tensor, rows: int, code: ErrorCode) -> None:
    with pytest.raises(WireError) as caught:
        check_embedding(embedding, rows, 2)
    assert caught.value.code is code
