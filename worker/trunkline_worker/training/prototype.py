"""Prototype heads: cosine similarity to what the rows of a class have in common. In closed form, for few rows a class.

Source: Snell, Swersky and Zemel 2017, "Prototypical Networks for Few-shot Learning", for classes as the mean of their
rows; Chen et al. 2019, "A Closer Look at Few-shot Classification" (Baseline++), for cosine similarity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL

from trunkline_worker.training.ridge import fit_ridge

# Shape suffix legend: N = rows, D = columns, K = outputs, T = temperatures

_TEMPERATURES = tuple(2.0 ** (0.5 * power) for power in range(15))
"""Log-odds per unit of cosine similarity that are tried: 1 to 128."""

_NEWTON_STEPS = 20


def fit_prototypes(
    x_ND: Tensor, task: str, truth: Tensor, num_outputs: int, l2: float, *, check: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Return weights, (D, K), and intercepts, (K,), on rows of unit length.

    How sharp the answers are is chosen by the cross-entropy of each row against prototypes made without it.

    Args:
        x_ND: Standardised rows.
        task: ``classification``; ``multi_label``, where a prototype of the rows with a label stands against one of
            those without; or ``regression``, which is ridge on rows of unit length.
        truth: Class indices, (N,); 0 and 1, (N, K); or targets, (N, K).
        num_outputs: K.
        l2: For regression: as ``fit_ridge``.
        check: Called between steps; may raise to stop.
    """
    check()
    unit_ND = functional.normalize(x_ND, dim=1)
    if task == CLASSIFICATION:
        return _classes(unit_ND, functional.one_hot(truth, num_outputs).to(unit_ND))
    if task == MULTI_LABEL:
        return _labels(unit_ND, truth.to(unit_ND))
    mean_D = unit_ND.mean(dim=0)
    ridge = fit_ridge(unit_ND - mean_D, truth, l2, check=check)
    return ridge.weights_DM, ridge.bias_M - mean_D.double() @ ridge.weights_DM


def _classes(unit_ND: Tensor, member_NK: Tensor) -> tuple[Tensor, Tensor]:
    left_out_NK = torch.where(member_NK > 0, *_similarities(unit_ND, member_NK))
    # Without its only row nothing is known of a class.
    known_N = (member_NK @ member_NK.sum(dim=0)) > 1
    temperature = _TEMPERATURES[len(_TEMPERATURES) // 2]
    if bool(known_N.any()):
        own_N = member_NK[known_N].argmax(dim=1)
        losses = [float(functional.cross_entropy(one * left_out_NK[known_N], own_N)) for one in _TEMPERATURES]
        temperature = _TEMPERATURES[losses.index(min(losses))]
    weights_DK = temperature * functional.normalize(member_NK.T @ unit_ND, dim=1).T
    return weights_DK, weights_DK.new_zeros(member_NK.shape[1])


def _labels(unit_ND: Tensor, member_NK: Tensor) -> tuple[Tensor, Tensor]:
    with_left_NK, with_all_NK = _similarities(unit_ND, member_NK)
    without_left_NK, without_all_NK = _similarities(unit_ND, 1 - member_NK)
    positive_NK = torch.where(member_NK > 0, with_left_NK, with_all_NK)
    negative_NK = torch.where(member_NK > 0, without_all_NK, without_left_NK)
    difference_NK = (positive_NK - negative_NK).double()
    best_loss, best = float("inf"), (1.0, difference_NK.new_zeros(member_NK.shape[1]))
    for temperature in _TEMPERATURES:
        bias_K = _intercepts(temperature * difference_NK, member_NK.double())
        logits_NK = temperature * difference_NK + bias_K
        loss = float(functional.binary_cross_entropy_with_logits(logits_NK, member_NK.double()))
        if loss < best_loss:
            best_loss, best = loss, (temperature, bias_K)
    temperature, bias_K = best
    prototypes = [functional.normalize(one.T @ unit_ND, dim=1) for one in (member_NK, 1 - member_NK)]
    return temperature * (prototypes[0] - prototypes[1]).T, bias_K


def _similarities(unit_ND: Tensor, member_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarity of each row to each prototype, made without that row, and made with it."""
    total_KD = member_NK.T @ unit_ND
    dot_NK = unit_ND @ total_KD.T
    square_K = total_KD.square().sum(dim=1)
    # Without itself a member's sum loses a vector of length 1. Of an only member nothing is left but rounding.
    left_square_NK = (square_K - 2 * dot_NK + 1).clamp(min=1e-12)
    left_NK = torch.where(member_NK.sum(dim=0) > 1, (dot_NK - 1) / left_square_NK.sqrt(), 0.0)
    return left_NK, dot_NK / square_K.clamp(min=1e-12).sqrt()


def _intercepts(offsets_NK: Tensor, truth_NK: Tensor) -> Tensor:
    """Return the intercepts of sigmoids behind fixed offsets, by Newton's method."""
    bias_K = offsets_NK.new_zeros(offsets_NK.shape[1])
    for _ in range(_NEWTON_STEPS):
        probability_NK = (offsets_NK + bias_K).sigmoid()
        slope_K = (probability_NK * (1 - probability_NK)).sum(dim=0).clamp(min=1e-6)
        bias_K = bias_K - ((probability_NK - truth_NK).sum(dim=0) / slope_K).clamp(-2.0, 2.0)
    return bias_K
