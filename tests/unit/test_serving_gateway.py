"""The real server over loopback, with nothing but generated stubs on the other side."""

import hashlib
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import grpc
import numpy as np
import pytest
import serving_fakes as fakes
from certificates import certificate
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from trunkline_wire import codecs, messages
from trunkline_wire.limits import MAX_CONCURRENT_STREAMS, MAX_MESSAGE_BYTES
from trunkline_wire.rows import row_id
from trunkline_wire.specs import IMAGES, FeatureSpace, local_space
from trunkline_wire.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    error_pb2,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    trunk_pb2,
    trunk_pb2_grpc,
)

USER = (("authorization", f"Bearer {fakes.TOKEN}"),)
OTHER = (("authorization", f"Bearer {fakes.OTHER_TOKEN}"),)


@pytest.fixture
def gateway(tmp_path):
    running = fakes.GatewayThread(tmp_path)
    yield running
    running.close()


@pytest.fixture
def channel(gateway):
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(gateway.address, options=options) as opened:
        yield opened


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)
    return caught.value


def extract(rows, space=None, **fields):
    space = messages.space_to_proto(space or fakes.images_space())
    return inference_pb2.ExtractRequest(space=space, features=codecs.encode_rows(rows), **fields)


def images(count=2, value=0):
    return np.full((count, 8, 8, 3), value, np.uint8)


def test_errors_carry_a_code_a_message_and_the_callers_request_id_and_nothing_else(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    metadata = (*USER, ("trunkline-request-id", "my-request-1"))
    error = refused(lambda: stub.Extract(extract(images(value=254)), metadata=metadata))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == (
        "[INTERNAL] something went wrong in the cluster; its log names this request (request my-request-1)"
    )
    assert "secret" not in str(error.trailing_metadata()) + error.details()


def test_a_request_id_that_is_not_harmless_is_replaced(channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    metadata = (("trunkline-request-id", "evil\tid" + "x" * 200),)
    error = refused(lambda: stub.GetServerInfo(catalog_pb2.GetServerInfoRequest(), metadata=metadata))
    assert "evil" not in error.details()


def test_every_rpc_of_the_wire_refuses_a_caller_without_a_token(channel):
    stubs = {
        "CatalogService": (catalog_pb2_grpc.CatalogServiceStub, catalog_pb2),
        "InferenceService": (inference_pb2_grpc.InferenceServiceStub, inference_pb2),
        "DatasetService": (dataset_pb2_grpc.DatasetServiceStub, dataset_pb2),
        "TrainingService": (training_pb2_grpc.TrainingServiceStub, training_pb2),
        "RegistryService": (registry_pb2_grpc.RegistryServiceStub, registry_pb2),
        "TrunkService": (trunk_pb2_grpc.TrunkServiceStub, trunk_pb2),
    }
    called = 0
    for name, (make, module) in stubs.items():
        stub = make(channel)
        for method in module.DESCRIPTOR.services_by_name[name].methods:
            request = getattr(module, method.input_type.name)()
            argument = iter([request]) if method.client_streaming else request
            error = refused(lambda stub=stub, method=method, argument=argument: getattr(stub, method.name)(argument))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method.name
            called += 1
    assert called == 29


def test_reflection_needs_a_token_and_then_lists_everything(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    assert refused(lambda: stub.ServerReflectionInfo(iter([question]))).code() is grpc.StatusCode.UNAUTHENTICATED
    [answer] = stub.ServerReflectionInfo(iter([question]), metadata=USER)
    names = {service.name for service in answer.list_services_response.service}
    assert {"trunkline_wire.v1.InferenceService", "grpc.health.v1.Health"} <= names


def test_health_is_open_to_everyone_and_says_so_when_draining(gateway, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="trunkline_wire.v1.InferenceService")
    assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(request)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    gateway.run(gateway.server.set_serving(False))
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


def test_a_stem_comes_in_pieces_with_its_checksum_and_an_end(channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    replies = list(stub.FetchStem(catalog_pb2.FetchStemRequest(backbone="fake", cut="mid"), metadata=USER))
    header = replies[0].header
    data = b"".join(reply.chunk for reply in replies[1:-1])
    assert [reply.seq for reply in replies] == list(range(len(replies)))
    assert len(replies) == 5
    assert header.size_bytes == len(data)
    assert header.sha256 == hashlib.sha256(data).hexdigest()
    assert replies[-1].end.num_messages == len(replies) - 1


def test_a_damaged_stem_is_not_sent(gateway, channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    put = gateway.blobs.put
    gateway.engine.blobs = type("Damaged", (), {"put": lambda self, path, data: put(path, data[:-1] + b"?")})()
    error = refused(lambda: stub.FetchStem(catalog_pb2.FetchStemRequest(backbone="fake", cut="mid"), metadata=USER))
    assert error.code() is grpc.StatusCode.DATA_LOSS


def test_one_bad_batch_does_not_end_a_stream(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    bad = inference_pb2.ExtractRequest(space=messages.space_to_proto(fakes.images_space()))
    batches = [extract(images()), bad, extract(images(value=254)), extract(images(value=255)), extract(images())]

    def requests():
        for seq, batch in enumerate(batches):
            yield inference_pb2.StreamExtractRequest(seq=seq, extract=batch)
        yield inference_pb2.StreamExtractRequest(seq=9, end=error_pb2.EndOfStream(num_messages=len(batches)))

    *replies, last = stub.StreamExtract(requests(), metadata=USER)
    by_seq = {reply.seq: reply for reply in replies}
    assert [by_seq[seq].WhichOneof("kind") for seq in range(5)] == ["result", "error", "error", "result", "result"]
    assert by_seq[1].error.code == error_pb2.ERROR_CODE_SHAPE_MISMATCH
    assert by_seq[2].error.code == error_pb2.ERROR_CODE_INTERNAL
    assert "secret" not in by_seq[2].error.message
    assert [one.row for one in by_seq[3].result.row_errors] == [0, 1]
    assert last.end.num_messages == 5


def test_a_stream_without_its_end_is_an_error(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.StreamExtractRequest(seq=0, extract=extract(images()))
    error = refused(lambda: stub.StreamExtract(iter([request]), metadata=USER))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "end message" in error.details()


def test_a_full_backbone_says_when_to_come_back(gateway, channel):
    gateway.engine.overloaded = True
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    error = refused(lambda: stub.Extract(extract(images()), metadata=USER))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "250") in [tuple(one) for one in error.trailing_metadata()]


@pytest.mark.parametrize("stated", [-1.0, 1e-9])
def test_a_deadline_in_the_message_that_has_passed_costs_no_compute(gateway, channel, stated):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    if stated > 0:
        stated = -stated
    error = refused(lambda: stub.Extract(extract(images(), timeout_s=stated), metadata=USER))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert gateway.engine.calls == 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (extract(images(), fakes.UNKNOWN_SPACE), grpc.StatusCode.NOT_FOUND),
        (
            inference_pb2.ExtractRequest(
                space=messages.space_to_proto(fakes.images_space()),
                features=codecs.encode_array(np.full((1, 4), np.nan, np.float32)),
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
    ids=["unknown backbone", "not finite"],
)
def test_bad_requests_are_told_apart(channel, request_, code):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    assert refused(lambda: stub.Extract(request_, metadata=USER)).code() is code


def test_an_unknown_model_and_a_bad_name_are_told_apart(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    space = messages.space_to_proto(fakes.images_space())
    for model, code in [("nothing", "NOT_FOUND"), ("no@0", "INVALID_ARGUMENT"), ("../x", "INVALID_ARGUMENT")]:
        request = inference_pb2.PredictRequest(space=space, features=codecs.encode_array(images()), model=model)
        error = refused(lambda request=request: stub.Predict(request, metadata=USER))
        assert error.code() is grpc.StatusCode[code]


def chunk(ids, rows, space, sha256=None):
    tensor = codecs.encode_images(rows) if isinstance(rows, list) else codecs.encode_rows(rows)
    content = b"".join([tensor.data, tensor.affine.scale, tensor.affine.offset, *tensor.encoded])
    return dataset_pb2.RowChunk(
        space=messages.space_to_proto(space),
        row_ids=ids,
        rows=tensor,
        sha256=hashlib.sha256(content).digest() if sha256 is None else sha256,
    )


def upload(channel, *chunks, metadata=USER):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)

    def requests():
        for seq, one in enumerate(chunks):
            yield dataset_pb2.UploadRowsRequest(seq=seq, chunk=one)
        yield dataset_pb2.UploadRowsRequest(seq=len(chunks), end=error_pb2.EndOfStream(num_messages=len(chunks)))

    *replies, last = stub.UploadRows(requests(), metadata=metadata)
    assert last.WhichOneof("kind") == "end"
    return {reply.seq: reply for reply in replies}


def ids_of(count, space=IMAGES):
    return [row_id(space, "float16", bytes([index]) * 32) for index in range(count)]


def test_upload_commit_and_submit_with_generated_stubs_alone(gateway, channel):
    spec = fakes.fake_spec()
    space = spec.space(spec.cut("mid"))
    ids = ids_of(4, space)
    features = np.arange(48, dtype=np.float16).reshape(4, 3, 2, 2)
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)
    missing = stub.FindMissingRows(dataset_pb2.FindMissingRowsRequest(row_ids=ids), metadata=USER).missing
    assert list(missing) == [0, 1, 2, 3]

    replies = upload(channel, chunk(ids[:2], features[:2], space), chunk(ids[2:], features[2:], space))
    assert [replies[seq].ack.num_new_rows for seq in (0, 1)] == [2, 2]
    assert not stub.FindMissingRows(dataset_pb2.FindMissingRowsRequest(row_ids=ids), metadata=USER).missing
    # Another tenant sees nothing of it.
    other = stub.FindMissingRows(dataset_pb2.FindMissingRowsRequest(row_ids=ids), metadata=OTHER).missing
    assert list(other) == [0, 1, 2, 3]

    commit = dataset_pb2.CommitDatasetRequest(
        name="digits",
        space=messages.space_to_proto(space),
        row_ids=ids,
        classes=dataset_pb2.ClassLabels(names=["a", "b"], indices=[0, 0, 1, 1]),
        idempotency_key="once",
    )
    dataset = stub.CommitDataset(commit, metadata=USER).dataset
    assert (dataset.name, dataset.version, dataset.num_rows) == ("digits", 1, 4)
    assert stub.CommitDataset(commit, metadata=USER).dataset == dataset
    unknown = refused(lambda: stub.GetDataset(dataset_pb2.GetDatasetRequest(dataset="digits"), metadata=OTHER))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
    refused_commit = refused(lambda: stub.CommitDataset(commit, metadata=OTHER))
    assert refused_commit.code() is grpc.StatusCode.NOT_FOUND

    jobs = training_pb2_grpc.TrainingServiceStub(channel)
    submit = training_pb2.SubmitJobRequest(
        spec=training_pb2.JobSpec(model="head", dataset="digits"), idempotency_key="one job"
    )
    job = jobs.SubmitJob(submit, metadata=USER).job
    assert jobs.SubmitJob(submit, metadata=USER).job.id == job.id
    assert job.state == training_pb2.JOB_STATE_QUEUED
    assert (job.spec.backbone, job.spec.input_size, job.spec.dataset) == ("fake", 8, "digits@1")
    cancelled = jobs.CancelJob(training_pb2.CancelJobRequest(id=job.id), metadata=USER).job
    assert cancelled.state == training_pb2.JOB_STATE_CANCELLED
    *events, ended, last = jobs.WatchJob(training_pb2.WatchJobRequest(id=job.id), metadata=USER)
    assert [one.event.phase for one in events] == ["queued", "end"]
    assert ended.job.state == training_pb2.JOB_STATE_CANCELLED
    assert last.end.num_messages == len(events) + 1
    again = refused(lambda: jobs.CancelJob(training_pb2.CancelJobRequest(id=job.id), metadata=USER))
    assert again.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_bad_chunks_are_answered_one_by_one_and_nothing_of_them_is_kept(gateway, channel):
    spec = fakes.fake_spec()
    space = spec.space(spec.cut("mid"))
    good = np.zeros((1, 3, 2, 2), np.float16)
    ids = ids_of(8, space)
    stale = FeatureSpace("fake", "mid", 8, "f" * 64)
    no_cut = FeatureSpace("fake", "nowhere", 8, "f" * 64)
    nan = np.full((1, 3, 2, 2), np.nan, np.float16)
    replies = upload(
        channel,
        chunk(ids[:1], good, space, sha256=b"\0" * 32),
        chunk(ids[:1], np.zeros((1, 3, 2, 3), np.float16), space),
        chunk(ids[:1], np.zeros((1, 3, 2, 2), np.uint8), space),
        chunk(ids[:1], good, stale),
        chunk(ids[:1], good, no_cut),
        chunk(ids[:2], good, space),
        chunk([b"short"], good, space),
        chunk(ids[:1], nan, space),
        chunk(ids[:1], good, IMAGES),
        chunk(ids[7:], good, space),
    )
    expected = [
        "CORRUPT_DATA",
        "SHAPE_MISMATCH",
        "DTYPE_MISMATCH",
        "INCOMPATIBLE",
        "NOT_FOUND",
        "SHAPE_MISMATCH",
        "INVALID_ARGUMENT",
        "NOT_FINITE",
        "INVALID_ARGUMENT",
    ]
    assert [error_pb2.ErrorCode.Name(replies[seq].error.code) for seq in range(9)] == [
        f"ERROR_CODE_{name}" for name in expected
    ]
    assert replies[9].ack.num_new_rows == 1
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)
    missing = stub.FindMissingRows(dataset_pb2.FindMissingRowsRequest(row_ids=ids), metadata=USER).missing
    assert list(missing) == list(range(7))


LOCAL = local_space("sensor", "5" * 64)


def multi_labels(values, names=("a", "b"), dtype=np.uint8):
    tensor = codecs.encode_array(np.array(values, dtype))
    return {"multi_labels": dataset_pb2.MultiLabels(names=names, values=tensor)}


def upload_local(channel, count=4, space=LOCAL):
    ids = ids_of(count, space)
    replies = upload(channel, chunk(ids, np.arange(3.0 * count, dtype=np.float32).reshape(count, 3), space))
    assert replies[0].ack.num_new_rows == count
    return ids


def commit_dataset(channel, space, ids, more=(), **labels):
    request = dataset_pb2.CommitDatasetRequest(
        name="d",
        space=messages.space_to_proto(space),
        row_ids=ids,
        idempotency_key=uuid.uuid4().hex,
        more_inputs=[dataset_pb2.DatasetInput(space=messages.space_to_proto(one), row_ids=rows) for one, rows in more],
        **(labels or {"classes": dataset_pb2.ClassLabels(names=["a", "b"], indices=[0, 1] * (len(ids) // 2))}),
    )
    return dataset_pb2_grpc.DatasetServiceStub(channel).CommitDataset(request, metadata=USER).dataset


def submit_job(channel, **spec):
    request = training_pb2.SubmitJobRequest(
        spec=training_pb2.JobSpec(**{"model": "m", "dataset": "d", **spec}), idempotency_key=uuid.uuid4().hex
    )
    return training_pb2_grpc.TrainingServiceStub(channel).SubmitJob(request, metadata=USER).job


def test_local_features_beside_images_and_features(gateway, channel):
    local_ids = upload_local(channel)
    pictures = ids_of(4)
    upload(channel, chunk(pictures, [b"one", b"two", b"three", b"four"], IMAGES))
    beside = commit_dataset(channel, IMAGES, pictures, [(LOCAL, local_ids)])
    assert [messages.space_from_proto(one.space) for one in beside.more_inputs] == [LOCAL]
    assert [one.codec for one in beside.more_inputs] == ["float32"]
    content = gateway.store.datasets.rows("default", "d@1")
    assert content.more_row_ids == (local_ids,)
    features = fakes.images_space(cut="mid")
    feature_ids = ids_of(4, features)
    upload(channel, chunk(feature_ids, np.zeros((4, 3, 2, 2), np.float16), features))
    both = commit_dataset(
        channel, IMAGES, pictures, [(features, feature_ids), (LOCAL, local_ids)], **multi_labels([[1, 0]] * 4)
    )
    assert both.version == 2
    assert [one.codec for one in both.more_inputs] == ["float16", "float32"]
    assert (list(both.class_names), both.num_targets) == (["a", "b"], 2)
    kept = gateway.store.datasets.rows("default", "d@2")
    assert kept.targets.tolist() == [[1.0, 0.0]] * 4
    error = refused(lambda: submit_job(channel))
    assert "'fake' is named twice" in error.details(), "the features' backbone is the one that would read the images"
    job = submit_job(channel, dataset="d@1", head=training_pb2.HeadConfig(fuse=training_pb2.FUSION_GATE))
    assert (job.spec.backbone, job.spec.fit.solver) == ("fake", training_pb2.SOLVER_ADAM)


def test_local_features_alone_are_trained_on_without_a_backbone(channel):
    dataset = commit_dataset(channel, LOCAL, upload_local(channel), **multi_labels([[1, 0], [0, 0], [1, 1], [0, 1]]))
    assert messages.space_from_proto(dataset.space) == LOCAL
    assert "no backbone can read them" in refused(lambda: submit_job(channel, backbone="fake")).details()
    job = submit_job(channel, fit=training_pb2.FitConfig(validation_fraction=0.25))
    assert (job.spec.backbone, job.spec.input_size) == ("", 0)


def test_a_dataset_whose_rows_are_of_no_class_is_not_trained_on(channel):
    commit_dataset(channel, LOCAL, upload_local(channel), **multi_labels([[0, 0]] * 4))
    error = refused(lambda: submit_job(channel))
    assert "no row of d@1 is of any class" in error.details()


@pytest.mark.parametrize(
    ("more", "code", "what"),
    [
        (lambda ids: [(LOCAL, ids[:3])], "INVALID_ARGUMENT", "3 rows of 'sensor' beside 4"),
        (lambda ids: [(LOCAL, [])], "INVALID_ARGUMENT", "no row is named"),
        (lambda ids: [(LOCAL, [*ids[:3], b"x"])], "INVALID_ARGUMENT", "a row id has 32 bytes"),
        (lambda ids: [(LOCAL, [*ids[:3], bytes(32)])], "NOT_FOUND", "1 of 4 rows are not stored (sensor)"),
        (lambda ids: [(LOCAL, ids), (LOCAL, ids)], "INVALID_ARGUMENT", "two inputs of 'sensor'"),
        (lambda ids: [(local_space("sensor", "6" * 64), ids)], "FAILED_PRECONDITION", "another feature space"),
        (lambda ids: [(IMAGES, ids)], "INVALID_ARGUMENT", "can be images"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(channel, more, code, what):
    local_ids = upload_local(channel)
    pictures = ids_of(4)
    upload(channel, chunk(pictures, [b"one", b"two", b"three", b"four"], IMAGES))
    error = refused(lambda: commit_dataset(channel, IMAGES, pictures, more(local_ids)))
    assert error.code() is grpc.StatusCode[code]
    assert what in error.details()
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)
    assert not stub.ListDatasets(dataset_pb2.ListDatasetsRequest(), metadata=USER).datasets


def test_bad_local_features_are_answered_one_by_one(channel):
    ids = ids_of(2, LOCAL)
    rows = np.zeros((2, 3), np.float32)
    replies = upload(
        channel,
        chunk(ids, rows.astype(np.uint8), LOCAL),
        chunk(ids, [b"one", b"two"], LOCAL),
        chunk(ids, rows.reshape(2, 3, 1), LOCAL),
        chunk(ids, np.full((2, 3), np.nan, np.float32), LOCAL),
        chunk(ids, rows, local_space("a b", "5" * 64)),
        chunk(ids, rows, local_space("sensor", "xyz")),
        chunk(ids, rows, FeatureSpace("", "mid", 8, "5" * 64, local_model="sensor")),
        chunk(ids, [b"one", b"two"], FeatureSpace("", "input", 0, "5" * 64)),
        chunk(ids, rows, LOCAL),
    )
    expected = ["DTYPE_MISMATCH", "DTYPE_MISMATCH", "SHAPE_MISMATCH", "NOT_FINITE", *["INVALID_ARGUMENT"] * 4]
    assert [error_pb2.ErrorCode.Name(replies[seq].error.code) for seq in range(8)] == [
        f"ERROR_CODE_{name}" for name in expected
    ]
    assert replies[8].ack.num_new_rows == 2


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ({"classes": dataset_pb2.ClassLabels(names=["a", "b"], indices=[0])}, "1 labels for 2 rows"),
        ({"classes": dataset_pb2.ClassLabels(names=["a", "b"], indices=[1, 1])}, "one class only"),
        ({"classes": dataset_pb2.ClassLabels(names=["a", "a"], indices=[0, 1])}, "distinct"),
        ({"classes": dataset_pb2.ClassLabels(names=["a", "b"], indices=[0, 2])}, "does not exist"),
        (
            {"targets": dataset_pb2.RegressionTargets(values=codecs.encode_array(np.zeros((3, 1), np.float32)))},
            "3 targets for 2 rows",
        ),
        (multi_labels([[1, 0]]), "1 targets for 2 rows"),
        (multi_labels([[1, 0], [0, 2]]), "a row says 2 of a class"),
        (multi_labels([[1], [0]]), "1 columns for 2 classes"),
        (multi_labels([[1, 0], [0, 1]], names=["a", "a"]), "distinct"),
        (multi_labels([[1, 0], [0, 1]], names=["a", ""]), "not empty"),
        (multi_labels([[1, 0], [0, 1]], names=[]), "no class is named"),
        (multi_labels([[1, 0], [0, 1]], dtype=np.float32), "uint8 of shape (rows, classes)"),
        (multi_labels([1, 0]), "uint8 of shape (rows, classes)"),
        (
            {"multi_labels": dataset_pb2.MultiLabels(names=["a", "b"], values=codecs.encode_images([b"x", b"y"]))},
            "uint8 of shape (rows, classes)",
        ),
    ],
)
def test_bad_labels_are_refused(channel, labels, what):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)
    request = dataset_pb2.CommitDatasetRequest(
        name="d", space=messages.space_to_proto(IMAGES), row_ids=ids_of(2), idempotency_key="k", **labels
    )
    error = refused(lambda: stub.CommitDataset(request, metadata=USER))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert what in error.details()


def test_one_connection_cannot_take_all_the_streams(gateway, channel):
    """Twice the limit at once: the server works on no more than the limit, and other connections go on."""
    import asyncio

    async def gate():
        return asyncio.Event()

    gateway.engine.gate = gateway.run(gate())
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    calls = [
        stub.Extract.future(extract(images()), metadata=USER, timeout=30) for _ in range(2 * MAX_CONCURRENT_STREAMS)
    ]
    with grpc.insecure_channel(gateway.address, options=[("grpc.use_local_subchannel_pool", 1)]) as other:
        # Calls of another connection go through meanwhile.
        info = catalog_pb2_grpc.CatalogServiceStub(other).GetServerInfo(
            catalog_pb2.GetServerInfoRequest(), metadata=USER, timeout=20
        )
        assert info.wire_version == 1
    gateway.loop.call_soon_threadsafe(gateway.engine.gate.set)
    # What came on top was held back by the client, or refused before any of it was read: safe to send again.
    codes = [call.code() for call in calls]
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert codes.count(grpc.StatusCode.OK) >= MAX_CONCURRENT_STREAMS // 2
    assert 1 < gateway.engine.most_running <= MAX_CONCURRENT_STREAMS


def test_a_message_over_the_limit_is_refused_by_the_server(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = extract(images())
    request.features.data = b"\0" * (MAX_MESSAGE_BYTES + 1)
    error = refused(lambda: stub.Extract(request, metadata=USER))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_stopping_lets_a_call_in_progress_finish_and_takes_no_new_one(tmp_path):
    import asyncio

    gateway = fakes.GatewayThread(tmp_path)

    async def gate():
        return asyncio.Event()

    gateway.engine.gate = gateway.run(gate())
    with grpc.insecure_channel(gateway.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Extract.future(extract(images()), metadata=USER)
        assert gateway.engine.started.wait(60)
        stopping = asyncio.run_coroutine_threadsafe(gateway.server.stop(20.0), gateway.loop)
        threading.Event().wait(0.05)  # lets the server announce that it goes away
        gateway.loop.call_soon_threadsafe(gateway.engine.gate.set)
        assert call.result(timeout=60).embedding.shape[0] == 2
        stopping.result(timeout=60)
    with grpc.insecure_channel(gateway.address) as channel:
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)
        error = refused(lambda: stub.GetServerInfo(catalog_pb2.GetServerInfoRequest(), metadata=USER))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    gateway.close()


def ask(channel, timeout=5):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    return stub.GetServerInfo(catalog_pb2.GetServerInfoRequest(), metadata=USER, timeout=timeout)


def test_tls_with_and_without_the_right_certificate(tmp_path):
    cert, key = certificate(tmp_path, "server", expires_in_s=3600)
    other, _ = certificate(tmp_path, "stranger", expires_in_s=3600)
    gateway = fakes.GatewayThread(tmp_path, tls_cert=cert, tls_key=key)
    try:
        trusted = grpc.ssl_channel_credentials(Path(cert).read_bytes())
        with grpc.secure_channel(gateway.address, trusted) as channel:
            assert ask(channel).wire_version == 1
        strange = grpc.ssl_channel_credentials(Path(other).read_bytes())
        with grpc.secure_channel(gateway.address, strange) as channel:
            assert refused(lambda: ask(channel)).code() is grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(gateway.address) as channel:
            assert refused(lambda: ask(channel)).code() is grpc.StatusCode.UNAVAILABLE
    finally:
        gateway.close()


def test_an_expired_certificate_is_not_accepted_by_a_client(tmp_path):
    cert, key = certificate(tmp_path, "server", expires_in_s=-3600)
    gateway = fakes.GatewayThread(tmp_path, tls_cert=cert, tls_key=key)
    try:
        credentials = grpc.ssl_channel_credentials(Path(cert).read_bytes())
        with grpc.secure_channel(gateway.address, credentials) as channel:
            error = refused(lambda: ask(channel))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "expired" in error.details().lower()
    finally:
        gateway.close()


def test_client_certificates_are_asked_for_where_the_operator_wants_them(tmp_path):
    cert, key = certificate(tmp_path, "server", expires_in_s=3600)
    client_cert, client_key = certificate(tmp_path, "client", expires_in_s=3600)
    gateway = fakes.GatewayThread(tmp_path, tls_cert=cert, tls_key=key, tls_client_ca=client_cert)
    try:
        root = Path(cert).read_bytes()
        with grpc.secure_channel(gateway.address, grpc.ssl_channel_credentials(root)) as channel:
            assert refused(lambda: ask(channel)).code() is grpc.StatusCode.UNAVAILABLE
        both = grpc.ssl_channel_credentials(root, Path(client_key).read_bytes(), Path(client_cert).read_bytes())
        with grpc.secure_channel(gateway.address, both) as channel:
            assert ask(channel).wire_version == 1
    finally:
        gateway.close()


def test_predictions_outlive_the_metadata_store(gateway):
    import asyncio

    from trunkline_worker.serving.models import NEWEST_TTL_S, ModelLookup
    from trunkline_worker.store.records import ModelRecord

    record = ModelRecord(
        "default", "m", 1, "classification", ("a", "b"), 2, fakes.images_space(), "", (), {}, "", "", "", {}, "", 0.0
    )
    now = [100.0]

    class Away:
        away, asked = False, 0

        async def call(self, name, *args, timeout_s=None):
            from trunkline_wire.errors import ErrorCode, WireError

            self.asked += 1
            if self.away:
                raise WireError(ErrorCode.UNAVAILABLE, "away")
            return record

    async def run():
        metadata = Away()
        lookup = ModelLookup(metadata, monotonic=lambda: now[0])
        assert await lookup.find("default", "m") == record
        assert await lookup.find("default", "m") == record
        assert metadata.asked == 1
        now[0] += NEWEST_TTL_S + 1
        metadata.away = True
        assert await lookup.find("default", "m") == record
        assert metadata.asked == 2

    asyncio.run(run())


def test_importing_the_gateway_does_not_load_ray():
    code = "import sys, trunkline_worker.serving.gateway; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_fails_the_chunk_with_the_reason_and_the_gateway_goes_on(gateway, channel, monkeypatch):
    from trunkline_wire.errors import ErrorCode, WireError
    from trunkline_worker.store.blobs import BlobStore

    put = BlobStore.put
    full = [True]

    def maybe(self, path, data):
        if full[0]:
            raise WireError(ErrorCode.STORAGE_FULL, "no space is left")
        put(self, path, data)

    monkeypatch.setattr(BlobStore, "put", maybe)
    spec = fakes.fake_spec()
    space = spec.space(spec.cut("mid"))
    one = chunk(ids_of(1, space), np.zeros((1, 3, 2, 2), np.float16), space)
    assert upload(channel, one)[0].error.code == error_pb2.ERROR_CODE_STORAGE_FULL
    full[0] = False
    assert upload(channel, one)[0].ack.num_new_rows == 1


def test_an_embedding_that_would_not_fit_a_message_is_refused_before_it_is_computed(gateway, channel, monkeypatch):
    from trunkline_worker.serving import replies

    monkeypatch.setattr(replies, "MAX_PAYLOAD_BYTES", 100)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    assert stub.Extract(extract(images(4)), metadata=USER).embedding.shape[0] == 4  # 4 x 6 x 4 bytes
    error = refused(lambda: stub.Extract(extract(images(5)), metadata=USER))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 4 rows" in error.details()
    assert stub.Extract(extract(images(5), slices=["pooled"]), metadata=USER).embedding.shape[0] == 5
    assert gateway.engine.calls == 2


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ({"head": training_pb2.HeadConfig(kind=training_pb2.HEAD_KIND_LINEAR, hidden=[4])}, "hidden"),
        ({"head": training_pb2.HeadConfig(kind=99)}, "not known here"),
        ({"fit": training_pb2.FitConfig(validation_fraction=1.5)}, "validation fraction"),
        ({"embedding": training_pb2.EMBEDDING_MODE_SLICES}, "slices are named"),
        ({"embedding": training_pb2.EMBEDDING_MODE_SLICES, "slices": ["nope"]}, "no slice"),
        ({"dataset": "nothing"}, "nothing"),
        ({"model": "../x"}, "not a model name"),
        ({"backbone": "other"}, "cannot read them"),
        ({"head": training_pb2.HeadConfig(fuse=99)}, "not known here"),
        ({"head": training_pb2.HeadConfig(kind=training_pb2.HEAD_KIND_CONV, channels=[4])}, "a head of another kind"),
        ({"head": training_pb2.HeadConfig(kind=training_pb2.HEAD_KIND_CONV)}, "1 to 8 convolutions"),
        ({"fit": training_pb2.FitConfig(loss=training_pb2.LOSS_HUBER)}, "'huber' is not one for classes"),
        ({"more_backbones": [training_pb2.BackboneChoice(backbone="other")]}, "no other backbone can read"),
        ({"embedding": training_pb2.EMBEDDING_MODE_SLICES, "slices": ["other:pooled"]}, "no backbone 'other'"),
    ],
)
def test_a_job_that_cannot_work_is_refused_when_it_is_submitted(gateway, channel, spec, what):
    space = fakes.images_space(cut="mid")
    ids = ids_of(4, space)
    upload(channel, chunk(ids, np.zeros((4, 3, 2, 2), np.float16), space))
    commit = dataset_pb2.CommitDatasetRequest(
        name="d",
        space=messages.space_to_proto(space),
        row_ids=ids,
        classes=dataset_pb2.ClassLabels(names=["a", "b"], indices=[0, 0, 1, 1]),
        idempotency_key="k",
    )
    dataset_pb2_grpc.DatasetServiceStub(channel).CommitDataset(commit, metadata=USER)
    request = training_pb2.SubmitJobRequest(
        spec=training_pb2.JobSpec(**{"model": "m", "dataset": "d", **spec}), idempotency_key="j"
    )
    stub = training_pb2_grpc.TrainingServiceStub(channel)
    assert what in refused(lambda: stub.SubmitJob(request, metadata=USER)).details()
    assert not stub.ListJobs(training_pb2.ListJobsRequest(), metadata=USER).jobs


def test_what_all_callers_together_hold_in_memory_is_bounded(gateway, channel):
    import asyncio

    async def gate():
        return asyncio.Event()

    gateway.engine.gate = gateway.run(gate())
    request = extract(images())
    gateway.budget.limit = request.ByteSize() + 10
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    first = stub.Extract.future(request, metadata=USER)
    assert gateway.engine.started.wait(60)
    error = refused(lambda: stub.Extract(request, metadata=USER))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "500") in [tuple(one) for one in error.trailing_metadata()]
    gateway.loop.call_soon_threadsafe(gateway.engine.gate.set)
    first.result(timeout=60)
    stub.Extract(request, metadata=USER)
    assert gateway.engine.calls == 2
