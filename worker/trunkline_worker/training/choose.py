"""Chooses what the spec leaves open, slices and L2 strength, by cross-validation on the training rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import MSE
from trunkline_wire.heads import CLASSIFICATION, CONV, LINEAR, MLP, MULTI_LABEL, ORDINAL, PROTOTYPE, REGRESSION
from trunkline_wire.specs import SliceSpec

from trunkline_worker.store.records import JobSpec
from trunkline_worker.training import selection
from trunkline_worker.training.fit import Rows, labels_loss, selected_badness, smooth_labels, target_scale
from trunkline_worker.training.grouped import apart
from trunkline_worker.training.ordinal import cross_validate_ordinal
from trunkline_worker.training.outputwise import cross_validate_outputwise, huber, log_odds, medians
from trunkline_worker.training.pictures import Pictures
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.scoring import Candidate, score_sets
from trunkline_worker.training.softmax import cross_validate_l2
from trunkline_worker.training.split import FOLDS, SUBSAMPLE, Indices, folds, random_stream, subsample
from trunkline_worker.training.standardise import standardisation
from trunkline_worker.training.weighing import row_weights

# Shape suffix legend: N = rows, D = columns of the embedding, M = outputs

WEIGHT_DECAY = 0.05
"""For heads with layers of their own, where cross-validating a strength would cost as many trainings."""

_L2_ROWS, _L2_CLASSES, _L2_FOLDS = 512, 256, 5
_LEAST_L2_PICTURES = 64
"""However many views they have."""

_FEW_SOFTMAX_ROWS, _MOST_SOFTMAX_ROWS, _MOST_SOFTMAX_ANSWERS = 2048, 8192, 80_000
"""A softmax takes all rows up to the first, else half of them up to the second, or so many that their probabilities are
no more than the third: where columns are many, the best strength grows with the rows, and few would tell of another
one. About ``_L2_ROWS`` of them are held out in all, a fifth at the least, not each in turn."""

L2_PER_COLUMN = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_RIDGE_STRENGTHS = tuple(10.0 ** (0.5 * power) for power in range(-10, 3))

_NAMED = 6
"""Slices of a set that a message names."""


def choose_slices(
    embedding_ND: Tensor,
    slices: Sequence[SliceSpec],
    task: str,
    truth: Tensor,
    classes_N: Indices | None,
    training_index: Indices,
    seed: int,
    progress: Progress,
    groups_N: Indices | None = None,
) -> list[Candidate]:
    """Score sets of slices on the training rows, at most some hundred of them, and return them best first.

    Rows are pictures here: their changed views take no part.

    Raises:
        WireError: BAD_LABELS if there are too few rows to compare anything.
    """
    progress.tell("select", 0.0)
    training_classes_N = None if classes_N is None else classes_N[training_index]
    if not _enough(training_classes_N, len(training_index)):
        raise WireError(
            ErrorCode.BAD_LABELS,
            "too few rows to compare slices: embedding 'auto' needs 4 rows, and 2 of some class, besides those "
            "that are held out. Add rows, hold none out, or name the embedding: 'pooled'",
        )
    training_groups_N = None if groups_N is None else groups_N[training_index]
    if not _enough(training_classes_N, len(training_index), training_groups_N):
        raise _too_few_groups("comparing slices", "name the embedding: 'pooled'")
    picked = subsample(
        training_classes_N,
        len(training_index),
        selection.MAX_ROWS,
        selection.MAX_CLASSES,
        random_stream(seed, SUBSAMPLE),
        training_groups_N,
    )
    rows = torch.from_numpy(training_index[picked]).to(embedding_ND.device)
    x_ND, picked_truth = embedding_ND[rows].float(), truth[rows]
    picked_classes_N = None if training_classes_N is None else training_classes_N[picked]
    picked_groups_N = None if training_groups_N is None else training_groups_N[picked]
    unlike = _unlike(x_ND, picked_truth)
    unlike_classes_N = None if picked_classes_N is None else picked_classes_N[unlike]
    unlike_groups_N = None if picked_groups_N is None else picked_groups_N[unlike]
    if _enough(unlike_classes_N, len(unlike), unlike_groups_N):
        rows = torch.from_numpy(unlike).to(x_ND.device)
        x_ND, picked_truth = x_ND[rows], picked_truth[rows]
        picked_classes_N, picked_groups_N = unlike_classes_N, unlike_groups_N
    if task in (CLASSIFICATION, ORDINAL):
        task = CLASSIFICATION  # what classes share with their neighbours no slice has for itself
        _, picked_truth = torch.unique(picked_truth, return_inverse=True)
    else:
        picked_truth = _some(picked_truth, selection.MAX_TARGETS)
    left_out, counted = _left_out(picked_classes_N, picked_groups_N, x_ND.device)
    candidates = selection.select_slices(
        *(x_ND, slices, task, picked_truth),
        groups_N=left_out,
        counted_N=counted,
        check=lambda done: progress.tell("select", done),
    )
    best = candidates[0]
    metrics = {"score": best.score, "num_candidates": float(len(candidates)), "num_features": float(best.width)}
    if best.accuracy is not None:
        metrics["cv_accuracy"] = best.accuracy
    progress.tell("select", 1.0, metrics, _summary(candidates), always=True)
    return candidates


@dataclass(frozen=True, eq=False)
class HeldOutSaid:
    """What linear fits to classes said of training rows that they had not seen, at the strength that was chosen.

    Attributes:
        rows: Which of the training rows, (N,).
        classes: Which classes the columns stand for, (K,).
        log_NK: Logarithms of probabilities.
    """

    rows: Indices
    classes: Indices
    log_NK: Tensor


def choose_l2(
    spec: JobSpec,
    task: str,
    training: Rows,
    classes_N: Indices | None,
    widths: Sequence[int],
    progress: Progress,
    pictures: Pictures | None = None,
    on_said: Callable[[HeldOutSaid], None] = lambda said: None,
) -> float:
    """Choose the L2 strength for a head on the chosen slices. The grid grows with the columns: so does the kernel.

    Each strength is fitted to all views of the other folds' pictures, and measured by the pictures themselves.

    Args:
        spec: The job.
        task: One of ``heads.TASKS``.
        training: Rows to train on.
        classes_N: Class of each picture, or None.
        widths: Of the slices.
        progress: Told how far it is; may raise to stop.
        pictures: What the rows are views of, and their groups. None: each row is one, and its own group.
        on_said: Takes what was said of held-out rows, of a linear head for classes whose rows count alike and are no
            views.

    Raises:
        WireError: BAD_LABELS for a single group.
    """
    pictures = pictures or Pictures(len(training))
    kind = spec.head.kind
    if kind in (MLP, CONV):
        return WEIGHT_DECAY
    if kind == PROTOTYPE and task != REGRESSION:
        return 0.0
    num_rows, num_columns = training.x_ND.shape
    if pictures.num_groups < 2 and pictures.groups_P is not None:
        raise _too_few_groups("choosing the L2 strength", "name the strength")
    is_softmax = task == CLASSIFICATION
    most = _softmax_rows(num_rows, classes_N) if is_softmax and classes_N is not None else _L2_ROWS
    most = max(_LEAST_L2_PICTURES, most // pictures.num_views)
    chosen = subsample(
        *(classes_N, pictures.count, most, min(_L2_CLASSES, most // 2)),
        random_stream(spec.seed, SUBSAMPLE),
        pictures.groups_P,
    )
    some, picked = pictures.take(chosen), pictures.views(chosen)
    sample = training if len(picked) == num_rows else training.take(torch.from_numpy(picked).to(training.truth.device))
    fitted = standardisation(sample.x_ND, widths)
    x_ND = (sample.x_ND.float() - fitted.mean_D) / fitted.scale_D
    if kind == PROTOTYPE:
        x_ND = torch.nn.functional.normalize(x_ND, dim=1)
        num_columns = 1  # each row has length 1, as if it had a single column of variance 1
    if task != REGRESSION or spec.loss.kind_for(task) != MSE or spec.select_by:
        sample_classes_P = None if classes_N is None else classes_N[chosen]
        num_folds = min(_L2_FOLDS, some.num_groups)
        folds_P = folds(sample_classes_P, some.count, num_folds, random_stream(spec.seed, FOLDS), some.groups_P)
        if is_softmax:
            folds_P[folds_P >= max(1, round(_L2_ROWS * num_folds / some.count))] = -1
        held_P = torch.from_numpy(folds_P >= 0).to(x_ND.device)
        folds_N = some.spread(torch.from_numpy(folds_P)).to(x_ND.device)
        scored_N = some.scored(x_ND.device)
        grid = [num_columns * one for one in L2_PER_COLUMN]
        check = progress.check

        def badness(truth: Tensor) -> Callable[[Tensor], float] | None:
            if not spec.select_by:
                return None
            return lambda outputs: selected_badness(
                spec, task, some.firsts(outputs)[held_P], some.firsts(truth)[held_P]
            )

        if task in (CLASSIFICATION, ORDINAL):
            present, dense_N = torch.unique(sample.truth, return_inverse=True)
            weights_N = row_weights(spec.loss, training.truth, int(training.truth.max()) + 1)
            if weights_N is not None:
                weights_N = weights_N[torch.from_numpy(picked).to(weights_N.device)]
            if task == CLASSIFICATION:
                smoothing = spec.loss.label_smoothing
                said: dict[float, Tensor] = {}
                scores = cross_validate_l2(
                    *(x_ND, dense_N, len(present), folds_N, grid),
                    weights_N=weights_N,
                    smoothing=smoothing,
                    scored_N=scored_N,
                    badness=badness(dense_N),
                    keep=said.__setitem__,
                    check=check,
                )
                if kind == LINEAR and weights_N is None and not smoothing and pictures.num_views == 1:
                    log_NK = said[min(scores, key=lambda one: scores[one])]
                    on_said(HeldOutSaid(picked[folds_P >= 0], present.cpu().numpy(), log_NK[held_P]))
            else:
                scores = cross_validate_ordinal(
                    *(x_ND, dense_N, len(present), folds_N, grid),
                    weights_N=weights_N,
                    scored_N=scored_N,
                    badness=badness(dense_N),
                    check=check,
                )
        elif task == MULTI_LABEL:
            some_NM = _some(sample.truth, _L2_CLASSES)
            weights_M = spec.loss.class_weights[:: _step(sample.truth, _L2_CLASSES)]
            loss_spec = replace(spec, loss=replace(spec.loss, class_weights=weights_M))
            scores = cross_validate_outputwise(
                *(x_ND, smooth_labels(spec, some_NM), labels_loss(loss_spec, some_NM), log_odds, folds_N, grid),
                scored_N=scored_N,
                badness=badness(some_NM),
                check=check,
            )
        else:
            # Squared errors would be those of the wild targets, which no strength but an endless one can please.
            mean_M, scale_M = target_scale(training.truth)
            targets_NM = _some((sample.truth.double() - mean_M) / scale_M, selection.MAX_TARGETS)
            grid = [num_columns * len(picked) * one for one in _RIDGE_STRENGTHS]
            loss = huber(spec.loss.huber_delta)
            scores = cross_validate_outputwise(
                *(x_ND, targets_NM, loss, medians, folds_N, grid),
                scored_N=scored_N,
                badness=badness(targets_NM),
                check=check,
            )
        return min(scores, key=lambda one: scores[one])
    name = "all"
    groups = some.row_groups()
    (scored,) = score_sets(
        [(name,)],
        {name: (x_ND @ x_ND.T).double() / num_columns},
        {name: num_columns},
        task,
        sample.truth,
        strengths=_RIDGE_STRENGTHS,
        groups_N=None if groups is None else torch.from_numpy(groups).to(x_ND.device),
        counted_N=some.scored(x_ND.device),
        check=lambda done: progress.check(),
    )
    return scored.strength * num_columns * num_rows


def _softmax_rows(num_rows: int, classes_N: Indices) -> int:
    """Return by how many rows to choose the strength of a softmax."""
    num_classes = min(len(np.unique(classes_N)), _L2_CLASSES)
    most = max(_FEW_SOFTMAX_ROWS, min(num_rows // 2, _MOST_SOFTMAX_ROWS))
    return max(_L2_ROWS, min(most, _MOST_SOFTMAX_ANSWERS // num_classes))


def _some(truth_NM: Tensor, most: int) -> Tensor:
    """Return evenly spaced outputs, at most so many."""
    return truth_NM[:, :: _step(truth_NM, most)]


def _step(truth_NM: Tensor, most: int) -> int:
    return -(-truth_NM.shape[1] // most)


def _enough(classes_N: Indices | None, num_rows: int, groups_N: Indices | None = None) -> bool:
    if groups_N is not None and not apart(classes_N, groups_N, num_rows).any():
        return False
    return num_rows >= 4 and (classes_N is None or int(np.bincount(classes_N).max()) >= 2)


def _left_out(
    classes_N: Indices | None, groups_N: Indices | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return the group that each row is left out with, and the rows of which something is known then."""
    if groups_N is None:
        return None, None
    counted_N = apart(classes_N, groups_N, len(groups_N))
    return torch.from_numpy(groups_N).to(device), torch.from_numpy(counted_N).to(device)


def _too_few_groups(what: str, way_out: str) -> WireError:
    return WireError(
        ErrorCode.BAD_LABELS,
        f"{what} needs rows of some class in two groups, besides the groups that are held out. Name groups more "
        f"finely, add some, hold none out, or {way_out}",
    )


def _unlike(x_ND: Tensor, truth: Tensor) -> Indices:
    """Return the rows that repeat no earlier one, label included.

    A row that was uploaded twice says nothing about slices: left out, it is predicted by its twin.
    """
    first: dict[tuple[bytes, bytes], int] = {}
    for row, (columns_D, label) in enumerate(zip(x_ND.cpu().numpy(), truth.cpu().numpy(), strict=True)):
        first.setdefault((columns_D.tobytes(), label.tobytes()), row)
    return np.array(list(first.values()), dtype=np.int64)


def _summary(candidates: Sequence[Candidate]) -> str:
    best, *others = candidates
    if not others:
        return f"chose {_described(best)}; there was nothing else to choose from"
    return f"chose {_described(best)}; the runner-up is {_described(others[0])}"


def _described(candidate: Candidate) -> str:
    names = ", ".join(candidate.slices[:_NAMED])
    if len(candidate.slices) > _NAMED:
        names += f" and {len(candidate.slices) - _NAMED} more"
    accuracy = "" if candidate.accuracy is None else f", accuracy {candidate.accuracy:.3f}"
    score = round(candidate.score, 3) + 0.0  # no "-0.000"
    return f"{names} (score {score:.3f}{accuracy})"
