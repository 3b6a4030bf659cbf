"""Trained models, by name and version."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
from trunkline_wire.v1 import registry_pb2 as pb
from trunkline_wire.v1 import registry_pb2_grpc

from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import current_call
from trunkline_worker.serving.servicers.records import evaluation_to_proto, model_to_proto
from trunkline_worker.store.evaluations import evaluation_from_bytes, evaluation_path


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """See ``RegistryService`` in registry.proto."""

    def __init__(self, backends: Backends) -> None:
        """Keep what the servicer stands on."""
        self._backends = backends

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.GetModelResponse:
        """Return one model."""
        call = current_call()
        model = await self._backends.metadata.call(
            "models.get", call.tenant, request.model, timeout_s=call.remaining_s()
        )
        return pb.GetModelResponse(model=model_to_proto(model))

    async def GetModelEvaluation(
        self, request: pb.GetModelEvaluationRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelEvaluationResponse:
        """Return what is kept of a training for its report; nothing of a model that is older than that."""
        call = current_call()
        model = await self._backends.metadata.call(
            "models.get", call.tenant, request.model, timeout_s=call.remaining_s()
        )
        sha256 = model.evaluation_sha256
        if not sha256:
            return pb.GetModelEvaluationResponse()
        data = await asyncio.to_thread(self._backends.blobs.get_checked, evaluation_path(sha256), sha256)
        return pb.GetModelEvaluationResponse(evaluation=evaluation_to_proto(evaluation_from_bytes(data)))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """Return every version of every model of the caller's."""
        call = current_call()
        models = await self._backends.metadata.call("models.list", call.tenant, timeout_s=call.remaining_s())
        return pb.ListModelsResponse(models=[model_to_proto(replace(model, conformal=None)) for model in models])
