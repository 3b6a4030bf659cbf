"""Rows in, predictions or embeddings out: one call, or a stream with several batches in flight."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import grpc
import numpy as np
from trunkline_wire import codecs, messages
from trunkline_wire.errors import WireError
from trunkline_wire.heads import CLASSIFICATION
from trunkline_wire.v1 import error_pb2, inference_pb2_grpc
from trunkline_wire.v1 import inference_pb2 as pb

from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.bottlenecks import find_bottleneck
from trunkline_worker.serving.boundary import current_call, public_error
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.fusion import more_columns
from trunkline_worker.serving.models import ModelLookup
from trunkline_worker.serving.replies import check_embedding_size
from trunkline_worker.serving.streams import pipelined

STREAM_WINDOW = 8
"""Batches of one stream that are worked on at a time."""


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """See ``InferenceService`` in inference.proto."""

    def __init__(self, backends: Backends, budget: ByteBudget) -> None:
        """Keep what the servicer stands on."""
        self._backends = backends
        self._budget = budget
        self._models = ModelLookup(backends.metadata)

    async def Predict(self, request: pb.PredictRequest, context: grpc.aio.ServicerContext) -> pb.PredictResponse:
        """Run trunk and head on one batch."""
        return await self._predict(request)

    async def Extract(self, request: pb.ExtractRequest, context: grpc.aio.ServicerContext) -> pb.ExtractResponse:
        """Run the trunk on one batch."""
        return await self._extract(request)

    async def StreamPredict(
        self, request_iterator: AsyncIterator[pb.StreamPredictRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamPredictResponse]:
        """Predict batch after batch. A batch that fails is answered with its error; the stream goes on."""

        async def handle(message: pb.StreamPredictRequest) -> pb.StreamPredictResponse:
            try:
                return pb.StreamPredictResponse(seq=message.seq, result=await self._predict(message.predict))
            except Exception as error:
                return pb.StreamPredictResponse(seq=message.seq, error=_error(error, "StreamPredict"))

        count = 0
        async for reply in pipelined(request_iterator, handle, window=STREAM_WINDOW):
            count += 1
            yield reply
        yield pb.StreamPredictResponse(seq=count, end=error_pb2.EndOfStream(num_messages=count))

    async def StreamExtract(
        self, request_iterator: AsyncIterator[pb.StreamExtractRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamExtractResponse]:
        """Extract batch after batch. A batch that fails is answered with its error; the stream goes on."""

        async def handle(message: pb.StreamExtractRequest) -> pb.StreamExtractResponse:
            try:
                return pb.StreamExtractResponse(seq=message.seq, result=await self._extract(message.extract))
            except Exception as error:
                return pb.StreamExtractResponse(seq=message.seq, error=_error(error, "StreamExtract"))

        count = 0
        async for reply in pipelined(request_iterator, handle, window=STREAM_WINDOW):
            count += 1
            yield reply
        yield pb.StreamExtractResponse(seq=count, end=error_pb2.EndOfStream(num_messages=count))

    async def _predict(self, request: pb.PredictRequest) -> pb.PredictResponse:
        with self._budget.hold(request.ByteSize()):
            return await self._predict_held(request)

    async def _extract(self, request: pb.ExtractRequest) -> pb.ExtractResponse:
        with self._budget.hold(request.ByteSize()):
            return await self._extract_held(request)

    async def _predict_held(self, request: pb.PredictRequest) -> pb.PredictResponse:
        call = current_call()
        rows = codecs.decode(request.features)
        space = messages.space_from_proto(request.space)
        model = await self._models.find(call.tenant, request.model)
        engine = self._backends.engine(self._backends.default_backbone if space.is_local else space.backbone)
        if space.bottleneck:
            await find_bottleneck(self._backends, call.tenant, space.bottleneck)
        more = await more_columns(
            model,
            rows,
            request.more_inputs,
            self._backends,
            tenant=call.tenant,
            timeout_s=call.remaining_s(request.timeout_s),
        )
        prediction = await engine.predict(
            space, rows, model, more_BE=more.more_BE, timeout_s=call.remaining_s(request.timeout_s)
        )
        row_errors = {**prediction.row_errors, **more.row_errors}
        outputs_BK = prediction.outputs_BK
        if more.row_errors:
            outputs_BK = outputs_BK.copy()
            outputs_BK[list(more.row_errors)] = np.nan
        labels: list[str] = []
        if model.task == CLASSIFICATION:
            # A failed row is NaN throughout; argmax of NaN is 0, so it must be told apart.
            best = np.argmax(outputs_BK, axis=1)
            labels = ["" if row in row_errors else model.class_names[index] for row, index in enumerate(best)]
        return pb.PredictResponse(
            model=model.reference,
            outputs=codecs.encode_array(outputs_BK),
            labels=labels,
            row_errors=_row_errors(row_errors),
            timings=messages.timings_to_proto(prediction.timings),
            codec_use=messages.codec_use_to_proto(prediction.codec_use),
        )

    async def _extract_held(self, request: pb.ExtractRequest) -> pb.ExtractResponse:
        call = current_call()
        remaining = call.remaining_s(request.timeout_s)
        rows = codecs.decode(request.features)
        space = messages.space_from_proto(request.space)
        if space.bottleneck:
            await find_bottleneck(self._backends, call.tenant, space.bottleneck)
        engine = self._backends.engine(space.backbone)
        await check_embedding_size(engine, space, request.slices, len(rows))
        extraction = await engine.extract(space, rows, tuple(request.slices), timeout_s=remaining)
        return pb.ExtractResponse(
            embedding=codecs.encode_array(extraction.embedding_BD),
            slices=messages.slices_to_proto(extraction.slices),
            row_errors=_row_errors(extraction.row_errors),
            timings=messages.timings_to_proto(extraction.timings),
            codec_use=messages.codec_use_to_proto(extraction.codec_use),
        )


def _row_errors(errors: Mapping[int, WireError]) -> list[error_pb2.RowError]:
    request_id = current_call().request_id
    return [
        error_pb2.RowError(row=row, error=messages.error_to_proto(error, request_id))
        for row, error in sorted(errors.items())
    ]


def _error(error: Exception, what: str) -> error_pb2.Error:
    request_id = current_call().request_id
    return messages.error_to_proto(public_error(error, what, request_id), request_id)
