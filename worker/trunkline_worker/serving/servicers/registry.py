"""Trained models, by name and version."""

from __future__ import annotations

import grpc
from trunkline_wire.v1 import registry_pb2 as pb
from trunkline_wire.v1 import registry_pb2_grpc

from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import current_call
from trunkline_worker.serving.servicers.records import model_to_proto


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

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """Return every version of every model of the caller's."""
        call = current_call()
        models = await self._backends.metadata.call("models.list", call.tenant, timeout_s=call.remaining_s())
        return pb.ListModelsResponse(models=[model_to_proto(model) for model in models])
