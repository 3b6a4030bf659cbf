import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline_worker.training.split import FOLDS, HOLD_OUT, folds, hold_out, keep_both, random_stream, subsample

class_counts = st.lists(st.integers(min_value=2, max_value=30), min_size=2, max_size=6)


def classes_of(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@settings(deadline=None)
@given(class_counts, st.floats(min_value=0.01, max_value=0.99), st.integers(-(2**63), 2**63 - 1))
def test_every_class_is_on_both_sides_and_no_row_on_two(counts: list[int], fraction: float, seed: int) -> None:
    classes = classes_of(counts)
    training, validation = hold_out(classes, len(classes), fraction, random_stream(seed, HOLD_OUT))
    assert sorted([*training, *validation]) == list(range(len(classes)))
    assert set(classes[training]) == set(classes[validation]) == set(range(len(counts)))
    for one, count in enumerate(counts):
        held = int((classes[validation] == one).sum())
        assert held == min(max(1, round(fraction * count)), count - 1)
    again = hold_out(classes, len(classes), fraction, random_stream(seed, HOLD_OUT))
    assert np.array_equal(training, again[0])


def test_nothing_is_held_out_on_request_and_seeds_differ() -> None:
    training, validation = hold_out(None, 50, 0.0, random_stream(1, HOLD_OUT))
    assert len(training) == 50
    assert len(validation) == 0
    one, other = (hold_out(None, 50, 0.2, random_stream(seed, HOLD_OUT))[1] for seed in (1, 2))
    assert len(one) == 10
    assert not np.array_equal(one, other)


@settings(deadline=None)
@given(class_counts, st.integers(min_value=2, max_value=5))
def test_folds_are_even_and_spread_each_class(counts: list[int], num_folds: int) -> None:
    classes = classes_of(counts)
    fold = folds(classes, len(classes), num_folds, random_stream(3, FOLDS))
    sizes = np.bincount(fold, minlength=num_folds)
    assert sizes.max() - sizes.min() <= 1
    for one, count in enumerate(counts):
        inside = np.bincount(fold[classes == one], minlength=num_folds)
        assert inside.max() <= -(-count // num_folds)


def test_a_subsample_keeps_shares_and_rare_classes() -> None:
    classes = classes_of([1000, 200, 3])
    rows = subsample(classes, len(classes), 120, 10, random_stream(0, 2))
    counts = np.bincount(classes[rows])
    assert len(rows) <= 122
    assert counts.tolist() == [99, 19, 2]
    assert np.array_equal(rows, np.unique(rows))


def test_a_subsample_of_many_classes_keeps_some_of_them() -> None:
    classes = classes_of([4] * 50)
    rows = subsample(classes, len(classes), 40, 10, random_stream(0, 2))
    assert len(np.unique(classes[rows])) == 10
    assert len(rows) == 40
    assert len(subsample(None, 500, 40, 10, random_stream(0, 2))) == 40


def test_classes_of_one_row_go_last_where_classes_are_left_out() -> None:
    classes = classes_of([1] * 40 + [3] * 6)
    rows = subsample(classes, len(classes), 100, 10, random_stream(0, 2))
    counts = np.bincount(classes[rows], minlength=46)
    assert (counts[40:] == 3).all()
    assert int((counts[:40] > 0).sum()) == 4


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 6), st.floats(0.05, 0.95), st.floats(0.1, 0.95), st.integers(0, 2**32))
def test_every_label_is_there_and_not_there_among_the_rows_to_train_on(
    num_rows: int, num_labels: int, share: float, fraction: float, seed: int
) -> None:
    targets = (np.random.default_rng(seed).random((num_rows, num_labels)) < share).astype(np.float32)
    before, held = hold_out(None, num_rows, fraction, random_stream(seed, HOLD_OUT))
    training, validation = keep_both(targets, before, held)
    assert sorted([*training, *validation]) == list(range(num_rows))
    assert set(before) <= set(training)
    for column in targets.T:
        assert set(column[training]) == set(column)
    # No row is moved for nothing: each was the first with, or without, some label.
    assert len(training) - len(before) <= 2 * num_labels
    if all(set(column[before]) == set(column) for column in targets.T):
        assert np.array_equal(training, before)
