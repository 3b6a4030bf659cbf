"""The hand-written stub and registration of ``InferenceService`` are those that the generator would write."""

from __future__ import annotations

from typing import Any

import grpc
from trunkline_wire import bulk_rpc
from trunkline_wire.v1 import inference_pb2, inference_pb2_grpc


class Recorder:
    """Stands for a channel and for a server: keeps what it is asked to make."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}
        self.handlers: dict[str, Any] = {}

    def unary_unary(self, path: str, **_: Any) -> object:
        return self.made.setdefault(path, "unary_unary")

    def stream_stream(self, path: str, **_: Any) -> object:
        return self.made.setdefault(path, "stream_stream")

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self.handlers = {f"/{service}/{name}": one for name, one in handlers.items()}


def test_the_stub_has_every_method_of_the_service() -> None:
    ours, generated = Recorder(), Recorder()
    bulk_rpc.InferenceServiceStub(ours)
    inference_pb2_grpc.InferenceServiceStub(generated)
    assert ours.made == generated.made


def test_a_server_gets_every_method_of_the_service() -> None:
    servicer = inference_pb2_grpc.InferenceServiceServicer()
    ours, generated = Recorder(), Recorder()
    bulk_rpc.add_inference_servicer(servicer, ours)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, generated)
    kinds = [
        {path: (one.request_streaming, one.response_streaming) for path, one in side.handlers.items()}
        for side in (ours, generated)
    ]
    assert kinds[0] == kinds[1] and len(kinds[0]) == len(
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
    )
