"""Rows in, predictions or embeddings out: one call, or a stream with several batches in flight."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from trunkline_wire import codecs, messages
from trunkline_wire.bulk import Apart
from trunkline_wire.errors import WireError
from trunkline_wire.heads import CLASSIFICATION, ORDINAL
from trunkline_wire.v1 import error_pb2
from trunkline_wire.v1 import inference_pb2 as pb

from trunkline_worker.engine.checks import check_outliers
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.bottlenecks import find_bottleneck
from trunkline_worker.serving.boundary import current_call, public_error
from trunkline_worker.serving.budget import ByteBudget, size_of
from trunkline_worker.serving.fusion import more_columns
from trunkline_worker.serving.models import ModelLookup
from trunkline_worker.serving.replies import check_embedding_size
from trunkline_worker.serving.streams import Room, pipelined
from trunkline_worker.serving.turns import Turn, reserve

STREAM_WINDOW = 8
"""Batches of one stream that are worked on at a time."""


class InferenceServicer:
    """See ``InferenceService`` in inference.proto. For ``bulk_rpc.add_inference_servicer``: tensors come apart."""

    def __init__(self, backends: Backends, budget: ByteBudget) -> None:
        """Keep what the servicer stands on."""
        self._backends = backends
        self._budget = budget
        self._models = ModelLookup(backends.metadata)

    async def Predict(self, request: Apart[pb.PredictRequest], context: grpc.aio.ServicerContext) -> pb.PredictResponse:
        """Run trunk and head on one batch."""
        with self._budget.hold(size_of(request), current_call().caller):
            return await self._predict(request.message, request.data)

    async def Extract(
        self, request: Apart[pb.ExtractRequest], context: grpc.aio.ServicerContext
    ) -> Apart[pb.ExtractResponse]:
        """Run the trunk on one batch."""
        with self._budget.hold(size_of(request), current_call().caller):
            return await self._extract(request.message, request.data)

    def StreamPredict(
        self, request_iterator: AsyncIterator[Apart[pb.StreamPredictRequest]], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamPredictResponse]:
        """Predict batch after batch. A batch that fails is answered with its error; the stream goes on."""

        async def answer(request: Apart[pb.StreamPredictRequest]) -> pb.StreamPredictResponse:
            result = await self._predict(request.message.predict, request.data, wait=True)
            return pb.StreamPredictResponse(seq=request.seq, result=result)

        return self._replies(request_iterator, "predict", answer, pb.StreamPredictResponse)

    def StreamExtract(
        self, request_iterator: AsyncIterator[Apart[pb.StreamExtractRequest]], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Apart[pb.StreamExtractResponse] | pb.StreamExtractResponse]:
        """Extract batch after batch. A batch that fails is answered with its error; the stream goes on."""

        async def answer(request: Apart[pb.StreamExtractRequest]) -> Apart[pb.StreamExtractResponse]:
            result = await self._extract(request.message.extract, request.data, wait=True)
            return Apart(pb.StreamExtractResponse(seq=request.seq, result=result.message), result.data)

        return self._replies(request_iterator, "extract", answer, pb.StreamExtractResponse)

    async def _replies(
        self,
        requests: AsyncIterator[Apart[Any]],
        kind: str,
        answer: Callable[[Apart[Any]], Awaitable[Any]],
        response: type[Any],
    ) -> AsyncIterator[Any]:
        """Answer a stream: ``kind`` names the field of its messages, ``response`` is the type of errors and the end."""
        call = current_call()

        async def handle(request: Apart[Any]) -> Any:
            try:
                return await answer(request)
            except Exception as error:
                return refuse(request, error)

        def refuse(request: Apart[Any], error: Exception) -> Any:
            return response(seq=request.seq, error=_error(error, f"Stream{kind.title()}"))

        room = Room(lambda request: reserve(self._budget, call, request, getattr(request.message, kind)), refuse)
        count = 0
        async for reply in pipelined(requests, handle, window=STREAM_WINDOW, draining=call.draining, room=room):
            count += 1
            yield reply
        yield response(seq=count, end=error_pb2.EndOfStream(num_messages=count))

    async def _predict(
        self, request: pb.PredictRequest, data: memoryview | None, *, wait: bool = False
    ) -> pb.PredictResponse:
        """Predict. ``wait``: as for ``Engine.predict``, and for engines that are elsewhere too."""
        call = current_call()
        turn = Turn(call, request.timeout_s, wait=wait)
        rows = codecs.decode(request.features, data)
        space = messages.space_from_proto(request.space)
        model = await self._models.find(call.tenant, request.model)
        if request.outlier_scores:
            check_outliers(model)
        engine = self._backends.engine(self._backends.default_backbone if space.is_local else space.backbone)
        if space.bottleneck:
            await find_bottleneck(self._backends, call.tenant, space.bottleneck)
        more = await turn.until_room(
            lambda: more_columns(
                model, rows, request.more_inputs, self._backends, tenant=call.tenant, **turn.keywords()
            )
        )
        prediction = await turn.until_room(
            lambda: engine.predict(
                space, rows, model, more_BE=more.more_BE, outliers=request.outlier_scores, **turn.keywords()
            )
        )
        row_errors = {**prediction.row_errors, **more.row_errors}
        outputs_BK = _without(prediction.outputs_BK, more.row_errors)
        outliers_B2 = prediction.outliers_B2
        if outliers_B2 is not None:
            outliers_B2 = _without(outliers_B2, more.row_errors)
        labels: list[str] = []
        if model.task in (CLASSIFICATION, ORDINAL):
            # A failed row is NaN throughout; argmax of NaN is 0, so it must be told apart.
            best = outputs_BK.argmax(axis=1).tolist()
            labels = ["" if row in row_errors else model.class_names[index] for row, index in enumerate(best)]
        return pb.PredictResponse(
            model=model.reference,
            outputs=codecs.encode_array(outputs_BK),
            labels=labels,
            row_errors=_row_errors(row_errors),
            timings=messages.timings_to_proto(prediction.timings),
            codec_use=messages.codec_use_to_proto(prediction.codec_use),
            outlier_distances=None if outliers_B2 is None else outliers_B2[:, 0].tolist(),
            outlier_scores=None if outliers_B2 is None else outliers_B2[:, 1].tolist(),
        )

    async def _extract(
        self, request: pb.ExtractRequest, data: memoryview | None, *, wait: bool = False
    ) -> Apart[pb.ExtractResponse]:
        """Extract. ``wait``: as for ``_predict``."""
        call = current_call()
        turn = Turn(call, request.timeout_s, wait=wait)
        rows = codecs.decode(request.features, data)
        space = messages.space_from_proto(request.space)
        if space.bottleneck:
            await find_bottleneck(self._backends, call.tenant, space.bottleneck)
        engine = self._backends.engine(space.backbone)
        await check_embedding_size(engine, space, request.slices, len(rows))
        extraction = await turn.until_room(
            lambda: engine.extract(space, rows, tuple(request.slices), **turn.keywords())
        )
        embedding, content = codecs.encode_array_apart(extraction.embedding_BD)
        response = pb.ExtractResponse(
            embedding=embedding,
            slices=messages.slices_to_proto(extraction.slices),
            row_errors=_row_errors(extraction.row_errors),
            timings=messages.timings_to_proto(extraction.timings),
            codec_use=messages.codec_use_to_proto(extraction.codec_use),
        )
        return Apart(response, content)


def _without(values_BX: npt.NDArray[np.float32], rows: Collection[int]) -> npt.NDArray[np.float32]:
    """Return the values with NaN in the rows that failed."""
    if not rows:
        return values_BX
    values_BX = values_BX.copy()
    values_BX[list(rows)] = np.nan
    return values_BX


def _row_errors(errors: Mapping[int, WireError]) -> list[error_pb2.RowError]:
    request_id = current_call().request_id
    return [
        error_pb2.RowError(row=row, error=messages.error_to_proto(error, request_id))
        for row, error in sorted(errors.items())
    ]


def _error(error: Exception, what: str) -> error_pb2.Error:
    request_id = current_call().request_id
    return messages.error_to_proto(public_error(error, what, request_id), request_id)
