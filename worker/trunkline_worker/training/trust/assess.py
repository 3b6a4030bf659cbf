"""What may be believed of a head: its probabilities brought to scale, intervals, sets, and what speaks against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, REGRESSION

from trunkline_worker.store.evaluations import LabelSuspect
from trunkline_worker.store.records import Conformal
from trunkline_worker.training.choose import HeldOutSaid
from trunkline_worker.training.fit import target_scale
from trunkline_worker.training.labels import Labels
from trunkline_worker.training.metrics import probabilities
from trunkline_worker.training.ordinal import above
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.split import TRUST, Indices, folds, num_groups, random_stream, subsample
from trunkline_worker.training.standardise import standardisation
from trunkline_worker.training.trust import conformal
from trunkline_worker.training.trust.bootstrap import share_interval
from trunkline_worker.training.trust.calibration import expected_calibration_error, fit_temperature
from trunkline_worker.training.trust.doubts import Evidence, warnings
from trunkline_worker.training.trust.headline import headline_intervals
from trunkline_worker.training.trust.suspects import cross_validated_probabilities, find_suspects

# Shape suffix legend: N = held-out rows, A = all rows, D = columns, K = outputs

_EXAMINED_ROWS, _LEAST_REFITTED, _EXAMINED_CLASSES = 1000, 512, 100
"""Rows whose labels are examined, training rows among them at the least, and classes of these: five fits on them are
quick. Held-out rows are judged by the head itself, which has not seen them."""

_MAX_EXAMINED_CELLS = 2**24
"""Probabilities of held-out rows that are looked at: evenly spaced rows where there are more."""


@dataclass(frozen=True)
class Assessment:
    """What is known of a head beside its scores.

    Attributes:
        temperature: What its outputs must be divided by.
        metrics: ``temperature``, ``ece`` and ``ece_uncalibrated``; ``NAME_low`` and ``NAME_high`` for the intervals.
        conformal: What gives sets and intervals their coverage; None where no rows were held out, or none are offered.
        warnings: A sentence for each doubt.
        answers_NK: Probabilities or values of the held-out rows.
        suspects: Rows whose label looks wrong, by their places among all rows, the most doubtful first.
    """

    temperature: float
    metrics: dict[str, float]
    conformal: Conformal | None
    warnings: tuple[str, ...]
    answers_NK: npt.NDArray[np.float32]
    suspects: tuple[LabelSuspect, ...]


def calibrate(
    task: str, outputs_NK: Tensor, truth: Tensor, seed: int, groups_N: Indices | None = None
) -> tuple[float, dict[str, float]]:
    """Return the temperature, and how far probabilities are off with and without one.

    For that each half of the rows is judged at the temperature of the other; no group is in both, if there are two.
    """
    if task == REGRESSION or len(outputs_NK) < 2:
        return 1.0, {}
    temperature = _temperature(task, outputs_NK, truth)
    if num_groups(groups_N, len(outputs_NK)) < 2:
        groups_N = None
    halves = folds(None, len(outputs_NK), 2, random_stream(seed, TRUST), groups_N)
    half_N = torch.from_numpy(halves).to(outputs_NK.device)
    scaled_NK = outputs_NK.double()
    for half in (0, 1):
        other = half_N != half
        scaled_NK[half_N == half] /= _temperature(task, outputs_NK[other], truth[other])
    return temperature, {
        "temperature": temperature,
        "ece_uncalibrated": expected_calibration_error(probabilities(task, outputs_NK), truth),
        "ece": expected_calibration_error(probabilities(task, scaled_NK), truth),
    }


def _temperature(task: str, outputs_NK: Tensor, truth: Tensor) -> float:
    if task == ORDINAL:  # each threshold is a question of its own
        return fit_temperature(MULTI_LABEL, outputs_NK, above(truth, outputs_NK.shape[1] + 1))
    return fit_temperature(task, outputs_NK, truth)


def assess(
    labels: Labels,
    columns_AD: Tensor,
    widths: Sequence[int],
    training_index: Indices,
    validation_index: Indices,
    outputs_NK: Tensor,
    truth: Tensor,
    *,
    l2: float,
    said: HeldOutSaid | None = None,
    seed: int,
    row_ids: Sequence[bytes] = (),
    groups_A: Indices | None = None,
    is_calibrated: bool = True,
    progress: Progress,
) -> Assessment:
    """Assess a head by what it says of held-out rows.

    Args:
        labels: Of all rows.
        columns_AD: What the head reads of them.
        widths: Of the slices, side by side.
        training_index: Rows that it was fitted on.
        validation_index: The held-out ones, N; may be empty.
        outputs_NK: Its outputs for them, before any temperature.
        truth: What these should be, as ``measure`` takes it.
        l2: A strength for linear fits that look for wrong labels.
        said: What such fits have said already, when the strength was chosen.
        seed: Of everything random.
        row_ids: What rows were made from; empty if not known.
        groups_A: Group of each row. None: each is its own.
        is_calibrated: Whether to fit a temperature.
        progress: Told how far it is; may raise to stop.
    """
    task = labels.task
    progress.tell("assess", 0.0)
    held_groups_N = None if groups_A is None else groups_A[validation_index]
    temperature, metrics = calibrate(task, outputs_NK, truth, seed, held_groups_N) if is_calibrated else (1.0, {})
    outputs_NK = outputs_NK.double() / temperature
    answers_NK = outputs_NK if task == REGRESSION else probabilities(task, outputs_NK)
    truths = truth.cpu().numpy()
    generator = random_stream(seed, TRUST)
    for name, (low, high) in headline_intervals(task, answers_NK.cpu().numpy(), truths, generator).items():
        if low == high and name in ("accuracy", "subset_accuracy"):  # all right, or none: so is every resample
            low, high = share_interval(round(low * len(truths)), len(truths))
        metrics[f"{name}_low"], metrics[f"{name}_high"] = low, high
    progress.tell("assess", 0.3)
    suspects: list[LabelSuspect] = []
    num_examined = 0
    classes_A = None if labels.class_indices is None else np.asarray(labels.class_indices, dtype=np.int64)
    if task == CLASSIFICATION and classes_A is not None:
        step = -(-answers_NK.numel() // _MAX_EXAMINED_CELLS) or 1
        examined = [(validation_index[::step], answers_NK[::step])] if len(validation_index) else []
        most = max(_LEAST_REFITTED, _EXAMINED_ROWS - len(validation_index))
        if said is not None and len(said.classes) <= _EXAMINED_CLASSES:
            say_NK = answers_NK.new_zeros((len(said.rows), len(labels.class_names)))
            say_NK[:, torch.from_numpy(said.classes).to(say_NK.device)] = said.log_NK.to(say_NK).exp()
            examined.append((training_index[said.rows], say_NK))
        elif len(training_index) > 1:
            groups_N = None if groups_A is None else groups_A[training_index]
            picked = subsample(
                classes_A[training_index], len(training_index), most, _EXAMINED_CLASSES, generator, groups_N
            )
            rows = training_index[picked]
            x_ND = columns_AD[torch.from_numpy(rows).to(columns_AD.device)].float()
            fitted = standardisation(x_ND, widths)
            say_NK = cross_validated_probabilities(
                (x_ND - fitted.mean_D) / fitted.scale_D,
                classes_A[rows],
                len(labels.class_names),
                l2 or 1.0,
                generator,
                groups_N=None if groups_A is None else groups_A[rows],
                check=progress.check,
            )
            examined.append((rows, say_NK))
        if examined:
            # Together: what a class's rows say of themselves takes more of them than are held out.
            rows = np.concatenate([one for one, _ in examined])
            say_NK = torch.cat([one.to(answers_NK) for _, one in examined])
            num_examined = len(rows)
            found = find_suspects(say_NK, classes_A[rows], None if groups_A is None else groups_A[rows])
            suspects = [replace(one, row=int(rows[one.row])) for one in found]
    progress.tell("assess", 0.8)
    is_one_of = task in (CLASSIFICATION, ORDINAL)
    evidence = Evidence(
        columns_AD,
        training_index,
        validation_index,
        row_ids=row_ids,
        groups_N=groups_A,
        class_names=labels.class_names,
        classes_N=classes_A if is_one_of else None,
        labels_NK=labels.targets if task == MULTI_LABEL else None,
        num_right=_num_right(answers_NK, truth) if is_one_of and len(truth) else None,
        suspects=suspects,
        num_examined=num_examined,
    )
    scale_K = None
    if labels.targets is not None and task == REGRESSION:
        # Of the training rows: what comes from the held-out ones would bend the promise.
        scale_K = target_scale(torch.from_numpy(labels.targets[training_index]))[1].to(outputs_NK)
    return Assessment(
        temperature,
        metrics,
        _conformal(task, outputs_NK, truth, scale_K),
        tuple(warnings(evidence)),
        answers_NK.float().cpu().numpy(),
        tuple(suspects),
    )


def _num_right(answers_NK: Tensor, truth: Tensor) -> int:
    return int((answers_NK.argmax(dim=1) == truth).sum())


def _conformal(task: str, outputs_NK: Tensor, truth: Tensor, scale_K: Tensor | None) -> Conformal | None:
    if not len(outputs_NK) or task == MULTI_LABEL:
        return None
    if scale_K is not None:
        scores, num_rows = conformal.calibration_scores(task, outputs_NK, truth, scale_K)
        return Conformal(scores, num_rows, tuple(scale_K.tolist()))
    if task == ORDINAL:  # as logits: probabilities have logarithms, but for those that are 0
        outputs_NK = probabilities(task, outputs_NK).clamp(min=1e-300).log()
    scores, num_rows = conformal.calibration_scores(CLASSIFICATION, outputs_NK, truth)
    return Conformal(scores, num_rows)
