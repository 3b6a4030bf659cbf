"""``InferenceService`` with messages whose large tensor stays apart: the stub, and how a server is told of a servicer.

Takes the place of the generated ones, which would have protobuf copy every tensor. See ``trunkline_wire.bulk``.
"""

from __future__ import annotations

from typing import Any

import grpc

from trunkline_wire import bulk
from trunkline_wire.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]

REQUESTS: dict[str, Any] = {
    "Predict": pb.PredictRequest,
    "StreamPredict": pb.StreamPredictRequest,
    "Extract": pb.ExtractRequest,
    "StreamExtract": pb.StreamExtractRequest,
}
"""Method to the type of its requests, all of which have a large tensor."""

RESPONSES: dict[str, Any] = {
    "Predict": pb.PredictResponse,
    "StreamPredict": pb.StreamPredictResponse,
    "Extract": pb.ExtractResponse,
    "StreamExtract": pb.StreamExtractResponse,
}
"""Method to the type of its responses."""


class InferenceServiceStub:
    """Requests go in whole or apart; of responses that have a large tensor, it comes apart."""

    Predict: Any
    StreamPredict: Any
    Extract: Any
    StreamExtract: Any

    def __init__(self, channel: Any) -> None:
        """Make the callables of a channel, ``grpc`` or ``grpc.aio``."""
        for name, request in REQUESTS.items():
            make = channel.stream_stream if name.startswith("Stream") else channel.unary_unary
            kind = RESPONSES[name]
            read = bulk.reader(kind) if bulk.has_large_tensor(kind) else kind.FromString
            path = f"/{SERVICE.full_name}/{name}"
            setattr(
                self,
                name,
                make(
                    path, request_serializer=bulk.writer(request), response_deserializer=read, _registered_method=True
                ),
            )


def add_inference_servicer(servicer: Any, server: Any) -> None:
    """Have a server call a servicer, which gets its requests apart, and gives responses whole or apart."""
    handlers = {}
    for name, request in REQUESTS.items():
        make = (
            grpc.stream_stream_rpc_method_handler if name.startswith("Stream") else grpc.unary_unary_rpc_method_handler
        )
        kind = RESPONSES[name]
        write = bulk.writer(kind) if bulk.has_large_tensor(kind) else kind.SerializeToString
        handlers[name] = make(
            getattr(servicer, name), request_deserializer=bulk.reader(request), response_serializer=write
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    server.add_registered_method_handlers(SERVICE.full_name, handlers)
