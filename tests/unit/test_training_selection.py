import numpy as np
import pytest
import torch
from trunkline_wire.specs import SliceSpec
from trunkline_worker.training.selection import (
    Candidate,
    candidate_sets,
    extended_sets,
    select_slices,
    standardisation,
)


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


def folds(num_rows: int, repetitions: int = 3) -> torch.Tensor:
    draw = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draw.permutation(num_rows) % 5 for _ in range(repetitions)]))


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
    spread[[3, 4]] = 1.0
    np.testing.assert_allclose(single.scale_D.numpy(), spread, rtol=1e-5)
    joined = standardisation(raw, [2, 8])
    scaled = (raw - joined.mean_D) / joined.scale_D
    scaled[:, 3:5] *= 0
    # two columns carry what eight do (two of the eight are constant), and the mean over columns stays 1
    assert float(scaled[:, :2].var(0, correction=0).sum()) == pytest.approx(5.0, rel=1e-4)
    assert float(scaled[:, 2:].var(0, correction=0).sum()) == pytest.approx(5.0 * 6 / 8, rel=1e-4)


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
    candidates = select_slices(x, TAPS, "classification", classes, folds(60), check=done.append)
    assert where in candidates[0].slices
    assert candidates[0].accuracy is not None
    assert candidates[0].accuracy > 0.8
    alone = {one.slices: one for one in candidates}
    assert alone[(where,)].score > alone[("blocks.1/grid",)].score + 0.3
    scores = [round(one.score, 4) for one in candidates]
    assert scores == sorted(scores, reverse=True)
    assert done == sorted(done)


def test_regression_finds_it_too_whatever_the_targets_scale() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(80, TAPS[-1].stop)).astype(np.float32)
    one = next(one for one in TAPS if one.name == "blocks.3/grid")
    targets = 1e4 * x[:, one.start : one.stop] @ draw.normal(size=(4, 2)) + 1e6
    candidates = select_slices(
        torch.from_numpy(x), TAPS, "regression", torch.from_numpy(targets.astype(np.float32)), folds(80), check=nothing
    )
    assert "blocks.3/grid" in candidates[0].slices
    assert candidates[0].score > 0.95
    assert candidates[0].accuracy is None


def test_of_equally_good_candidates_the_narrower_wins() -> None:
    x, classes = informative(60, "blocks.1/grid", 0)
    column = x[:, 2:3]
    twice = torch.cat([column.expand(-1, 6), column.expand(-1, 2)], dim=1)
    candidates = select_slices(
        twice, slices_of(("wide", 6), ("narrow", 2)), "classification", classes, folds(60), check=nothing
    )
    assert candidates[0].slices == ("narrow",)
