"""Trains one head on one embedding: the whole of a training job, without ray, storage or clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import SliceSpec

from trunkline_worker.heads.model import CLASSIFICATION, TrainedHead
from trunkline_worker.store.records import Event, JobSpec
from trunkline_worker.training.choose import choose_l2, choose_slices
from trunkline_worker.training.fit import Rows, fit_head, measure_head
from trunkline_worker.training.labels import Labels, check_embedding, check_labels
from trunkline_worker.training.progress import Progress, TrainingCancelled
from trunkline_worker.training.scoring import Candidate
from trunkline_worker.training.spec import check_spec
from trunkline_worker.training.split import HOLD_OUT, hold_out, random_stream

__all__ = ["Labels", "TrainingCancelled", "TrainingResult", "train_head"]

# Shape suffix legend: N = rows, D = columns of the embedding

POOLED = "pooled"


@dataclass(frozen=True)
class TrainingResult:
    """What a training job made.

    Attributes:
        head: The head to publish, on the CPU.
        metrics: ``num_rows``, ``num_train_rows``, ``num_validation_rows``, ``num_features``, ``l2``; with held-out rows
            ``accuracy`` and ``cross_entropy``, or ``r2``, ``mse`` and ``mae``; the same with ``train_`` in front, on
            the training split; and what the solver says of itself. Where the spec asks for a refit on all rows, the
            scores are those measured before it: afterwards no row is left that the head has not seen.
        candidates: Sets of slices that were tried, best first; empty unless the embedding is ``auto``.
    """

    head: TrainedHead
    metrics: dict[str, float]
    candidates: list[Candidate]


def train_head(
    embedding_ND: npt.NDArray[np.floating] | Tensor,
    slices: Sequence[SliceSpec],
    labels: Labels,
    spec: JobSpec,
    *,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> TrainingResult:
    """Choose slices, fit a head, measure it on held-out rows, and fit it once more on all of them.

    Everything is chosen and fitted on the training split; the held-out rows are only measured (and, for heads trained
    in epochs, tell which epoch was best). Equal arguments give an equal head, to the bit, on one machine with one
    number of threads.

    Args:
        embedding_ND: One row per row of the dataset. Stays on its device, where the work is done.
        slices: Which columns are which.
        labels: Classes or numbers.
        spec: What to train. Zeros leave a setting to us; a negative ``l2`` has it chosen by cross-validation. Epochs,
            batch size and learning rate mean nothing to the solver ``lbfgs``, which runs to convergence.
        on_event: Takes events of the phases ``select`` and ``fit``, a few dozen at most.
        should_stop: Asked between steps.

    Raises:
        WireError: INVALID_ARGUMENT, BAD_LABELS, NOT_FINITE, EMPTY_BATCH, SHAPE_MISMATCH; NOT_FOUND for a slice that the
            embedding does not have.
        TrainingCancelled: Once ``should_stop`` said so.
    """
    progress = Progress(on_event, should_stop)
    config = check_spec(spec)
    if isinstance(embedding_ND, np.ndarray):
        # Rows read from storage cannot be written to, and torch will not have such memory.
        embedding_ND = torch.from_numpy(np.require(embedding_ND, requirements=["C", "W"]))
    num_rows = int(embedding_ND.shape[0]) if embedding_ND.ndim else 0
    check_labels(labels, num_rows, hold_out=spec.validation_fraction > 0)
    check_embedding(embedding_ND, num_rows, max((one.stop for one in slices), default=0))
    truth, classes_N = _truth(labels, embedding_ND.device)
    training_index, validation_index = hold_out(
        classes_N, num_rows, spec.validation_fraction, random_stream(spec.seed, HOLD_OUT)
    )

    candidates: list[Candidate] = []
    if spec.embedding == "auto":
        candidates = choose_slices(
            embedding_ND, slices, labels.task, truth, classes_N, training_index, spec.seed, progress
        )
        chosen = _named(slices, candidates[0].slices)
    else:
        chosen = _named(slices, (POOLED,) if spec.embedding == "pooled" else spec.slices)
    columns_ND = _columns(embedding_ND, chosen)
    widths = [one.width for one in chosen]

    everything = Rows(columns_ND, truth)
    training = (
        everything.take(torch.from_numpy(training_index).to(truth.device)) if len(validation_index) else everything
    )
    validation = everything.take(torch.from_numpy(validation_index).to(truth.device))
    training_classes_N = None if classes_N is None else classes_N[training_index]
    l2 = spec.l2
    if l2 < 0:
        l2 = choose_l2(config, labels.task, training, training_classes_N, widths, spec.seed, progress)

    again = spec.refit and len(validation_index) > 0
    fit = fit_head(
        config,
        spec,
        labels.task,
        labels.num_outputs,
        widths,
        training,
        validation if len(validation) else None,
        l2,
        progress,
        span=(0.0, 0.6 if again else 1.0),
    )
    metrics = {
        "num_rows": float(num_rows),
        "num_train_rows": float(len(training)),
        "num_validation_rows": float(len(validation)),
        "num_features": float(sum(widths)),
        "l2": l2,
        **fit.details,
        **measure_head(fit.head, labels.task, validation),
        **{f"train_{name}": value for name, value in measure_head(fit.head, labels.task, training).items()},
    }
    if again:
        fit = fit_head(
            config,
            spec,
            labels.task,
            labels.num_outputs,
            widths,
            everything,
            None,
            l2,
            progress,
            span=(0.6, 1.0),
            before=fit,
        )
    head = TrainedHead(
        fit.head, labels.task, tuple(labels.class_names), tuple(one.name for one in chosen), tuple(widths)
    )
    progress.tell("fit", 1.0, metrics, _summary(metrics, again), always=True)
    return TrainingResult(head.to("cpu"), metrics, candidates)


def _truth(labels: Labels, device: torch.device) -> tuple[Tensor, npt.NDArray[np.int64] | None]:
    if labels.task == CLASSIFICATION:
        classes_N = np.asarray(labels.class_indices, dtype=np.int64)
        return torch.from_numpy(classes_N).to(device), classes_N
    return torch.from_numpy(np.array(labels.targets, dtype=np.float32)).to(device), None


def _named(slices: Sequence[SliceSpec], names: Sequence[str]) -> list[SliceSpec]:
    """Return the slices of those names, in the embedding's order."""
    known = {one.name for one in slices}
    missing = [name for name in names if name not in known]
    if missing:
        raise WireError(
            ErrorCode.NOT_FOUND,
            f"slice {missing[0][:80]!r} is not part of this embedding, which has {', '.join(sorted(known)) or 'none'}",
        )
    return [one for one in slices if one.name in names]


def _columns(embedding_ND: Tensor, chosen: Sequence[SliceSpec]) -> Tensor:
    """Return the chosen slices side by side."""
    return torch.cat([embedding_ND[:, one.start : one.stop] for one in chosen], dim=1)


def _summary(metrics: dict[str, float], again: bool) -> str:
    rows = int(metrics["num_validation_rows"])
    name = "accuracy" if "accuracy" in metrics else "r2"
    if not rows or name not in metrics:
        return f"fitted on {int(metrics['num_train_rows'])} rows, none held out"
    after = f"; then fitted on all {int(metrics['num_rows'])} rows" if again else ""
    return f"{name} {metrics[name]:.3f} on {rows} held-out rows{after}"
