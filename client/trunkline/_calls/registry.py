"""Calls about trained models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, REGRESSION
from trunkline_wire.messages import space_from_proto
from trunkline_wire.v1 import registry_pb2 as pb
from trunkline_wire.v1.registry_pb2_grpc import RegistryServiceStub

from trunkline._calls.core import Caller
from trunkline._calls.heads import head_from_message
from trunkline._calls.matrices import decode_matrix
from trunkline._calls.times import from_timestamp
from trunkline._deadline import Deadline
from trunkline.records import Candidate, Conformal, Evaluation, FineTuning, LabelSuspect, ModelInput, ModelRecord, Trial

_TASKS = {pb.TASK_REGRESSION: REGRESSION, pb.TASK_MULTI_LABEL: MULTI_LABEL, pb.TASK_ORDINAL: ORDINAL}


class RegistryCalls:
    """``RegistryService``."""

    def __init__(self, caller: Caller) -> None:
        """Keep who makes the calls."""
        self._caller = caller

    def get(self, reference: str, deadline: Deadline) -> ModelRecord:
        """Return one model."""
        answer: pb.GetModelResponse = self._caller.unary(
            RegistryServiceStub, "GetModel", pb.GetModelRequest(model=reference), deadline
        )
        return _model(answer.model)

    def evaluation(self, reference: str, deadline: Deadline) -> Evaluation | None:
        """Return what the cluster keeps of a training; None if it is too old to keep any, or the model is."""
        request = pb.GetModelEvaluationRequest(model=reference)
        answer: pb.GetModelEvaluationResponse = self._caller.unary(
            RegistryServiceStub, "GetModelEvaluation", request, deadline
        )
        return _evaluation(answer.evaluation) if answer.HasField("evaluation") else None

    def list(self, deadline: Deadline) -> list[ModelRecord]:
        """Return every model, without its candidates."""
        answer: pb.ListModelsResponse = self._caller.unary(
            RegistryServiceStub, "ListModels", pb.ListModelsRequest(), deadline
        )
        return [_model(one) for one in answer.models]


def _model(message: pb.Model) -> ModelRecord:
    return ModelRecord(
        name=message.name,
        version=message.version,
        task=_TASKS.get(message.task, CLASSIFICATION),
        class_names=tuple(message.class_names),
        num_outputs=message.num_outputs,
        space=space_from_proto(message.space),
        embedding_fingerprint=message.embedding_fingerprint,
        slices=tuple(message.slices),
        metrics=dict(message.metrics),
        dataset=message.dataset,
        dataset_digest=message.dataset_digest,
        head_sha256=message.head_sha256,
        versions=dict(message.versions),
        job_id=message.job_id,
        create_time=from_timestamp(message, "create_time"),
        codec=message.codec,
        codec_error=message.codec_error,
        candidates=tuple(_candidate(one) for one in message.candidates),
        more_inputs=tuple(_input(one) for one in message.more_inputs),
        head=head_from_message(message.head),
        conformal=_conformal(message),
        warnings=tuple(message.warnings),
        trials=_trials(message.trials),
        fine_tuning=_fine_tuning(message),
        has_outlier_scores=message.has_outlier_scores,
    )


def _evaluation(message: pb.Evaluation) -> Evaluation:
    return Evaluation(
        rows=np.array(message.rows, dtype=np.int64),
        num_held_out=message.num_held_out,
        classes_N=None if message.HasField("targets") else np.array(message.classes, dtype=np.int64),
        targets_NK=decode_matrix(message.targets) if message.HasField("targets") else None,
        answers_NK=decode_matrix(message.answers) if message.rows else np.zeros((0, 0), dtype=np.float32),
        curves={one.name: tuple(one.values) for one in message.curves},
        suspects=tuple(LabelSuspect(one.row, one.given, one.suggested, one.margin) for one in message.suspects),
    )


def _trials(messages: Sequence[pb.Trial]) -> tuple[Trial, ...]:
    # What was dropped early was not scored on every fold.
    folds = max((len(one.scores) for one in messages), default=0)
    return tuple(_trial(one, folds) for one in messages)


def _trial(message: pb.Trial, folds: int) -> Trial:
    return Trial(
        slices=tuple(message.slices),
        l2=message.l2,
        hidden=tuple(message.hidden),
        learning_rate=message.learning_rate,
        dropout=message.dropout,
        scores=tuple(message.scores),
        score=message.score,
        error=message.error,
        seconds=message.seconds,
        won=message.won,
        dropped=not message.error and len(message.scores) < folds,
    )


def _fine_tuning(message: pb.Model) -> FineTuning | None:
    if not message.HasField("fine_tuning"):
        return None
    one = message.fine_tuning
    return FineTuning(
        kept=one.kept,
        reason=one.reason,
        cut=one.cut,
        metric=one.metric,
        gain=one.gain,
        low=one.low,
        high=one.high,
        before=dict(one.before),
        after=dict(one.after),
        num_trained=one.num_trained,
        epochs=one.epochs,
        num_workers=one.num_workers,
        num_resumed=one.num_resumed,
        seconds=one.seconds,
    )


def _conformal(message: pb.Model) -> Conformal | None:
    if not message.HasField("conformal"):
        return None
    one = message.conformal
    return Conformal(tuple(one.scores), one.num_rows, tuple(one.scales))


def _input(message: pb.ModelInput) -> ModelInput:
    return ModelInput(
        space=space_from_proto(message.space),
        embedding_fingerprint=message.embedding_fingerprint,
        slices=tuple(message.slices),
        width=message.width,
        codec=message.codec,
        codec_error=message.codec_error,
    )


def _candidate(message: pb.Candidate) -> Candidate:
    accuracy = message.accuracy if message.HasField("accuracy") else None
    return Candidate(tuple(message.slices), message.width, message.score, accuracy)
