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
from trunkline_worker.heads.outliers import Detector
from trunkline_worker.store.evaluations import Evaluation, sample
from trunkline_worker.store.groups import check_held_groups
from trunkline_worker.store.records import Conformal, Event, FineTuning, JobSpec
from trunkline_worker.training.choose import HeldOutSaid, choose_l2, choose_slices
from trunkline_worker.training.fit import Rows, fit_head, quantile_of, soften
from trunkline_worker.training.labels import Labels, check_embedding, check_labels
from trunkline_worker.training.metrics import measure
from trunkline_worker.training.minibatch import run_head
from trunkline_worker.training.pictures import Pictures
from trunkline_worker.training.progress import Progress, TrainingCancelled
from trunkline_worker.training.scoring import Candidate
from trunkline_worker.training.search import Found, search
from trunkline_worker.training.sources import Source, slices_by_source
from trunkline_worker.training.spec import check_spec
from trunkline_worker.training.split import HOLD_OUT, hold_out, keep_both, random_stream
from trunkline_worker.training.sweep.alone import RunTrials, run_in_process
from trunkline_worker.training.trust.assess import assess
from trunkline_worker.training.trust.outliers import fit_detector
from trunkline_worker.training.tuning.tune import TailSource, Tuned, check_tuning, fine_tune

__all__ = ["Labels", "Source", "TrainingCancelled", "TrainingResult", "train_head"]

# Shape suffix legend: N = rows, D = columns of all inputs side by side


@dataclass(frozen=True)
class TrainingResult:
    """What a training job made.

    Attributes:
        head: The head to publish, on the CPU.
        metrics: ``num_rows``, ``num_train_rows``, ``num_validation_rows``, ``num_features``, ``l2``; where pictures
            have views, rows are pictures here and ``num_views`` is what each was trained on in; ``num_groups`` where
            there are any; with held-out rows what ``measure`` returns for the task; the same with ``train_`` in front,
            on the training split; and what the solver says of itself. Where the spec asks for a refit on all rows, the
            scores are those measured before it: afterwards no row is left that the head has not seen.
        conformal: What gives sets and intervals of predictions their coverage. None where no rows were held out.
        warnings: What its maker should know before trusting the head.
        found: What the search found; None where nothing was searched.
        evaluation: For the report: answers on held-out rows and the like.
        tuning: What came of fine-tuning; None where it was not asked for.
        outliers: Says how unlike its training rows a row is; None for a head that reads a map.
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
    tuning: FineTuning | None = None
    outliers: Detector | None = None


def train_head(
    sources: Sequence[Source],
    labels: Labels,
    spec: JobSpec,
    *,
    row_ids: Sequence[bytes] = (),
    tail: TailSource | None = None,
    groups: npt.NDArray[np.integer] | None = None,
    num_views: int = 1,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    run_trials: RunTrials = run_in_process,
) -> TrainingResult:
    """Choose slices, fit a head, measure it on held-out rows, and fit it once more on all of them.

    Everything is chosen and fitted on the training split; the held-out rows are only measured (and, for heads trained
    in epochs, tell which epoch was best). Of pictures with several views all are trained on, but only the pictures
    themselves are measured with, and no group is on both sides. Equal arguments give an equal head, to the bit, on one
    machine with one number of threads.

    Args:
        sources: The inputs of the rows, one row per row of the dataset each, in the order in which they enter the head.
            Tensors stay on their device, where the work is done.
        labels: Classes or numbers.
        spec: What to train. Zeros leave a setting to us; a negative ``l2`` has it chosen by cross-validation. Epochs,
            batch size and learning rate mean nothing to the solver ``lbfgs``, which runs to convergence.
        row_ids: What each row was made from, to find copies by; of a row with several inputs, their ids one behind the
            other. Empty if not known.
        tail: Where the blocks begin that the spec asks to be fine-tuned, and who trains them.
        groups: Group of each row. None: each picture is its own.
        num_views: So many rows, one after another, are views of one picture, the first the picture itself.
        on_event: Takes events of the phases ``select``, ``fit``, ``tune`` and ``assess``, a few dozen at most.
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
    pictures = Pictures.of(num_rows, num_views, groups)
    labels = labels.of_pictures(num_views)
    check_labels(labels, pictures.count, hold_out=spec.validation_fraction > 0)
    spec.loss.kind_for(labels.task)
    check_metric(spec.select_by, labels.task)
    _check_weights(spec, labels)
    check_tuning(spec, tail)
    for source in sources:
        check_embedding(source.tensor, num_rows, source.width)
    truth, classes_N = _truth(labels, first_ND.device)
    training_index, validation_index = _split(labels, classes_N, pictures, spec)
    trained_on = pictures.take(training_index)
    training_rows = torch.from_numpy(pictures.views(training_index)).to(truth.device)

    training_classes_N = None if classes_N is None else classes_N[training_index]
    tries_slices = spec.sweep is not None and bool(spec.sweep.embeddings)
    candidates: list[Candidate] = []
    if tries_slices:
        chosen = [list(one.slices) for one in sources]
    else:
        chosen, candidates = _choose(sources, labels.task, truth, classes_N, training_index, spec, progress, pictures)
    found: Found | None = None
    if spec.sweep is not None:
        searched = Rows(_side_by_side(sources, chosen), pictures.spread(truth)).take(training_rows)
        settled = None if tries_slices else chosen
        found = search(
            *(spec, spec.sweep, sources, settled, labels.task, searched, training_classes_N, len(labels.class_names)),
            *(progress, run_trials, trained_on),
        )
        spec, chosen = found.spec, [found.slices] if found.slices is not None else chosen
    inputs = [source.head_input(slices) for source, slices in zip(sources, chosen, strict=True)]
    columns_ND = _side_by_side(sources, chosen)

    everything = Rows(columns_ND, pictures.spread(truth))
    training = everything.take(training_rows) if len(validation_index) else everything
    as_taken = Rows(pictures.firsts(columns_ND), truth)
    validation = as_taken.take(torch.from_numpy(validation_index).to(truth.device))
    widths = [width for one in inputs for width in one.widths]
    l2, said = spec.l2, list[HeldOutSaid]()
    if l2 < 0:
        l2 = choose_l2(spec, labels.task, training, training_classes_N, widths, progress, trained_on, said.append)

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
    seen = Rows(trained_on.firsts(training.x_ND), trained_on.firsts(training.truth))
    on_training = run_head(fit.head, seen.x_ND)
    details, curves = fit.details, fit.curves
    tuned: Tuned | None = None
    if tail is not None and spec.fine_tune is not None:
        progress.tell("fit", 1.0, details, always=True)
        tuned = fine_tune(
            *(spec, labels.task, labels.num_outputs, sources[0], tail, truth, classes_N),
            *(training_index, validation_index, held_out, progress, pictures),
        )
        curves = {**curves, **tuned.curves}
    head = fit.head if tuned is None or tuned.head is None else tuned.head
    if tuned is not None and tuned.outputs_NK is not None:
        outputs_NK = tuned.outputs_NK.to(held_out.device)
        held_out, on_training = (outputs_NK[torch.from_numpy(one)] for one in (validation_index, training_index))
    elif again:
        head = fit_head(
            spec, labels.task, labels.num_outputs, inputs, everything, None, l2, progress, span=(0.6, 1.0), before=fit
        ).head
    if tuned is None:
        progress.tell("fit", 1.0, details, always=True)
    assessed = assess(
        labels,
        as_taken.x_ND,
        widths,
        training_index,
        validation_index,
        held_out,
        validation.truth,
        l2=l2,
        said=said[0] if said else None,
        seed=spec.seed,
        row_ids=row_ids[::num_views],
        groups_A=pictures.groups_P,
        is_calibrated=spec.calibrate,
        progress=progress,
    )
    soften(head, assessed.temperature)

    def measured(outputs: Tensor, rows: Rows) -> dict[str, float]:
        return measure(labels.task, outputs / assessed.temperature, rows.truth, quantile=quantile_of(spec))

    metrics = {
        "num_rows": float(pictures.count),
        "num_train_rows": float(len(seen)),
        "num_validation_rows": float(len(validation)),
        "num_features": float(sum(widths)),
        "l2": l2,
        **({"num_views": float(num_views)} if num_views > 1 else {}),
        **({"num_groups": float(pictures.num_groups)} if pictures.groups_P is not None else {}),
        **details,
        **measured(held_out, validation),
        **assessed.metrics,
        **{f"train_{name}": value for name, value in measured(on_training, seen).items()},
    }
    outliers = None
    if not head.inputs[0].map_shape:  # of a map, where places differ, means and covariances say nothing
        outliers = fit_detector(seen.x_ND, training_classes_N, validation.x_ND, inputs, spec.seed, check=progress.check)
    trained = TrainedHead(head, labels.task, tuple(labels.class_names))
    progress.tell("assess", 1.0, metrics, _summary(metrics, again), always=True)
    evaluation = sample(
        validation_index, validation.truth.cpu().numpy(), assessed.answers_NK, curves, assessed.suspects
    )
    return TrainingResult(
        trained.to("cpu"),
        metrics,
        candidates,
        assessed.conformal,
        assessed.warnings,
        found,
        evaluation,
        None if tuned is None else tuned.record,
        outliers,
    )


def _split(
    labels: Labels, classes_P: npt.NDArray[np.int64] | None, pictures: Pictures, spec: JobSpec
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the pictures to train on and those to measure with."""
    groups_P = pictures.groups_P
    if groups_P is not None:
        check_held_groups(labels.class_names, classes_P, groups_P, hold_out=spec.validation_fraction > 0)
    training_index, validation_index = hold_out(
        classes_P, pictures.count, spec.validation_fraction, random_stream(spec.seed, HOLD_OUT), groups_P
    )
    if labels.task == MULTI_LABEL:
        assert labels.targets is not None
        training_index, validation_index = keep_both(labels.targets, training_index, validation_index, groups_P)
    if groups_P is not None and spec.validation_fraction > 0 and not len(validation_index):
        raise WireError(
            ErrorCode.BAD_LABELS,
            "no group can be held out and every label still be learnt with and without; name groups more finely, add "
            "rows in other groups, or set the validation fraction to 0",
        )
    return training_index, validation_index


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
    pictures: Pictures,
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
                *(pictures.firsts(source.tensor), source.slices, task, truth, classes_N, training_index, spec.seed),
                progress,
                pictures.groups_P,
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
