import numpy as np
import pytest
import torch
from trunkline_wire.specs import SliceSpec
from trunkline_worker.training.ridge import left_out_predictions
from trunkline_worker.training.scoring import Candidate, score_sets, slice_kernels
from trunkline_worker.training.selection import candidate_sets, extended_sets, select_slices
from trunkline_worker.training.standardise import standardisation


def nothing(*ignored: object) -> None:
    """Take anything."""


def slices_of(*widths: tuple[str, int]) -> list[SliceSpec]:
    result, start = [], 0
    for name, width in widths:
        result.append(SliceSpec(name, start, start + width))
        start += width
    return result


TAPS = slices_of(
    *[(f"blocks.{tap}/{kind}", 4 if kind == "grid" else 1) for tap in (1, 2, 3) for kind in ("mean", "std", "grid")],
    ("pooled", 8),
)


def test_first_round_holds_the_sets_worth_trying_once_each() -> None:
    sets = candidate_sets(TAPS)
    assert len(sets) == len(set(sets))
    names = [one.name for one in TAPS]
    for expected in (
        *[(name,) for name in names],
        ("blocks.2/mean", "blocks.2/std"),
        ("blocks.2/mean", "blocks.2/std", "blocks.2/grid"),
        ("blocks.1/grid", "blocks.2/grid"),
        ("blocks.1/grid", "blocks.2/grid", "blocks.3/grid"),
        ("blocks.1/mean", "blocks.2/mean", "blocks.3/mean"),
        ("blocks.1/mean", "blocks.1/std", "blocks.2/mean", "blocks.2/std", "blocks.3/mean", "blocks.3/std"),
        tuple(names),
    ):
        assert expected in sets


def test_an_embedding_with_one_slice_has_one_candidate() -> None:
    assert candidate_sets(slices_of(("pooled", 3))) == [("pooled",)]


def test_second_round_extends_the_best_and_repeats_nothing() -> None:
    ranked = [
        Candidate((name,), 1, -rank, None, 1.0)
        for rank, name in enumerate(("pooled", "blocks.3/grid", "blocks.1/grid"))
    ]
    sets = extended_sets(ranked, TAPS)
    assert ("blocks.1/grid", "blocks.3/grid") in sets
    assert ("blocks.1/grid", "blocks.3/grid", "pooled") in sets
    assert ("blocks.2/std", "pooled") in sets
    assert not {one.slices for one in ranked} & set(sets)


def test_columns_are_standardised_and_slices_balanced() -> None:
    draw = np.random.default_rng(0)
    raw = torch.from_numpy(draw.normal(size=(50, 10)) * np.arange(1, 11) + 100).float()
    raw[:, 3] = 5.0
    raw[:, 4] = 1e4 + torch.rand(50, generator=torch.Generator().manual_seed(0)) * 1e-3
    single = standardisation(raw, [10])
    np.testing.assert_allclose(single.mean_D.numpy(), raw.double().mean(0).numpy(), rtol=1e-6)
    spread = raw.double().std(0, correction=0).numpy()
    spread[[3, 4]] = 0.0
    spread[[3, 4]] = 0.1 * spread.mean()
    np.testing.assert_allclose(single.scale_D.numpy(), spread, rtol=1e-5)
    joined = standardisation(raw, [2, 8])
    scaled = (raw - joined.mean_D) / joined.scale_D
    scaled[:, 3:5] *= 0
    # two columns carry what eight do (two of the eight are constant), and the mean over columns stays 1
    assert float(scaled[:, :2].var(0, correction=0).sum()) == pytest.approx(5.0, rel=1e-4)
    assert float(scaled[:, 2:].var(0, correction=0).sum()) == pytest.approx(5.0 * 6 / 8, rel=1e-4)


def test_a_column_that_hardly_moves_in_training_does_not_explode_later() -> None:
    """Behind a ReLU a column is often zero in every training row but one, and there by a hair."""
    draw = np.random.default_rng(0)
    raw = torch.from_numpy(draw.normal(size=(200, 20))).float().relu()
    raw[:, 7] = 0.0
    raw[3, 7] = 1e-5
    fitted = standardisation(raw, [20])
    excited = (1.0 - fitted.mean_D[7]) / fitted.scale_D[7]
    assert 1.0 < float(excited) < 30.0
    nothing_there = standardisation(torch.full((9, 4), 3.0), [4])
    assert nothing_there.scale_D.tolist() == [1.0] * 4


def test_a_column_in_other_units_is_scaled_like_the_others() -> None:
    """It varies little beside the others, but in most rows: as local features do, and behind a ReLU hardly any does."""
    draw = np.random.default_rng(0)
    raw = torch.from_numpy(draw.normal(size=(200, 6)) * [1e-3, 1.0, 100.0, 1.0, 5.0, 1.0] + 50.0).float()
    raw[:, 3] = torch.from_numpy((draw.random(200) < 0.3) * 1e-2).float()
    raw[:, 5] = 0.0
    raw[:4, 5] = 1e-2
    scaled = (raw - standardisation(raw, [6]).mean_D) / standardisation(raw, [6]).scale_D
    np.testing.assert_allclose(scaled.std(dim=0, correction=0)[:5], 1.0, rtol=1e-2)
    assert float(scaled[:, 5].abs().max()) < 0.1


def informative(num_rows: int, where: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of noise in which one slice tells the class."""
    draw = np.random.default_rng(seed)
    classes = np.arange(num_rows) % 3
    x = draw.normal(size=(num_rows, TAPS[-1].stop)).astype(np.float32)
    one = next(one for one in TAPS if one.name == where)
    x[:, one.start : one.stop] += 3.0 * draw.normal(size=(3, one.width))[classes]
    return torch.from_numpy(x), torch.from_numpy(classes)


@pytest.mark.parametrize("where", ["blocks.2/grid", "pooled"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_slice_that_knows_is_found(where: str, seed: int) -> None:
    x, classes = informative(60, where, seed)
    done: list[float] = []
    candidates = select_slices(x, TAPS, "classification", classes, check=done.append)
    assert where in candidates[0].slices
    assert candidates[0].accuracy is not None
    assert candidates[0].accuracy > 0.8
    alone = {one.slices: one for one in candidates}
    assert alone[(where,)].score > alone[("blocks.1/grid",)].score + 0.3
    scores = [round(one.score, 3) for one in candidates]
    assert scores == sorted(scores, reverse=True)
    assert done == sorted(done)


def test_regression_finds_it_too_whatever_the_targets_scale() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(80, TAPS[-1].stop)).astype(np.float32)
    one = next(one for one in TAPS if one.name == "blocks.3/grid")
    targets = 1e4 * x[:, one.start : one.stop] @ draw.normal(size=(4, 2)) + 1e6
    candidates = select_slices(
        torch.from_numpy(x), TAPS, "regression", torch.from_numpy(targets.astype(np.float32)), check=nothing
    )
    assert "blocks.3/grid" in candidates[0].slices
    assert candidates[0].score > 0.95
    assert candidates[0].accuracy is None


def test_of_equally_good_candidates_the_narrower_wins() -> None:
    x, classes = informative(60, "blocks.1/grid", 0)
    column = x[:, 2:3]
    twice = torch.cat([column.expand(-1, 6), column.expand(-1, 2)], dim=1)
    candidates = select_slices(twice, slices_of(("wide", 6), ("narrow", 2)), "classification", classes, check=nothing)
    assert candidates[0].slices == ("narrow",)


def test_a_tap_without_a_grid_is_compared_by_its_means() -> None:
    flat = slices_of(*[(f"layer{tap}.{kind}", 2) for tap in (1, 2, 3) for kind in ("mean", "std")], ("pooled", 2))
    sets = candidate_sets(flat)
    assert ("layer1.mean", "layer2.mean") in sets
    assert ("layer1.mean", "layer2.mean", "layer3.mean") in sets
    mixed = candidate_sets(slices_of(("a.mean", 1), ("a.std", 1), ("a.grid", 4), ("b.mean", 1), ("b.std", 1)))
    assert ("a.grid", "b.mean") in mixed
    draw = np.random.default_rng(0)
    classes = np.arange(40) % 2
    x = draw.normal(size=(40, flat[-1].stop)).astype(np.float32)
    x[:, 6:8] += 4 * classes[:, None]
    found = select_slices(torch.from_numpy(x), flat, "classification", torch.from_numpy(classes), check=nothing)
    assert "layer2.std" in found[0].slices


def test_all_of_both_rounds_is_there_best_first() -> None:
    x, classes = informative(60, "blocks.2/grid", 0)
    candidates = select_slices(x, TAPS, "classification", classes, check=nothing)
    tried = [one.slices for one in candidates]
    first = candidate_sets(TAPS)
    assert len(tried) == len(set(tried)) > len(first)
    assert set(first) < set(tried)
    widths = {one.name: one.width for one in TAPS}
    order = [one.name for one in TAPS]
    for one in candidates:
        assert one.width == sum(widths[name] for name in one.slices)
        assert list(one.slices) == sorted(one.slices, key=order.index)
        assert one.accuracy is not None
        assert 0.0 <= one.accuracy <= 1.0
        assert one.score < 0.0


def score(x: torch.Tensor, task: str, truth: torch.Tensor, strengths: tuple[float, ...] = (1e-2,)) -> list[Candidate]:
    """Score all columns together, in float64."""
    kernels = {"all": slice_kernels(x, slices_of(("all", x.shape[1])))["all"].double()}
    return score_sets([("all",)], kernels, {"all": x.shape[1]}, task, truth, strengths=strengths, check=nothing)


@pytest.mark.parametrize("num_columns", [20, 2000])
def test_noise_scores_no_better_than_chance(num_columns: int) -> None:
    """A mean over all rows, in the columns or in the targets, would tell a row's label by what the others lack."""
    right, r2 = [], []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        x = torch.from_numpy(draw.normal(size=(12, num_columns))).float()
        (scored,) = score(x, "classification", torch.from_numpy(draw.permutation(np.arange(12) % 2)))
        assert scored.accuracy is not None
        right.append(scored.accuracy)
        r2.append(score(x, "regression", torch.from_numpy(draw.normal(size=(12, 1))))[0].score)
    assert np.mean(right) < 0.55
    assert np.mean(r2) < 0.0


def test_scores_do_not_hang_on_how_many_sets_are_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, classes = informative(60, "pooled", 1)
    whole = select_slices(x, TAPS, "classification", classes, check=nothing)
    monkeypatch.setattr("trunkline_worker.training.scoring._CHUNK_BYTES", {"cpu": 1})
    steps: list[float] = []
    single = select_slices(x, TAPS, "classification", classes, check=steps.append)
    assert len(steps) == len(single) == len(whole)
    by_slices = {one.slices: one for one in single}
    for one in whole:
        assert by_slices[one.slices].score == pytest.approx(one.score, abs=2e-4)


def test_single_precision_scores_as_double_does() -> None:
    x, classes = informative(60, "pooled", 2)
    kernels = slice_kernels(x, TAPS)
    widths = {one.name: one.width for one in TAPS}
    sets = candidate_sets(TAPS)
    double = {name: kernel.double() for name, kernel in kernels.items()}
    pairs = zip(
        score_sets(sets, kernels, widths, "classification", classes, check=nothing),
        score_sets(sets, double, widths, "classification", classes, check=nothing),
        strict=True,
    )
    for fast, exact in pairs:
        assert fast.score == pytest.approx(exact.score, abs=2e-4)


def test_a_row_alone_in_its_class_does_not_count() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(30, 6)).astype(np.float32)
    classes = np.repeat([0, 1], 15)
    x[:, 0] += 4 * classes
    x[29] = 50.0
    with_single = classes.copy()
    with_single[29] = 2
    (alone,) = score(torch.from_numpy(x), "classification", torch.from_numpy(with_single))
    assert alone.accuracy is not None
    assert alone.accuracy * 29 == pytest.approx(round(alone.accuracy * 29))
    assert alone.accuracy > 0.8


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_constant_slices_score_finite_and_last(task: str) -> None:
    draw = np.random.default_rng(0)
    classes = np.arange(40) % 4
    x = np.full((40, 12), 7.0, dtype=np.float32)
    x[:, 4:8] = draw.normal(size=(40, 4)) + 3 * draw.normal(size=(4, 4))[classes]
    some = slices_of(("a.mean", 4), ("b.mean", 4), ("pooled", 4))
    truth = torch.from_numpy(classes)
    if task == "regression":
        # the second of the targets never changes
        truth = torch.stack([torch.from_numpy(x[:, 4]) * 1e3, torch.full((40,), 1e6)], dim=1)
    found = select_slices(torch.from_numpy(x), some, task, truth, check=nothing)
    assert all(np.isfinite(one.score) for one in found)
    assert "b.mean" in found[0].slices
    assert all("b.mean" in one.slices for one in found if one.score > found[-1].score + 0.01)


def test_a_wide_network_with_many_taps_is_searched_in_bounded_steps() -> None:
    kinds = (("mean", 1), ("std", 1), ("grid", 4))
    many = slices_of(*[(f"stage{tap}.{kind}", width * 8) for tap in range(12) for kind, width in kinds], ("pooled", 8))
    draw = np.random.default_rng(0)
    classes = np.arange(48) % 4
    x = draw.normal(size=(48, many[-1].stop)).astype(np.float32)
    one = next(one for one in many if one.name == "stage7.grid")
    x[:, one.start : one.stop] += 2 * draw.normal(size=(4, one.width))[classes]
    found = select_slices(torch.from_numpy(x), many, "classification", torch.from_numpy(classes), check=nothing)
    assert "stage7.grid" in found[0].slices
    assert len(found) < 5 * len(many)


def test_the_score_is_the_cross_entropy_at_the_best_temperature() -> None:
    x, classes = informative(60, "pooled", 3)
    strengths = (1e-2,)
    columns = x[:, TAPS[-1].start :]
    kernel = slice_kernels(columns, slices_of(("all", 8)))["all"].double()
    onehot = torch.nn.functional.one_hot(classes).double()
    predicted = left_out_predictions(kernel[None], onehot, strengths)[0, 0]
    losses = [float(torch.nn.functional.cross_entropy(predicted * t, classes)) for t in (2.5, 5, 10, 20, 40)]
    (scored,) = score(columns, "classification", classes, strengths)
    assert scored.score == pytest.approx(-min(losses), abs=1e-9)
    assert losses.index(min(losses)) > 0
    assert scored.accuracy == pytest.approx(float((predicted.argmax(1) == classes).double().mean()))
