"""How raw columns of the embedding are brought to one scale, alike for choosing slices and for the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline_worker.heads.inputs import HeadInput

# Shape suffix legend: N = rows, D = columns, C = channels, H = height, W = width

_LEAST_SPREAD = 0.1
"""Of the slice's mean spread: a column that varies less than this, and in few rows, is not blown up to the others'
size."""

_FEW_ROWS = 0.15
"""Share of all rows. Of a bell curve a third counts, of what is evenly spread five ninths, of what is zero in all rows
but one that one. Quiet columns of EfficientNet-Lite0 lie below this on digits, those of scikit-learn's wine above."""


@dataclass(frozen=True)
class Standardisation:
    """Per column. ``scale_D`` holds the standard deviation and the slice's balance."""

    mean_D: Tensor
    scale_D: Tensor


def standardisation(x_ND: Tensor, widths: Sequence[int]) -> Standardisation:
    """Fit mean and scale of raw columns.

    A column that varies in a few rows alone is not scaled by less than a fraction of its slice's mean standard
    deviation. Activations behind a ReLU are often zero in every training row but one: divided by their own tiny
    deviation they would reach into the thousands on the first picture that does excite them, and drown all others.
    A column that varies little but in most rows is merely measured in other units, as local features are. How many rows
    share in the spread is told by the deviations: the square of their second moment over their fourth, of all rows.
    Slices that are constant get scale 1.

    Where slices of different widths are joined, each is weighted so that all have the same total variance and the mean
    over all columns stays 1: otherwise a wide slice drowns a narrow one. A single slice is not weighted.

    Args:
        x_ND: Raw rows of the training split.
        widths: Columns of each slice, in order.
    """
    mean_D = _mean(x_ND)
    std_D, shared_D = _spread(x_ND, mean_D)
    # A constant column's spread is rounding noise, relative to its size.
    is_constant_D = std_D <= 1e-6 * mean_D.abs() + 1e-12
    std_D = torch.where(is_constant_D, torch.zeros_like(std_D), std_D)
    least_D = torch.cat([(_LEAST_SPREAD * one_W.mean()).expand(len(one_W)) for one_W in std_D.split(list(widths))])
    floored_D = torch.where(is_constant_D | (shared_D < _FEW_ROWS), torch.maximum(std_D, least_D), std_D)
    scale_D = torch.where(floored_D > 0, floored_D, torch.ones_like(floored_D))
    balance = [(len(widths) * width / sum(widths)) ** 0.5 for width in widths]
    balance_D = torch.repeat_interleave(torch.tensor(balance, dtype=torch.float64), torch.tensor(widths))
    return Standardisation(mean_D.float(), (scale_D * balance_D.to(scale_D)).float())


def input_statistics(x_ND: Tensor, inputs: Sequence[HeadInput]) -> tuple[Tensor, Tensor]:
    """Return what a head subtracts from the columns of its inputs and divides them by.

    Ordinary inputs are standardised together, by column; a map by channel.
    """
    first, *others = inputs
    if not first.map_shape:
        fitted = standardisation(x_ND, [width for one in inputs for width in one.widths])
        return fitted.mean_D, fitted.scale_D
    mean_C, scale_C = _map_statistics(x_ND[:, : first.num_columns].unflatten(1, first.map_shape))
    if not others:
        return mean_C, scale_C
    rest = standardisation(x_ND[:, first.num_columns :], [width for one in others for width in one.widths])
    return torch.cat([mean_C, rest.mean_D]), torch.cat([scale_C, rest.scale_D])


def _map_statistics(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    total_C = square_C = x_NCHW.new_zeros(x_NCHW.shape[1], dtype=torch.float64)
    for chunk_NCHW in x_NCHW.split(max(1, 2**22 // x_NCHW[0].numel())):
        chunk_NCHW = chunk_NCHW.double()
        total_C = total_C + chunk_NCHW.sum(dim=(0, 2, 3))
        square_C = square_C + chunk_NCHW.square().sum(dim=(0, 2, 3))
    count = x_NCHW.numel() / x_NCHW.shape[1]
    mean_C = total_C / count
    std_C = (square_C / count - mean_C.square()).clamp(min=0.0).sqrt()
    std_C = torch.where(std_C <= 1e-6 * mean_C.abs() + 1e-12, torch.zeros_like(std_C), std_C)
    floored_C = std_C.clamp(min=_LEAST_SPREAD * std_C.mean())
    return mean_C.float(), torch.where(floored_C > 0, floored_C, torch.ones_like(floored_C)).float()


def chunks(x_ND: Tensor) -> Sequence[Tensor]:
    """Return the rows in portions whose copies in double precision a processor's cache holds."""
    cells = 2**18 if x_ND.device.type == "cpu" else 2**22
    return x_ND.split(max(1, cells // max(1, x_ND.shape[1])))


def _mean(x_ND: Tensor) -> Tensor:
    total_D = x_ND.new_zeros(x_ND.shape[1], dtype=torch.float64)
    for chunk_ND in chunks(x_ND):
        total_D += chunk_ND.double().sum(dim=0)
    return total_D / x_ND.shape[0]


def _spread(x_ND: Tensor, mean_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation, and the share of the rows that it rests on: see ``standardisation``."""
    second_D, fourth_D = torch.zeros_like(mean_D), torch.zeros_like(mean_D)
    for chunk_ND in chunks(x_ND):
        square_ND = (chunk_ND.double() - mean_D).square_()
        second_D += square_ND.sum(dim=0)
        fourth_D += square_ND.square_().sum(dim=0)
    shared_D = second_D.square() / (fourth_D * x_ND.shape[0]).clamp(min=torch.finfo(torch.float64).tiny)
    return (second_D / x_ND.shape[0]).sqrt(), shared_D
