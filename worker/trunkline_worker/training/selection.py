"""Which slices of the embedding to train on: candidates scored by cross-validated kernel ridge.

A kernel over several slices is the sum of the slices' kernels, so one Gram matrix per slice serves every candidate.
Each slice counts by the mean over its columns, whatever its width: the head's standardisation does the same, so what is
scored is what is trained (see ``standardisation``).

Source: Evci et al. 2022, "Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning", for the idea
of choosing from every depth instead of the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trunkline_wire.specs import SliceSpec

from trunkline_worker.heads.model import CLASSIFICATION
from trunkline_worker.training.ridge import held_out_predictions

# Shape suffix legend: N = rows, D = columns, M = outputs, A = kernels, S = strengths, F = repetitions of the folds,
# T = temperatures

MAX_ROWS = 320
MAX_CLASSES = 64
"""What stands for the whole in the selection: its differences are far above the noise of that many rows."""

NUM_FOLDS = 5
REPETITIONS = 5
"""Times the folds are drawn. Costs next to nothing here and keeps one lucky draw from deciding."""

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
_TEMPERATURES = (2.0, 5.0, 10.0, 20.0, 40.0)
_TIE = 1e-5
"""Scores closer than this are equal."""

_NUM_EXTENDED = 2
"""Candidates that the second round extends by one more slice each."""

_KIND = re.compile(r"(?P<tap>.+)[./:_](?P<kind>mean|std|grid)\d*")


@dataclass(frozen=True)
class Candidate:
    """A set of slices and how well it did.

    Attributes:
        slices: Their names, in the embedding's order.
        width: Columns in all.
        score: Higher is better: minus the cross-entropy (nats per row, at the best temperature), or r2.
        accuracy: Fraction of held-out rows right; None for regression.
        strength: The penalty per row it did best with, on kernels of mean diagonal 1.
    """

    slices: tuple[str, ...]
    width: int
    score: float
    accuracy: float | None
    strength: float


@dataclass(frozen=True)
class Standardisation:
    """Per column. ``scale_D`` holds the standard deviation and the slice's balance."""

    mean_D: Tensor
    scale_D: Tensor


def standardisation(x_ND: Tensor, widths: Sequence[int]) -> Standardisation:
    """Fit mean and scale of raw columns.

    Constant columns get scale 1. Where slices of different widths are joined, each is weighted so that all have the
    same total variance and the mean over all columns stays 1: otherwise a wide slice drowns a narrow one. A single
    slice is plainly standardised.

    Args:
        x_ND: Raw rows of the training split.
        widths: Columns of each slice, in order.
    """
    mean_D = _mean(x_ND)
    std_D = _std(x_ND, mean_D)
    # A constant column's spread is rounding noise, relative to its size.
    constant_D = std_D <= 1e-6 * mean_D.abs() + 1e-12
    std_D = torch.where(constant_D, torch.ones_like(std_D), std_D)
    balance = [(len(widths) * width / sum(widths)) ** 0.5 for width in widths]
    balance_D = torch.repeat_interleave(torch.tensor(balance, dtype=torch.float64), torch.tensor(widths))
    return Standardisation(mean_D.float(), (std_D * balance_D.to(std_D)).float())


def _chunks(x_ND: Tensor) -> Sequence[Tensor]:
    return x_ND.split(max(1, 2**22 // max(1, x_ND.shape[1])))


def _mean(x_ND: Tensor) -> Tensor:
    total_D = x_ND.new_zeros(x_ND.shape[1], dtype=torch.float64)
    for chunk_ND in _chunks(x_ND):
        total_D += chunk_ND.double().sum(dim=0)
    return total_D / x_ND.shape[0]


def _std(x_ND: Tensor, mean_D: Tensor) -> Tensor:
    total_D = torch.zeros_like(mean_D)
    for chunk_ND in _chunks(x_ND):
        total_D += (chunk_ND.double() - mean_D).square().sum(dim=0)
    return (total_D / x_ND.shape[0]).sqrt()


def candidate_sets(slices: Sequence[SliceSpec]) -> list[tuple[str, ...]]:
    """Return the sets of the first round, without repeats, each in the embedding's order.

    Each slice alone; per tap what it has (mean and std, all three); neighbouring taps' grids by two and three; all of
    one kind; all means and stds; everything.
    """
    order = [one.name for one in slices]
    kinds: dict[str, list[str]] = {"mean": [], "std": [], "grid": []}
    taps: dict[str, dict[str, str]] = {}
    for name in order:
        match = _KIND.fullmatch(name)
        if match is not None:
            kinds[match["kind"]].append(name)
            taps.setdefault(match["tap"], {})[match["kind"]] = name
    sets: list[list[str]] = [[name] for name in order]
    for tap in taps.values():
        sets.append([tap[kind] for kind in ("mean", "std") if kind in tap])
        sets.append(list(tap.values()))
    grids = kinds["grid"]
    sets += [grids[start : start + size] for size in (2, 3) for start in range(len(grids) - size + 1)]
    sets += [kinds["mean"], kinds["std"], grids, kinds["mean"] + kinds["std"], order]
    return _distinct(sets, order)


def extended_sets(ranked: Sequence[Candidate], slices: Sequence[SliceSpec]) -> list[tuple[str, ...]]:
    """Return the sets of the second round: the best two and three single slices and grids, and the best ones extended.

    Args:
        ranked: The first round, best first.
        slices: All slices.
    """
    order = [one.name for one in slices]
    singles = [one.slices[0] for one in ranked if len(one.slices) == 1]
    grids = [name for name in singles if (match := _KIND.fullmatch(name)) and match["kind"] == "grid"]
    sets = [names[:size] for names in (singles, grids) for size in (2, 3)]
    for candidate in ranked[:_NUM_EXTENDED]:
        sets += [[*candidate.slices, name] for name in order if name not in candidate.slices]
    known = {one.slices for one in ranked}
    return [one for one in _distinct(sets, order) if one not in known]


def _distinct(sets: Sequence[Sequence[str]], order: Sequence[str]) -> list[tuple[str, ...]]:
    result = dict.fromkeys(tuple(name for name in order if name in one) for one in sets)
    return [one for one in result if one]


def select_slices(
    x_ND: Tensor,
    slices: Sequence[SliceSpec],
    task: str,
    truth: Tensor,
    folds_FN: Tensor,
    *,
    check: Callable[[float], None],
) -> list[Candidate]:
    """Score sets of slices; the best comes first.

    Args:
        x_ND: Raw embedding of the rows that stand for all.
        slices: Which columns are which.
        task: ``classification`` or ``regression``.
        truth: Class indices, (N,), counted from 0 without gaps; or targets, (N, M).
        folds_FN: Fold of each row, once per repetition.
        check: Called with the fraction done; may raise to stop.
    """
    kernels = slice_kernels(x_ND, slices)
    widths = {one.name: one.width for one in slices}

    def score(sets: Sequence[tuple[str, ...]], start: float, stop: float) -> list[Candidate]:
        return score_sets(
            sets, kernels, widths, task, truth, folds_FN, check=lambda done: check(start + (stop - start) * done)
        )

    ranked = _rank(score(candidate_sets(slices), 0.0, 0.6))
    second = extended_sets(ranked, slices)
    return _rank([*ranked, *score(second, 0.6, 1.0)] if second else ranked)


def _rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort best first; equal scores by width, then as they came."""
    return sorted(candidates, key=lambda one: (-round(one.score / _TIE), one.width))


def slice_kernels(x_ND: Tensor, slices: Sequence[SliceSpec]) -> dict[str, Tensor]:
    """Return each slice's Gram matrix of standardised columns, (N, N), divided by its width."""
    kernels = {}
    for one in slices:
        raw_NW = x_ND[:, one.start : one.stop]
        fitted = standardisation(raw_NW, [one.width])
        scaled_NW = ((raw_NW - fitted.mean_D) / fitted.scale_D).float()
        kernels[one.name] = (scaled_NW @ scaled_NW.T).double() / one.width
    return kernels


def score_sets(
    sets: Sequence[tuple[str, ...]],
    kernels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    task: str,
    truth: Tensor,
    folds_FN: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    check: Callable[[float], None],
) -> list[Candidate]:
    """Cross-validate kernel ridge on each set of slices, all in one batched solve."""
    stacked_ANN = torch.stack([sum_kernels([kernels[name] for name in one]) for one in sets])
    if task == CLASSIFICATION:
        targets_NM = torch.nn.functional.one_hot(truth).double()
    else:
        targets_NM = truth.double() / truth.double().std(dim=0, correction=0).clamp(min=1e-12)
    offset_M = targets_NM.mean(dim=0)
    centred_NM = targets_NM - offset_M
    predictions = held_out_predictions(stacked_ANN, centred_NM, folds_FN, strengths, check=check)
    accuracy_AS: Tensor | None = None
    if task == CLASSIFICATION:
        score_AS, accuracy_AS = _score_classes(predictions + offset_M, truth)
    else:
        score_AS = 1.0 - (predictions - centred_NM).square().mean(dim=(2, 3, 4))
    best_A = score_AS.argmax(dim=1)
    return [
        Candidate(
            slices=one,
            width=sum(widths[name] for name in one),
            score=float(score_AS[row, best]),
            accuracy=None if accuracy_AS is None else float(accuracy_AS[row, best]),
            strength=strengths[best],
        )
        for row, (one, best) in enumerate(zip(sets, best_A.tolist(), strict=True))
    ]


def sum_kernels(kernels: Sequence[Tensor]) -> Tensor:
    """Return the mean of kernels: every slice has the same say."""
    return torch.stack(list(kernels)).mean(dim=0)


def _score_classes(predictions: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return minus the cross-entropy at the best temperature, and the accuracy, each (A, S).

    Accuracy alone is too coarse to choose by: on a few hundred rows many candidates share one value. Cross-entropy
    needs probabilities; a temperature turns ridge's scores into such.
    """
    accuracy_AS = (predictions.argmax(dim=4) == truth).double().mean(dim=(2, 3))
    index = truth[:, None].expand(*predictions.shape[:-1], 1)
    predictions = predictions.float()
    losses = []
    for temperature in _TEMPERATURES:
        log_odds = (predictions * temperature).log_softmax(dim=4)
        losses.append(-log_odds.gather(4, index).mean(dim=(2, 3, 4)))
    return -torch.stack(losses).amin(dim=0), accuracy_AS
