"""Calls that store rows and make datasets of them."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from trunkline_wire.codecs import encode_array, encoded_size
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_FIND_ROWS
from trunkline_wire.messages import space_from_proto, space_to_proto
from trunkline_wire.specs import FeatureSpace
from trunkline_wire.v1 import dataset_pb2 as pb
from trunkline_wire.v1 import error_pb2, tensor_pb2
from trunkline_wire.v1.dataset_pb2_grpc import DatasetServiceStub

from trunkline._calls.core import Caller, Method
from trunkline._calls.exchange import Exchange
from trunkline._calls.inference import Rows, rows_to_tensor
from trunkline._calls.times import from_timestamp
from trunkline._deadline import Deadline
from trunkline._status import is_retryable
from trunkline.errors import TrunklineError, from_wire
from trunkline.labels import Labels, MultiLabels, Targets
from trunkline.records import DatasetRecord, DatasetSource

UPLOAD_WINDOW = 8
"""Most chunks of an upload without an acknowledgement."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are stored together. ``compress`` says whether to apply zstd on the way."""

    row_ids: tuple[bytes, ...]
    rows: Rows
    compress: bool = False


class DatasetCalls:
    """``DatasetService``."""

    def __init__(self, caller: Caller) -> None:
        """Keep who makes the calls."""
        self._caller = caller

    def find_missing(self, row_ids: Sequence[bytes], deadline: Deadline) -> list[int]:
        """Return the indices of rows that the cluster lacks, asking in slices."""
        missing: list[int] = []
        for start in range(0, len(row_ids), MAX_FIND_ROWS):
            request = pb.FindMissingRowsRequest(row_ids=row_ids[start : start + MAX_FIND_ROWS])
            answer: pb.FindMissingRowsResponse = self._caller.unary(
                DatasetServiceStub, "FindMissingRows", request, deadline
            )
            missing.extend(start + index for index in answer.missing)
        return missing

    def upload(
        self,
        space: FeatureSpace,
        chunks: Iterator[Chunk],
        *,
        deadline: Deadline,
        on_sent: Callable[[Chunk, int], None] = lambda chunk, num_bytes: None,
    ) -> Iterator[tuple[Chunk, int]]:
        """Store chunks. Yields each with the number of rows it added, once it is durable.

        After a broken connection the cluster is asked again what it lacks, and only that is sent.

        Args:
            space: Where the rows live.
            chunks: What to store; pulled as the window allows.
            deadline: Over everything.
            on_sent: Told every chunk that is put on the wire, and the bytes of its rows there: values, scales and
                offsets, compressed where they are. Repetitions included. Runs in the sending thread.
        """
        space_message = space_to_proto(space)

        def request(seq: int, chunk: Chunk) -> pb.UploadRowsRequest:
            message = _chunk_message(space_message, chunk)
            on_sent(chunk, encoded_size(message.rows))
            return pb.UploadRowsRequest(seq=seq, chunk=message)

        arrived: list[Chunk] = []

        def ask_again(exchange: Exchange[Chunk]) -> None:
            pending = exchange.pending()
            row_ids = [one for chunk in pending.values() for one in chunk.row_ids]
            missing = {row_ids[index] for index in self.find_missing(row_ids, deadline)}
            for key, chunk in pending.items():
                if missing.isdisjoint(chunk.row_ids):
                    exchange.drop(key)
                    arrived.append(chunk)

        method = Method(
            DatasetServiceStub,
            "UploadRows",
            request=request,
            end=lambda sent: pb.UploadRowsRequest(seq=0, end=error_pb2.EndOfStream(num_messages=sent)),
            result="ack",
            on_reconnect=ask_again,
            retry_item=_worth_sending_again,
        )
        with closing(self._caller.stream(method, Exchange(chunks, UPLOAD_WINDOW), deadline)) as answers:
            for _, chunk, answer in answers:
                if isinstance(answer, TrunklineError):
                    raise answer
                yield chunk, answer.num_new_rows
        for chunk in arrived:
            yield chunk, len(chunk.row_ids)

    def commit(
        self,
        name: str,
        inputs: Sequence[tuple[FeatureSpace, Sequence[bytes]]],
        labels: Labels,
        deadline: Deadline,
        *,
        groups_N: npt.NDArray[np.uint32] | None = None,
        views: int = 1,
    ) -> DatasetRecord:
        """Make a dataset of rows that are stored.

        Args:
            name: Of the dataset.
            inputs: Where the rows of each input live, and their ids. The first one first.
            labels: Of the rows.
            deadline: Of the call.
            groups_N: Of the rows, if they are grouped.
            views: So many rows, one after another, are views of one picture.
        """
        (space, row_ids), *more = inputs
        request = pb.CommitDatasetRequest(
            name=name,
            space=space_to_proto(space),
            row_ids=row_ids,
            idempotency_key=uuid.uuid4().hex,
            more_inputs=[pb.DatasetInput(space=space_to_proto(one), row_ids=ids) for one, ids in more],
            groups=None if groups_N is None else groups_N.tolist(),
            views=views if views > 1 else 0,
        )
        try:
            if isinstance(labels, Targets):
                request.targets.values.CopyFrom(encode_array(labels.values_NM))
            elif isinstance(labels, MultiLabels):
                request.multi_labels.names.extend(labels.names)
                request.multi_labels.values.CopyFrom(encode_array(labels.values_NK))
            else:
                request.classes.names.extend(labels.names)
                request.classes.indices.extend(labels.indices_N.tolist())
        except WireError as error:
            raise from_wire(error, prefix="labels: ", hint="Make several datasets") from None
        answer: pb.CommitDatasetResponse = self._caller.unary(DatasetServiceStub, "CommitDataset", request, deadline)
        return _dataset(answer.dataset)

    def get(self, reference: str, deadline: Deadline) -> DatasetRecord:
        """Return one dataset."""
        answer: pb.GetDatasetResponse = self._caller.unary(
            DatasetServiceStub, "GetDataset", pb.GetDatasetRequest(dataset=reference), deadline
        )
        return _dataset(answer.dataset)

    def list(self, deadline: Deadline) -> list[DatasetRecord]:
        """Return every dataset."""
        answer: pb.ListDatasetsResponse = self._caller.unary(
            DatasetServiceStub, "ListDatasets", pb.ListDatasetsRequest(), deadline
        )
        return [_dataset(one) for one in answer.datasets]


def _chunk_message(space: tensor_pb2.FeatureSpace, chunk: Chunk) -> pb.RowChunk:
    tensor = rows_to_tensor(chunk.rows, chunk.compress)
    digest = hashlib.sha256(tensor.data)
    digest.update(tensor.affine.scale)
    digest.update(tensor.affine.offset)
    for one in tensor.encoded:
        digest.update(one)
    return pb.RowChunk(space=space, row_ids=chunk.row_ids, rows=tensor, sha256=digest.digest())


def _worth_sending_again(error: TrunklineError) -> bool:
    """A chunk that arrived damaged is whole here: sending it again is right."""
    return is_retryable(error) or error.code is ErrorCode.CORRUPT_DATA


def _dataset(message: pb.Dataset) -> DatasetRecord:
    return DatasetRecord(
        name=message.name,
        version=message.version,
        num_rows=message.num_rows,
        digest=message.digest,
        space=space_from_proto(message.space),
        class_names=tuple(message.class_names),
        num_targets=message.num_targets,
        create_time=from_timestamp(message, "create_time"),
        codec=message.codec,
        more_inputs=tuple(DatasetSource(space_from_proto(one.space), one.codec) for one in message.more_inputs),
        num_groups=message.num_groups,
        views=message.views or 1,
    )
