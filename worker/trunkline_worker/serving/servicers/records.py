"""Pairs of conversions between the store's records and their messages. No logic."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from trunkline_wire import messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import dataset_pb2, registry_pb2, training_pb2

from trunkline_worker.store.records import DatasetRecord, Event, JobRecord, JobSpec, ModelRecord

_HEADS = {training_pb2.HEAD_KIND_LINEAR: "linear", training_pb2.HEAD_KIND_MLP: "mlp"}
_SOLVERS = {training_pb2.SOLVER_LBFGS: "lbfgs", training_pb2.SOLVER_ADAM: "adam"}
_EMBEDDINGS = {
    training_pb2.EMBEDDING_MODE_POOLED: "pooled",
    training_pb2.EMBEDDING_MODE_AUTO: "auto",
    training_pb2.EMBEDDING_MODE_SLICES: "slices",
}
_TASKS = {"classification": registry_pb2.TASK_CLASSIFICATION, "regression": registry_pb2.TASK_REGRESSION}


def timestamp(seconds: float) -> Timestamp | None:
    """Return the message of a time in seconds since the epoch, None for 0."""
    if not seconds:
        return None
    nanos = round(seconds * 1e9)
    return Timestamp(seconds=nanos // 10**9, nanos=nanos % 10**9)


def dataset_to_proto(record: DatasetRecord) -> dataset_pb2.Dataset:
    """Return the message of a dataset."""
    return dataset_pb2.Dataset(
        name=record.name,
        version=record.version,
        num_rows=record.num_rows,
        digest=record.digest,
        space=messages.space_to_proto(record.space),
        class_names=record.class_names,
        num_targets=record.num_targets,
        create_time=timestamp(record.create_time),
        codec=record.codec,
    )


def spec_from_proto(message: training_pb2.JobSpec) -> JobSpec:
    """Return the job that a message asks for; what is unspecified takes the default.

    Raises:
        WireError: UNSUPPORTED, for a value from a newer wire.
    """
    fit = message.fit
    head = _choice(_HEADS, message.head.kind, training_pb2.HEAD_KIND_LINEAR, "head kind")
    default_solver = training_pb2.SOLVER_LBFGS if head == "linear" else training_pb2.SOLVER_ADAM
    return JobSpec(
        model=message.model,
        dataset=message.dataset,
        backbone=message.backbone,
        input_size=message.input_size,
        embedding=_choice(_EMBEDDINGS, message.embedding, training_pb2.EMBEDDING_MODE_AUTO, "embedding mode"),
        slices=tuple(message.slices),
        head_kind=head,
        hidden=tuple(message.head.hidden),
        dropout=message.head.dropout,
        solver=_choice(_SOLVERS, fit.solver, default_solver, "solver"),
        epochs=fit.epochs,
        batch_size=fit.batch_size,
        learning_rate=fit.learning_rate,
        l2=fit.l2,
        validation_fraction=fit.validation_fraction,
        refit=fit.refit,
        seed=fit.seed,
    )


def spec_to_proto(spec: JobSpec) -> training_pb2.JobSpec:
    """Return the message of a job's specification."""
    return training_pb2.JobSpec(
        model=spec.model,
        dataset=spec.dataset,
        backbone=spec.backbone,
        input_size=spec.input_size,
        embedding=_code(_EMBEDDINGS, spec.embedding),
        slices=spec.slices,
        head=training_pb2.HeadConfig(kind=_code(_HEADS, spec.head_kind), hidden=spec.hidden, dropout=spec.dropout),
        fit=training_pb2.FitConfig(
            solver=_code(_SOLVERS, spec.solver),
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            l2=spec.l2,
            validation_fraction=spec.validation_fraction,
            refit=spec.refit,
            seed=spec.seed,
        ),
    )


def job_to_proto(record: JobRecord) -> training_pb2.Job:
    """Return the message of a job. A failure becomes its typed error, with the job's id as the request id."""
    error = None
    if record.error_code:
        error = messages.error_to_proto(WireError(ErrorCode[record.error_code], record.error_message), record.id)
    return training_pb2.Job(
        id=record.id,
        state=training_pb2.JobState.Name(record.state.value),
        spec=spec_to_proto(record.spec),
        error=error,
        model=record.model,
        num_restarts=record.num_restarts,
        create_time=timestamp(record.create_time),
        start_time=timestamp(record.start_time),
        end_time=timestamp(record.end_time),
    )


def event_to_proto(event: Event) -> training_pb2.JobEvent:
    """Return the message of an event."""
    return training_pb2.JobEvent(
        seq=event.seq,
        time=timestamp(event.time),
        phase=event.phase,
        progress=event.progress,
        metrics=event.metrics,
        message=event.message,
    )


def model_to_proto(record: ModelRecord) -> registry_pb2.Model:
    """Return the message of a model."""
    return registry_pb2.Model(
        name=record.name,
        version=record.version,
        task=_TASKS[record.task],
        class_names=record.class_names,
        num_outputs=record.num_outputs,
        space=messages.space_to_proto(record.space),
        embedding_fingerprint=record.embedding_fingerprint,
        slices=record.slices,
        metrics=record.metrics,
        dataset=record.dataset,
        dataset_digest=record.dataset_digest,
        head_sha256=record.head_sha256,
        versions=record.versions,
        job_id=record.job_id,
        create_time=timestamp(record.create_time),
        codec=record.codec,
        codec_error=record.codec_error,
        candidates=[
            registry_pb2.Candidate(slices=one.slices, width=one.width, score=one.score, accuracy=one.accuracy)
            for one in record.candidates
        ],
    )


def _choice(table: dict[Any, str], value: int, default: int, what: str) -> str:
    name = table.get(value or default)
    if name is None:
        raise WireError(ErrorCode.UNSUPPORTED, f"{what} {value} is not known here")
    return name


def _code(table: dict[Any, str], name: str) -> Any:
    return next(code for code, known in table.items() if known == name)
