"""Labels in whatever form."""

import numpy as np
import pytest
from trunkline.errors import BadLabelsError, PayloadTooLargeError
from trunkline.labels import ClassLabels, MultiLabels, Targets, encode_labels, encode_memberships, label_names


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


FLAGS = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)


@pytest.mark.parametrize(
    ("labels", "names", "values"),
    [
        ([[2, 10], [], [3]], ("2", "3", "10"), FLAGS),
        ([(2, 10), (), (3,)], ("2", "3", "10"), FLAGS),
        ([{"a", "c"}, set(), {"b"}], ("a", "b", "c"), FLAGS),
        ([frozenset("ac"), [], ("b", "b")], ("a", "b", "c"), FLAGS),
        ([[np.int64(2), 10], [], [3]], ("2", "3", "10"), FLAGS),
        ([np.array([2, 10]), np.array([], int), np.array([3])], ("2", "3", "10"), FLAGS),
        ([["a", "c"], ["a", "c"], ["a", "c"]], ("a", "c"), np.ones((3, 2))),
        ([[1, 2], [1, 2], [2, 1]], ("1", "2"), np.ones((3, 2))),
        (iter([[2, 10], [], [3]]), ("2", "3", "10"), FLAGS),
        (FLAGS, ("0", "1", "2"), FLAGS),
        (FLAGS.tolist(), ("0", "1", "2"), FLAGS),
        (list(FLAGS), ("0", "1", "2"), FLAGS),
    ],
    ids=range(12),
)
def test_several_classes(labels, names, values):
    found = encode_labels(labels, 3)
    assert isinstance(found, MultiLabels)
    assert found.names == names and found.values_NK.dtype == np.uint8
    np.testing.assert_array_equal(found.values_NK, values)


def test_several_classes_in_a_table():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(FLAGS, columns=["cat", "dog", "owl"])
    found = encode_labels(table, 3)
    assert found.names == ("cat", "dog", "owl")
    np.testing.assert_array_equal(found.values_NK, FLAGS)
    assert encode_labels(pandas.Series([["b"], [], ["a", "b"]]), 3).values_NK.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert isinstance(encode_labels(pandas.DataFrame({"x": [0.5, 1.0], "y": [1.0, 2.0]}), 2), Targets)
    for columns in (["a", "a", "b"], ["a", "", "b"]):
        with pytest.raises(BadLabelsError, match="two classes have the same name, or one has none"):
            encode_labels(pandas.DataFrame(FLAGS, columns=columns), 3)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([["a"], ["b"]], "2 labels for 3 images"),
        (FLAGS[:2], "2 labels for 3 images"),
        ([[], [], []], "no row is of any class"),
        (np.zeros((3, 2), bool), "no row is of any class"),
        ([["a"], [None], []], "row 1 is missing"),
        ([["a"], [""], []], "row 1 is missing"),
        ([["a"], [b"b"], []], "row 1 is a bytes"),
        ([["a"], [1], []], "some labels are text"),
        ([["a"], "b", ["c"]], "is a list"),
        ([["a"], None, ["c"]], "is a list"),
        ([["x" * 513], [], []], "has 513 characters; at most 512"),
    ],
    ids=range(11),
)
def test_what_are_no_several_classes(labels, said):
    with pytest.raises(BadLabelsError, match=said):
        encode_labels(labels, 3)


def test_labels_that_do_not_fit_a_message():
    with pytest.raises(PayloadTooLargeError, match="at most"):
        encode_labels([[str(row)] for row in range(6000)], 6000)


def test_memberships_by_the_model_s_classes():
    names = ("cat", "dog", "owl")
    assert encode_memberships([["owl"], [], ["dog", "cat"]], 3, names).tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert encode_memberships([[], []], 2, names).tolist() == [[0, 0, 0]] * 2
    np.testing.assert_array_equal(encode_memberships(FLAGS, 3, names), FLAGS)
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(FLAGS[:, :2], columns=["owl", "cat"])
    assert encode_memberships(table, 3, names).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([["cow"], []], "knows no class 'cow'"),
        ([["cat"]], "1 labels for 2"),
        (["cat", "dog"], "one label a row does not say that"),
        ([0.5, 1.0], "one label a row"),
        (FLAGS[:2, :2], r"booleans of shape \(2, 2\); \(2, 3\) is needed"),
    ],
    ids=range(5),
)
def test_what_are_no_memberships(labels, said):
    with pytest.raises(BadLabelsError, match=said):
        encode_memberships(labels, 2, ("cat", "dog", "owl"))
