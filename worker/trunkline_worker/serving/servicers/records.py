"""Pairs of conversions between the store's records and their messages. No logic."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from trunkline_wire import codecs, fits, job_messages, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CONCAT, LINEAR, MLP, PROTOTYPE, HeadConfig
from trunkline_wire.v1 import dataset_pb2, registry_pb2, training_pb2

from trunkline_worker.store.evaluations import Evaluation
from trunkline_worker.store.records import (
    BackboneChoice,
    Conformal,
    DatasetRecord,
    Event,
    JobRecord,
    JobSpec,
    ModelInput,
    ModelRecord,
)

_DEFAULT_HIDDEN = (256,)
"""Hidden layers of an MLP that names none."""

_HEADS = {
    training_pb2.HEAD_KIND_LINEAR: "linear",
    training_pb2.HEAD_KIND_MLP: "mlp",
    training_pb2.HEAD_KIND_CONV: "conv",
    training_pb2.HEAD_KIND_PROTOTYPE: "prototype",
    training_pb2.HEAD_KIND_TAIL: "tail",
}
_ACTIVATIONS = {training_pb2.ACTIVATION_RELU: "relu", training_pb2.ACTIVATION_GELU: "gelu"}
_FUSIONS = {
    training_pb2.FUSION_CONCAT: "concat",
    training_pb2.FUSION_ADD: "add",
    training_pb2.FUSION_GATE: "gate",
}
_SOLVERS = {training_pb2.SOLVER_LBFGS: "lbfgs", training_pb2.SOLVER_ADAM: "adamw"}
_EMBEDDINGS = {
    training_pb2.EMBEDDING_MODE_POOLED: "pooled",
    training_pb2.EMBEDDING_MODE_AUTO: "auto",
    training_pb2.EMBEDDING_MODE_SLICES: "slices",
}
_TASKS = {
    "classification": registry_pb2.TASK_CLASSIFICATION,
    "multi_label": registry_pb2.TASK_MULTI_LABEL,
    "regression": registry_pb2.TASK_REGRESSION,
    "ordinal": registry_pb2.TASK_ORDINAL,
}


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
        more_inputs=[
            dataset_pb2.DatasetSource(space=messages.space_to_proto(one.space), codec=one.codec)
            for one in record.more_inputs
        ],
        num_groups=record.num_groups,
        views=record.views,
    )


def head_from_proto(message: training_pb2.HeadConfig) -> HeadConfig:
    """Return the head that a message asks for; what is unspecified takes the default.

    Raises:
        WireError: UNSUPPORTED for a value from a newer wire; INVALID_ARGUMENT where the parts do not fit each other.
    """
    kind = _choice(_HEADS, message.kind, training_pb2.HEAD_KIND_LINEAR, "head kind")
    return HeadConfig(
        kind=kind,
        hidden=tuple(message.hidden) or (_DEFAULT_HIDDEN if kind == MLP else ()),
        activation=_choice(_ACTIVATIONS, message.activation, training_pb2.ACTIVATION_RELU, "activation"),
        batch_norm=message.batch_norm,
        dropout=message.dropout,
        channels=tuple(message.channels),
        tap=message.tap,
        fuse=_choice(_FUSIONS, message.fuse, training_pb2.FUSION_CONCAT, "fusion"),
        fuse_width=message.fuse_width,
        slices=tuple(message.slices),
        lora_rank=message.lora_rank,
    )


def head_to_proto(head: HeadConfig) -> training_pb2.HeadConfig:
    """Return the message of a head."""
    return training_pb2.HeadConfig(
        kind=_code(_HEADS, head.kind),
        hidden=head.hidden,
        dropout=head.dropout,
        activation=_code(_ACTIVATIONS, head.activation),
        batch_norm=head.batch_norm,
        channels=head.channels,
        tap=head.tap,
        fuse=_code(_FUSIONS, head.fuse),
        fuse_width=head.fuse_width,
        slices=head.slices,
        lora_rank=head.lora_rank,
    )


def spec_from_proto(message: training_pb2.JobSpec) -> JobSpec:
    """Return the job that a message asks for; what is unspecified takes the default.

    Raises:
        WireError: UNSUPPORTED for a value from a newer wire; INVALID_ARGUMENT for a head whose parts do not fit.
    """
    fit = message.fit
    head = head_from_proto(message.head)
    loss = job_messages.loss_from_proto(fit)
    # Convex, so that a solver that goes to convergence finds the one solution; or nothing to solve. Rows are mixed anew
    # in every step, which only minibatches have.
    convex = loss.kind in (fits.AUTO, fits.CROSS_ENTROPY, fits.MSE) and (not fit.mixup or bool(loss.class_order))
    convex = head.kind == PROTOTYPE or (head.kind == LINEAR and head.fuse == CONCAT and convex)
    default_solver = training_pb2.SOLVER_LBFGS if convex else training_pb2.SOLVER_ADAM
    return JobSpec(
        model=message.model,
        dataset=message.dataset,
        backbone=message.backbone,
        input_size=message.input_size,
        embedding=_choice(_EMBEDDINGS, message.embedding, training_pb2.EMBEDDING_MODE_AUTO, "embedding mode"),
        slices=tuple(message.slices),
        head=head,
        solver=_choice(_SOLVERS, fit.solver, default_solver, "solver"),
        epochs=fit.epochs,
        batch_size=fit.batch_size,
        learning_rate=fit.learning_rate,
        l2=fit.l2,
        validation_fraction=fit.validation_fraction,
        refit=fit.refit,
        seed=fit.seed,
        loss=loss,
        optimiser=job_messages.optimiser_from_proto(fit),
        select_by=fit.select_by,
        calibrate=fit.calibrate if fit.HasField("calibrate") else True,
        more_backbones=tuple(BackboneChoice(one.backbone, one.input_size) for one in message.more_backbones),
        sweep=job_messages.sweep_from_proto(message.sweep) if message.HasField("sweep") else None,
        fine_tune=job_messages.fine_tune_from_proto(message.fine_tune) if message.HasField("fine_tune") else None,
    )


def spec_to_proto(spec: JobSpec) -> training_pb2.JobSpec:
    """Return the message of a job's specification."""
    fit = training_pb2.FitConfig(
        solver=_code(_SOLVERS, spec.solver),
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        l2=spec.l2,
        validation_fraction=spec.validation_fraction,
        refit=spec.refit,
        seed=spec.seed,
        select_by=spec.select_by,
        calibrate=spec.calibrate,
    )
    job_messages.write_loss(spec.loss, fit)
    job_messages.write_optimiser(spec.optimiser, fit)
    return training_pb2.JobSpec(
        model=spec.model,
        dataset=spec.dataset,
        backbone=spec.backbone,
        input_size=spec.input_size,
        embedding=_code(_EMBEDDINGS, spec.embedding),
        slices=spec.slices,
        head=head_to_proto(spec.head),
        fit=fit,
        more_backbones=[
            training_pb2.BackboneChoice(backbone=one.backbone, input_size=one.input_size) for one in spec.more_backbones
        ],
        sweep=None if spec.sweep is None else job_messages.sweep_to_proto(spec.sweep),
        fine_tune=job_messages.fine_tune_to_proto(spec.fine_tune),
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
        more_inputs=[_model_input_to_proto(one) for one in record.more_inputs],
        head=head_to_proto(record.head),
        conformal=_conformal_to_proto(record.conformal),
        warnings=record.warnings,
        trials=[registry_pb2.Trial(**vars(one)) for one in record.trials],
        fine_tuning=None if record.fine_tuning is None else registry_pb2.FineTuning(**vars(record.fine_tuning)),
        has_outlier_scores=bool(record.outliers_sha256),
    )


def evaluation_to_proto(one: Evaluation) -> registry_pb2.Evaluation:
    """Return the message of an evaluation."""
    return registry_pb2.Evaluation(
        rows=one.rows.tolist(),
        num_held_out=one.num_held_out,
        classes=None if one.classes is None else one.classes.tolist(),
        targets=None if one.targets is None or not len(one.rows) else codecs.encode_array(one.targets),
        answers=codecs.encode_array(one.answers) if len(one.rows) else None,
        curves=[registry_pb2.Curve(name=name, values=values) for name, values in one.curves.items()],
        suspects=[
            registry_pb2.LabelSuspect(
                row=suspect.row, given=suspect.given, suggested=suspect.suggested, margin=suspect.margin
            )
            for suspect in one.suspects
        ],
    )


def _conformal_to_proto(one: Conformal | None) -> registry_pb2.Conformal | None:
    if one is None:
        return None
    return registry_pb2.Conformal(scores=one.scores, num_rows=one.num_rows, scales=one.scales)


def _model_input_to_proto(one: ModelInput) -> registry_pb2.ModelInput:
    return registry_pb2.ModelInput(
        space=messages.space_to_proto(one.space),
        embedding_fingerprint=one.embedding_fingerprint,
        slices=one.slices,
        width=one.width,
        codec=one.codec,
        codec_error=one.codec_error,
    )


def _choice(table: dict[Any, str], value: int, default: int, what: str) -> str:
    name = table.get(value or default)
    if name is None:
        raise WireError(ErrorCode.UNSUPPORTED, f"{what} {value} is not known here")
    return name


def _code(table: dict[Any, str], name: str) -> Any:
    return next(code for code, known in table.items() if known == name)
