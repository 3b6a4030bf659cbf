"""The inputs of a request behind its first: alone, and over a gateway whose engines compute on pixels."""

import asyncio
import dataclasses
import hashlib

import grpc
import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire import bottleneck_file, codecs, messages
from trunkline_wire.bottleneck import Bottleneck, ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError, parse_details
from trunkline_wire.quantise import pack
from trunkline_wire.specs import local_space
from trunkline_wire.v1 import error_pb2, inference_pb2, inference_pb2_grpc
from trunkline_worker.serving import replies
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.fusion import more_columns
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.bottlenecks import bottleneck_path
from trunkline_worker.store.records import JobSpec, ModelInput, ModelRecord

EDGE = local_space("edge", "ab" * 32)
SECOND = dataclasses.replace(fakes.images_space(), backbone="second")
THIRD = dataclasses.replace(SECOND, backbone="third")
MID = dataclasses.replace(fakes.images_space(cut="mid"), backbone="second")
USER = (("authorization", f"Bearer {fakes.TOKEN}"),)


def layer(num_out, num_in):
    return ChannelLinear(np.ones((num_out, num_in), np.float32), np.zeros(num_out, np.float32))


BOTTLENECK = Bottleneck(MID, (3, 2, 2), 0, layer(1, 3), layer(3, 1), "int8", 0.01)
BOTTLENECK_FILE = bottleneck_file.to_bytes(BOTTLENECK)
BOTTLENECK_SHA = hashlib.sha256(BOTTLENECK_FILE).hexdigest()
CODED = BOTTLENECK.code_space(BOTTLENECK_SHA)
CODES = np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2)
FEATURES = np.ones((3, 3, 2, 2), np.float16)

FILES = [fakes.unreadable("second"), b"two", b"three"]
OWN = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def backends(tmp_path):
    blobs = BlobStore(f"file://{tmp_path}/data")
    return Backends({name: fakes.FakeEngine(blobs, name) for name in ("fake", "second")}, metadata=None, blobs=blobs)


NEEDED = {
    "edge": ModelInput(EDGE, "", ("edge",), 4, "float32"),
    "second": ModelInput(SECOND, fakes.fake_spec().embedding_fingerprint, ("pooled",), 3, "images"),
    "third": ModelInput(THIRD, fakes.fake_spec().embedding_fingerprint, ("a",), 3, "images"),
    "coded": ModelInput(CODED, fakes.fake_spec().embedding_fingerprint, ("pooled",), 3, "int8", 0.01),
    "mid": ModelInput(MID, fakes.fake_spec().embedding_fingerprint, ("pooled",), 3, "float16", 0.0005),
}


def model(*inputs, **fields):
    """Return a model that reads images with the backbone `fake`, and others of ``NEEDED`` beside them."""
    fields = {
        "tenant": "default",
        "name": "m",
        "version": 1,
        "task": "classification",
        "class_names": ("a", "b"),
        "num_outputs": 2,
        "space": fakes.images_space(),
        "embedding_fingerprint": fakes.fake_spec().embedding_fingerprint,
        "slices": ("pooled",),
        "metrics": {},
        "dataset": "d@1",
        "dataset_digest": "",
        "head_sha256": "",
        "versions": {},
        "job_id": "j",
        "create_time": 0.0,
        "more_inputs": tuple(NEEDED[one] for one in inputs),
        **fields,
    }
    return ModelRecord(**fields)


def encoded(rows):
    return codecs.encode_images(rows) if isinstance(rows, list) else codecs.encode_rows(rows)


def sent(space, rows=None):
    return inference_pb2.Input(space=messages.space_to_proto(space), features=None if rows is None else encoded(rows))


def gather(backends, record, inputs, first=FILES):
    return asyncio.run(more_columns(record, first, inputs, backends, tenant="default", timeout_s=5.0))


def test_nothing_is_needed_and_nothing_sent(backends):
    assert gather(backends, model(), []).more_BE is None


def test_local_features_and_another_backbones_slices_stand_in_the_models_order(backends):
    both = gather(backends, model("second", "edge"), [sent(EDGE, OWN), sent(SECOND)])
    assert both.more_BE.shape == (3, 7)
    np.testing.assert_array_equal(both.more_BE[1:, :3], [[3, 3, 3], [5, 5, 5]])
    np.testing.assert_array_equal(both.more_BE[1:, 3:], OWN[1:])
    # What failed in one of them fails, and holds nothing that could spoil a batch.
    assert set(both.row_errors) == {0}
    assert np.isfinite(both.more_BE).all()
    assert backends.engines["second"].last_rows == FILES


def test_packed_local_features_are_unpacked(backends):
    record = model("edge")
    (needed,) = record.more_inputs
    record = dataclasses.replace(record, more_inputs=(dataclasses.replace(needed, codec="int8"),))
    got = gather(backends, record, [sent(EDGE, pack(OWN, "int8", 0))]).more_BE
    np.testing.assert_allclose(got, OWN, atol=0.02)


@pytest.mark.parametrize(
    ("needs", "inputs", "code", "message"),
    [
        (("edge",), [], ErrorCode.INVALID_ARGUMENT, "edge is missing"),
        ((), [sent(EDGE, OWN)], ErrorCode.INVALID_ARGUMENT, "nothing; 'edge' was sent"),
        (("edge",), [sent(local_space("other", "ab" * 32), OWN)], ErrorCode.INVALID_ARGUMENT, "'other' was sent"),
        (("edge",), [sent(EDGE, OWN)] * 2, ErrorCode.INVALID_ARGUMENT, "twice"),
        (("edge",), [sent(EDGE, OWN[:2])], ErrorCode.SHAPE_MISMATCH, "the first has 3, 'edge' 2"),
        (("edge",), [sent(EDGE, OWN[:, :3])], ErrorCode.SHAPE_MISMATCH, r"\(rows, 4\); got \(3, 3\)"),
        (("edge",), [sent(local_space("edge", "cd" * 32), OWN)], ErrorCode.INCOMPATIBLE, "abab.*cdcd"),
        (("edge",), [sent(EDGE, OWN.astype(np.float16))], ErrorCode.INCOMPATIBLE, "'float16'"),
        (("edge",), [sent(EDGE, OWN.astype(np.uint8))], ErrorCode.DTYPE_MISMATCH, "float32.* got uint8"),
        (("edge",), [sent(EDGE)], ErrorCode.INVALID_ARGUMENT, "without rows"),
        (
            ("second",),
            [sent(dataclasses.replace(SECOND, input_size=16))],
            ErrorCode.INCOMPATIBLE,
            "was trained on embeddings",
        ),
        (("second",), [sent(MID, FEATURES[:2])], ErrorCode.SHAPE_MISMATCH, "the first has 3, 'second' 2"),
        (("second",), [sent(CODED, CODES)], ErrorCode.INCOMPATIBLE, "of bottleneck"),
        (("coded",), [sent(CODED, CODES)], ErrorCode.INCOMPATIBLE, "'int8'; these are 'float32'"),
        (("coded",), [sent(MID, FEATURES)], ErrorCode.INCOMPATIBLE, "trained on features of second at cut 'mid' of b"),
        (("mid",), [sent(MID)], ErrorCode.INVALID_ARGUMENT, "without rows"),
        (("mid",), [sent(MID, pack(FEATURES, "int4", 0))], ErrorCode.INCOMPATIBLE, "these are 'int4'"),
    ],
)
def test_what_does_not_fit_is_refused(backends, needs, inputs, code, message):
    with pytest.raises(WireError, match=message) as caught:
        gather(backends, model(*needs), inputs)
    assert caught.value.code is code


def test_another_backbone_cannot_read_pixels_that_were_made_for_the_first(backends):
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(WireError, match="only encoded images") as caught:
        gather(backends, model("second"), [sent(SECOND)], first=pixels)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_what_needs_no_backbone_is_refused_before_one_is_asked(backends):
    with pytest.raises(WireError, match="abab"):
        gather(backends, model("second", "edge"), [sent(SECOND), sent(local_space("edge", "cd" * 32), OWN)])
    assert backends.engines["second"].calls == 0


class Running:
    """A gateway with three backbones, to which models can be published and requests sent."""

    def __init__(self, folder):
        self.gateway = fakes.GatewayThread(folder, ("fake", "second", "third"))
        self.engines, self.store = self.gateway.engines, self.gateway.store
        options = [("grpc.enable_http_proxy", 0)]
        self.channel = grpc.insecure_channel(self.gateway.address, options=options)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        ids = [bytes([number]) * 32 for number in range(3)]
        self.store.rows.add_chunk("default", chunks.write_chunk(self.gateway.blobs, OWN), EDGE, "float32", ids)
        self.store.datasets.commit("default", "d", EDGE, ids, ("a", "b"), [0, 1, 1], None, "d")

    def publish(self, record):
        """Publish a model through a job, as a lane does."""
        job = self.store.jobs.submit("default", JobSpec("m", "d", "", 0), "job")
        self.store.jobs.succeed(job.id, self.store.jobs.lease("lane", 60.0).fence, record)

    def put_bottleneck(self, tenant):
        self.gateway.blobs.put(bottleneck_path(BOTTLENECK_SHA), BOTTLENECK_FILE)
        self.store.bottlenecks.add(tenant, BOTTLENECK_SHA)

    def predict(self, request):
        return self.stub.Predict(request, metadata=USER, timeout=20)

    def refused(self, call):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        return parse_details(caught.value.details())

    def close(self):
        self.channel.close()
        self.gateway.close()


@pytest.fixture
def running(tmp_path):
    running = Running(tmp_path)
    yield running
    running.close()


def request(*inputs, space=None, rows=FILES):
    space = fakes.images_space() if space is None else space
    return inference_pb2.PredictRequest(
        space=messages.space_to_proto(space), features=encoded(rows), model="m", more_inputs=inputs
    )


def test_a_row_that_one_backbone_cannot_read_fails_and_the_others_go_on(running):
    running.publish(model("edge", "second", "third"))
    files = [FILES[0], b"seven..", fakes.unreadable("fake")]
    answer = running.predict(request(sent(THIRD), sent(EDGE, OWN), sent(SECOND), rows=files))
    outputs = np.frombuffer(answer.outputs.data, np.float32).reshape(3, 2)  # decoding refuses NaN
    assert np.isnan(outputs).all(axis=1).tolist() == [True, False, True]
    assert list(answer.labels) == ["", "b", ""]
    assert [(one.row, parse_details(one.error.message).message) for one in answer.row_errors] == [
        (0, "second cannot read it"),
        (2, "fake cannot read it"),
    ]
    more = running.engines["fake"].last_more
    assert (more.dtype, more.shape) == (np.float32, (3, 10))
    assert not more[0].any(), "a row that failed already holds nothing that could spoil the batch"
    assert more[1].tolist() == [*OWN[1], *[7.0] * 6]


def test_outlier_scores_of_rows_that_failed_in_any_backbone_are_none(running):
    running.publish(model("second", outliers_sha256="5" * 64))
    asked = request(sent(SECOND), rows=[FILES[0], b"seven..", fakes.unreadable("fake")])
    assert not running.predict(asked).outlier_scores
    asked.outlier_scores = True
    answer = running.predict(asked)
    assert (
        np.isnan(answer.outlier_distances).tolist() == np.isnan(answer.outlier_scores).tolist() == [True, False, True]
    )
    assert (answer.outlier_distances[1], answer.outlier_scores[1]) == (1.0, 0.5)


def test_a_model_without_outlier_scores_is_refused_before_any_backbone_is_asked(running):
    running.publish(model("edge", "second"))
    asked = request(sent(EDGE, OWN), sent(SECOND))
    asked.outlier_scores = True
    error = running.refused(lambda: running.predict(asked))
    assert error.code is ErrorCode.UNSUPPORTED and "Train it again" in error.message
    assert [one.calls for one in running.engines.values()] == [0, 0, 0]


def test_other_backbones_work_at_the_same_time(running):
    running.publish(model("second", "third"))
    # Each waits until the other has begun.
    running.engines["second"].gate = running.engines["third"].gate = asyncio.Barrier(2)
    answer = running.predict(request(sent(SECOND), sent(THIRD)))
    assert len(answer.labels) == 3


def test_local_features_alone_go_to_the_default_backbone(running):
    running.publish(model(space=EDGE, embedding_fingerprint="", slices=("edge",), codec="float32"))
    assert list(running.predict(request(space=EDGE, rows=OWN)).labels) == ["b"] * 3
    assert [one.calls for one in running.engines.values()] == [1, 0, 0]


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_only_classifiers_answer_with_labels(running, task):
    names = ("a", "b") if task == "multi_label" else ()
    running.publish(model("edge", task=task, class_names=names))
    answer = running.predict(request(sent(EDGE, OWN)))
    assert list(answer.labels) == []
    assert tuple(answer.outputs.shape) == (3, 2)


@pytest.mark.parametrize(
    ("inputs", "code", "what"),
    [
        ([], ErrorCode.INVALID_ARGUMENT, "needs, beside its first input, edge, second; edge, second is missing"),
        ([sent(SECOND)], ErrorCode.INVALID_ARGUMENT, "edge is missing"),
        ([sent(EDGE, OWN), sent(SECOND), sent(THIRD)], ErrorCode.INVALID_ARGUMENT, "'third' was sent"),
        ([sent(EDGE, OWN), sent(SECOND), sent(SECOND)], ErrorCode.INVALID_ARGUMENT, "'second' was sent twice"),
        ([sent(EDGE, OWN[:2]), sent(SECOND)], ErrorCode.SHAPE_MISMATCH, "the first has 3, 'edge' 2"),
        ([sent(EDGE, OWN.astype(np.float16)), sent(SECOND)], ErrorCode.INCOMPATIBLE, "Send them as 'float32'"),
        ([sent(EDGE, np.full_like(OWN, np.nan)), sent(SECOND)], ErrorCode.NOT_FINITE, ""),
    ],
)
def test_requests_that_do_not_fit_are_refused_and_cost_nothing(running, inputs, code, what):
    running.publish(model("edge", "second"))
    error = running.refused(lambda: running.predict(request(*inputs)))
    assert error.code is code
    assert what in error.message
    assert [one.calls for one in running.engines.values()] == [0, 0, 0]


def test_one_bad_batch_does_not_end_a_stream(running):
    running.publish(model("edge"))
    good, bad = request(sent(EDGE, OWN)), request()
    batches = [inference_pb2.StreamPredictRequest(seq=seq, predict=one) for seq, one in enumerate((bad, good))]
    batches.append(inference_pb2.StreamPredictRequest(seq=2, end=error_pb2.EndOfStream(num_messages=2)))
    *replies, last = running.stub.StreamPredict(iter(batches), metadata=USER, timeout=20)
    assert {one.seq: one.WhichOneof("kind") for one in replies} == {0: "error", 1: "result"}
    assert last.end.num_messages == 2


def coded_calls(running):
    """Return a call with codes of the bottleneck for each way in which they come."""
    codes = pack(CODES, "int8", 0)
    extract = inference_pb2.ExtractRequest(
        space=messages.space_to_proto(CODED), features=encoded(codes), slices=["pooled"]
    )
    return {
        "first": lambda: running.predict(request(space=CODED, rows=codes)),
        "behind": lambda: running.predict(request(sent(CODED, codes))),
        "extract": lambda: running.stub.Extract(extract, metadata=USER, timeout=20),
    }


@pytest.mark.parametrize("way", ["first", "behind", "extract"])
def test_a_bottleneck_is_found_for_its_tenant_alone(running, way):
    if way == "first":
        needed = NEEDED["coded"]
        running.publish(model(space=CODED, codec=needed.codec, codec_error=needed.codec_error))
    else:
        running.publish(model("coded"))
    call = coded_calls(running)[way]
    running.put_bottleneck("other")
    error = running.refused(call)
    assert error.code is ErrorCode.NOT_FOUND
    assert BOTTLENECK_SHA[:12] in error.message
    assert running.engines["second"].calls == 0
    running.put_bottleneck("default")
    call()
    assert running.engines["second"].calls == 1


def test_a_map_that_would_not_fit_a_message_is_refused_before_it_is_computed(running, monkeypatch):
    spec = fakes.fake_spec()
    mid = dataclasses.replace(spec.cut("mid"), map_shape=(3, 2, 2))
    monkeypatch.setattr(fakes, "fake_spec", lambda size=8: dataclasses.replace(spec, cuts=(spec.cuts[0], mid)))
    monkeypatch.setattr(replies, "MAX_PAYLOAD_BYTES", 2 * 4 * 12)  # two maps of 12 numbers
    ask = inference_pb2.ExtractRequest(
        space=messages.space_to_proto(MID), features=encoded(FEATURES), slices=["mid.map"]
    )
    error = running.refused(lambda: running.stub.Extract(ask, metadata=USER, timeout=20))
    assert error.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert "at most 2 rows" in error.message
    assert running.engines["second"].calls == 0
    ask.features.CopyFrom(codecs.encode_rows(FEATURES[:2]))
    running.stub.Extract(ask, metadata=USER, timeout=20)
