"""Calls about trained models."""

from __future__ import annotations

from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION
from trunkline_wire.messages import space_from_proto
from trunkline_wire.v1 import registry_pb2 as pb
from trunkline_wire.v1.registry_pb2_grpc import RegistryServiceStub

from trunkline._calls.core import Caller
from trunkline._calls.heads import head_from_message
from trunkline._calls.times import from_timestamp
from trunkline._deadline import Deadline
from trunkline.records import Candidate, ModelInput, ModelRecord

_TASKS = {pb.TASK_REGRESSION: REGRESSION, pb.TASK_MULTI_LABEL: MULTI_LABEL}


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
    )


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
