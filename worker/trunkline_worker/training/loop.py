"""Trains one head on one embedding: the whole of a training job, without ray, storage or clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig, check_metric
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL
from trunkline_wire.specs import POOLED, SliceSpec

from trunkline_worker.heads.model import TrainedHead
from trunkline_worker.store.evaluations import Evaluation, sample
from trunkline_worker.store.records import Conformal, Event, JobSpec
from trunkline_worker.training.choose import choose_l2, choose_slices
from trunkline_worker.training.fit import Rows, fit_head, quantile_of, soften
from trunkline_worker.training.labels import Labels, check_embedding, check_labels
from trunkline_worker.training.metrics import measure
from trunkline_worker.training.minibatch import run_head
from trunkline_worker.training.progress import Progress, TrainingCancelled
from trunkline_worker.training.scoring import Candidate
from trunkline_worker.training.search import Found, search
from trunkline_worker.training.sources import Source, slices_by_source
from trunkline_worker.training.spec import check_spec
from trunkline_worker.training.split import HOLD_OUT, hold_out, keep_both, random_stream
from trunkline_worker.training.sweep.alone import RunTrials, run_in_process
from trunkline_worker.training.trust.assess import assess

__all__ = ["Labels", "Source", "TrainingCancelled", "TrainingResult", "train_head"]

# Shape suffix legend: N = rows, D = columns of all inputs side by side


@dataclass(frozen=True)
class TrainingResult:
    """What a training job made.

    Attributes:
        head: The head to publish, on the CPU.
        metrics: ``num_rows``, ``num_train_rows``, ``num_validation_rows``, ``num_features``, ``l2``; with held-out rows
            what ``measure`` returns for the task; the same with ``train_`` in front, on the training split; and what
            the solver says of itself. Where the spec asks for a refit on all rows, the scores are those measured before
            it: afterwards no row is left that the head has not seen.
        conformal: What gives sets and intervals of predictions their coverage. None where no rows were held out.
        warnings: What its maker should know before trusting the head.
        found: What the search found; None where nothing was searched.
        evaluation: For the report: answers on held-out rows and the like.
        candidates: Sets of slices that were tried, best first; empty unless the embedding is ``auto``. Those of each
            further backbone follow, their slices named ``BACKBONE:SLICE``.
    """

    head: TrainedHead
    metrics: dict[str, float]
    candidates: list[Candidate]
    conformal: Conformal | None = None
    warnings: tuple[str, ...] = ()
    found: Found | None = None
    evaluation: Evaluation | None = None


def train_head(
    sources: Sequence[Source],
    labels: Labels,
    spec: JobSpec,
    *,
    row_ids: Sequence[bytes] = (),
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    run_trials: RunTrials = run_in_process,
) -> TrainingResult:
    """Choose slices, fit a head, measure it on held-out rows, and fit it once more on all of them.

    Everything is chosen and fitted on the training split; the held-out rows are only measured (and, for heads trained
    in epochs, tell which epoch was best). Equal arguments give an equal head, to the bit, on one machine with one
    number of threads.

    Args:
        sources: The inputs of the rows, one row per row of the dataset each, in the order in which they enter the head.
            Tensors stay on their device, where the work is done.
        labels: Classes or numbers.
        spec: What to train. Zeros leave a setting to us; a negative ``l2`` has it chosen by cross-validation. Epochs,
            batch size and learning rate mean nothing to the solver ``lbfgs``, which runs to convergence.
        row_ids: What each row was made from, to find copies by; of a row with several inputs, their ids one behind the
            other. Empty if not known.
        on_event: Takes events of the phases ``select``, ``fit`` and ``assess``, a few dozen at most.
        should_stop: Asked between steps.
        run_trials: Runs the configurations of a sweep that cannot be computed many at once.

    Raises:
        WireError: INVALID_ARGUMENT, BAD_LABELS, NOT_FINITE, EMPTY_BATCH, SHAPE_MISMATCH; NOT_FOUND for a slice that an
            embedding does not have.
        TrainingCancelled: Once ``should_stop`` said so.
    """
    progress = Progress(on_event, should_stop)
    check_spec(spec)
    first_ND = sources[0].tensor
    num_rows = int(first_ND.shape[0]) if first_ND.ndim else 0
    if spec.loss.class_order:
        spec = replace(spec, loss=_in_order(spec.loss, labels.class_names))
        labels = labels.ordered(spec.loss.class_order)
    check_labels(labels, num_rows, hold_out=spec.validation_fraction > 0)
    spec.loss.kind_for(labels.task)
    check_metric(spec.select_by, labels.task)
    _check_weights(spec, labels)
    for source in sources:
        check_embedding(source.tensor, num_rows, source.width)
    truth, classes_N = _truth(labels, first_ND.device)
    training_index, validation_index = hold_out(
        classes_N, num_rows, spec.validation_fraction, random_stream(spec.seed, HOLD_OUT)
    )
    if labels.task == MULTI_LABEL:
        assert labels.targets is not None
        training_index, validation_index = keep_both(labels.targets, training_index, validation_index)

    training_classes_N = None if classes_N is None else classes_N[training_index]
    tries_slices = spec.sweep is not None and bool(spec.sweep.embeddings)
    candidates: list[Candidate] = []
    if tries_slices:
        chosen = [list(one.slices) for one in sources]
    else:
        chosen, candidates = _choose(sources, labels.task, truth, classes_N, training_index, spec, progress)
    found: Found | None = None
    if spec.sweep is not None:
        searched = Rows(_side_by_side(sources, chosen), truth).take(torch.from_numpy(training_index).to(truth.device))
        settled = None if tries_slices else chosen
        found = search(
            *(spec, spec.sweep, sources, settled, labels.task, searched, training_classes_N, len(labels.class_names)),
            *(progress, run_trials),
        )
        spec, chosen = found.spec, [found.slices] if found.slices is not None else chosen
    inputs = [source.head_input(slices) for source, slices in zip(sources, chosen, strict=True)]
    columns_ND = _side_by_side(sources, chosen)

    everything = Rows(columns_ND, truth)
    training = (
        everything.take(torch.from_numpy(training_index).to(truth.device)) if len(validation_index) else everything
    )
    validation = everything.take(torch.from_numpy(validation_index).to(truth.device))
    widths = [width for one in inputs for width in one.widths]
    l2 = spec.l2
    if l2 < 0:
        l2 = choose_l2(spec, labels.task, training, training_classes_N, widths, progress)

    again = spec.refit and len(validation_index) > 0
    fit = fit_head(
        spec,
        labels.task,
        labels.num_outputs,
        inputs,
        training,
        validation if len(validation) else None,
        l2,
        progress,
        span=(0.0, 0.6 if again else 1.0),
    )
    held_out = run_head(fit.head, validation.x_ND) if len(validation) else fit.head.output.bias.new_zeros((0, 1))
    on_training = run_head(fit.head, training.x_ND)
    details, curves = fit.details, fit.curves
    if again:
        fit = fit_head(
            spec, labels.task, labels.num_outputs, inputs, everything, None, l2, progress, span=(0.6, 1.0), before=fit
        )
    progress.tell("fit", 1.0, details, always=True)
    assessed = assess(
        labels,
        columns_ND,
        widths,
        training_index,
        validation_index,
        held_out,
        validation.truth,
        l2=l2,
        seed=spec.seed,
        row_ids=row_ids,
        is_calibrated=spec.calibrate,
        progress=progress,
    )
    soften(fit.head, assessed.temperature)

    def measured(outputs: Tensor, rows: Rows) -> dict[str, float]:
        return measure(labels.task, outputs / assessed.temperature, rows.truth, quantile=quantile_of(spec))

    metrics = {
        "num_rows": float(num_rows),
        "num_train_rows": float(len(training)),
        "num_validation_rows": float(len(validation)),
        "num_features": float(sum(widths)),
        "l2": l2,
        **details,
        **measured(held_out, validation),
        **assessed.metrics,
        **{f"train_{name}": value for name, value in measured(on_training, training).items()},
    }
    head = TrainedHead(fit.head, labels.task, tuple(labels.class_names))
    progress.tell("assess", 1.0, metrics, _summary(metrics, again), always=True)
    evaluation = sample(
        validation_index, validation.truth.cpu().numpy(), assessed.answers_NK, curves, assessed.suspects
    )
    return TrainingResult(head.to("cpu"), metrics, candidates, assessed.conformal, assessed.warnings, found, evaluation)


def _in_order(loss: LossConfig, class_names: Sequence[str]) -> LossConfig:
    """Return a loss whose class weights, given in the dataset's order, are in the classes' own."""
    if len(loss.class_weights) != len(class_names):
        return loss
    weights = dict(zip(class_names, loss.class_weights, strict=True))
    return replace(loss, class_weights=tuple(weights.get(name, 1.0) for name in loss.class_order))


def _check_weights(spec: JobSpec, labels: Labels) -> None:
    num_weights = len(spec.loss.class_weights)
    if num_weights and num_weights != len(labels.class_names):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"{num_weights} class weights for {len(labels.class_names)} classes; one for each is needed",
        )


def _side_by_side(sources: Sequence[Source], chosen: Sequence[Sequence[SliceSpec]]) -> Tensor:
    columns = [source.columns(slices) for source, slices in zip(sources, chosen, strict=True)]
    return columns[0] if len(columns) == 1 else torch.cat([one.to(columns[0]) for one in columns], dim=1)


def _choose(
    sources: Sequence[Source],
    task: str,
    truth: Tensor,
    classes_N: npt.NDArray[np.int64] | None,
    training_index: npt.NDArray[np.int64],
    spec: JobSpec,
    progress: Progress,
) -> tuple[list[list[SliceSpec]], list[Candidate]]:
    """Return the slices of each source that enter the head, and the sets that were tried."""
    named = slices_by_source(spec.slices, sources) if spec.embedding == "slices" else []
    chosen: list[list[SliceSpec]] = []
    tried: list[Candidate] = []
    for number, source in enumerate(sources):
        if source.is_whole:
            if named:
                source.take(named[number])  # all of it enters; a name that it does not have is a mistake all the same
            chosen.append(list(source.slices))
        elif spec.embedding == "auto":
            candidates = choose_slices(
                source.tensor, source.slices, task, truth, classes_N, training_index, spec.seed, progress
            )
            prefix = f"{source.name}:" if number else ""
            tried += [replace(one, slices=tuple(prefix + name for name in one.slices)) for one in candidates]
            chosen.append(source.take(candidates[0].slices))
        else:
            chosen.append(source.take((POOLED,) if spec.embedding == POOLED else named[number]))
    return chosen, tried


def _truth(labels: Labels, device: torch.device) -> tuple[Tensor, npt.NDArray[np.int64] | None]:
    if labels.task in (CLASSIFICATION, ORDINAL):
        classes_N = np.asarray(labels.class_indices, dtype=np.int64)
        return torch.from_numpy(classes_N).to(device), classes_N
    return torch.from_numpy(np.array(labels.targets, dtype=np.float32)).to(device), None


def _summary(metrics: dict[str, float], again: bool) -> str:
    rows = int(metrics["num_validation_rows"])
    name = next((one for one in ("accuracy", "f1_micro", "r2") if one in metrics), "")
    if not rows or not name:
        return f"fitted on {int(metrics['num_train_rows'])} rows, none held out"
    after = f"; then fitted on all {int(metrics['num_rows'])} rows" if again else ""
    return f"{name} {metrics[name]:.3f} on {rows} held-out rows{after}"
