"""Fits what says how unlike its training rows a row is: distances to class means under one covariance.

Sources: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks", for the Mahalanobis distance to the nearest class; Wang et al. 2022, "ViM: Out-Of-Distribution with
Virtual-logit Matching", for what lies outside of the leading directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.outliers import Detector
from trunkline_worker.training.split import TRUST, Indices, folds, random_stream, subsample
from trunkline_worker.training.standardise import chunks, standardisation

# Shape suffix legend: N = training rows, M = rows of a sample or held out, D = columns, P = directions, C = centres,
# Q = quantiles, R = Q + 1

MAX_DIRECTIONS = 64
"""Most directions with a covariance of their own."""

MAX_QUANTILES = 200
"""Most quantiles of the distances of rows held out that are kept."""

_ROWS_PER_DIRECTION = 4
"""Fewer would make directions, and their variances, out of noise."""

_MAX_ROWS, _MAX_CELLS = 2048, 2**25
"""Most rows, and numbers, that directions and covariance are computed from."""

_MAX_HELD_OUT = 20_000
_FOLDS = 5

_LEAST_RESIDUAL = 0.01
"""Of the rows' mean length: what the training rows hardly have outside of the directions counts as this much. Otherwise
rounding would, where columns depend on each other."""

_LEAST_SPREAD = 1e-4
"""Of the largest standard deviation: a direction with less has none, but for rounding."""


def fit_detector(
    x_ND: Tensor,
    classes_N: Indices | None,
    held_out_MD: Tensor,
    inputs: Sequence[HeadInput],
    seed: int,
    *,
    check: Callable[[], None] = lambda: None,
) -> Detector:
    """Fit on training rows, and keep how far rows that took no part in it are.

    Where none were held out, these are the training rows in cross-validation: each as seen by a fit on others. Equal
    arguments give an equal detector on one machine with one number of threads.

    Args:
        x_ND: Raw columns of the training rows, one row at least, on any device.
        classes_N: Class of each; None where they have none.
        held_out_MD: Raw columns of rows held out; may be empty.
        inputs: What the columns are. No maps.
        seed: Of the choice of rows, where there are more than are needed.
        check: Called between steps; may raise to stop.
    """
    widths = [width for one in inputs for width in one.widths]
    num_rows = len(x_ND) if len(held_out_MD) else len(x_ND) - len(x_ND) // _FOLDS  # of the smallest fit
    num_classes = 1 if classes_N is None else len(np.unique(classes_N))
    if 2 * num_classes > num_rows:  # of a class with a single row nobody knows how far its rows lie apart
        classes_N, num_classes = None, 1
    most = max(1, (num_rows - num_classes) // _ROWS_PER_DIRECTION)
    fit = _Fit(widths, min(MAX_DIRECTIONS, x_ND.shape[1], most), seed, check)
    detector = fit(x_ND, classes_N)
    if len(held_out_MD):
        picked = subsample(None, len(held_out_MD), _MAX_HELD_OUT, 1, random_stream(seed, TRUST))
        distances_M = _distances(detector, _take(held_out_MD, picked), check)
    else:
        distances_M = _cross_validated(x_ND, classes_N, fit)
    distances_Q, shares_R = quantiles(distances_M)
    first, *more = inputs
    return replace(
        detector,
        slices=first.slices,
        more_width=sum(one.num_columns for one in more),
        distances_Q=distances_Q,
        shares_R=shares_R,
        num_rows=len(distances_M),
        is_held_out=len(held_out_MD) > 0,
    )


def quantiles(distances_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return some of the distances, ascending, and the share of all that is nearer, below the first and above each.

    All of them where they are few: then shares are exact. Of many every so-manieth is kept, and more of the largest,
    by which rows are called unusual; shares are too small then by one step of the table at most.

    Args:
        distances_M: One or more.

    Shape:
        returns (Q,) and (Q + 1,), float32; Q is at most ``MAX_QUANTILES``.
    """
    ascending_M = distances_M.sort().values
    num = len(ascending_M)
    ranks = np.arange(num)
    if num > MAX_QUANTILES:
        half = MAX_QUANTILES // 2
        spread = np.concatenate([np.linspace(0, num - 1, half), num - np.geomspace(1, num, half)])
        ranks = np.unique(spread.round().astype(np.int64).clip(0, num - 1))
    shares_R = torch.from_numpy(np.concatenate([[0.0], (ranks + 1) / num]))
    return ascending_M[torch.from_numpy(ranks)].float(), shares_R.float()


@dataclass(frozen=True)
class _Fit:
    """Makes detectors that know no distances of other rows yet; their distances can be compared."""

    widths: Sequence[int]
    num_directions: int
    seed: int
    check: Callable[[], None]

    def __call__(self, x_ND: Tensor, classes_N: Indices | None) -> Detector:
        """Fit one on rows and, where they have any, their classes."""
        fitted = standardisation(x_ND, self.widths)
        mean_D, scale_D = fitted.mean_D.cpu(), fitted.scale_D.cpu()
        most = min(_MAX_ROWS, max(1, _MAX_CELLS // x_ND.shape[1]))
        picked = subsample(None, len(x_ND), most, 1, random_stream(self.seed, TRUST))
        self.check()
        directions_PD = _directions(_standardised(_take(x_ND, picked), mean_D, scale_D), self.num_directions)
        self.check()
        parts, outside, length = [], 0.0, 0.0
        for chunk_MD in chunks(x_ND):
            z_MD = _standardised(chunk_MD, mean_D, scale_D)
            parts.append((z_MD @ directions_PD.t()).double())
            squares_M = z_MD.double().square().sum(dim=1)
            length += float(squares_M.sum())
            outside += float((squares_M - parts[-1].square().sum(dim=1)).clamp(min=0.0).sum())
            self.check()
        p_NP = torch.cat(parts)
        num_rows = len(p_NP)
        class_of_N = torch.zeros(num_rows, dtype=torch.int64)
        if classes_N is not None:
            class_of_N = torch.from_numpy(np.unique(classes_N, return_inverse=True)[1])
        centres_CP = _means(p_NP, class_of_N)
        # What is left when every class has spent a row on its mean.
        freedom = max(1, num_rows - len(centres_CP))
        within_NP = p_NP - centres_CP[class_of_N]
        whitening_PP = _whitening(_take(within_NP, picked), num_rows / freedom)
        return Detector(
            slices=(),
            more_width=0,
            mean_D=mean_D,
            scale_D=scale_D,
            directions_PD=directions_PD,
            whitening_PP=whitening_PP.float(),
            centres_CP=(centres_CP @ whitening_PP.t()).float(),
            residual=_residual(outside, length, num_rows, freedom, directions_PD),
            distances_Q=torch.zeros(0),
            shares_R=torch.zeros(1),
            num_rows=0,
            is_held_out=False,
        )


def _directions(sample_MD: Tensor, num_directions: int) -> Tensor:
    """Return the leading principal directions of standardised rows, (P, D), orthonormal; fewer where they have fewer.

    By a randomised method, to which only the leading ones cost anything: thousands of columns have thousands. It is
    exact where there are few of them. A sample of standardised rows need not have the mean 0.
    """
    centred_MD = sample_MD - sample_MD.mean(dim=0)
    _, values, directions_PD = randomized_svd(centred_MD.numpy(), num_directions, n_iter=2, random_state=0)
    is_real = (values > _LEAST_SPREAD * values.max(initial=0.0)) & (values > 0.0)
    return torch.from_numpy(np.ascontiguousarray(directions_PD[is_real], dtype=np.float32))


def _means(p_NP: Tensor, class_of_N: Tensor) -> Tensor:
    counts_C = torch.bincount(class_of_N)
    totals_CP = p_NP.new_zeros((len(counts_C), p_NP.shape[1])).index_add_(0, class_of_N, p_NP)
    return totals_CP / counts_C.unsqueeze(1)


def _whitening(within_MP: Tensor, factor: float) -> Tensor:
    """Return what makes the covariance of deviations from the class means the identity, (P, P).

    Args:
        within_MP: The deviations.
        factor: By which their covariance is too small, the means being of the same rows.
    """
    if not within_MP.shape[1]:
        return within_MP.new_zeros((0, 0))
    covariance, _ = ledoit_wolf(within_MP.numpy(), assume_centered=True)
    covariance_PP = factor * torch.from_numpy(covariance)
    # Where classes have no spread at all in some direction, it is as good as none.
    least = 1e-6 * covariance_PP.diagonal().mean()
    covariance_PP += (least if least > 0 else 1.0) * torch.eye(len(covariance_PP), dtype=torch.float64)
    triangle_PP = torch.linalg.cholesky(covariance_PP)
    return torch.linalg.solve_triangular(triangle_PP, torch.eye(len(triangle_PP), dtype=torch.float64), upper=False)


def _residual(outside: float, length: float, num_rows: int, freedom: int, directions_PD: Tensor) -> float:
    """Return the root mean square length of what is outside of the directions; 0 where they span everything.

    Args:
        outside: Sum of the squares over the training rows.
        length: The same of whole rows.
        num_rows: Of these.
        freedom: Rows, but for one a class.
        directions_PD: The directions, which were chosen to leave these rows little outside: each took one of them.
    """
    directions, columns = directions_PD.shape
    if directions == columns:
        return 0.0
    typical = (outside / max(1, freedom - directions)) ** 0.5
    return max(typical, _LEAST_RESIDUAL * (length / num_rows) ** 0.5) or 1.0


def _cross_validated(x_ND: Tensor, classes_N: Indices | None, fit: _Fit) -> Tensor:
    """Return how far each training row is for a detector fitted on the rows of other folds; M is N."""
    num_rows = len(x_ND)
    if num_rows < 2:
        return _distances(fit(x_ND, classes_N), x_ND, fit.check)
    fold_N = folds(classes_N, num_rows, min(_FOLDS, num_rows), random_stream(fit.seed, TRUST))
    found = []
    for fold in range(int(fold_N.max()) + 1):
        inside, others = np.flatnonzero(fold_N == fold), np.flatnonzero(fold_N != fold)
        detector = fit(_take(x_ND, others), None if classes_N is None else classes_N[others])
        found.append(_distances(detector, _take(x_ND, inside), fit.check))
    return torch.cat(found)


def _distances(detector: Detector, x_MD: Tensor, check: Callable[[], None]) -> Tensor:
    found = []
    for chunk_MD in chunks(x_MD):
        found.append(detector.distance(chunk_MD))
        check()
    return torch.cat(found)


def _standardised(x_MD: Tensor, mean_D: Tensor, scale_D: Tensor) -> Tensor:
    return (x_MD.cpu().float() - mean_D) / scale_D


def _take(x_ND: Tensor, rows: Indices) -> Tensor:
    return x_ND if len(rows) == len(x_ND) else x_ND[torch.from_numpy(rows).to(x_ND.device)]
