"""How well sets of slices do: kernel ridge, each row predicted by all the others, all sets in one batched solve.

A kernel over several slices is the mean of the slices' kernels, so one Gram matrix per slice serves every set. Each
slice counts by the mean over its columns, whatever its width: the head's standardisation does the same, so what is
scored is what is trained (see ``standardise``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trunkline_wire.heads import CLASSIFICATION
from trunkline_wire.specs import SliceSpec

from trunkline_worker.training.ridge import left_out_predictions
from trunkline_worker.training.standardise import standardisation

# Shape suffix legend: N = rows, D = columns, W = columns of one slice, M = outputs, A = sets, B = slices,
# S = strengths

STRENGTHS = (1e-3, 2e-2, 3e-1)
"""Penalties per row. So far apart because a set's score is flat around its best one; all that is wanted is an order."""

_TEMPERATURE, _DOUBLINGS = 2.5, 4
"""Scores become log-odds times 2.5, 5, 10, 20 or 40, whichever suits a set best."""

_CHUNK_BYTES = {"cpu": 2**22}
_DEFAULT_CHUNK_BYTES = 2**28
"""Memory for the matrices that are solved together. What leaves a processor's cache costs more to move than to solve;
an accelerator wants many at once."""


@dataclass(frozen=True)
class Candidate:
    """A set of slices and how well it did.

    Attributes:
        slices: Their names, in the embedding's order.
        width: Columns in all.
        score: Higher is better: minus the cross-entropy (nats per row, at the best temperature), or r2. Each row is
            scored by a fit to all the others.
        accuracy: Fraction of rows that such fits get right; None for regression.
        strength: The penalty per row it did best with, on kernels of mean diagonal 1.
    """

    slices: tuple[str, ...]
    width: int
    score: float
    accuracy: float | None
    strength: float


def slice_kernels(x_ND: Tensor, slices: Sequence[SliceSpec]) -> dict[str, Tensor]:
    """Return each slice's Gram matrix of standardised columns, (N, N), divided by its width."""
    kernels = {}
    for one in slices:
        raw_NW = x_ND[:, one.start : one.stop].float()
        fitted = standardisation(raw_NW, [one.width])
        scaled_NW = (raw_NW - fitted.mean_D) / fitted.scale_D
        kernels[one.name] = scaled_NW @ scaled_NW.T / one.width
    return kernels


def score_sets(
    sets: Sequence[tuple[str, ...]],
    kernels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    task: str,
    truth: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    groups_N: Tensor | None = None,
    counted_N: Tensor | None = None,
    check: Callable[[float], None],
) -> list[Candidate]:
    """Score sets of slices, in the order given.

    Args:
        sets: Names of slices.
        kernels: Per slice, (N, N); their type is the one that is computed in.
        widths: Columns per slice.
        task: ``classification`` or ``regression``.
        truth: Class indices, (N,), counted from 0 without gaps; or targets, (N, M).
        strengths: Penalties per row to try.
        groups_N: Group of each row, which is left out with all of it. None: each row is its own.
        counted_N: Which rows are scored, some of them at least. None: all of which something is known, left out.
        check: Called between chunks with the fraction done; may raise to stop.
    """
    names = list(kernels)
    kernels_BC = torch.stack([kernels[name].flatten() for name in names])
    share_AB = torch.tensor([[(name in one) / len(one) for name in names] for one in sets]).to(kernels_BC)
    targets_NM = _targets(task, truth).to(kernels_BC)
    num_rows, num_outputs = targets_NM.shape
    chunk_bytes = _CHUNK_BYTES.get(kernels_BC.device.type, _DEFAULT_CHUNK_BYTES)
    cells = len(strengths) * num_rows * (num_rows + 2 * num_outputs)
    size = max(1, chunk_bytes // (kernels_BC.element_size() * cells))
    scores, accuracies = [], []
    for start in range(0, len(sets), size):
        check(start / len(sets))
        kernels_ANN = (share_AB[start : start + size] @ kernels_BC).view(-1, num_rows, num_rows)
        predictions_ASNM = left_out_predictions(kernels_ANN, targets_NM, strengths, groups_N)
        if task == CLASSIFICATION:
            score_AS, accuracy_AS = _score_classes(predictions_ASNM, truth, counted_N)
            accuracies.append(accuracy_AS)
        else:
            squared_ASNM = (predictions_ASNM - targets_NM).square()
            score_AS = 1.0 - (squared_ASNM if counted_N is None else squared_ASNM[:, :, counted_N]).mean(dim=(2, 3))
        scores.append(score_AS.double())
    score_AS = torch.cat(scores)
    best_A = score_AS.argmax(dim=1, keepdim=True)
    best = score_AS.gather(1, best_A).squeeze(1).tolist()
    right: Sequence[float | None] = [None] * len(sets)
    if accuracies:
        right = torch.cat(accuracies).gather(1, best_A).squeeze(1).tolist()
    return [
        Candidate(one, sum(widths[name] for name in one), best[row], right[row], strengths[strength])
        for row, (one, strength) in enumerate(zip(sets, best_A.squeeze(1).tolist(), strict=True))
    ]


def _targets(task: str, truth: Tensor) -> Tensor:
    """Return what is regressed on, (N, M): one column per class, or targets of mean 0 and variance 1."""
    if task == CLASSIFICATION:
        return torch.nn.functional.one_hot(truth)
    centred_NM = truth.double() - truth.double().mean(dim=0)
    std_M = centred_NM.square().mean(dim=0).sqrt()
    return centred_NM / torch.where(std_M > 0, std_M, torch.ones_like(std_M))


def _score_classes(predictions_ASNM: Tensor, truth: Tensor, counted_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return minus the cross-entropy at the best temperature, and the accuracy, each (A, S).

    Accuracy alone is too coarse to choose by: on a few hundred rows many sets share one value. Cross-entropy needs
    probabilities; a temperature turns ridge's scores into such. A row that is its class's only one is not counted:
    left out, nothing is known of its class.
    """
    known = torch.nonzero(torch.bincount(truth)[truth] > 1 if counted_N is None else counted_N).squeeze(1)
    if len(known) < len(truth):
        predictions_ASNM, truth = predictions_ASNM[:, :, known], truth[known]
    top_ASN1, winner_ASN1 = predictions_ASNM.max(dim=3, keepdim=True)
    accuracy_AS = (winner_ASN1.squeeze(3) == truth).double().mean(dim=2)
    index_ASN1 = truth[:, None].expand_as(top_ASN1)
    short_AS = (top_ASN1 - predictions_ASNM.gather(3, index_ASN1)).double().mean(dim=(2, 3))
    # exp(2 t x) is the square of exp(t x): one exponential serves every temperature.
    odds_ASNM = ((predictions_ASNM - top_ASN1) * _TEMPERATURE).exp_()
    losses = []
    for doubling in range(_DOUBLINGS + 1):
        log_total_AS = odds_ASNM.sum(dim=3).log_().double().mean(dim=2)
        losses.append(_TEMPERATURE * 2**doubling * short_AS + log_total_AS)
        odds_ASNM.square_()
    return -torch.stack(losses).amin(dim=0), accuracy_AS
