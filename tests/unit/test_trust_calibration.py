from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION
from trunkline_worker.training.metrics import probabilities
from trunkline_worker.training.trust.calibration import (
    HIGHEST,
    LOWEST,
    MIN_ROWS,
    expected_calibration_error,
    fit_temperature,
    reliability,
)

# N = rows, K = outputs


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are small: beside other work, threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(task: str, num_rows: int, num_outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and a truth drawn by their very probabilities."""
    draw = np.random.default_rng(seed)
    logits = 2.0 * draw.normal(size=(num_rows, num_outputs))
    if task == MULTI_LABEL:
        truth = draw.random(logits.shape) < 1 / (1 + np.exp(-logits))
        return torch.from_numpy(logits), torch.from_numpy(truth.astype(np.float32))
    # The largest of logits plus Gumbel noise is distributed as their softmax.
    return torch.from_numpy(logits), torch.from_numpy((logits + draw.gumbel(size=logits.shape)).argmax(axis=1))


# --- temperature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 6.0])
def test_a_known_temperature_is_found(task: str, temperature: float) -> None:
    logits, truth = drawn(task, 5000, 6)
    assert fit_temperature(task, (logits * temperature).float(), truth) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_temperature_has_a_lower_cross_entropy_by_scikit_learn(seed: int) -> None:
    logits, truth = drawn(CLASSIFICATION, 2000, 4, seed)
    logits = 3.0 * logits

    def loss(temperature: float) -> float:
        return log_loss(truth.numpy(), probabilities(CLASSIFICATION, logits / temperature).numpy(), labels=range(4))

    ours = loss(fit_temperature(CLASSIFICATION, logits, truth))
    others = [loss(one) for one in np.geomspace(1.0, 9.0, 200)]
    assert ours <= min(others) + 1e-5
    assert ours < loss(1.0) - 0.1


def test_rows_that_are_all_right_make_it_surer_the_more_they_are_but_never_endlessly() -> None:
    found = []
    for num_rows in (10, 100, 1000, 10_000):
        truth = torch.arange(num_rows) % 3
        found.append(fit_temperature(CLASSIFICATION, 2.0 * torch.nn.functional.one_hot(truth, 3).double(), truth))
    assert all(LOWEST < later < earlier < 1.0 for earlier, later in pairwise(found))
    # Ten rows are no reason for much: two in three of the logits' size stay.
    assert found[0] > 0.4
    one_class = torch.zeros(1000, dtype=torch.int64)
    assert LOWEST <= fit_temperature(CLASSIFICATION, torch.tensor([[3.0, 0.0]]).repeat(1000, 1), one_class) < 1.0
    assert LOWEST <= fit_temperature(MULTI_LABEL, torch.full((1000, 1), -3.0), torch.zeros(1000, 1)) < 1.0


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL])
def test_the_temperature_stays_within_its_bounds(task: str) -> None:
    logits, truth = drawn(task, 500, 3)
    assert fit_temperature(task, logits * 0.01, truth) == pytest.approx(LOWEST, rel=1e-6)
    assert fit_temperature(task, logits * 1e5, truth) == pytest.approx(HIGHEST, rel=1e-6)
    # Wrong in every row.
    worst = (logits.argmin(dim=1)) if task == CLASSIFICATION else (logits < 0).double()
    assert fit_temperature(task, logits, worst) == pytest.approx(HIGHEST, rel=1e-6)


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL])
def test_many_rows_are_read_in_pieces(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, truth = drawn(task, 100, 3)
    whole = fit_temperature(task, 3 * logits, truth)
    monkeypatch.setattr("trunkline_worker.training.trust.calibration._CHUNK_CELLS", 40)
    assert fit_temperature(task, 3 * logits, truth) == pytest.approx(whole)
    assert whole != 1.0


def test_too_few_rows_and_numbers_leave_it_at_one() -> None:
    logits, truth = drawn(CLASSIFICATION, MIN_ROWS, 3)
    assert fit_temperature(CLASSIFICATION, logits * 5, truth) > 1.5
    assert fit_temperature(CLASSIFICATION, logits[:-1] * 5, truth[:-1]) == 1.0
    assert fit_temperature(CLASSIFICATION, logits[:0], truth[:0]) == 1.0
    assert fit_temperature(REGRESSION, logits, logits * 2) == 1.0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(10, 30), st.floats(-30, 30), st.integers(0, 2**32), st.sampled_from([0, 1, 2]))
def test_any_finite_outputs_give_a_temperature(
    num_outputs: int, num_rows: int, exponent: float, seed: int, kind: int
) -> None:
    draw = np.random.default_rng(seed)
    outputs = torch.from_numpy(draw.normal(size=(num_rows, num_outputs)) * 10.0**exponent)
    if kind == 2:
        outputs = torch.zeros_like(outputs)
    classes = torch.from_numpy(draw.integers(num_outputs, size=num_rows))
    labels = torch.from_numpy(draw.integers(2, size=(num_rows, num_outputs)))
    assert LOWEST <= fit_temperature(CLASSIFICATION, outputs, classes) <= HIGHEST
    assert LOWEST <= fit_temperature(MULTI_LABEL, outputs, labels) <= HIGHEST


# --- reliability ------------------------------------------------------------------------------------------------------


def test_scaling_makes_too_sure_logits_honest_on_rows_it_was_not_fitted_to() -> None:
    logits, truth = drawn(CLASSIFICATION, 6000, 10)
    logits = 4.0 * logits
    temperature = fit_temperature(CLASSIFICATION, logits[:2000], truth[:2000])
    before = expected_calibration_error(probabilities(CLASSIFICATION, logits[2000:]), truth[2000:])
    after = expected_calibration_error(probabilities(CLASSIFICATION, logits[2000:] / temperature), truth[2000:])
    assert before > 0.2
    assert after < 0.04


def test_bins_by_hand() -> None:
    sure = torch.tensor([[0.9, 0.1]]).double().repeat(10, 1)
    unsure = torch.tensor([[0.4, 0.6]]).double().repeat(10, 1)
    truth = torch.tensor([0] * 7 + [1] * 3 + [1] * 5 + [0] * 5)
    first, second = reliability(torch.cat([sure, unsure]), truth, 2)
    assert (first.confidence, first.accuracy, first.count) == pytest.approx((0.6, 0.5, 10))
    assert (second.confidence, second.accuracy, second.count) == pytest.approx((0.9, 0.7, 10))
    assert expected_calibration_error(torch.cat([sure, unsure]), truth, 2) == pytest.approx(0.15)


def test_labels_are_statements_of_their_own() -> None:
    said = torch.tensor([[0.1, 0.8], [0.1, 0.8]]).double()
    low, high = reliability(said, torch.tensor([[0, 1], [1, 1]]), 2)
    assert (low.confidence, low.accuracy, low.count) == pytest.approx((0.1, 0.5, 2))
    assert (high.confidence, high.accuracy, high.count) == pytest.approx((0.8, 1.0, 2))


def test_bins_are_those_of_scikit_learn() -> None:
    logits, truth = drawn(MULTI_LABEL, 1000, 1)
    said = probabilities(MULTI_LABEL, 2.0 * logits)
    accuracy, confidence = calibration_curve(truth[:, 0].numpy(), said[:, 0].numpy(), n_bins=10, strategy="quantile")
    ours = reliability(said, truth, 10)
    np.testing.assert_allclose([one.accuracy for one in ours], accuracy)
    np.testing.assert_allclose([one.confidence for one in ours], confidence)


def test_bins_hold_every_statement_whatever_the_order_of_the_rows() -> None:
    draw = np.random.default_rng(0)
    # Many are equal.
    said = torch.from_numpy(draw.dirichlet([0.3] * 3, size=157).round(1))
    said = said / said.sum(dim=1, keepdim=True)
    truth = torch.from_numpy(draw.integers(3, size=157))
    bins = reliability(said, truth, 15)
    assert sum(one.count for one in bins) == 157
    assert max(one.count for one in bins) - min(one.count for one in bins) <= 1
    order = torch.from_numpy(draw.permutation(157))
    for one, other in zip(bins, reliability(said[order], truth[order], 15), strict=True):
        assert (one.confidence, one.accuracy, one.count) == pytest.approx(
            (other.confidence, other.accuracy, other.count)
        )


def test_few_rows_make_few_bins_and_none_make_no_number() -> None:
    said = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    assert len(reliability(said, torch.tensor([0, 1]), 15)) == 2
    assert reliability(said[:0], torch.zeros(0, dtype=torch.int64)) == []
    with pytest.raises(WireError) as caught:
        expected_calibration_error(said[:0], torch.zeros(0, dtype=torch.int64))
    assert caught.value.code is ErrorCode.EMPTY_BATCH


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = torch.zeros(12, 3)
NAN = torch.full((12, 3), float("nan"))
CLASSES = torch.zeros(12, dtype=torch.int64)


@pytest.mark.parametrize(
    ("task", "outputs", "truth", "code"),
    [
        (CLASSIFICATION, NAN, CLASSES, ErrorCode.NOT_FINITE),
        (MULTI_LABEL, NAN, GOOD, ErrorCode.NOT_FINITE),
        (REGRESSION, GOOD, NAN, ErrorCode.NOT_FINITE),
        (CLASSIFICATION, GOOD, CLASSES - 1, ErrorCode.BAD_LABELS),
        (CLASSIFICATION, GOOD, CLASSES + 3, ErrorCode.BAD_LABELS),
        (CLASSIFICATION, GOOD, CLASSES.double(), ErrorCode.BAD_LABELS),
        (CLASSIFICATION, GOOD, CLASSES[:-1], ErrorCode.SHAPE_MISMATCH),
        (CLASSIFICATION, GOOD[:, 0], CLASSES, ErrorCode.SHAPE_MISMATCH),
        (CLASSIFICATION, GOOD[:, :0], CLASSES, ErrorCode.SHAPE_MISMATCH),
        (MULTI_LABEL, GOOD, GOOD + 0.5, ErrorCode.BAD_LABELS),
        (MULTI_LABEL, GOOD, CLASSES, ErrorCode.SHAPE_MISMATCH),
        (REGRESSION, GOOD, GOOD[:, :1], ErrorCode.SHAPE_MISMATCH),
        ("ranking", GOOD, CLASSES, ErrorCode.INVALID_ARGUMENT),
    ],
)
def test_what_does_not_belong_together_is_refused(
    task: str, outputs: torch.Tensor, truth: torch.Tensor, code: ErrorCode
) -> None:
    with pytest.raises(WireError) as caught:
        fit_temperature(task, outputs, truth)
    assert caught.value.code is code


def test_logits_are_not_taken_for_probabilities() -> None:
    with pytest.raises(WireError, match="between 0 and 1"):
        expected_calibration_error(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(WireError, match="at least one bin"):
        reliability(GOOD, CLASSES, 0)
