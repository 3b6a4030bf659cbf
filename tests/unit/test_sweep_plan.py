"""Which trial of a sweep wins."""

import pytest
from trunkline_wire.errors import WireError
from trunkline_worker.training.sweep.plan import Configuration, Trial, winner


def trial(
    score: float, *, columns: int = 10, l2: float = 1.0, hidden: tuple[int, ...] = (), spread: float = 0.1
) -> Trial:
    scores = (score - spread, score, score + spread)  # a standard error of 0.577 times the spread
    return Trial(Configuration(("a",), l2, hidden), scores, score, num_columns=columns)


def failed() -> Trial:
    return Trial(Configuration(("b",), 1.0), (), float("-inf"), "why not")


def test_the_best_wins_if_it_is_best_by_more_than_one_standard_error() -> None:
    best = trial(0.9, columns=100, hidden=(8,), l2=0.1)
    assert winner([trial(0.84), best, failed()]) is best


def test_within_one_standard_error_the_simplest_wins() -> None:
    best = trial(0.9, columns=100)
    simpler = trial(0.85)
    assert winner([best, simpler, trial(0.8, columns=1)]) is simpler


@pytest.mark.parametrize(
    ("simple", "complex_"),
    [
        ({"columns": 10, "hidden": (64,), "l2": 0.1}, {"columns": 11, "l2": 9.0}),
        ({"l2": 0.1}, {"hidden": (1,), "l2": 9.0}),
        ({"hidden": (8,), "l2": 0.1}, {"hidden": (8, 8), "l2": 9.0}),
        ({"hidden": (8, 8), "l2": 0.1}, {"hidden": (16,), "l2": 9.0}),
        ({"l2": 3.0}, {"l2": 1.0}),
    ],
)
def test_what_is_simpler(simple: dict, complex_: dict) -> None:
    better, worse = trial(0.9, **complex_), trial(0.88, **simple)
    assert winner([better, worse]) is worse
    assert winner([worse, better]) is worse


def test_of_equally_simple_trials_the_better_one_wins() -> None:
    better, worse = trial(0.9), trial(0.88)
    assert winner([worse, better]) is better


def test_the_error_is_that_of_the_best_trial_and_not_of_the_others() -> None:
    best, wild = trial(0.9, columns=100, spread=0.01), trial(0.85, spread=0.5)
    assert winner([best, wild]) is best


def test_without_a_success_there_is_no_winner() -> None:
    with pytest.raises(WireError):
        winner([failed()])


def test_a_configuration_says_what_it_is() -> None:
    text = str(Configuration(("a", "b"), 0.5, (8, 4), 1e-2, 0.1))
    assert text == "slices a, b; l2 0.5; hidden 8, 4; learning rate 0.01; dropout 0.1"
    assert str(Configuration((), 2.0)) == "slices none; l2 2"
