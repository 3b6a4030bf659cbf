"""Calls past the gateway, made by hand: what the client does, with nothing but generated stubs."""

import time

import grpc
import numpy as np
from direct_fakes import Caller
from trunkline_wire import codecs, messages
from trunkline_wire.limits import MAX_MESSAGE_BYTES
from trunkline_wire.specs import INPUT_CUT
from trunkline_wire.v1 import catalog_pb2, catalog_pb2_grpc, inference_pb2, inference_pb2_grpc

EXTRACT = "InferenceService/Extract"
_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]


class ByHand:
    """A caller of a cluster."""

    def __init__(self, cluster):
        self._token = (("authorization", f"Bearer {cluster.token}"),)
        self._gateway = grpc.insecure_channel(cluster.address, _OPTIONS)
        self._catalog = catalog_pb2_grpc.CatalogServiceStub(self._gateway)

    def close(self):
        """End the connection to the gateway."""
        self._gateway.close()

    def endpoints(self, backbone=""):
        """Ask for the endpoints of a backbone, the default one if none is named."""
        question = catalog_pb2.GetEndpointsRequest(backbone=backbone)
        answer = self._catalog.GetEndpoints(question, metadata=self._token, timeout=30, wait_for_ready=True)
        return messages.endpoints_from_proto(answer)

    def endpoints_that(self, fit, within_s):
        """Ask until the answer is as wanted. Returns it."""
        deadline = time.monotonic() + within_s
        while not fit(found := self.endpoints()):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def request(self, rows=2, size=96):
        """Return a request for the embedding of some pictures by the default backbone."""
        question = catalog_pb2.DescribeBackboneRequest(input_size=size)
        answer = self._catalog.DescribeBackbone(question, metadata=self._token, timeout=60, wait_for_ready=True)
        spec = messages.backbone_from_proto(answer.backbone)
        pictures = np.random.default_rng(0).integers(0, 256, size=(rows, size, size, 3), dtype=np.uint8)
        space = messages.space_to_proto(spec.space(spec.cut(INPUT_CUT)))
        return inference_pb2.ExtractRequest(space=space, features=codecs.encode_array(pictures), slices=["pooled"])

    def through_the_gateway(self, request):
        """Return the embedding that the gateway answers with."""
        stub = inference_pb2_grpc.InferenceServiceStub(self._gateway)
        return codecs.decode(stub.Extract(request, metadata=self._token, timeout=120).embedding)

    def direct(self, request, found, caller=None):
        """Return the embedding that the first endpoint answers with, shown a ticket of the caller's."""
        caller = caller or Caller(found)
        with grpc.insecure_channel(found.endpoints[0].address, _OPTIONS) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            return codecs.decode(stub.Extract(request, metadata=caller.metadata(EXTRACT), timeout=120).embedding)
