"""Groups in whatever form they are given, and what is refused."""

import numpy as np
import pytest
from trunkline.errors import InvalidArgumentError
from trunkline.groups import encode_groups
from trunkline.images import grouped


@pytest.mark.parametrize(
    "groups",
    [
        ["x", "y", "x", "z"],
        (7, -1, 7, 2**70),
        np.array([3, 1, 3, 2]),
        np.array(["b", "a", "b", "c"]),
        np.array([0.5, 0.25, 0.5, 0.75]),
        [("p", 1), ("p", 2), ("p", 1), ("q", 1)],
        [np.int64(4), np.int64(3), 4, 5],
        (one for one in "abac"),
    ],
)
def test_what_is_alike_gets_one_number(groups):
    assert encode_groups(groups, 4).tolist() == [0, 1, 0, 2]
    assert encode_groups(None, 4) is None


def test_columns_of_tables():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(
        {"path": list("abcd"), "who": ["x", "y", "x", "z"], "when": pandas.to_datetime([1, 2, 1, 3])}
    )
    for groups in (table["who"], table["when"], table["who"].astype("category"), grouped(table, "who")):
        assert encode_groups(groups, 4).tolist() == [0, 1, 0, 2]
    with pytest.raises(InvalidArgumentError, match="row 1 is missing"):
        encode_groups(pandas.Series(["x", None, "y", "z"]), 4)
    with pytest.raises(InvalidArgumentError, match="row 1 is missing"):
        encode_groups(pandas.array([1, None, 2, 3], dtype="Int64"), 4)
    with pytest.raises(InvalidArgumentError, match="row 1 is missing"):
        encode_groups(pandas.to_datetime(pandas.Series(["2024-01-01", None, "2024-01-02", "2024-01-03"])), 4)
    with pytest.raises(InvalidArgumentError, match="no column of groups: it has path, who, when"):
        grouped(table, "patient")


def test_columns_of_polars():
    polars = pytest.importorskip("polars")
    assert encode_groups(polars.Series(["x", "y", "x", "z"]), 4).tolist() == [0, 1, 0, 2]
    assert encode_groups(grouped(polars.DataFrame({"path": list("abcd"), "g": [3, 1, 3, 2]}), "g"), 4).tolist() == [
        0,
        1,
        0,
        2,
    ]


def test_columns_of_pyarrow():
    pyarrow = pytest.importorskip("pyarrow")
    assert encode_groups(pyarrow.array(["x", "y", "x", "z"]), 4).tolist() == [0, 1, 0, 2]
    assert encode_groups(pyarrow.chunked_array([["x", "y"], ["x", "z"]]), 4).tolist() == [0, 1, 0, 2]
    with pytest.raises(InvalidArgumentError, match="row 2 is missing"):
        encode_groups(pyarrow.array(["x", "y", None, "z"]), 4)


def test_a_column_of_a_csv_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("path,label,patient\na.png,x,p1\nb.png,y,p2\nc.png,x,p1\n")
    assert grouped(path, "patient") == grouped(str(path), "patient") == ["p1", "p2", "p1"]
    with pytest.raises(InvalidArgumentError, match="no column of groups"):
        grouped(path, "camera")
    path.write_text("path,label,patient\na.png,x,p1\nb.png,y,\n")
    with pytest.raises(InvalidArgumentError, match="row 1 is missing"):
        encode_groups(grouped(path, "patient"), 2)
    with pytest.raises(InvalidArgumentError, match="groups names a column, 'patient', and the images are no table"):
        grouped(tmp_path, "patient")


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ([1, 2, 3], "3 groups for 4 rows"),
        ([1, 2, 3, 4, 5], "5 groups for 4 rows"),
        ([1, None, 2, 3], "the group of row 1 is missing"),
        ([1.0, 2.0, float("nan"), 3.0], "the group of row 2 is missing"),
        (np.array([1, np.nan, 2, 3]), "the group of row 1 is missing"),
        ([[1], [2], [1], [3]], "the group of row 0 is a list, which cannot be compared"),
        (np.zeros((4, 2)), "is a list, which cannot be compared"),
        ([1, 1, 1, 1], "all 4 rows are in one group"),
        ("abcd", "groups is 'abcd'; a name of a column needs a table"),
        (7, "groups is a int; expected a list"),
    ],
)
def test_what_is_refused(groups, match):
    with pytest.raises(InvalidArgumentError, match=match) as caught:
        encode_groups(groups, 4)
    assert caught.value.hint
