"""Rows and datasets: what is missing, chunks as they come, and the list that names them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import grpc
import numpy as np
from trunkline_wire import codecs, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_CLASSES, MAX_DATASET_ROWS, MAX_FIND_ROWS
from trunkline_wire.quantise import BFLOAT16, CODECS, PackedRows, codec_of
from trunkline_wire.rows import ROW_ID_BYTES
from trunkline_wire.specs import FLOAT32, CutSpec, FeatureSpace, codec_label
from trunkline_wire.v1 import dataset_pb2 as pb
from trunkline_wire.v1 import dataset_pb2_grpc, error_pb2

from trunkline_worker.engine.api import Payload
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import current_call, public_error
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.servicers.records import dataset_to_proto
from trunkline_worker.serving.streams import pipelined
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
                with self._budget.hold(message.ByteSize()):
                    added = await self._store(call.tenant, message.chunk)
                return pb.UploadRowsResponse(seq=message.seq, ack=pb.ChunkAck(num_new_rows=added))
            except Exception as error:
                public = public_error(error, "UploadRows", call.request_id)
                return pb.UploadRowsResponse(seq=message.seq, error=messages.error_to_proto(public, call.request_id))

        count = 0
        async for reply in pipelined(request_iterator, handle, window=UPLOAD_WINDOW):
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
        names, indices, targets = _labels(request, len(row_ids))
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
        precision = await self._check_space(space, rows)
        sha256 = await asyncio.to_thread(chunks.write_chunk, self._backends.blobs, rows)
        # The index comes last: what it names is durable.
        added: int = await self._backends.metadata.call(
            "rows.add_chunk", tenant, sha256, space, codec_label(codec_of(rows), precision), list(chunk.row_ids)
        )
        return added

    async def _check_space(self, space: FeatureSpace, rows: Payload) -> str:
        """Check that rows belong into a feature space, and return the precision of the stem that made them."""
        if not space.backbone:
            if not space.is_input or isinstance(rows, np.ndarray | PackedRows):
                raise WireError(
                    ErrorCode.INVALID_ARGUMENT, "rows without a backbone must be encoded images at the cut 'input'"
                )
            return FLOAT32
        spec = await self._backends.engine(space.backbone).describe(space.input_size)
        cut = spec.cut(space.cut)
        if cut is None:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"{space.backbone} has no cut {space.cut[:80]!r}. It has {len(spec.cuts)} cuts; where its stages end: "
                + ", ".join(one.name for one in spec.cuts if one.is_stage),
            )
        precision = cut.precision_of(space.fingerprint)
        if precision is None:
            raise WireError(
                ErrorCode.INCOMPATIBLE,
                f"these features were made with other weights or preprocessing than {space.backbone} has now; "
                "fetch the stem again",
            )
        _check_layout(space, cut, rows)
        return precision


def _check_layout(space: FeatureSpace, cut: CutSpec, rows: Payload) -> None:
    """Check type and shape of rows at a cut."""
    if not isinstance(rows, np.ndarray | PackedRows):
        if not space.is_input:
            raise WireError(ErrorCode.DTYPE_MISMATCH, f"the cut {space.cut!r} takes features, not encoded images")
        return
    if rows.shape[1:] != cut.feature_shape:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"rows of shape {rows.shape[1:]}; the cut {space.cut!r} at input size {space.input_size} needs "
            f"{cut.feature_shape}",
        )
    codec = codec_of(rows)
    if (codec == "uint8") != space.is_input:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"rows of {codec} at the cut {space.cut!r}; images are uint8, features one of {', '.join(CODECS)}",
        )
    # Values of bfloat16 have no scales, so it does not matter what they count along.
    if isinstance(rows, PackedRows) and codec != BFLOAT16 and rows.channel_axis != cut.channel_axis:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"rows quantised along axis {rows.channel_axis}; a row at the cut {space.cut!r}, of shape "
            f"{cut.feature_shape}, counts channels along axis {cut.channel_axis}",
        )


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


def _labels(request: pb.CommitDatasetRequest, num_rows: int) -> tuple[tuple[str, ...], list[int], np.ndarray | None]:
    kind = request.WhichOneof("labels")
    if kind == "targets":
        targets = codecs.decode(request.targets.values, max_rows=MAX_DATASET_ROWS)
        if not isinstance(targets, np.ndarray) or targets.dtype != np.float32 or targets.ndim != 2:
            raise WireError(ErrorCode.BAD_LABELS, "targets must be float32 of shape (rows, outputs)")
        if len(targets) != num_rows:
            raise WireError(ErrorCode.BAD_LABELS, f"{len(targets)} targets for {num_rows} rows")
        return (), [], targets
    if kind is None:
        return (), [], None
    names, indices = tuple(request.classes.names), list(request.classes.indices)
    if len(indices) != num_rows:
        raise WireError(ErrorCode.BAD_LABELS, f"{len(indices)} labels for {num_rows} rows")
    if len(names) > MAX_CLASSES or len(set(names)) != len(names) or any(not name for name in names):
        raise WireError(ErrorCode.BAD_LABELS, f"class names must be distinct, not empty, {MAX_CLASSES} at most")
    if max(indices) >= len(names):
        raise WireError(ErrorCode.BAD_LABELS, f"label {max(indices)} does not exist: there are {len(names)} classes")
    if len(set(indices)) < 2:
        raise WireError(ErrorCode.BAD_LABELS, "the labels are of one class only; a classifier needs two at least")
    return names, indices, None
