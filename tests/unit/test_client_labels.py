"""Labels in whatever form."""

import numpy as np
import pytest
from trunkline.errors import BadLabelsError
from trunkline.labels import ClassLabels, Targets, encode_labels, label_names


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        ([2, 10, 2], ("2", "10"), [0, 1, 0]),
        (np.array([2, 10, 2], np.int64), ("2", "10"), [0, 1, 0]),
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (np.array(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
        ([True, False, True], ("0", "1"), [1, 0, 1]),
        (np.array(["b", "a", "b"], dtype=object), ("a", "b"), [1, 0, 1]),
    ],
)
def test_classes(labels, names, indices):
    found = encode_labels(labels, 3)
    assert isinstance(found, ClassLabels)
    assert found.names == names and found.indices_N.tolist() == indices and found.indices_N.dtype == np.uint32


@pytest.mark.parametrize(
    ("labels", "shape"),
    [
        ([0.5, 1.5], (2, 1)),
        (np.array([1.0, 2.0]), (2, 1)),
        (np.ones((2, 3), np.float16), (2, 3)),
        ([[0.5, 1], [2, 3]], (2, 2)),
    ],
)
def test_numbers(labels, shape):
    found = encode_labels(labels, 2)
    assert isinstance(found, Targets)
    assert found.values_NM.shape == shape and found.values_NM.dtype == np.float32


def test_pandas():
    pandas = pytest.importorskip("pandas")
    assert encode_labels(pandas.Series(["x", "y"]), 2).names == ("x", "y")
    assert encode_labels(pandas.Series(["x", "y"], dtype="category"), 2).names == ("x", "y")
    with pytest.raises(BadLabelsError, match="row 1 is missing"):
        encode_labels(pandas.Series(["x", None]), 2)
    with pytest.raises(BadLabelsError, match="missing"):
        encode_labels(pandas.Series([1, None], dtype="Int64"), 2)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1], "2 labels for 3 images"),
        (["a", None, "b"], "row 1 is missing"),
        ([0, None, 1], "row 1 is missing"),
        (["a", float("nan"), "b"], "row 1 is missing"),
        (["a", "", "b"], "row 1 is missing"),
        ([1, 1, 1], "nothing to tell apart"),
        (["a"] * 3, "nothing to tell apart"),
        ([1, "a", 2], "some labels are text"),
        ([0.5, float("nan"), 1.0], "row 1"),
        ([0.5, float("inf"), 1.0], "row 1"),
        (np.zeros((3, 2), int), "class labels must be"),
        (np.zeros((3, 2, 2)), "must be .N,. or"),
        ([[1.0], [2.0, 3.0], [1.0]], "unequal length"),
        ([b"a", b"b", b"c"], "is a bytes"),
        (np.array(3), "1 labels for 3"),
    ],
)
def test_what_are_no_labels(labels, said):
    with pytest.raises(BadLabelsError, match=said):
        encode_labels(labels, 3)


def test_names():
    assert label_names([3, 4]) == ["3", "4"] and label_names(np.array(["x"])) == ["x"]
    with pytest.raises(BadLabelsError):
        label_names([0.5])
    with pytest.raises(BadLabelsError):
        label_names([None])
