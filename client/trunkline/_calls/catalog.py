"""Calls about the cluster: versions, backbones, stems, health."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from trunkline_wire.limits import MAX_STEM_BYTES
from trunkline_wire.messages import (
    backbone_from_proto,
    cut_cost_from_proto,
    endpoints_from_proto,
    preprocessing_from_proto,
    space_from_proto,
    tuning_from_proto,
)
from trunkline_wire.specs import FLOAT32, BackboneSpec, CutCost, Endpoints, FeatureSpace, Preprocessing, Tuning
from trunkline_wire.v1 import catalog_pb2 as pb
from trunkline_wire.v1.catalog_pb2_grpc import CatalogServiceStub

from trunkline._calls.core import Caller, new_request_id
from trunkline._deadline import Deadline, retry_delay
from trunkline._status import is_retryable
from trunkline.errors import CorruptDataError, PayloadTooLargeError, ServiceUnavailableError, TrunklineError
from trunkline.records import ServerInfo

MAX_FETCHES = 4
"""Most tries to fetch one stem."""


@dataclass(frozen=True)
class FetchedStem:
    """A stem's file as it arrived, its checksum verified.

    Attributes:
        precision: Empty where the cluster is too old to know of any but ``float32``.
        embedding_error: Of features that this stem makes. 0 for the exact one.
    """

    space: FeatureSpace
    preprocessing: Preprocessing
    feature_shape: tuple[int, ...]
    sha256: str
    data: bytes
    precision: str = FLOAT32
    embedding_error: float = 0.0


class CatalogCalls:
    """``CatalogService`` and the standard health service."""

    def __init__(self, caller: Caller) -> None:
        """Keep who makes the calls."""
        self._caller = caller

    def server_info(self, deadline: Deadline, *, wait_for_ready: bool = True, retry: bool = True) -> ServerInfo:
        """Return what the cluster says about itself."""
        answer: pb.GetServerInfoResponse = self._caller.unary(
            CatalogServiceStub,
            "GetServerInfo",
            pb.GetServerInfoRequest(),
            deadline,
            wait_for_ready=wait_for_ready,
            retry=retry,
        )
        return ServerInfo(
            version=answer.version,
            wire_version=answer.wire_version,
            versions=dict(answer.versions),
            max_message_bytes=answer.max_message_bytes,
            max_batch_rows=answer.max_batch_rows,
            time_s=answer.time_s,
            tenant=answer.tenant,
            storage_shared=answer.storage_shared,
            storage_note=answer.storage_note,
            codecs=tuple(answer.codecs),
        )

    def backbones(self, deadline: Deadline) -> list[BackboneSpec]:
        """Return every backbone."""
        answer: pb.ListBackbonesResponse = self._caller.unary(
            CatalogServiceStub, "ListBackbones", pb.ListBackbonesRequest(), deadline
        )
        return [backbone_from_proto(one) for one in answer.backbones]

    def describe(self, backbone: str, input_size: int, deadline: Deadline) -> BackboneSpec:
        """Return one backbone at an input size; 0 is its own."""
        answer: pb.DescribeBackboneResponse = self._caller.unary(
            CatalogServiceStub,
            "DescribeBackbone",
            pb.DescribeBackboneRequest(backbone=backbone, input_size=input_size),
            deadline,
        )
        return backbone_from_proto(answer.backbone)

    def describe_cut(self, backbone: str, cut: str, input_size: int, deadline: Deadline) -> CutCost:
        """Return what sending features at a cut costs; 0 is the backbone's own input size."""
        answer: pb.DescribeCutResponse = self._caller.unary(
            CatalogServiceStub,
            "DescribeCut",
            pb.DescribeCutRequest(backbone=backbone, cut=cut, input_size=input_size),
            deadline,
        )
        return cut_cost_from_proto(answer.cost)

    def tune(self, backbone: str, cut: str, input_size: int, again: bool, deadline: Deadline) -> Tuning:
        """Return how the runtime behind a cut was chosen; 0 is the backbone's own input size."""
        answer: pb.TuneBackboneResponse = self._caller.unary(
            CatalogServiceStub,
            "TuneBackbone",
            pb.TuneBackboneRequest(backbone=backbone, cut=cut, input_size=input_size, again=again),
            deadline,
        )
        return tuning_from_proto(answer)

    def endpoints(self, backbone: str, deadline: Deadline) -> Endpoints:
        """Return where the replicas of a backbone listen themselves, and a ticket for them.

        Raises:
            UnsupportedError: The cluster does not know the question.
            TrunklineError: It did not answer. It is asked once.
        """
        answer: pb.GetEndpointsResponse = self._caller.unary(
            CatalogServiceStub,
            "GetEndpoints",
            pb.GetEndpointsRequest(backbone=backbone),
            deadline,
            wait_for_ready=False,
            retry=False,
        )
        return endpoints_from_proto(answer)

    def fetch_stem(
        self,
        backbone: str,
        cut: str,
        input_size: int,
        deadline: Deadline,
        *,
        precision: str = FLOAT32,
        on_bytes: Callable[[int, int], None] = lambda received, total: None,
    ) -> FetchedStem:
        """Fetch a stem's file and check it. A broken or damaged transfer is started again.

        Args:
            backbone: Name of the backbone.
            cut: Name of the cut.
            input_size: Side of the preprocessed square; 0 is the backbone's own.
            deadline: Over all tries.
            precision: ``float32`` or ``int8``.
            on_bytes: Told the bytes received and the whole, as they come.
        """
        request = pb.FetchStemRequest(backbone=backbone, cut=cut, input_size=input_size, precision=precision)
        attempt = 0
        while True:
            try:
                return self._fetch_once(request, deadline, on_bytes)
            except TrunklineError as error:
                attempt += 1
                delay_s = retry_delay(attempt, error.retry_delay_s)
                worth_it = is_retryable(error) or isinstance(error, CorruptDataError)
                if not worth_it or attempt >= MAX_FETCHES or not deadline.allows(delay_s):
                    raise
                self._caller.sleep(delay_s)

    def _fetch_once(
        self, request: pb.FetchStemRequest, deadline: Deadline, on_bytes: Callable[[int, int], None]
    ) -> FetchedStem:
        request_id = new_request_id()
        call = self._caller.connection.stub(CatalogServiceStub).FetchStem(
            request,
            timeout=deadline.check("FetchStem"),
            metadata=self._caller.metadata(request_id),
            wait_for_ready=True,
        )
        receiver = _StemReceiver(request_id, on_bytes)
        try:
            for message in call:
                receiver.take(message)
        except grpc.RpcError as error:
            raise self._caller.error(error, request_id) from None
        finally:
            call.cancel()
        return receiver.finish()

    def is_serving(self, deadline: Deadline) -> bool:
        """Ask the standard health service (``grpc.health.v1``) about the whole server, without its generated code."""
        request_id = new_request_id()
        check = self._caller.connection.channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer: bytes = check(b"", timeout=deadline.check("Health"), metadata=self._caller.metadata(request_id))
        except grpc.RpcError as error:
            raise self._caller.error(error, request_id) from None
        # HealthCheckResponse {status = 1 (varint)}; SERVING is 1.
        return answer[:2] == b"\x08\x01"


class _StemReceiver:
    """Puts a stem's file together: header, chunks in order, end; then the checksum, before anything is parsed."""

    def __init__(self, request_id: str, on_bytes: Callable[[int, int], None]) -> None:
        self._request_id = request_id
        self._on_bytes = on_bytes
        self._header: pb.StemHeader | None = None
        self._pieces: list[bytes] = []
        self._received = 0
        self._messages = 0
        self._ended = False

    def take(self, message: pb.FetchStemResponse) -> None:
        """Take the next message of the stream."""
        kind = message.WhichOneof("kind")
        if kind == "end":
            if message.end.num_messages != self._messages:
                raise self._damaged(f"{self._messages} of {message.end.num_messages} messages arrived")
            self._ended = True
            return
        self._messages += 1
        if kind == "header":
            if message.header.size_bytes > MAX_STEM_BYTES:
                raise PayloadTooLargeError(
                    f"the stem has {message.header.size_bytes} bytes; at most {MAX_STEM_BYTES} are accepted",
                    hint="Choose an earlier cut",
                    request_id=self._request_id,
                )
            self._header = message.header
            return
        if self._header is None:
            raise self._damaged("a chunk came before the header")
        self._received += len(message.chunk)
        if self._received > self._header.size_bytes:
            raise self._damaged(f"more than the {self._header.size_bytes} bytes announced arrived")
        self._pieces.append(message.chunk)
        self._on_bytes(self._received, self._header.size_bytes)

    def finish(self) -> FetchedStem:
        """Check that all is there and undamaged."""
        header = self._header
        if header is None or not self._ended:
            raise ServiceUnavailableError("the transfer of the stem was cut off", request_id=self._request_id)
        data = b"".join(self._pieces)
        if len(data) != header.size_bytes or hashlib.sha256(data).hexdigest() != header.sha256:
            raise self._damaged("its checksum is wrong")
        return FetchedStem(
            space=space_from_proto(header.space),
            preprocessing=preprocessing_from_proto(header.preprocessing),
            feature_shape=tuple(header.feature_shape),
            sha256=header.sha256,
            data=data,
            precision=header.precision,
            embedding_error=header.embedding_error,
        )

    def _damaged(self, what: str) -> CorruptDataError:
        return CorruptDataError(f"the stem arrived damaged: {what}", hint="Try again", request_id=self._request_id)
