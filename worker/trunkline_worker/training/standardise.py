"""How raw columns of the embedding are brought to one scale, alike for choosing slices and for the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Shape suffix legend: N = rows, D = columns

_LEAST_SPREAD = 0.1
"""Of the slice's mean spread: a column that varies less than this is not blown up to the others' size."""


@dataclass(frozen=True)
class Standardisation:
    """Per column. ``scale_D`` holds the standard deviation and the slice's balance."""

    mean_D: Tensor
    scale_D: Tensor


def standardisation(x_ND: Tensor, widths: Sequence[int]) -> Standardisation:
    """Fit mean and scale of raw columns.

    No column is scaled by less than a fraction of its slice's mean standard deviation. Activations behind a ReLU are
    often zero in every training row but one: divided by their own tiny deviation they would reach into the thousands
    on the first picture that does excite them, and drown all others. Slices that are constant get scale 1.

    Where slices of different widths are joined, each is weighted so that all have the same total variance and the mean
    over all columns stays 1: otherwise a wide slice drowns a narrow one. A single slice is not weighted.

    Args:
        x_ND: Raw rows of the training split.
        widths: Columns of each slice, in order.
    """
    mean_D = _mean(x_ND)
    std_D = _std(x_ND, mean_D)
    # A constant column's spread is rounding noise, relative to its size.
    std_D = torch.where(std_D <= 1e-6 * mean_D.abs() + 1e-12, torch.zeros_like(std_D), std_D)
    floored_D = torch.cat([one_W.clamp(min=_LEAST_SPREAD * one_W.mean()) for one_W in std_D.split(list(widths))])
    scale_D = torch.where(floored_D > 0, floored_D, torch.ones_like(floored_D))
    balance = [(len(widths) * width / sum(widths)) ** 0.5 for width in widths]
    balance_D = torch.repeat_interleave(torch.tensor(balance, dtype=torch.float64), torch.tensor(widths))
    return Standardisation(mean_D.float(), (scale_D * balance_D.to(scale_D)).float())


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
