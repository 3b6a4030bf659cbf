"""Rows and datasets: what is missing, chunks as they come, and the list that names them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import grpc
from trunkline_wire import codecs, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_DATASET_ROWS, MAX_FIND_ROWS
from trunkline_wire.quantise import codec_of
from trunkline_wire.rows import ROW_ID_BYTES
from trunkline_wire.specs import codec_label
from trunkline_wire.v1 import dataset_pb2 as pb
from trunkline_wire.v1 import dataset_pb2_grpc, error_pb2

from trunkline_worker.engine.api import Payload
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import current_call, public_error
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.servicers.labels import labels_from_proto
from trunkline_worker.serving.servicers.records import dataset_to_proto
from trunkline_worker.serving.spaces import check_rows
from trunkline_worker.serving.streams import Room, pipelined
from trunkline_worker.serving.turns import reserve
from trunkline_worker.store import chunks

UPLOAD_WINDOW = 4
"""Chunks of one upload that are being made durable at a time."""


class DatasetServicer(dataset_pb2_grpc.DatasetServiceServicer):
    """See ``DatasetService`` in dataset.proto."""

    def __init__(self, backends: Backends, budget: ByteBudget) -> None:
        """Keep what the servicer stands on."""
        self._backends = backends
        self._budget = budget

    async def FindMissingRows(
        self, request: pb.FindMissingRowsRequest, context: grpc.aio.ServicerContext
    ) -> pb.FindMissingRowsResponse:
        """Return which of the rows the cluster lacks."""
        call = current_call()
        row_ids = _row_ids(request.row_ids, MAX_FIND_ROWS)
        missing = await self._backends.metadata.call("rows.missing", call.tenant, row_ids, timeout_s=call.remaining_s())
        return pb.FindMissingRowsResponse(missing=missing)

    async def UploadRows(
        self, request_iterator: AsyncIterator[pb.UploadRowsRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.UploadRowsResponse]:
        """Make chunk after chunk durable. A bad chunk is answered with its error; the stream goes on."""
        call = current_call()

        async def handle(message: pb.UploadRowsRequest) -> pb.UploadRowsResponse:
            try:
                added = await self._store(call.tenant, message.chunk)
                return pb.UploadRowsResponse(seq=message.seq, ack=pb.ChunkAck(num_new_rows=added))
            except Exception as error:
                return refuse(message, error)

        def refuse(message: pb.UploadRowsRequest, error: Exception) -> pb.UploadRowsResponse:
            public = public_error(error, "UploadRows", call.request_id)
            return pb.UploadRowsResponse(seq=message.seq, error=messages.error_to_proto(public, call.request_id))

        room = Room(lambda message: reserve(self._budget, call, message), refuse)
        count = 0
        replies = pipelined(request_iterator, handle, window=UPLOAD_WINDOW, draining=call.draining, room=room)
        async for reply in replies:
            count += 1
            yield reply
        yield pb.UploadRowsResponse(seq=count, end=error_pb2.EndOfStream(num_messages=count))

    async def CommitDataset(
        self, request: pb.CommitDatasetRequest, context: grpc.aio.ServicerContext
    ) -> pb.CommitDatasetResponse:
        """Name rows that are there."""
        call = current_call()
        if not request.idempotency_key:
            raise WireError(ErrorCode.INVALID_ARGUMENT, "CommitDataset needs an idempotency_key")
        row_ids = _row_ids(request.row_ids, MAX_DATASET_ROWS)
        names, indices, targets = labels_from_proto(request, len(row_ids))
        more_inputs = [
            (messages.space_from_proto(one.space), _row_ids(one.row_ids, MAX_DATASET_ROWS))
            for one in request.more_inputs
        ]
        record = await self._backends.metadata.call(
            "datasets.commit",
            call.tenant,
            request.name,
            messages.space_from_proto(request.space),
            row_ids,
            names,
            indices,
            targets,
            request.idempotency_key,
            more_inputs,
            list(request.groups),
            request.views,
            timeout_s=call.remaining_s(),
        )
        return pb.CommitDatasetResponse(dataset=dataset_to_proto(record))

    async def GetDataset(
        self, request: pb.GetDatasetRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDatasetResponse:
        """Return one dataset's description."""
        call = current_call()
        record = await self._backends.metadata.call(
            "datasets.get", call.tenant, request.dataset, timeout_s=call.remaining_s()
        )
        return pb.GetDatasetResponse(dataset=dataset_to_proto(record))

    async def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListDatasetsResponse:
        """Return every version of every dataset of the caller's."""
        call = current_call()
        records = await self._backends.metadata.call("datasets.list", call.tenant, timeout_s=call.remaining_s())
        return pb.ListDatasetsResponse(datasets=[dataset_to_proto(record) for record in records])

    async def _store(self, tenant: str, chunk: pb.RowChunk) -> int:
        # Blocking work (hashing, packing, the write and its fsync) stays off the event loop.
        rows = await asyncio.to_thread(_checked_rows, chunk)
        space = messages.space_from_proto(chunk.space)
        precision = await check_rows(self._backends, tenant, space, rows)
        sha256 = await asyncio.to_thread(chunks.write_chunk, self._backends.blobs, rows)
        # The index comes last: what it names is durable.
        added: int = await self._backends.metadata.call(
            "rows.add_chunk", tenant, sha256, space, codec_label(codec_of(rows), precision), list(chunk.row_ids)
        )
        return added


def _checked_rows(chunk: pb.RowChunk) -> Payload:
    content = hashlib.sha256(chunk.rows.data)
    content.update(chunk.rows.affine.scale)
    content.update(chunk.rows.affine.offset)
    for image in chunk.rows.encoded:
        content.update(image)
    if content.digest() != chunk.sha256:
        raise WireError(ErrorCode.CORRUPT_DATA, "the chunk's bytes do not match its sha256; send it again")
    rows = codecs.decode(chunk.rows)
    if len(chunk.row_ids) != len(rows):
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"{len(chunk.row_ids)} row ids for {len(rows)} rows")
    _row_ids(chunk.row_ids, len(rows))
    return rows


def _row_ids(row_ids: object, most: int) -> list[bytes]:
    ids = list(row_ids)  # type: ignore[call-overload]
    if not ids:
        raise WireError(ErrorCode.EMPTY_BATCH, "no row is named")
    if len(ids) > most:
        raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"{len(ids)} row ids in one message; at most {most} fit here")
    if any(len(one) != ROW_ID_BYTES for one in ids):
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"a row id has {ROW_ID_BYTES} bytes")
    return ids
