"""The trunk as a function with a gradient, and the bottlenecks that are trained through it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import numpy as np
import numpy.typing as npt
from trunkline_wire import codecs, messages
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.bottleneck_file import linear_from_proto, linear_to_proto
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FeatureSpace
from trunkline_wire.v1 import error_pb2, trunk_pb2_grpc
from trunkline_wire.v1 import trunk_pb2 as pb

from trunkline_worker.engine.api import DEFAULT_OUTPUTS, LOGITS
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.bottlenecks import get_bottleneck, put_bottleneck
from trunkline_worker.serving.boundary import current_call, public_error
from trunkline_worker.serving.budget import ByteBudget, size_of
from trunkline_worker.serving.replies import check_embedding_size, check_reply_size
from trunkline_worker.serving.streams import Room, pipelined
from trunkline_worker.serving.turns import Turn, reserve

STREAM_WINDOW = 4
"""Batches of one stream that are worked on at a time."""


class TrunkServicer(trunk_pb2_grpc.TrunkServiceServicer):
    """See ``TrunkService`` in trunk.proto."""

    def __init__(self, backends: Backends, budget: ByteBudget) -> None:
        """Keep what the servicer stands on."""
        self._backends = backends
        self._budget = budget

    async def Forward(self, request: pb.ForwardRequest, context: grpc.aio.ServicerContext) -> pb.ForwardResponse:
        """Run the trunk on one batch."""
        with self._budget.hold(size_of(request), current_call().caller):
            return await self._forward(request)

    async def Backward(self, request: pb.BackwardRequest, context: grpc.aio.ServicerContext) -> pb.BackwardResponse:
        """Propagate the gradient of one batch back."""
        with self._budget.hold(size_of(request), current_call().caller):
            return await self._backward(request)

    async def StreamTrunk(
        self, request_iterator: AsyncIterator[pb.StreamTrunkRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamTrunkResponse]:
        """Do either for batch after batch. A batch that fails is answered with its error; the stream goes on."""
        call = current_call()

        async def handle(message: pb.StreamTrunkRequest) -> pb.StreamTrunkResponse:
            try:
                if message.WhichOneof("kind") == "backward":
                    backward = await self._backward(message.backward, wait=True)
                    return pb.StreamTrunkResponse(seq=message.seq, backward=backward)
                forward = await self._forward(message.forward, wait=True)
                return pb.StreamTrunkResponse(seq=message.seq, forward=forward)
            except Exception as error:
                return refuse(message, error)

        def refuse(message: pb.StreamTrunkRequest, error: Exception) -> pb.StreamTrunkResponse:
            public = public_error(error, "StreamTrunk", call.request_id)
            return pb.StreamTrunkResponse(seq=message.seq, error=messages.error_to_proto(public, call.request_id))

        def timed(message: pb.StreamTrunkRequest) -> pb.ForwardRequest | pb.BackwardRequest:
            return message.backward if message.WhichOneof("kind") == "backward" else message.forward

        room = Room(lambda message: reserve(self._budget, call, message, timed(message)), refuse)
        count = 0
        replies = pipelined(request_iterator, handle, window=STREAM_WINDOW, draining=call.draining, room=room)
        async for reply in replies:
            count += 1
            yield reply
        yield pb.StreamTrunkResponse(seq=count, end=error_pb2.EndOfStream(num_messages=count))

    async def PutBottleneck(
        self, request: pb.PutBottleneckRequest, context: grpc.aio.ServicerContext
    ) -> pb.PutBottleneckResponse:
        """Keep a bottleneck for the caller."""
        with self._budget.hold(size_of(request), current_call().caller):
            sha256 = await put_bottleneck(self._backends, current_call().tenant, request.file)
        return pb.PutBottleneckResponse(sha256=sha256)

    async def GetBottleneck(
        self, request: pb.GetBottleneckRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetBottleneckResponse:
        """Return the file of a bottleneck of the caller's."""
        file = await get_bottleneck(self._backends, current_call().tenant, request.sha256)
        return pb.GetBottleneckResponse(file=file)

    async def _forward(self, request: pb.ForwardRequest, *, wait: bool = False) -> pb.ForwardResponse:
        turn = Turn(current_call(), request.timeout_s, wait=wait)
        space, features, decoder = _entry(request)
        engine = self._backends.engine(space.backbone)
        outputs = tuple(request.outputs) or DEFAULT_OUTPUTS
        if outputs != (LOGITS,):
            await check_embedding_size(engine, space, outputs, len(features))
        answer = await turn.until_room(
            lambda: engine.forward(space, features, outputs, decoder=decoder, timeout_s=turn.left_s())
        )
        return pb.ForwardResponse(
            outputs=codecs.encode_array(answer.outputs_BD), timings=messages.timings_to_proto(answer.timings)
        )

    async def _backward(self, request: pb.BackwardRequest, *, wait: bool = False) -> pb.BackwardResponse:
        turn = Turn(current_call(), request.timeout_s, wait=wait)
        space, features, decoder = _entry(request)
        gradient = codecs.decode(request.gradient)
        if not isinstance(gradient, np.ndarray):
            raise WireError(ErrorCode.DTYPE_MISMATCH, "a gradient is a plain tensor of floats")
        check_reply_size(len(features), 4 * features[0].size, "the gradient")
        engine, outputs = self._backends.engine(space.backbone), tuple(request.outputs)
        answer = await turn.until_room(
            lambda: engine.backward(space, features, gradient, outputs, decoder=decoder, timeout_s=turn.left_s())
        )
        return pb.BackwardResponse(
            gradient=codecs.encode_array(answer.features),
            decoder_gradient=None if answer.decoder is None else linear_to_proto(answer.decoder),
            timings=messages.timings_to_proto(answer.timings),
        )


def _entry(
    request: pb.ForwardRequest | pb.BackwardRequest,
) -> tuple[FeatureSpace, npt.NDArray[np.generic], ChannelLinear | None]:
    features = codecs.decode(request.features)
    if not isinstance(features, np.ndarray):
        raise WireError(
            ErrorCode.DTYPE_MISMATCH, "features that are to be differentiated are plain float32 or float16, not packed"
        )
    decoder = linear_from_proto(request.decoder) if request.HasField("decoder") else None
    return messages.space_from_proto(request.space), features, decoder
