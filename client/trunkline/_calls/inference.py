"""Calls that put rows in and get predictions or embeddings out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.bulk import Apart
from trunkline_wire.bulk_rpc import InferenceServiceStub
from trunkline_wire.codecs import encode_images, encode_rows_apart, whole
from trunkline_wire.errors import WireError
from trunkline_wire.messages import codec_use_from_proto, space_to_proto, timings_from_proto
from trunkline_wire.quantise import PackedRows
from trunkline_wire.specs import CodecUse, FeatureSpace, SliceSpec, Timings
from trunkline_wire.v1 import error_pb2, tensor_pb2
from trunkline_wire.v1 import inference_pb2 as pb

from trunkline._calls.core import Caller, Method, error_from_message
from trunkline._calls.exchange import Exchange
from trunkline._calls.matrices import decode_matrix
from trunkline._deadline import Deadline
from trunkline.errors import TrunklineError, UnsupportedError, from_wire

# Shape suffix legend: B = rows, D = embedding width, K = classes or outputs

Rows = npt.NDArray[np.generic] | PackedRows | Sequence[bytes]
"""Features at a cut, (B, ...), or the same in fewer bytes; or encoded images, one per row."""


@dataclass(frozen=True)
class RawPrediction:
    """One batch's answer. ``outputs_BK`` is NaN in rows that failed.

    ``outliers_B2`` likewise, where it was asked for: distances, and shares of rows held out that were nearer.
    """

    model: str
    outputs_BK: npt.NDArray[np.float32]
    labels: tuple[str, ...]
    row_errors: Mapping[int, TrunklineError]
    timings: Timings
    codec_use: CodecUse = field(default_factory=CodecUse)
    outliers_B2: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class RawEmbedding:
    """One batch's answer. ``embedding_BD`` is NaN in rows that failed."""

    embedding_BD: npt.NDArray[np.float32]
    slices: tuple[SliceSpec, ...]
    row_errors: Mapping[int, TrunklineError]
    timings: Timings
    codec_use: CodecUse = field(default_factory=CodecUse)


@dataclass(frozen=True)
class MoreRows:
    """What stands beside a batch's first tensor, row for row.

    Attributes:
        space: Where it lives.
        rows: What travels. None: the encoded images of the first tensor are these rows too.
        compress: Whether to apply zstd.
    """

    space: FeatureSpace
    rows: Rows | None
    compress: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows that travel together.

    Attributes:
        rows: What travels.
        row_numbers: Which of the caller's rows they are.
        compress: Whether to apply zstd.
        more: What stands beside.
    """

    rows: Rows
    row_numbers: tuple[int, ...]
    compress: bool = False
    more: tuple[MoreRows, ...] = ()


class InferenceCalls:
    """``InferenceService``."""

    def __init__(self, caller: Caller) -> None:
        """Keep who makes the calls."""
        self._caller = caller

    def predict(
        self,
        space: FeatureSpace,
        batch: Batch,
        model: str,
        deadline: Deadline,
        *,
        outliers: bool = False,
        backbone: str = "",
    ) -> RawPrediction:
        """Predict one batch.

        Args:
            space: Where its first tensor lives.
            batch: The rows.
            model: Reference of the model.
            deadline: Over all tries.
            outliers: Whether to ask how unlike the model's training rows each row is.
            backbone: Whose replicas can answer all of it themselves. Empty: none, the gateway finds them.

        Raises:
            UnsupportedError: The cluster takes no notice of ``outliers``.
        """
        request = _predict_request(space, batch, model, deadline, outliers)
        answer = self._caller.rows(
            InferenceServiceStub,
            "Predict",
            request,
            deadline,
            backbone=backbone,
            num_rows=len(batch.row_numbers),
        )
        return _prediction(answer, outliers)

    def extract(self, space: FeatureSpace, batch: Batch, slices: Sequence[str], deadline: Deadline) -> RawEmbedding:
        """Compute the embedding of one batch. A replica of its backbone answers it, or the gateway."""
        request = _extract_request(space, batch, slices, deadline)
        answer = self._caller.rows(
            InferenceServiceStub,
            "Extract",
            request,
            deadline,
            backbone=space.backbone,
            num_rows=len(batch.row_numbers),
        )
        return _embedding(answer)

    def stream_predict(
        self,
        space: FeatureSpace,
        batches: Iterator[Batch],
        model: str,
        *,
        window: int,
        deadline: Deadline,
        outliers: bool = False,
        backbone: str = "",
    ) -> Iterator[tuple[Batch, RawPrediction | TrunklineError]]:
        """Predict many batches with several in flight. Yields each with its answer or its error, as they come.

        Replicas of ``backbone`` that can be reached share them, where one is named: ``window`` counts for each.
        ``outliers`` as for ``predict``.
        """
        method: Method[Batch] = Method(
            InferenceServiceStub,
            "StreamPredict",
            request=lambda seq, batch: _numbered_predict(
                seq, _predict_request(space, batch, model, deadline, outliers)
            ),
            end=lambda sent: pb.StreamPredictRequest(seq=0, end=error_pb2.EndOfStream(num_messages=sent)),
            result="result",
            num_rows=lambda batch: len(batch.row_numbers),
        )
        answers = self._caller.stream(method, Exchange(batches, window), deadline, backbone=backbone)
        for _, batch, answer in answers:
            yield batch, answer if isinstance(answer, TrunklineError) else _prediction(answer, outliers)

    def stream_extract(
        self, space: FeatureSpace, batches: Iterator[Batch], slices: Sequence[str], *, window: int, deadline: Deadline
    ) -> Iterator[tuple[Batch, RawEmbedding | TrunklineError]]:
        """Compute the embeddings of many batches with several in flight."""
        method: Method[Batch] = Method(
            InferenceServiceStub,
            "StreamExtract",
            request=lambda seq, batch: _numbered_extract(seq, _extract_request(space, batch, slices, deadline)),
            end=lambda sent: pb.StreamExtractRequest(seq=0, end=error_pb2.EndOfStream(num_messages=sent)),
            result="result",
            num_rows=lambda batch: len(batch.row_numbers),
        )
        answers = self._caller.stream(method, Exchange(batches, window), deadline, backbone=space.backbone)
        for _, batch, answer in answers:
            yield batch, answer if isinstance(answer, TrunklineError) else _embedding(answer)


def rows_to_tensor(rows: Rows, compress: bool) -> tensor_pb2.Tensor:
    """Return the message of rows.

    Args:
        rows: What is sent.
        compress: Whether to apply zstd. Images have a compression of their own.

    Raises:
        TrunklineError: A row has a type that cannot be sent, or all of it is over the limit.
    """
    tensor, data = _rows_apart(rows, compress)
    return tensor if data is None else whole(tensor, data)


def _rows_apart(rows: Rows, compress: bool) -> tuple[tensor_pb2.Tensor, memoryview | None]:
    """Return the message of rows without their data, and the data; images stay in it. See ``rows_to_tensor``."""
    try:
        if isinstance(rows, (np.ndarray, PackedRows)):
            return encode_rows_apart(rows, compress=compress)
        return encode_images(rows), None
    except WireError as error:
        raise from_wire(error) from None


def _predict_request(
    space: FeatureSpace, batch: Batch, model: str, deadline: Deadline, outliers: bool
) -> Apart[pb.PredictRequest]:
    features, data = _rows_apart(batch.rows, batch.compress)
    request = pb.PredictRequest(
        space=space_to_proto(space),
        features=features,
        model=model,
        timeout_s=deadline.remaining() or 0.0,
        more_inputs=[_input(one) for one in batch.more],
        outlier_scores=outliers,
    )
    return Apart(request, data)


def _numbered_predict(seq: int, request: Apart[pb.PredictRequest]) -> Apart[pb.StreamPredictRequest]:
    return Apart(pb.StreamPredictRequest(seq=seq, predict=request.message), request.data)


def _numbered_extract(seq: int, request: Apart[pb.ExtractRequest]) -> Apart[pb.StreamExtractRequest]:
    return Apart(pb.StreamExtractRequest(seq=seq, extract=request.message), request.data)


def _input(more: MoreRows) -> pb.Input:
    features = None if more.rows is None else rows_to_tensor(more.rows, more.compress)
    return pb.Input(space=space_to_proto(more.space), features=features)


def _extract_request(
    space: FeatureSpace, batch: Batch, slices: Sequence[str], deadline: Deadline
) -> Apart[pb.ExtractRequest]:
    features, data = _rows_apart(batch.rows, batch.compress)
    request = pb.ExtractRequest(
        space=space_to_proto(space), features=features, slices=slices, timeout_s=deadline.remaining() or 0.0
    )
    return Apart(request, data)


def _prediction(answer: pb.PredictResponse, outliers: bool) -> RawPrediction:
    outputs_BK = decode_matrix(answer.outputs)
    return RawPrediction(
        model=answer.model,
        outputs_BK=outputs_BK,
        labels=tuple(answer.labels),
        row_errors=_row_errors(answer.row_errors),
        timings=timings_from_proto(answer.timings),
        codec_use=codec_use_from_proto(answer.codec_use),
        outliers_B2=_outliers(answer, len(outputs_BK)) if outliers else None,
    )


def _outliers(answer: pb.PredictResponse, num_rows: int) -> npt.NDArray[np.float32]:
    if not len(answer.outlier_distances) == len(answer.outlier_scores) == num_rows:
        raise UnsupportedError(
            f"who answered for {answer.model} does not know outlier scores: it is of an earlier version",
            hint="Leave outliers=True out, or upgrade the cluster",
        )
    return np.stack([answer.outlier_distances, answer.outlier_scores], axis=1).astype(np.float32)


def _embedding(apart: Apart[pb.ExtractResponse]) -> RawEmbedding:
    answer = apart.message
    return RawEmbedding(
        embedding_BD=decode_matrix(answer.embedding, apart.data),
        slices=tuple(SliceSpec(one.name, one.start, one.stop) for one in answer.slices),
        row_errors=_row_errors(answer.row_errors),
        timings=timings_from_proto(answer.timings),
        codec_use=codec_use_from_proto(answer.codec_use),
    )


def _row_errors(errors: Any) -> dict[int, TrunklineError]:
    return {one.row: error_from_message(one.error) for one in errors}
