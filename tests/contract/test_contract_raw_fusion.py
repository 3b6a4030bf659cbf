"""Inputs of a row that our own client never sends, sent by plain generated stubs."""

import hashlib

import grpc
import numpy as np
import pytest
import trunkline
from trunkline_wire.codecs import encode_array, encode_images
from trunkline_wire.errors import ErrorCode, parse_details
from trunkline_wire.messages import space_to_proto
from trunkline_wire.specs import local_space
from trunkline_wire.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    error_pb2,
    inference_pb2,
    inference_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

WIDTH = 3
NAME = "sensor"


def at_hand(rows, name=NAME):
    return trunkline.local_features(rows, name=name, version="1")


@pytest.fixture
def ask(server):
    """Make a call; returns the answer, or the code of the error."""
    stubs = {
        "Predict": inference_pb2_grpc.InferenceServiceStub,
        "CommitDataset": dataset_pb2_grpc.DatasetServiceStub,
        "SubmitJob": training_pb2_grpc.TrainingServiceStub,
    }
    metadata = (("authorization", f"Bearer {server.token}"),)

    with grpc.insecure_channel(server.address) as channel:

        def ask(method, request):
            try:
                return getattr(stubs[method](channel), method)(request, metadata=metadata, timeout=60)
            except grpc.RpcError as error:
                return parse_details(error.details()).code.name

        ask.channel, ask.metadata = channel, metadata
        yield ask


@pytest.fixture
def stem(client, server):
    return client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1, codec="float32")


@pytest.fixture
def fused(client, stem, pictures, unique):
    """Train a model of features beside local ones; returns it and a request that it answers."""
    images, labels = pictures(12)
    vectors = np.random.default_rng(0).random((12, WIDTH)).astype(np.float32)
    local = at_hand(vectors)
    data = client.upload(images, labels, name=unique("d"), stem=stem, local=local)
    model = client.train(data, name=unique("m"), embedding="pooled").result(120)
    return local, inference_pb2.PredictRequest(
        space=space_to_proto(stem.space),
        features=encode_array(stem(images)),
        model=model.reference,
        more_inputs=[inference_pb2.Input(space=space_to_proto(local.space), features=encode_array(vectors))],
    )


def changed(request, number=0, space=None, features=None):
    """Return a request whose input of that number is another."""
    other = type(request)()
    other.CopyFrom(request)
    if space is not None:
        other.more_inputs[number].space.CopyFrom(space_to_proto(space))
    if features is not None:
        other.more_inputs[number].features.CopyFrom(encode_array(features))
    return other


def test_good_request(ask, fused):
    answer = ask("Predict", fused[1])
    assert list(answer.outputs.shape) == [12, 3] and len(answer.labels) == 12 and not answer.row_errors


VECTORS = np.zeros((12, WIDTH), np.float32)
SPOILT = {
    "other width": ({"features": np.zeros((12, WIDTH + 1), np.float32)}, "SHAPE_MISMATCH"),
    "maps": ({"features": np.zeros((12, WIDTH, 1), np.float32)}, "SHAPE_MISMATCH"),
    "too few rows": ({"features": VECTORS[:11]}, "SHAPE_MISMATCH"),
    "whole numbers": ({"features": VECTORS.astype(np.uint8)}, "DTYPE_MISMATCH"),
    "nan": ({"features": np.where(np.arange(12)[:, None] == 3, np.nan, VECTORS)}, "NOT_FINITE"),
    "other codec": ({"features": VECTORS.astype(np.float16)}, "INCOMPATIBLE"),
    "other fingerprint": ({"space": local_space(NAME, "0" * 64)}, "INCOMPATIBLE"),
    "other name": ({"space": local_space("other", "0" * 64)}, "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize(("fields", "code"), SPOILT.values(), ids=SPOILT)
def test_local_features_that_are_refused(ask, fused, fields, code):
    assert ask("Predict", changed(fused[1], **fields)) == code


def test_inputs_that_are_missing_or_not_known(ask, fused):
    _, request = fused
    missing = changed(request)
    del missing.more_inputs[:]
    assert ask("Predict", missing) == "INVALID_ARGUMENT"
    twice = changed(request)
    twice.more_inputs.add().CopyFrom(request.more_inputs[0])
    assert ask("Predict", twice) == "INVALID_ARGUMENT"
    strange = changed(request)
    strange.more_inputs.add(
        space=space_to_proto(at_hand(VECTORS, name="other").space), features=request.more_inputs[0].features
    )
    assert ask("Predict", strange) == "INVALID_ARGUMENT"
    no_rows = changed(request)
    no_rows.more_inputs[0].ClearField("features")
    assert ask("Predict", no_rows) == "INVALID_ARGUMENT"
    images = changed(request)
    images.more_inputs[0].features.CopyFrom(encode_images([b"x"] * 12))
    assert ask("Predict", images) == "DTYPE_MISMATCH"


def test_a_bad_batch_does_not_end_a_stream(ask, fused):
    _, good = fused
    bad = changed(good, features=VECTORS[:11])
    requests = [inference_pb2.StreamPredictRequest(seq=seq, predict=one) for seq, one in enumerate((good, bad, good))]
    requests.append(inference_pb2.StreamPredictRequest(seq=9, end=error_pb2.EndOfStream(num_messages=3)))
    stub = inference_pb2_grpc.InferenceServiceStub(ask.channel)
    replies = {one.seq: one for one in stub.StreamPredict(iter(requests), metadata=ask.metadata, timeout=60)}
    assert [replies[seq].WhichOneof("kind") for seq in range(3)] == ["result", "error", "result"]
    assert ErrorCode(replies[1].error.code) is ErrorCode.SHAPE_MISMATCH


@pytest.fixture
def stored(client, pictures, unique):
    """Store rows of local features; returns a request that makes a dataset of them."""
    images, labels = pictures(4)
    local = at_hand(np.random.default_rng().random((4, WIDTH)))
    client.upload(images, labels, name=unique("d"), local=local, remote=False)
    row_ids = local.features.row_ids()
    return dataset_pb2.CommitDatasetRequest(
        name=unique("e"),
        space=space_to_proto(local.space),
        row_ids=row_ids,
        classes=dataset_pb2.ClassLabels(names=["a", "b"], indices=[0, 1, 0, 1]),
        idempotency_key=hashlib.sha256(b"".join(row_ids)).hexdigest(),
    )


def test_inputs_of_a_dataset(ask, stored):
    again = dataset_pb2.CommitDatasetRequest()
    again.CopyFrom(stored)
    again.more_inputs.add(space=stored.space, row_ids=stored.row_ids)
    assert ask("CommitDataset", again) == "INVALID_ARGUMENT"
    other = space_to_proto(local_space("other", "0" * 64))
    missing = dataset_pb2.CommitDatasetRequest()
    missing.CopyFrom(stored)
    missing.more_inputs.add(space=other, row_ids=[bytes([7]) * 32] * 4)
    assert ask("CommitDataset", missing) == "NOT_FOUND"
    fewer = dataset_pb2.CommitDatasetRequest()
    fewer.CopyFrom(stored)
    fewer.more_inputs.add(space=other, row_ids=stored.row_ids[:3])
    assert ask("CommitDataset", fewer) == "SHAPE_MISMATCH"
    assert ask("CommitDataset", stored).dataset.num_rows == 4


@pytest.mark.parametrize(
    "values",
    [np.zeros((4, 3), np.uint8), np.zeros((3, 2), np.uint8)],
    ids=["other number of classes", "other number of rows"],
)
def test_several_classes_that_do_not_fit(ask, stored, values):
    stored.multi_labels.names.extend(["a", "b"])
    stored.multi_labels.values.CopyFrom(encode_array(values))
    assert ask("CommitDataset", stored) == "BAD_LABELS"


def test_several_classes(ask, stored):
    stored.multi_labels.names.extend(["a", "b"])
    stored.multi_labels.values.CopyFrom(encode_array(np.array([[0, 0], [1, 1], [0, 1], [0, 0]], np.uint8)))
    dataset = ask("CommitDataset", stored).dataset
    assert list(dataset.class_names) == ["a", "b"] and dataset.num_targets == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "the server's"},
        {"input_size": 64},
        {"head": training_pb2.HeadConfig(kind=training_pb2.HEAD_KIND_CONV, channels=[8])},
    ],
    ids=str,
)
def test_jobs_that_local_features_alone_cannot_do(ask, server, stored, fields):
    dataset = ask("CommitDataset", stored).dataset
    fields = {name: server.backbone if name == "backbone" else value for name, value in fields.items()}
    spec = training_pb2.JobSpec(model="m", dataset=f"{dataset.name}@{dataset.version}", **fields)
    assert ask("SubmitJob", training_pb2.SubmitJobRequest(spec=spec, idempotency_key="k" * 32)) == "INVALID_ARGUMENT"
