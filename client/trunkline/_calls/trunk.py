"""Calls that run the trunk forward and backward, and those about bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.bottleneck_file import linear_from_proto, linear_to_proto
from trunkline_wire.codecs import decode, encode_array
from trunkline_wire.errors import WireError
from trunkline_wire.messages import space_to_proto
from trunkline_wire.specs import FeatureSpace
from trunkline_wire.v1 import error_pb2, tensor_pb2
from trunkline_wire.v1 import trunk_pb2 as pb
from trunkline_wire.v1.trunk_pb2_grpc import TrunkServiceStub

from trunkline._calls.core import Caller, Method
from trunkline._calls.exchange import Exchange
from trunkline._deadline import Deadline
from trunkline.errors import InternalError, TrunklineError, from_wire

# Shape suffix legend: B = rows, D = outputs


@dataclass(frozen=True)
class TrunkBatch:
    """Rows that go through the trunk together.

    Attributes:
        first_row: Which row of the step its first one is.
        features: (B, ...), float32.
        gradient_BD: Of the loss with respect to the outputs; None for a forward pass.
    """

    first_row: int
    features: npt.NDArray[np.float32]
    gradient_BD: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TrunkAnswer:
    """What the trunk says of a batch: its outputs, (B, D); or gradients of the features and the decoder."""

    values: npt.NDArray[np.float32]
    decoder: ChannelLinear | None = None


class TrunkCalls:
    """``TrunkService``."""

    def __init__(self, caller: Caller) -> None:
        """Keep who makes the calls."""
        self._caller = caller

    def run(
        self,
        space: FeatureSpace,
        batches: Sequence[TrunkBatch],
        outputs: Sequence[str],
        decoder: ChannelLinear | None,
        *,
        window: int,
        deadline: Deadline,
    ) -> list[TrunkAnswer]:
        """Run batches forward, or all of them backward, several in flight. Returns the answers in their order.

        What a broken connection or a dead replica left unanswered is sent again. Where replicas can be reached they
        share the batches.

        Raises:
            TrunklineError: One batch failed.
        """
        kind = "forward" if batches[0].gradient_BD is None else "backward"
        space_message = space_to_proto(space)

        def request(seq: int, batch: TrunkBatch) -> pb.StreamTrunkRequest:
            message = pb.StreamTrunkRequest(seq=seq)
            entry = message.forward if batch.gradient_BD is None else message.backward
            entry.space.CopyFrom(space_message)
            entry.features.CopyFrom(encode_array(batch.features))
            entry.outputs.extend(outputs)
            if decoder is not None:
                entry.decoder.CopyFrom(linear_to_proto(decoder))
            if batch.gradient_BD is not None:
                message.backward.gradient.CopyFrom(encode_array(batch.gradient_BD))
            entry.timeout_s = deadline.remaining() or 0.0
            return message

        answers: dict[int, TrunkAnswer] = {}
        if len(batches) == 1:
            # One message needs no stream, where a replica answers it; otherwise a stream survives more.
            message = getattr(request(1, batches[0]), kind)
            found = self._caller.rows_directly(
                TrunkServiceStub,
                kind.capitalize(),
                message,
                deadline,
                backbone=space.backbone,
                num_rows=len(batches[0].features),
            )
            if found is not None:
                return [_answer(found)]
        method = Method(
            TrunkServiceStub,
            "StreamTrunk",
            request=request,
            end=lambda sent: pb.StreamTrunkRequest(seq=0, end=error_pb2.EndOfStream(num_messages=sent)),
            result=kind,
            num_rows=lambda batch: len(batch.features),
        )
        exchange = Exchange(iter(batches), window)
        with closing(self._caller.stream(method, exchange, deadline, backbone=space.backbone)) as stream:
            for _, batch, answer in stream:
                if isinstance(answer, TrunklineError):
                    if batch.first_row:
                        counted = f"Its rows are counted from row {batch.first_row} of the step"
                        answer.hint = f"{answer.hint.rstrip('.')}. {counted}" if answer.hint else counted
                    raise answer
                answers[batch.first_row] = _answer(answer)
        return [answers[batch.first_row] for batch in batches]

    def put_bottleneck(self, file: bytes, deadline: Deadline) -> str:
        """Put the file of a bottleneck there and return its hex SHA-256. Repeating it changes nothing."""
        answer: pb.PutBottleneckResponse = self._caller.unary(
            TrunkServiceStub, "PutBottleneck", pb.PutBottleneckRequest(file=file), deadline
        )
        return answer.sha256

    def get_bottleneck(self, sha256: str, deadline: Deadline) -> bytes:
        """Return the file of a bottleneck."""
        answer: pb.GetBottleneckResponse = self._caller.unary(
            TrunkServiceStub, "GetBottleneck", pb.GetBottleneckRequest(sha256=sha256), deadline
        )
        return answer.file


def _answer(message: pb.ForwardResponse | pb.BackwardResponse) -> TrunkAnswer:
    if isinstance(message, pb.ForwardResponse):
        return TrunkAnswer(_array(message.outputs))
    try:
        decoder = linear_from_proto(message.decoder_gradient) if message.HasField("decoder_gradient") else None
    except WireError as error:
        raise from_wire(error) from None
    return TrunkAnswer(_array(message.gradient), decoder)


def _array(tensor: tensor_pb2.Tensor) -> npt.NDArray[np.float32]:
    try:
        array = decode(tensor)
    except WireError as error:
        raise from_wire(error) from None
    if not isinstance(array, np.ndarray):
        raise InternalError("the cluster answered with something else than a plain tensor")
    return array.astype(np.float32, copy=False)
