"""What the cluster has: versions, limits, backbones and their stems."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator
from importlib import metadata

import grpc
from trunkline_wire import WIRE_VERSION, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_BATCH_ROWS, MAX_MESSAGE_BYTES, STEM_CHUNK_BYTES
from trunkline_wire.quantise import CODECS, IMAGES
from trunkline_wire.specs import FLOAT32, Endpoints
from trunkline_wire.v1 import catalog_pb2 as pb
from trunkline_wire.v1 import catalog_pb2_grpc, error_pb2

from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import current_call


class CatalogServicer(catalog_pb2_grpc.CatalogServiceServicer):
    """See ``CatalogService`` in catalog.proto."""

    def __init__(self, backends: Backends) -> None:
        """Keep what the servicer stands on."""
        self._backends = backends

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Return versions, limits and the caller's tenant."""
        return pb.GetServerInfoResponse(
            version=metadata.version("trunkline"),
            wire_version=WIRE_VERSION,
            versions=self._backends.versions,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_batch_rows=MAX_BATCH_ROWS,
            time_s=time.time(),
            tenant=current_call().tenant,
            storage_shared=self._backends.storage_shared,
            storage_note=self._backends.storage_note,
            codecs=(*CODECS, IMAGES),
        )

    async def ListBackbones(
        self, request: pb.ListBackbonesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListBackbonesResponse:
        """Describe every backbone at its own input size, the default first. Class names are left out."""
        specs = await asyncio.gather(*(engine.describe() for engine in self._backends.engines.values()))
        return pb.ListBackbonesResponse(
            backbones=[messages.backbone_to_proto(dataclasses.replace(spec, class_names=())) for spec in specs]
        )

    async def DescribeBackbone(
        self, request: pb.DescribeBackboneRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeBackboneResponse:
        """Describe one backbone at an input size."""
        name = request.backbone or self._backends.default_backbone
        spec = await self._backends.engine(name).describe(request.input_size)
        return pb.DescribeBackboneResponse(backbone=messages.backbone_to_proto(spec))

    async def DescribeCut(
        self, request: pb.DescribeCutRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeCutResponse:
        """Say what every codec and stem costs at a cut."""
        name = request.backbone or self._backends.default_backbone
        cost = await self._backends.engine(name).cut_cost(request.cut, request.input_size)
        return pb.DescribeCutResponse(cost=messages.cut_cost_to_proto(cost))

    async def TuneBackbone(
        self, request: pb.TuneBackboneRequest, context: grpc.aio.ServicerContext
    ) -> pb.TuneBackboneResponse:
        """Say how the runtime behind a cut was chosen, measuring where that was not done or is asked for again."""
        name = request.backbone or self._backends.default_backbone
        tuning = await self._backends.engine(name).tune(request.cut, request.input_size, request.again)
        return messages.tuning_to_proto(tuning)

    async def FetchStem(
        self, request: pb.FetchStemRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.FetchStemResponse]:
        """Send a stem's file: a header, its bytes in order, an end message."""
        name = request.backbone or self._backends.default_backbone
        stem = await self._backends.engine(name).stem(request.cut, request.input_size, request.precision or FLOAT32)
        data = await asyncio.to_thread(self._backends.blobs.get, stem.path)
        if hashlib.sha256(data).hexdigest() != stem.sha256:
            raise WireError(
                ErrorCode.CORRUPT_DATA, "the stored stem is damaged; restart the backbone to export it again"
            )
        yield pb.FetchStemResponse(
            seq=0,
            header=pb.StemHeader(
                space=messages.space_to_proto(stem.space),
                preprocessing=messages.preprocessing_to_proto(stem.preprocessing),
                feature_shape=stem.feature_shape,
                size_bytes=len(data),
                sha256=stem.sha256,
                precision=stem.precision,
                embedding_error=stem.embedding_error,
            ),
        )
        seq = 0
        for start in range(0, len(data), STEM_CHUNK_BYTES):
            seq += 1
            yield pb.FetchStemResponse(seq=seq, chunk=data[start : start + STEM_CHUNK_BYTES])
        yield pb.FetchStemResponse(seq=seq + 1, end=error_pb2.EndOfStream(num_messages=seq + 1))

    async def GetEndpoints(
        self, request: pb.GetEndpointsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetEndpointsResponse:
        """Say where a backbone's replicas listen themselves, and give the caller a ticket for them."""
        name = request.backbone or self._backends.default_backbone
        self._backends.engine(name)  # refuses one that is not there
        book = self._backends.endpoints
        found = Endpoints() if book is None else await book.endpoints(name, current_call().principal)
        return messages.endpoints_to_proto(found)
