"""What our own client never sends, sent by plain generated stubs: another client may."""

import hashlib

import grpc
import numpy as np
import pytest
from trunkline_wire.codecs import encode_array
from trunkline_wire.errors import ErrorCode, parse_details
from trunkline_wire.messages import space_to_proto
from trunkline_wire.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    error_pb2,
    inference_pb2,
    inference_pb2_grpc,
    tensor_pb2,
    training_pb2,
    training_pb2_grpc,
)


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def metadata(server):
    return (("authorization", f"Bearer {server.token}"),)


@pytest.fixture
def chunk(client, server):
    """Make a good chunk of two random rows."""
    spec = client.describe(server.backbone, input_size=server.input_size)
    cut = spec.cut(server.cut)
    rows = np.random.default_rng().random((2, *cut.feature_shape), dtype=np.float32)
    tensor = encode_array(rows)
    return dataset_pb2.RowChunk(
        space=space_to_proto(spec.space(cut)),
        row_ids=[hashlib.sha256(row.tobytes()).digest() for row in rows],
        rows=tensor,
        sha256=hashlib.sha256(tensor.data).digest(),
    )


def upload(channel, metadata, *chunks, end=True, seqs=None):
    requests = [
        dataset_pb2.UploadRowsRequest(seq=seq, chunk=one)
        for seq, one in zip(seqs or range(1, len(chunks) + 1), chunks, strict=True)
    ]
    if end:
        message = error_pb2.EndOfStream(num_messages=len(chunks))
        requests.append(dataset_pb2.UploadRowsRequest(seq=99, end=message))
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)
    return list(stub.UploadRows(iter(requests), metadata=metadata, timeout=30))


def changed(chunk, **fields):
    other = dataset_pb2.RowChunk()
    other.CopyFrom(chunk)
    for name, value in fields.items():
        if name == "data":
            other.rows.data = value
        elif name == "row_ids":
            other.row_ids[:] = value
        else:
            setattr(other, name, value)
    return other


def test_good_chunk(channel, metadata, chunk):
    replies = upload(channel, metadata, chunk)
    assert [one.WhichOneof("kind") for one in replies] == ["ack", "end"]
    assert replies[0].ack.num_new_rows == 2 and replies[0].seq == 1
    # Another chunk with one of the rows and a new one: what is there already does not count.
    other = changed(chunk, row_ids=[chunk.row_ids[1], np.random.default_rng().bytes(32)])
    data = chunk.rows.data[len(chunk.rows.data) // 2 :] + chunk.rows.data[: len(chunk.rows.data) // 2]
    other = changed(other, data=data, sha256=hashlib.sha256(data).digest())
    assert upload(channel, metadata, other)[0].ack.num_new_rows == 1


SPOIL = {
    "bit flip": (lambda c: changed(c, data=bytes([c.rows.data[0] ^ 1]) + c.rows.data[1:]), "CORRUPT_DATA"),
    "truncated": (lambda c: changed(c, data=c.rows.data[:-4]), "CORRUPT_DATA"),
    "truncated and hashed": (
        lambda c: changed(c, data=c.rows.data[:-4], sha256=hashlib.sha256(c.rows.data[:-4]).digest()),
        "SHAPE_MISMATCH",
    ),
    "one id": (lambda c: changed(c, row_ids=c.row_ids[:1]), "SHAPE_MISMATCH"),
}


@pytest.mark.parametrize(("spoil", "code"), SPOIL.values(), ids=SPOIL)
def test_bad_chunk_among_good_ones(channel, metadata, chunk, spoil, code):
    replies = {one.seq: one for one in upload(channel, metadata, spoil(chunk), chunk) if not one.HasField("end")}
    assert ErrorCode(replies[1].error.code).name == code
    assert replies[2].ack.num_new_rows == 2


@pytest.mark.parametrize(("end", "seqs"), [(False, None), (True, [2, 1]), (True, [1, 1])])
def test_stream_that_breaks_the_rules(channel, metadata, chunk, end, seqs):
    with pytest.raises(grpc.RpcError) as caught:
        upload(channel, metadata, *([chunk] if seqs is None else [chunk, chunk]), end=end, seqs=seqs)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert parse_details(caught.value.details()).code is ErrorCode.INVALID_ARGUMENT


def test_rows_that_are_not_there(channel, metadata):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)
    ids = [np.random.default_rng().bytes(32) for _ in range(3)]
    answer = stub.FindMissingRows(dataset_pb2.FindMissingRowsRequest(row_ids=ids), metadata=metadata)
    assert list(answer.missing) == [0, 1, 2]
    labels = dataset_pb2.ClassLabels(names=["a", "b"], indices=[0, 1, 0])
    request = dataset_pb2.CommitDatasetRequest(name="d", row_ids=ids, classes=labels, idempotency_key=ids[0].hex())
    request.space.cut = "input"
    with pytest.raises(grpc.RpcError) as caught:
        stub.CommitDataset(request, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_mutations_need_an_idempotency_key(channel, metadata):
    with pytest.raises(grpc.RpcError) as caught:
        training_pb2_grpc.TrainingServiceStub(channel).SubmitJob(training_pb2.SubmitJobRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_without_a_token(channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListBackbones(catalog_pb2.ListBackbonesRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("features", "code"),
    [
        (tensor_pb2.Tensor(data_type=1, codec=1, shape=[2, -1], data=b""), "SHAPE_MISMATCH"),
        (tensor_pb2.Tensor(data_type=1, codec=1, shape=[0, 3], data=b""), "EMPTY_BATCH"),
        (tensor_pb2.Tensor(data_type=77, codec=1, shape=[1, 1], data=b"1234"), "DTYPE_MISMATCH"),
        (tensor_pb2.Tensor(data_type=1, codec=1, shape=[2**40, 2**40], data=b"1234"), "PAYLOAD_TOO_LARGE"),
        (encode_array(np.full((1, 3), np.nan, np.float32)), "NOT_FINITE"),
    ],
)
def test_tensors_that_are_none(channel, metadata, client, server, features, code):
    spec = client.describe(server.backbone, input_size=server.input_size)
    request = inference_pb2.ExtractRequest(space=space_to_proto(spec.space(spec.cut(server.cut))), features=features)
    with pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceServiceStub(channel).Extract(request, metadata=metadata)
    assert parse_details(caught.value.details()).code is ErrorCode[code]
    assert parse_details(caught.value.details()).request_id


def test_deadline_that_was_past_when_it_was_sent(channel, metadata, client, server):
    spec = client.describe(server.backbone, input_size=server.input_size)
    cut = spec.cut("input")
    request = inference_pb2.ExtractRequest(
        space=space_to_proto(spec.space(cut)),
        features=encode_array(np.zeros((1, *cut.feature_shape), np.uint8)),
        timeout_s=-1.0,
    )
    with pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceServiceStub(channel).Extract(request, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
