import numpy as np
import pytest
import torch
from scipy.optimize import minimize as scipy_minimise
from sklearn.linear_model import LogisticRegression, Ridge
from trunkline_worker.training import softmax
from trunkline_worker.training.lbfgs import minimise
from trunkline_worker.training.outputwise import (
    cross_validate_outputwise,
    fit_outputwise,
    huber,
    log_odds,
    logistic,
    medians,
)
from trunkline_worker.training.ridge import fit_ridge, left_out_predictions

# N = rows, D = columns, K = classes


def nothing(*ignored: object) -> None:
    """Take anything."""


def problem(num_rows: int, num_columns: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return standardised rows around class centres, overlapping, columns correlated."""
    draw = np.random.default_rng(seed)
    classes = np.arange(num_rows) % num_classes
    x = draw.normal(size=(num_rows, num_columns)) + 0.4 * draw.normal(size=(num_classes, num_columns))[classes]
    x = x @ (np.eye(num_columns) + 0.3 * draw.normal(size=(num_columns, num_columns)) / num_columns**0.5)
    return (x - x.mean(axis=0)) / x.std(axis=0), classes


def fit(x: np.ndarray, classes: np.ndarray, l2: float) -> softmax.SoftmaxFit:
    num_classes = int(classes.max()) + 1
    return softmax.fit_softmax(
        softmax.prepare(torch.from_numpy(x)), torch.from_numpy(classes), num_classes, l2, on_step=nothing
    )


@pytest.mark.parametrize("l2", [0.3, 30.0])
@pytest.mark.parametrize(
    ("num_rows", "num_columns"),
    [pytest.param(60, 200, id="fewer rows than columns"), pytest.param(300, 20, id="fewer columns than rows")],
)
@pytest.mark.parametrize("num_classes", [2, 5])
def test_weights_are_those_of_scikit_learn(
    num_rows: int, num_columns: int, num_classes: int, l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "_TIGHT", 1e-12)
    x, classes = problem(num_rows, num_columns, num_classes)
    ours = fit(x, classes, l2)
    theirs = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=20_000).fit(x, classes)
    assert ours.converged
    weights, bias = ours.weights_DK.numpy(), ours.bias_K.numpy()
    if num_classes == 2:
        weights, bias = weights[:, 1:] - weights[:, :1], bias[1:] - bias[:1]
    else:
        bias = bias - bias.mean()
    np.testing.assert_allclose(weights.T, theirs.coef_, atol=2e-4 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(
        bias, theirs.intercept_ - (theirs.intercept_.mean() if num_classes > 2 else 0), atol=2e-3
    )


@pytest.mark.parametrize("shape", [(60, 200), (300, 20)])
def test_every_way_to_prepare_gives_the_same_weights(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_TIGHT", 1e-11)
    x, classes = problem(*shape, 3)
    reduced = fit(x, classes, 1.0)
    monkeypatch.setattr(softmax, "MAX_BASIS", 0)
    plain = fit(x, classes, 1.0)
    monkeypatch.setattr(softmax, "_SKETCH_ROWS", 8)
    sketched = fit(x, classes, 1.0)
    monkeypatch.setattr(softmax, "_FLOAT64_CELLS", 0)
    monkeypatch.setattr(softmax, "_FLOAT32_TIGHT", 1e-8)
    monkeypatch.setattr(softmax, "_GRADIENT", 0.0)
    single = fit(x, classes, 1.0)
    assert single.weights_DK.dtype == torch.float32
    for other, tolerance in ((plain, 1e-4), (sketched, 1e-4), (single, 2e-2)):
        scale = float(reduced.weights_DK.abs().max())
        torch.testing.assert_close(other.weights_DK.double(), reduced.weights_DK, atol=tolerance * scale, rtol=0.0)


def test_the_preconditioner_saves_steps() -> None:
    x, classes = problem(300, 40, 3)
    x = x @ np.diag(np.logspace(0, -3, 40)) @ np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    design = softmax.prepare(torch.from_numpy(x))
    known = design.curvature
    blind = softmax.Design(design.x_NR, softmax.Curvature(None, torch.full_like(known.curvature_Q, 100.0), 100.0))
    steps = [
        softmax.fit_softmax(one, torch.from_numpy(classes), 3, 1e-3, on_step=nothing).num_iterations
        for one in (design, blind)
    ]
    assert steps[0] * 1.5 < steps[1], steps


def test_separable_classes_and_a_weak_penalty_do_not_need_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once rows are right their losses are flat: a preconditioner that ignores it takes seven times the steps."""
    monkeypatch.setattr(softmax, "_SMALL_CELLS", 2**20)
    draw = np.random.default_rng(0)
    classes = np.arange(300) % 5
    x = draw.normal(size=(300, 500)) * np.logspace(0, -2, 500) + 0.5 * draw.normal(size=(5, 500))[classes]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    adaptive = fit(x, classes, 0.5).num_iterations
    monkeypatch.setattr(softmax, "_MIN_SLOPE", 0.2)
    assert adaptive * 3 < fit(x, classes, 0.5).num_iterations


def test_starting_from_a_solution_takes_fewer_steps_and_ends_there() -> None:
    x, classes = problem(80, 200, 4)
    design, truth = softmax.prepare(torch.from_numpy(x)), torch.from_numpy(classes)
    cold = softmax.fit_softmax(design, truth, 4, 1.0, on_step=nothing)
    warm = softmax.fit_softmax(design, truth, 4, 1.0, start_from=cold, on_step=nothing)
    assert warm.num_iterations <= 2 < cold.num_iterations
    torch.testing.assert_close(warm.weights_DK, cold.weights_DK, atol=1e-3, rtol=1e-2)


def test_cross_validated_losses_are_those_of_separate_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_LOOSE", 1e-10)
    x, classes = problem(60, 100, 3)
    fold = np.arange(60) % 4
    grid = (300.0, 30.0, 3.0)
    got = softmax.cross_validate_l2(
        torch.from_numpy(x), torch.from_numpy(classes), 3, torch.from_numpy(fold), grid, check=nothing
    )
    for l2, loss in got.items():
        total = 0.0
        for one in range(4):
            inside, outside = fold != one, fold == one
            model = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=10_000).fit(x[inside], classes[inside])
            total -= model.predict_log_proba(x[outside])[np.arange(outside.sum()), classes[outside]].sum()
        assert loss == pytest.approx(total / 60, rel=1e-3)


def test_rows_of_no_fold_are_seen_by_every_fit_and_measured_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_LOOSE", 1e-10)
    x, classes = problem(60, 100, 3)
    fold = np.arange(60) % 5
    fold[fold >= 2] = -1
    said: list[torch.Tensor] = []
    (loss,) = softmax.cross_validate_l2(
        *(torch.from_numpy(x), torch.from_numpy(classes), 3, torch.from_numpy(fold), (30.0,)),
        keep=lambda l2, log_NK: said.append(log_NK),
        check=nothing,
    ).values()
    total = 0.0
    for one in range(2):
        model = LogisticRegression(C=1 / 30, tol=1e-9, max_iter=10_000).fit(x[fold != one], classes[fold != one])
        logs = model.predict_log_proba(x[fold == one])
        np.testing.assert_allclose(said[0][fold == one].numpy(), logs, atol=1e-3)
        total -= logs[np.arange(len(logs)), classes[fold == one]].sum()
    assert loss == pytest.approx(total / 24, rel=1e-3)
    assert not said[0][fold < 0].any()


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (4, [4, 3, 2, 5, 6]),  # neither way leads on
        (2, [4, 3, 2, 1, 0, 5]),  # the weaker way does, so that one look the other way is enough
        (0, [4, 3, 2, 1, 0, 5]),
        (7, [4, 3, 2, 5, 6, 7, 8]),
    ],
)
def test_strengths_are_tried_from_the_middle_as_long_as_it_helps(best: int, tried: list[int]) -> None:
    grid = [10.0**power for power in range(9)]
    scores = softmax.score_strengths(grid, lambda l2: abs(float(np.log10(l2)) - best))
    assert [round(float(np.log10(one))) for one in scores] == tried
    assert min(scores, key=lambda one: scores[one]) == 10.0**best


def test_a_bumpy_score_does_not_end_the_walk_at_once() -> None:
    bumpy = dict(zip([1.0, 10.0, 100.0, 1000.0, 10_000.0], [0.1, 0.9, 0.5, 0.9, 0.9], strict=True))
    assert min(softmax.score_strengths(list(bumpy), bumpy.__getitem__).values()) == 0.1


def test_wide_rows_get_the_curvature_only_where_plain_steps_are_slow() -> None:
    """Rows as wide as they are many: told apart without a mistake, and Newton's first step would fit their noise."""
    x, classes = problem(1200, 1100, 4)
    steps, asked = [], []
    for l2 in (1.0, 100.0):
        design = softmax.prepare_softmax(torch.from_numpy(x))
        assert design.known is None
        solved = softmax.fit_softmax(design, torch.from_numpy(classes), 4, l2, on_step=nothing)
        assert solved.converged
        steps.append(solved.num_iterations)
        asked.append("curvature" in vars(design))
    assert asked == [False, True]
    assert max(steps) < 20, steps


def test_constant_rows_and_no_penalty_end_without_nan() -> None:
    solved = fit(np.zeros((6, 9)), np.array([0, 1, 0, 1, 0, 0]), 0.0)
    np.testing.assert_allclose(solved.bias_K.softmax(0).numpy(), [4 / 6, 2 / 6], atol=1e-3)
    x, classes = problem(20, 50, 2)
    assert bool(torch.isfinite(fit(x, classes, 0.0).weights_DK).all())


def test_problems_side_by_side_do_not_disturb_each_other() -> None:
    scale = torch.tensor([[1.0], [100.0], [1e-3]], dtype=torch.float64)
    goal = torch.arange(6.0, dtype=torch.float64).view(3, 2)

    def objective(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        off = x - goal
        return (scale * (off**2 + off**4)).sum(dim=1) + 1e-9, scale * (2 * off + 4 * off**3)

    done = minimise(objective, torch.full_like(goal, 9.0), precondition=lambda x: x, on_step=nothing, tolerance=1e-10)
    assert done.converged
    torch.testing.assert_close(done.x_PV, goal, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("limit", [4096, 4])
@pytest.mark.parametrize("shape", [(20, 60), (60, 20)])
def test_ridge_is_that_of_scikit_learn(shape: tuple[int, int], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline_worker.training.ridge._MAX_CLOSED_FORM", limit)
    x, _ = problem(*shape, 2)
    targets = np.random.default_rng(1).normal(size=(shape[0], 2)) + 7
    ours = fit_ridge(torch.from_numpy(x), torch.from_numpy(targets), 3.0, check=nothing)
    theirs = Ridge(alpha=3.0).fit(x, targets)
    np.testing.assert_allclose(ours.weights_DM.numpy().T, theirs.coef_, atol=1e-3 if limit == 4 else 1e-8)
    np.testing.assert_allclose(ours.bias_M.numpy(), theirs.intercept_, atol=1e-8)


def test_ridge_without_penalty_on_dependent_columns_stays_finite() -> None:
    x = np.repeat(problem(10, 3, 2)[0], 4, axis=1)
    ours = fit_ridge(torch.from_numpy(x), torch.ones(10, 1), 0.0, check=nothing)
    assert bool(torch.isfinite(ours.weights_DM).all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_left_out_predictions_are_those_of_training_without_the_row(dtype: torch.dtype, tolerance: float) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.normal(size=(23, 4)), draw.normal(size=(23, 30))]
    strengths = (1e-3, 0.1)
    kernels = torch.stack([torch.from_numpy(one @ one.T / one.shape[1]) for one in rows]).to(dtype)
    targets = draw.normal(size=(23, 2)) + 5
    got = left_out_predictions(kernels, torch.from_numpy(targets).to(dtype), strengths)
    assert got.shape == (2, 2, 23, 2)
    assert got.dtype == dtype
    for a, one in enumerate(rows):
        for s, strength in enumerate(strengths):
            for row in range(23):
                others = np.flatnonzero(np.arange(23) != row)
                fitted = Ridge(alpha=strength * 23 * one.shape[1]).fit(one[others], targets[others])
                expected = fitted.predict(one[row : row + 1])[0]
                np.testing.assert_allclose(got[a, s, row].numpy(), expected, rtol=tolerance, atol=tolerance)


def test_left_out_predictions_take_no_notice_of_a_shift_of_the_columns() -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(15, 6))
    targets = torch.from_numpy(draw.normal(size=(15, 1)))
    kernels = torch.stack([torch.from_numpy(one @ one.T / 6) for one in (x, x - x.mean(axis=0), x + 3)])
    got = left_out_predictions(kernels, targets, (1e-2,))
    torch.testing.assert_close(got[1], got[0])
    torch.testing.assert_close(got[2], got[0])


def test_a_centred_kernel_costs_no_digits_in_single_precision() -> None:
    """Its row sums are 0: without a constant in it, the row of ones is a nearly lost direction."""
    draw = np.random.default_rng(2)
    x = draw.normal(size=(8, 200))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    kernel = torch.from_numpy(x @ x.T / 200)[None]
    targets = torch.nn.functional.one_hot(torch.arange(8) % 2).double()
    exact = left_out_predictions(kernel, targets, (2e-4,))
    single = left_out_predictions(kernel.float(), targets.float(), (2e-4,))
    torch.testing.assert_close(single.double(), exact, atol=2e-6, rtol=0.0)


@pytest.mark.parametrize("delta", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("shape", [(120, 8), (40, 90)])
def test_hubers_loss_ends_where_scipy_ends(shape: tuple[int, int], delta: float) -> None:
    x, _ = problem(*shape, 2)
    draw = np.random.default_rng(1)
    targets = (x[:, :2].sum(axis=1) + draw.standard_t(1.5, size=shape[0]))[:, None]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        error = x @ flat[:-1] + flat[-1] - targets[:, 0]
        clipped = error.clip(-delta, delta)
        value = (clipped * (error - 0.5 * clipped)).sum() + 0.5 * 2.0 * (flat[:-1] ** 2).sum()
        return value, np.append(x.T @ clipped + 2.0 * flat[:-1], clipped.sum())

    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9}
    theirs = scipy_minimise(objective, np.zeros(shape[1] + 1), jac=True, method="L-BFGS-B", options=options)
    truth = torch.from_numpy(targets)
    ours = fit_outputwise(
        softmax.prepare(torch.from_numpy(x)), truth, huber(delta), 2.0, medians(truth), on_step=nothing
    )
    assert ours.converged
    got = np.append(ours.weights_DK[:, 0].numpy(), float(ours.bias_K[0]))
    assert objective(got)[0] == pytest.approx(theirs.fun, rel=1e-5)
    np.testing.assert_allclose(got, theirs.x, atol=2e-3)


def test_cross_validated_losses_of_several_labels_are_those_of_separate_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline_worker.training.outputwise._LOOSE", 1e-10)
    x, _ = problem(60, 100, 3)
    truth = (x[:, :3] + np.random.default_rng(1).normal(size=(60, 3)) > 0.5).astype(np.float64)
    fold = np.arange(60) % 4
    got = cross_validate_outputwise(
        torch.from_numpy(x),
        torch.from_numpy(truth),
        logistic,
        log_odds,
        torch.from_numpy(fold),
        (300.0, 30.0, 3.0),
        check=nothing,
    )
    assert len(got) >= 2
    for l2, loss in got.items():
        total = 0.0
        for one, label in np.ndindex(4, 3):
            inside, outside = fold != one, fold == one
            model = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=10_000).fit(x[inside], truth[inside, label])
            said = model.predict_log_proba(x[outside])[np.arange(outside.sum()), truth[outside, label].astype(int)]
            total -= said.sum()
        assert loss == pytest.approx(total / 180, rel=1e-3)
