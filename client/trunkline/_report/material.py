"""What a report is made of: all that the cluster still knows of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from trunkline_wire.errors import WireError
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL

from trunkline._deadline import Deadline
from trunkline._report.figures import Flags, Indices, Values
from trunkline.errors import CorruptDataError, NotFoundError, TrunklineError, UnsupportedError
from trunkline.records import Evaluation, JobEvent, JobStatus, ModelRecord

if TYPE_CHECKING:
    from trunkline.models import Model

# Shape suffix legend: N = rows, K = classes or outputs

MAX_OUTPUTS = 6
"""Most numbers a row that are drawn."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers on held-out rows that go with the model.

    Attributes:
        rows_N: Places in the dataset.
        classes_N: True class of each; empty unless each is of one.
        targets_NK: What each should be; empty where there are classes.
        answers_NK: Probabilities or values.
        num_held_out: Of so many rows.
    """

    rows_N: Indices
    classes_N: Indices
    targets_NK: Values
    answers_NK: Values
    num_held_out: int

    @cached_property
    def said(self) -> Indices:
        """(N,) the likeliest class of each row."""
        said_N: Indices = self.answers_NK.argmax(axis=1).astype(np.int64)
        return said_N

    @cached_property
    def confidence(self) -> Values:
        """(N,) its probability."""
        confidence_N: Values = self.answers_NK.max(axis=1)
        return confidence_N

    @property
    def memberships(self) -> Flags:
        """(N, K) whether each row is of each class, where it may be of several."""
        return self.targets_NK > 0.5

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows_N)


@dataclass(frozen=True, eq=False)
class Material:
    """What is known of a model.

    Attributes:
        record: What the registry keeps.
        facts: What it reads and what its head is made of, as names and values.
        evaluation: What was kept for a report; None if nothing was.
        status: Of the job that made it; None if that is gone.
        events: Of that job.
        damage: What is wrong with what was kept; empty if nothing is.
    """

    record: ModelRecord
    facts: tuple[tuple[str, str], ...] = ()
    evaluation: Evaluation | None = None
    status: JobStatus | None = None
    events: tuple[JobEvent, ...] = ()
    damage: str = ""

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        """What was measured, as far as it is finite."""
        return {name: value for name, value in self.record.metrics.items() if np.isfinite(value)}

    @property
    def is_one_of(self) -> bool:
        """Whether a row is of one class."""
        return self.record.task in (CLASSIFICATION, ORDINAL)

    @property
    def is_of_labels(self) -> bool:
        """Whether a row may be of several."""
        return self.record.task == MULTI_LABEL

    @property
    def is_refitted(self) -> bool:
        """Whether the model was fitted once more on all rows, after it was measured."""
        has_measured = self.metrics.get("num_validation_rows", 0) > 0
        return has_measured and self.status is not None and self.status.spec.fit.refit

    @property
    def is_tuned(self) -> bool:
        """Whether the model has blocks of its own."""
        return self.record.fine_tuning is not None and self.record.fine_tuning.kept

    @property
    def is_mixed(self) -> bool:
        """Whether rows were mixed in pairs while it learnt."""
        optimiser = None if self.status is None else self.status.spec.fit.optimiser
        return optimiser is not None and optimiser.mixup > 0

    @property
    def loss(self) -> str:
        """What was minimised; empty if that is not known."""
        loss = None if self.status is None else self.status.spec.fit.loss
        if loss is None:
            return ""
        try:
            return loss.kind_for(self.record.task)
        except WireError:
            return loss.kind

    @cached_property
    def answers(self) -> Answers | None:
        """Answers on held-out rows; None if there are none that go with the model."""
        return None if self.evaluation is None else self._checked(self.evaluation)

    @property
    def no_answers(self) -> str:
        """Why there are none."""
        if self.damage:
            return f"The answers on held-out rows cannot be read: {self.damage}"
        if self.evaluation is None:
            return (
                "The cluster keeps no answers on held-out rows of this model: the cluster, or the model, is older than "
                "that."
            )
        if not len(self.evaluation.rows):
            return "No rows were held out, so nothing is known of new ones."
        return "What the cluster keeps of this model's answers on held-out rows does not go with the model."

    def class_name(self, index: int) -> str:
        """Return the name of a class, whatever a cluster says of their number."""
        names = self.record.class_names
        return names[index] if 0 <= index < len(names) else f"class {index}"

    def output_name(self, index: int) -> str:
        """Return what to call an output that is a number."""
        return "value" if self.record.num_outputs == 1 else f"output {index + 1}"

    def _checked(self, kept: Evaluation) -> Answers | None:
        answers_NK = np.asarray(kept.answers_NK, dtype=np.float64)
        num_rows = len(kept.rows)
        if not num_rows or answers_NK.ndim != 2 or len(answers_NK) != num_rows or not answers_NK.shape[1]:
            return None
        names, num_outputs = self.record.class_names, answers_NK.shape[1]
        classes_N, targets_NK = np.zeros(0, np.int64), np.zeros((0, 0))
        if self.is_one_of:
            if kept.classes_N is None or len(kept.classes_N) != num_rows or len(names) != num_outputs:
                return None
            classes_N = np.asarray(kept.classes_N, dtype=np.int64)
            if classes_N.min() < 0 or classes_N.max() >= num_outputs:
                return None
        else:
            if kept.targets_NK is None or kept.targets_NK.shape != answers_NK.shape:
                return None
            if self.is_of_labels and len(names) != num_outputs:
                return None
            targets_NK = np.asarray(kept.targets_NK, dtype=np.float64)
        good = np.isfinite(answers_NK).all(axis=1)
        if len(targets_NK):
            good &= np.isfinite(targets_NK).all(axis=1)
        if not good.any():
            return None
        return Answers(
            np.asarray(kept.rows, dtype=np.int64)[good],
            classes_N[good] if self.is_one_of else classes_N,
            targets_NK if self.is_one_of else targets_NK[good],
            answers_NK[good],
            max(kept.num_held_out, num_rows),
        )


def gather(model: Model, deadline: Deadline, *, with_answers: bool = True) -> Material:
    """Return what is known of a model. What an older cluster does not have, or has no more, is left out.

    Raises:
        TrunklineError: The cluster cannot be reached, and the like.
    """
    client, record = model._client, model._whole()
    evaluation, damage = None, ""
    if with_answers:
        try:
            evaluation = client._calls.registry.evaluation(record.reference, deadline)
        except CorruptDataError as error:
            damage = error.message
        except (UnsupportedError, NotFoundError):
            pass  # it is older than evaluations
    status, events = _job(model, deadline, with_events=with_answers)
    return Material(record, tuple(model.facts()), evaluation, status, events, damage)


def _job(model: Model, deadline: Deadline, *, with_events: bool) -> tuple[JobStatus | None, tuple[JobEvent, ...]]:
    """Return what became of the job that made a model, and its events: what is told of it can do without."""
    if not model.record.job_id:
        return None, ()
    status: JobStatus | None = None
    events: list[JobEvent] = []
    try:
        job = model._client.job(model.record.job_id, timeout_s=deadline.remaining())
        status = job._last
        if with_events and status.state.has_ended:
            events += job.events(timeout_s=deadline.remaining())
    except TrunklineError:
        pass
    return status, tuple(events)
