"""Chooses what the spec leaves open, slices and L2 strength, by cross-validation on the training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import SliceSpec

from trunkline_worker.heads.config import HeadConfig
from trunkline_worker.heads.model import CLASSIFICATION
from trunkline_worker.training import selection
from trunkline_worker.training.fit import Rows
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.softmax import cross_validate_l2
from trunkline_worker.training.split import FOLDS, SUBSAMPLE, Indices, folds, random_stream, subsample

# Shape suffix legend: N = rows, D = columns of the embedding, M = outputs, F = repetitions of the folds

MLP_L2 = 0.1
"""For MLPs, where cross-validating a strength would cost as many trainings."""

_L2_ROWS = 512
_L2_PER_COLUMN = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_RIDGE_STRENGTHS = tuple(10.0 ** (0.5 * power) for power in range(-10, 3))


def choose_slices(
    embedding_ND: Tensor,
    slices: Sequence[SliceSpec],
    task: str,
    truth: Tensor,
    classes_N: Indices | None,
    training_index: Indices,
    seed: int,
    progress: Progress,
) -> list[selection.Candidate]:
    """Score sets of slices on the training rows, at most some hundred of them, and return them best first.

    Raises:
        WireError: BAD_LABELS if there are too few rows to compare anything.
    """
    progress.tell("select", 0.0)
    training_classes_N = None if classes_N is None else classes_N[training_index]
    _check_enough(training_classes_N, len(training_index))
    picked = subsample(
        training_classes_N,
        len(training_index),
        selection.MAX_ROWS,
        selection.MAX_CLASSES,
        random_stream(seed, SUBSAMPLE),
    )
    rows = torch.from_numpy(training_index[picked]).to(embedding_ND.device)
    picked_classes_N: Indices | None = None
    picked_truth = truth[rows]
    if training_classes_N is not None:
        _, dense_N = np.unique(training_classes_N[picked], return_inverse=True)
        picked_classes_N = dense_N.astype(np.int64)
        picked_truth = torch.from_numpy(picked_classes_N).to(truth.device)
    candidates = selection.select_slices(
        embedding_ND[rows].float(),
        slices,
        task,
        picked_truth,
        _folds(picked_classes_N, len(picked), selection.REPETITIONS, seed),
        check=lambda done: progress.tell("select", done),
    )
    best = candidates[0]
    metrics = {"score": best.score, "num_candidates": float(len(candidates)), "num_features": float(best.width)}
    if best.accuracy is not None:
        metrics["cv_accuracy"] = best.accuracy
    progress.tell("select", 1.0, metrics, f"chose {', '.join(best.slices)}", always=True)
    return candidates


def choose_l2(
    config: HeadConfig,
    task: str,
    training: Rows,
    classes_N: Indices | None,
    widths: Sequence[int],
    seed: int,
    progress: Progress,
) -> float:
    """Choose the L2 strength for a head on the chosen slices. The grid grows with the columns: so does the kernel."""
    if config.kind == "mlp":
        return MLP_L2
    num_rows, num_columns = training.x_ND.shape
    picked = subsample(classes_N, num_rows, _L2_ROWS, num_rows, random_stream(seed, SUBSAMPLE))
    sample = training if len(picked) == num_rows else training.take(torch.from_numpy(picked).to(training.truth.device))
    sample_classes_N = None if classes_N is None else classes_N[picked]
    fitted = selection.standardisation(sample.x_ND, widths)
    x_ND = (sample.x_ND.float() - fitted.mean_D) / fitted.scale_D
    repetitions = 1 if task == CLASSIFICATION else selection.REPETITIONS
    folds_FN = _folds(sample_classes_N, len(picked), repetitions, seed)
    if task == CLASSIFICATION:
        scores = cross_validate_l2(
            x_ND,
            sample.truth,
            int(sample.truth.max()) + 1,
            folds_FN[0].to(x_ND.device),
            [num_columns * one for one in _L2_PER_COLUMN],
            check=progress.check,
        )
        return min(scores, key=lambda one: scores[one])
    name = "all"
    (scored,) = selection.score_sets(
        [(name,)],
        {name: (x_ND @ x_ND.T).double() / num_columns},
        {name: num_columns},
        task,
        sample.truth,
        folds_FN,
        strengths=_RIDGE_STRENGTHS,
        check=lambda done: progress.check(),
    )
    return scored.strength * num_columns * num_rows


def _check_enough(classes_N: Indices | None, num_rows: int) -> None:
    if num_rows < 4 or (classes_N is not None and int(np.bincount(classes_N).max()) < 2):
        raise WireError(
            ErrorCode.BAD_LABELS,
            "too few rows to compare slices: embedding 'auto' needs 4 training rows, and 2 of some class. Add rows, or "
            "name the embedding: 'pooled'",
        )


def _folds(classes_N: Indices | None, num_rows: int, repetitions: int, seed: int) -> Tensor:
    random = random_stream(seed, FOLDS)
    num_folds = min(selection.NUM_FOLDS, num_rows)
    drawn = [folds(classes_N, num_rows, num_folds, random) for _ in range(repetitions)]
    return torch.from_numpy(np.stack(drawn))
