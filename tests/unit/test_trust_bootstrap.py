import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.training.trust.bootstrap import difference, interval, mean_interval, share_interval

# N = rows


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def share_that_hold(intervals: list[tuple[float, float] | None], truth: float) -> float:
    return float(np.mean([one is not None and one[0] <= truth <= one[1] for one in intervals]))


# Of 200 intervals 95 % hold the truth, give or take 3 of 1.5 %; percentile intervals of few rows are a little narrow.
LEAST, MOST = 0.89, 0.995


def test_intervals_of_a_mean_hold_the_truth() -> None:
    found = [mean_interval(stream(seed).normal(3.0, 2.0, size=80), stream(seed + 1000), 400) for seed in range(200)]
    assert LEAST <= share_that_hold(found, 3.0) <= MOST


def test_intervals_of_an_accuracy_hold_the_truth() -> None:
    found = [mean_interval(stream(seed).random(150) < 0.8, stream(seed + 1000)) for seed in range(200)]
    assert LEAST <= share_that_hold(found, 0.8) <= MOST


def test_intervals_of_any_metric_hold_the_truth() -> None:
    """Of the median, which is no mean over rows."""
    found = []
    for seed in range(200):
        rows = stream(seed).normal(size=100)
        found.append(interval(lambda index, rows=rows: float(np.median(rows[index])), 100, stream(seed + 1000), 200))
    assert LEAST <= share_that_hold(found, 0.0) <= MOST


@pytest.mark.parametrize("decimals", [0, 9])
def test_the_fast_way_is_the_slow_way(decimals: int) -> None:
    """Rounded, values are counted; else rows are drawn."""
    rows = stream(7).exponential(size=60).round(decimals)
    fast = mean_interval(rows, stream(1), 20_000, 0.8)
    slow = interval(lambda index: float(rows[index].mean()), 60, stream(2), 20_000, 0.8)
    assert fast is not None
    assert slow is not None
    # A hundredth of the interval's width is what 20,000 draws leave open, three times over.
    np.testing.assert_allclose(fast, slow, atol=0.03 * (slow[1] - slow[0]))


def test_an_accuracy_is_binomial() -> None:
    right = np.arange(200) < 170
    found = mean_interval(right, stream(), 50_000)
    assert found == pytest.approx(binom.ppf([0.025, 0.975], 200, 0.85) / 200, abs=0.0051)


def test_equal_values_leave_no_doubt() -> None:
    assert mean_interval(np.full(37, 0.1), stream()) == (0.1, 0.1)


def test_one_seed_gives_one_interval() -> None:
    rows = stream(3).normal(size=50)
    assert mean_interval(rows, stream(5)) == mean_interval(rows, stream(5))
    assert mean_interval(rows, stream(5)) != mean_interval(rows, stream(6))


@pytest.mark.parametrize("decimals", [0, 9])
def test_many_rows_are_drawn_in_pieces(decimals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream(3).normal(size=50).round(decimals)
    whole = mean_interval(rows, stream(5))
    monkeypatch.setattr("trunkline_worker.training.trust.bootstrap._CHUNK_CELLS", 7 * 50)
    assert mean_interval(rows, stream(5)) == pytest.approx(whole)


def test_a_higher_level_is_wider() -> None:
    rows = stream(3).normal(size=50)
    narrow, wide = mean_interval(rows, stream(5), level=0.5), mean_interval(rows, stream(5), level=0.99)
    assert narrow is not None
    assert wide is not None
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


# --- what has no value ------------------------------------------------------------------------------------------------


def test_fewer_than_two_rows_have_no_interval() -> None:
    for count in (0, 1):
        assert interval(lambda index: 1.0, count, stream()) is None
        assert mean_interval(np.ones(count), stream()) is None
        assert difference(np.ones(count), np.ones(count), stream()) is None


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_resamples_without_a_value_are_skipped(nothing: float | None) -> None:
    positive = np.arange(20) < 2  # every ninth resample has neither

    def recall(index: np.ndarray) -> float | None:
        chosen = positive[index]
        return float((index[chosen] == 0).mean()) if chosen.any() else nothing

    found = interval(recall, 20, stream())
    assert found == (0.0, 1.0)
    assert interval(lambda index: nothing, 20, stream()) is None
    rare = iter(range(10**6))
    assert interval(lambda index: 1.0 if next(rare) % 3 == 0 else nothing, 20, stream()) is None


# --- which is better --------------------------------------------------------------------------------------------------


def test_pairs_tell_apart_what_single_accuracies_do_not() -> None:
    hard = stream(1).random(400)
    a, b = hard < 0.80, hard < 0.77
    found = difference(a, b, stream())
    assert found is not None
    assert 0 < found[0] < found[1]
    one, other = mean_interval(a, stream()), mean_interval(b, stream())
    assert one is not None
    assert other is not None
    assert one[0] < other[1]
    mirrored = difference(b, a, stream())
    assert mirrored is not None
    assert mirrored[1] < 0


def test_noise_is_called_better_one_time_in_twenty() -> None:
    outside = 0
    for seed in range(200):
        a, b = (stream(2 * seed + one).normal(size=100) for one in (0, 1))
        found = difference(a, b, stream(seed), 400)
        assert found is not None
        outside += not found[0] <= 0 <= found[1]
    assert 1 <= outside <= 22
    assert difference(np.ones(9), np.ones(9), stream()) == (0.0, 0.0)


# --- counted shares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_right", "num_rows"), [(0, 10), (10, 10), (1, 3), (81, 263), (500, 1000), (1, 1)])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_shares_are_those_of_scipy(num_right: int, num_rows: int, level: float) -> None:
    theirs = binomtest(num_right, num_rows).proportion_ci(level, method="wilson")
    assert share_interval(num_right, num_rows, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_all_right_is_not_beyond_doubt() -> None:
    low, high = share_interval(10, 10)
    assert low < 0.75
    assert high == 1.0
    assert share_interval(0, 10)[0] == 0.0
    assert share_interval(0, 0) == (0.0, 1.0)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    rows = np.ones(5)
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(WireError, match="level"):
            mean_interval(rows, stream(), level=bad)
        with pytest.raises(WireError, match="level"):
            interval(lambda index: 1.0, 5, stream(), level=bad)
        with pytest.raises(WireError, match="level"):
            share_interval(1, 2, bad)
    with pytest.raises(WireError, match="resample"):
        mean_interval(rows, stream(), 0)
    with pytest.raises(WireError, match="share"):
        share_interval(3, 2)
    for call in (
        lambda: mean_interval(np.ones((2, 2)), stream()),
        lambda: difference(rows, rows[:-1], stream()),
    ):
        with pytest.raises(WireError) as caught:
            call()
        assert caught.value.code is ErrorCode.SHAPE_MISMATCH
    with pytest.raises(WireError) as caught:
        mean_interval(np.array([1.0, math.nan]), stream())
    assert caught.value.code is ErrorCode.NOT_FINITE
