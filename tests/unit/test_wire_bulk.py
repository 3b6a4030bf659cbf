"""Large tensors beside their messages: the bytes on the wire are what protobuf itself reads and writes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline_wire import bulk, codecs
from trunkline_wire.bulk import LEAST_BYTES, Apart
from trunkline_wire.v1 import error_pb2, tensor_pb2
from trunkline_wire.v1 import inference_pb2 as pb

ROWS = np.arange(32 * 64 * 32, dtype=np.uint8).reshape(32, 64, 32)


def request(rows: np.ndarray = ROWS, **fields: object) -> Apart[pb.PredictRequest]:
    tensor, data = codecs.encode_array_apart(rows)
    space = tensor_pb2.FeatureSpace(backbone="net", cut="input", input_size=32)
    return Apart(pb.PredictRequest(space=space, features=tensor, model="digits", timeout_s=2.5, **fields), data)


def whole(rows: np.ndarray = ROWS, **fields: object) -> pb.PredictRequest:
    message = pb.PredictRequest()
    message.CopyFrom(request(rows, **fields).message)
    message.features.CopyFrom(codecs.encode_array(rows))
    return message


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS.astype(np.float16), ROWS[:, ::2]], ids=str)
def test_what_is_written_apart_is_read_by_protobuf(rows: np.ndarray) -> None:
    assert pb.PredictRequest.FromString(bulk.writer(pb.PredictRequest)(request(rows))) == whole(rows)


def test_a_message_given_whole_is_written_whole() -> None:
    assert bulk.writer(pb.PredictRequest)(whole()) == whole().SerializeToString()
    assert bulk.writer(pb.PredictRequest)(Apart(whole())) == whole().SerializeToString()


@pytest.mark.parametrize("written", ["apart", "whole"])
def test_the_data_is_found_where_it_lies(written: str) -> None:
    sent = bulk.writer(pb.PredictRequest)(request()) if written == "apart" else whole().SerializeToString()
    got = bulk.reader(pb.PredictRequest)(sent)
    assert got.message == request().message
    assert got.data is not None and got.data.obj is sent
    rows = codecs.decode(got.message.features, got.data)
    np.testing.assert_array_equal(rows, ROWS)


def test_a_stream_message_keeps_its_number() -> None:
    apart = request()
    message = pb.StreamPredictRequest(seq=7, predict=apart.message)
    sent = bulk.writer(pb.StreamPredictRequest)(Apart(message, apart.data))
    assert pb.StreamPredictRequest.FromString(sent) == pb.StreamPredictRequest(seq=7, predict=whole())
    got = bulk.reader(pb.StreamPredictRequest)(sent)
    assert got.message == message and got.data is not None and bytes(got.data) == ROWS.tobytes()


def test_small_and_other_messages_are_left_whole() -> None:
    small = whole(ROWS[:1])
    assert len(small.SerializeToString()) < LEAST_BYTES
    assert bulk.reader(pb.PredictRequest)(small.SerializeToString()) == Apart(small)
    end = pb.StreamPredictRequest(seq=3, end=error_pb2.EndOfStream(num_messages=3))
    assert bulk.reader(pb.StreamPredictRequest)(end.SerializeToString()) == Apart(end)


def test_images_stay_in_their_message() -> None:
    message = pb.PredictRequest(features=codecs.encode_images([bytes(20_000), bytes(20_000)]))
    assert bulk.reader(pb.PredictRequest)(message.SerializeToString()) == Apart(message)


def test_the_last_data_wins_as_in_protobuf() -> None:
    sent = whole().SerializeToString() + pb.PredictRequest(features=tensor_pb2.Tensor(data=b"x")).SerializeToString()
    got = bulk.reader(pb.PredictRequest)(sent)
    assert got.data is None and got.message == pb.PredictRequest.FromString(sent)
    assert got.message.features.data == b"x"


def test_a_message_of_millions_of_fields_is_left_to_protobuf() -> None:
    many = b"\x20\x01" * 100_000  # `timeout_s`'s number with the wrong type: unknown fields
    got = bulk.reader(pb.PredictRequest)(many + whole().SerializeToString())
    assert got.data is None and got.message.features.data == ROWS.tobytes()


def test_damage_is_protobufs_to_tell() -> None:
    sent = whole().SerializeToString()
    for cut in (1, 100, len(sent) // 2):
        with pytest.raises(DecodeError):
            bulk.reader(pb.PredictRequest)(sent[:-cut])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_are_read_otherwise_than_by_protobuf(data: st.DataObject) -> None:
    pieces = {
        "field": st.binary(max_size=40),
        "other": st.sampled_from(
            [b"\x1a\x01m", b"\x0a\x02\x0a\x00", b"\x12\x00", b"\x12\x02\x2a\x00", b"\x09" + bytes(8)]
        ),
        "tensor": st.builds(
            lambda seed, more: pb.PredictRequest(
                features=tensor_pb2.Tensor(data=random.Random(seed).randbytes(LEAST_BYTES + more), shape=[1, 2])
            ).SerializeToString(),
            st.integers(0, 99),
            st.integers(0, 9),
        ),
    }
    kinds = data.draw(st.lists(st.sampled_from(sorted(pieces)), min_size=1, max_size=5))
    sent = b"".join(data.draw(pieces[kind]) for kind in kinds)
    try:
        expected = pb.PredictRequest.FromString(sent)
    except DecodeError:
        with pytest.raises(DecodeError):
            bulk.reader(pb.PredictRequest)(sent)
        return
    got = bulk.reader(pb.PredictRequest)(sent)
    merged = pb.PredictRequest()
    merged.CopyFrom(got.message)
    if got.data is not None:
        assert not got.message.features.data
        merged.features.data = bytes(got.data)
    assert merged == expected


def test_only_messages_with_a_large_tensor_have_a_way() -> None:
    with pytest.raises(ValueError, match="no large tensor"):
        bulk.writer(pb.PredictResponse)
    with pytest.raises(ValueError, match="no large tensor"):
        bulk.reader(pb.PredictResponse)
