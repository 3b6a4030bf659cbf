from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.store.evaluations import LabelSuspect
from trunkline_worker.training import softmax
from trunkline_worker.training.split import folds
from trunkline_worker.training.trust.suspects import cross_validated_probabilities, find_suspects

# N = rows, D = columns, K = classes


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are small: beside other work, threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(
    num_rows: int, num_columns: int, num_classes: int, seed: int = 0, distance: float = 1.0
) -> tuple[torch.Tensor, np.ndarray]:
    """Return standardised rows around class centres."""
    draw = np.random.default_rng(seed)
    classes = draw.integers(num_classes, size=num_rows)
    x = draw.normal(size=(num_rows, num_columns)) + distance * draw.normal(size=(num_classes, num_columns))[classes]
    return torch.from_numpy((x - x.mean(axis=0)) / x.std(axis=0)).float(), classes


def flipped(classes: np.ndarray, share: float, num_classes: int, seed: int) -> tuple[np.ndarray, set[int]]:
    """Return other labels, and where they are wrong."""
    draw = np.random.default_rng(seed)
    rows = draw.permutation(len(classes))[: round(share * len(classes))]
    given = classes.copy()
    given[rows] = (given[rows] + draw.integers(1, num_classes, size=len(rows))) % num_classes
    return given, set(rows.tolist())


# --- which labels are doubtful ----------------------------------------------------------------------------------------


# What lies between the classes stays undoubted.
@pytest.mark.parametrize(("shape", "recall"), [((600, 20), 0.7), ((200, 400), 0.9)])
@pytest.mark.parametrize("seed", range(3))
def test_planted_flips_are_found(shape: tuple[int, int], recall: float, seed: int) -> None:
    x, classes = problem(*shape, 4, seed)
    given, wrong = flipped(classes, 0.06, 4, seed)
    said = cross_validated_probabilities(x, given, 4, 0.03 * shape[1], np.random.default_rng(seed))
    suspects = find_suspects(said, given)
    found = {one.row for one in suspects}
    assert len(found & wrong) / len(wrong) > recall
    assert len(found & wrong) / len(found) > 0.85
    assert all(one.given == given[one.row] for one in suspects)
    hits = [one for one in suspects if one.row in wrong]
    assert np.mean([one.suggested == classes[one.row] for one in hits]) > 0.95
    margins = [one.margin for one in suspects]
    assert margins == sorted(margins, reverse=True)
    # The wrong ones come first.
    assert np.mean([one.row in wrong for one in suspects[: len(wrong) // 2]]) > 0.9


def test_right_labels_are_hardly_doubted() -> None:
    x, classes = problem(600, 20, 4)
    said = cross_validated_probabilities(x, classes, 4, 0.6, np.random.default_rng(0))
    assert len(find_suspects(said, classes)) <= 6


def test_thresholds_by_hand() -> None:
    said = torch.tensor(
        [
            [0.9, 0.1, 0.0],  # the threshold of class 0 is (0.9 + 0.5 + 0.1) / 3 = 0.5
            [0.5, 0.4, 0.1],
            [0.1, 0.8, 0.1],  # of class 1 it is (0.7 + 0.5 + 0.45) / 3 = 0.55: sure of class 1, given 0
            [0.3, 0.7, 0.0],
            [0.5, 0.5, 0.0],  # sure of class 0, but no surer than of the class given
            [0.52, 0.45, 0.03],  # sure of class 0
        ]
    ).double()
    suspects = find_suspects(said, np.array([0, 0, 0, 1, 1, 1]))
    assert [(one.row, one.given, one.suggested) for one in suspects] == [(2, 0, 1), (5, 1, 0)]
    assert [one.margin for one in suspects] == pytest.approx([0.7, 0.07])


def test_a_class_of_no_row_or_one_is_left_alone() -> None:
    said = torch.tensor([[0.1, 0.0, 0.9], [0.1, 0.0, 0.9], [0.2, 0.0, 0.8], [0.9, 0.1, 0.0]]).double()
    # Class 2 has no row, class 1 a single one.
    assert find_suspects(said, np.array([0, 0, 0, 1])) == []
    assert find_suspects(torch.zeros(0, 3), np.zeros(0, np.int64)) == []
    two = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert find_suspects(two, np.array([0, 0, 0, 1, 1])) == [LabelSuspect(0, 0, 1, 1.0)]


# --- probabilities of rows left out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(90, 15), (60, 200)])
def test_probabilities_are_those_of_scikit_learn_on_the_same_folds(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "_LOOSE", 1e-11)
    x, classes = problem(*shape, 3, distance=0.5)
    ours = cross_validated_probabilities(x, classes, 3, 5.0, np.random.default_rng(4))
    fold = folds(classes, len(x), 5, np.random.default_rng(4))
    for one in range(5):
        theirs = LogisticRegression(C=1 / 5.0, tol=1e-9, max_iter=5000).fit(
            x[fold != one].double(), classes[fold != one]
        )
        np.testing.assert_allclose(ours[fold == one], theirs.predict_proba(x[fold == one].double()), atol=1e-4)


def test_no_row_has_seen_its_own_label() -> None:
    """With more columns than rows any labels can be learnt by heart."""
    x, _ = problem(300, 600, 2)
    noise = np.random.default_rng(1).integers(2, size=300)
    said = cross_validated_probabilities(x, noise, 2, 1.0, np.random.default_rng(0))
    assert 0.35 < float((said.argmax(dim=1).numpy() == noise).mean()) < 0.65


def test_classes_without_rows_get_nothing_and_a_row_alone_is_not_judged() -> None:
    x, classes = problem(60, 5, 2)
    classes = classes * 2  # 0 and 2 of 0 to 4
    classes[7] = 3
    said = cross_validated_probabilities(x, classes, 5, 1.0, np.random.default_rng(0))
    assert said.dtype == torch.float64
    np.testing.assert_allclose(said.sum(dim=1), 1.0)
    np.testing.assert_allclose(said[7], 0.2)
    others = torch.arange(60) != 7
    assert bool((said[others][:, [1, 4]] == 0).all())
    assert 7 not in {one.row for one in find_suspects(said, classes)}


def test_one_seed_gives_one_answer_and_the_caller_can_stop_it() -> None:
    x, classes = problem(60, 5, 3)
    one, again, other = (
        cross_validated_probabilities(x, classes, 3, 1.0, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cross_validated_probabilities(x, classes, 3, 1.0, np.random.default_rng(0), check=stop)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 2**32))
def test_any_small_problem_gives_probabilities(
    num_rows: int, num_columns: int, num_classes: int, constant: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    x = torch.from_numpy(draw.normal(size=(num_rows, num_columns)))
    classes = draw.integers(num_classes, size=num_rows)
    if constant:
        x, classes = torch.zeros_like(x), np.zeros_like(classes)
    classes.flags.writeable = False
    said = cross_validated_probabilities(x, classes, num_classes, 1.0, draw)
    assert said.shape == (num_rows, num_classes)
    np.testing.assert_allclose(said.sum(dim=1), 1.0)
    for one in find_suspects(said, classes):
        assert one.given == classes[one.row] != one.suggested


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "classes", "num_folds", "code"),
    [
        (torch.full((4, 2), float("nan")), [0, 1, 0, 1], 5, ErrorCode.NOT_FINITE),
        (torch.zeros(0, 2), [], 5, ErrorCode.EMPTY_BATCH),
        (torch.zeros(1, 2), [0], 5, ErrorCode.EMPTY_BATCH),
        (torch.zeros(4, 0), [0, 1, 0, 1], 5, ErrorCode.SHAPE_MISMATCH),
        (torch.zeros(4, 2), [0, 1, 0], 5, ErrorCode.SHAPE_MISMATCH),
        (torch.zeros(4, 2), [0, 1, 0, 2], 5, ErrorCode.BAD_LABELS),
        (torch.zeros(4, 2), [0, 1, 0, 1], 1, ErrorCode.INVALID_ARGUMENT),
    ],
)
def test_rows_and_classes_are_checked(x: torch.Tensor, classes: list[int], num_folds: int, code: ErrorCode) -> None:
    with pytest.raises(WireError) as caught:
        cross_validated_probabilities(x, np.array(classes, dtype=np.int64), 2, 1.0, np.random.default_rng(0), num_folds)
    assert caught.value.code is code


def test_probabilities_are_checked() -> None:
    with pytest.raises(WireError) as caught:
        find_suspects(torch.tensor([[float("nan"), 0.5]]), np.array([0]))
    assert caught.value.code is ErrorCode.NOT_FINITE
    with pytest.raises(WireError, match="between 0 and 1"):
        find_suspects(torch.tensor([[2.0, -1.0]]), np.array([0]))
