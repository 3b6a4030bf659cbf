import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline_wire import conformal as wire
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION
from trunkline_worker.training.metrics import probabilities
from trunkline_worker.training.trust.conformal import MAX_SCORES, calibration_scores, nonconformity

# N = rows, K = classes, M = values of a row

SEEDS = range(20)


def classified(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of a model that is far too sure, and classes."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(num_rows, 5))
    truth = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    return torch.from_numpy(3.0 * logits), torch.from_numpy(truth)


@pytest.mark.parametrize("coverage", [0.7, 0.9])
def test_sets_hold_the_true_class_as_often_as_asked(coverage: float) -> None:
    num_scores, num_new = 200, 1000
    shares = []
    for seed in SEEDS:
        logits, truth = classified(num_scores + num_new, seed)
        scores, num_rows = calibration_scores(CLASSIFICATION, logits[:num_scores], truth[:num_scores])
        found = wire.threshold(scores, num_rows, coverage)
        inside = wire.sets(probabilities(CLASSIFICATION, logits[num_scores:]).float().numpy(), found)
        shares.append(inside[np.arange(num_new), truth[num_scores:].numpy()].mean())
    # Of one seed: rows to count with, and rows to check with, each binomial.
    spread = math.sqrt(coverage * (1 - coverage) * (1 / num_scores + 1 / num_new))
    assert np.mean(shares) > coverage - 3 * spread / math.sqrt(len(shares))
    assert np.mean(shares) < coverage + 3 * spread / math.sqrt(len(shares)) + 1 / num_scores
    assert min(shares) > coverage - 4 * spread


def test_intervals_hold_all_values_of_a_row_as_often_as_asked() -> None:
    coverage, num_scores, num_new = 0.9, 200, 1000
    size = np.array([1.0, 10.0, 0.1])
    shares = []
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        truth = draw.normal(size=(num_scores + num_new, 3)) * size
        said = truth + draw.standard_t(3, size=truth.shape) * size / 3
        scores, num_rows = calibration_scores(
            REGRESSION,
            torch.from_numpy(said[:num_scores]),
            torch.from_numpy(truth[:num_scores]),
            torch.from_numpy(size),
        )
        found = wire.threshold(scores, num_rows, coverage)
        low, high = wire.intervals(said[num_scores:], found, size)
        shares.append(((low <= truth[num_scores:]) & (truth[num_scores:] <= high)).all(axis=1).mean())
    spread = math.sqrt(coverage * (1 - coverage) * (1 / num_scores + 1 / num_new))
    assert abs(np.mean(shares) - coverage) < 3 * spread / math.sqrt(len(shares)) + 1 / num_scores


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]))
    scores, num_rows = calibration_scores(CLASSIFICATION, logits, torch.tensor([1, 0]))
    assert scores == pytest.approx((0.3, 0.8), abs=1e-6)
    assert num_rows == 2
    said, truth = torch.tensor([[1.0, 10.0], [0.0, 0.0]]), torch.tensor([[2.0, 40.0], [-5.0, 0.0]])
    assert nonconformity(REGRESSION, said, truth, torch.tensor([1.0, 10.0])).tolist() == [3.0, 5.0]
    assert nonconformity(REGRESSION, said, truth).tolist() == [30.0, 5.0]


def test_several_labels_are_not_offered() -> None:
    assert nonconformity(MULTI_LABEL, torch.zeros(4, 2), torch.zeros(4, 2)).shape == (0,)
    assert calibration_scores(MULTI_LABEL, torch.zeros(4, 2), torch.zeros(4, 2)) == ((), 0)
    assert wire.threshold((), 0, 0.5) == math.inf


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6 * MAX_SCORES), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_fewer_scores_only_make_sets_larger_and_hardly(num_rows: int, coverage: float, seed: int) -> None:
    error = torch.from_numpy(np.random.default_rng(seed).random((num_rows, 1)))
    kept, counted = calibration_scores(REGRESSION, error, torch.zeros_like(error))
    everything = tuple(error[:, 0].sort().values.tolist())
    assert counted == num_rows
    assert len(kept) == min(num_rows, MAX_SCORES)
    assert list(kept) == sorted(kept)
    assert kept[-1] == everything[-1]
    exact, thinned = wire.threshold(everything, num_rows, coverage), wire.threshold(kept, counted, coverage)
    assert thinned >= exact
    if thinned < math.inf:
        assert everything.index(thinned) - everything.index(exact) <= num_rows / MAX_SCORES


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "coverage", "expected"),
    [
        (9, 0.9, 9),
        (9, 0.8, 8),
        (9, 0.01, 1),
        (8, 0.9, math.inf),
        (19, 0.95, 19),
        (18, 0.95, math.inf),
        (99, 0.07, 7),  # 100 times 0.07 is more than 7 to a computer
        (0, 0.5, math.inf),
    ],
)
def test_the_rank_is_corrected_for_the_new_row(num_rows: int, coverage: float, expected: float) -> None:
    assert wire.threshold(tuple(float(one) for one in range(1, num_rows + 1)), num_rows, coverage) == expected


def test_too_few_rows_leave_everything_possible() -> None:
    said = np.array([[0.9, 0.1], [0.5, 0.5]], np.float32)
    assert wire.sets(said, math.inf).all()
    low, high = wire.intervals(said, math.inf, np.ones(2))
    assert (low == -math.inf).all()
    assert (high == math.inf).all()


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_sets_are_never_empty_and_grow_with_the_threshold(
    num_classes: int, num_rows: int, one: float, other: float, seed: int
) -> None:
    said = np.random.default_rng(seed).dirichlet([0.5] * num_classes, size=num_rows)
    small, large = (wire.sets(said, found) for found in sorted((one, other)))
    assert small.shape == said.shape
    assert small[np.arange(num_rows), said.argmax(axis=1)].all()
    assert (small <= large).all()
    assert wire.sets(said, 1.0).all()
    assert (wire.sets(said, -1.0).sum(axis=1) == 1).all()


def test_single_precision_loses_no_class_on_the_edge() -> None:
    said = np.array([[0.55, 0.35, 0.1]])  # 0.35 becomes a little less
    found = 1 - said[0, 1]
    assert wire.sets(said.astype(np.float32), found).tolist() == [[True, True, False]]


def test_intervals_by_hand() -> None:
    low, high = wire.intervals(np.array([[1.0, 2.0]], np.float32), 2.0, np.array([0.5, 3.0]))
    assert low.tolist() == [[0.0, -4.0]]
    assert high.tolist() == [[2.0, 8.0]]


def test_the_client_needs_no_torch() -> None:
    code = "import sys, trunkline_wire.conformal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, 90.0, math.nan])
def test_a_coverage_is_a_share(coverage: float) -> None:
    with pytest.raises(WireError, match="above 0 and below 1"):
        wire.threshold((1.0, 2.0), 2, coverage)


def test_thresholds_are_not_made_of_nonsense() -> None:
    with pytest.raises(WireError, match="cannot stand for"):
        wire.threshold((1.0, 2.0), 1, 0.5)
    with pytest.raises(WireError, match="NaN"):
        wire.threshold((math.nan,) * 9, 9, 0.5)


@pytest.mark.parametrize(
    ("rows", "threshold", "code"),
    [
        (np.array([[0.5, math.nan]]), 0.5, ErrorCode.NOT_FINITE),
        (np.array([[0.5, 0.5]]), math.nan, ErrorCode.INVALID_ARGUMENT),
        (np.array([0.5, 0.5]), 0.5, ErrorCode.SHAPE_MISMATCH),
        (np.zeros((2, 0)), 0.5, ErrorCode.SHAPE_MISMATCH),
    ],
)
def test_rows_are_checked(rows: np.ndarray, threshold: float, code: ErrorCode) -> None:
    for call in (lambda: wire.sets(rows, threshold), lambda: wire.intervals(rows, threshold, np.ones(rows.shape[-1:]))):
        with pytest.raises(WireError) as caught:
            call()
        assert caught.value.code is code


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_are_positive(scale: float) -> None:
    with pytest.raises(WireError, match="scale"):
        wire.intervals(np.zeros((1, 1)), 1.0, np.array([scale]))
    with pytest.raises(WireError, match="scales"):
        nonconformity(REGRESSION, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([scale]))


def test_as_many_scales_as_outputs() -> None:
    with pytest.raises(WireError, match="scales of"):
        wire.intervals(np.zeros((1, 2)), 1.0, np.ones(3))
    with pytest.raises(WireError, match="scales of"):
        nonconformity(REGRESSION, torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(3))
    with pytest.raises(WireError, match="at least 0"):
        wire.intervals(np.zeros((1, 2)), -1.0, np.ones(2))


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(WireError) as caught:
        calibration_scores(CLASSIFICATION, torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))
    assert caught.value.code is ErrorCode.NOT_FINITE
