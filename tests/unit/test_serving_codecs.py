"""Codecs and quantised stems through the real gateway: what is taken, what is refused, and what is said about it."""

import hashlib

import grpc
import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire import codecs, messages
from trunkline_wire.quantise import CODECS, PackedRows, codec_of, pack, unpack
from trunkline_wire.rows import row_id
from trunkline_wire.specs import IMAGES, INT8, FeatureSpace
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
    tensor_pb2,
    training_pb2,
    training_pb2_grpc,
)
from trunkline_worker.store import chunks
from trunkline_worker.store.records import Candidate, JobSpec, ModelRecord

USER = (("authorization", f"Bearer {fakes.TOKEN}"),)
SPEC = fakes.fake_spec()
MID = SPEC.cut("mid")
EXACT, QUANTISED = SPEC.space(MID), SPEC.space(MID, INT8)
PACKED = ("bfloat16", "int8", "int4")


@pytest.fixture
def gateway(tmp_path):
    running = fakes.GatewayThread(tmp_path)
    yield running
    running.close()


@pytest.fixture
def channel(gateway):
    with grpc.insecure_channel(gateway.address) as opened:
        yield opened


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)
    return caught.value


def features(count=4, shape=(3, 2, 2)):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


def extract(rows, space, **fields):
    return inference_pb2.ExtractRequest(
        space=messages.space_to_proto(space), features=codecs.encode_rows(rows), **fields
    )


def ids_of(count, space, codec):
    return [row_id(space, codec, bytes([index]) * 32) for index in range(count)]


def digest(tensor):
    return hashlib.sha256(b"".join([tensor.data, tensor.affine.scale, tensor.affine.offset, *tensor.encoded])).digest()


def chunk(rows, space, ids=None):
    tensor = codecs.encode_rows(rows)
    return dataset_pb2.RowChunk(
        space=messages.space_to_proto(space),
        row_ids=ids or ids_of(len(rows), space, codec_of(rows)),
        rows=tensor,
        sha256=digest(tensor),
    )


def upload(channel, *messages_):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)

    def requests():
        for seq, one in enumerate(messages_):
            yield dataset_pb2.UploadRowsRequest(seq=seq, chunk=one)
        yield dataset_pb2.UploadRowsRequest(seq=99, end=error_pb2.EndOfStream(num_messages=len(messages_)))

    *replies, _ = stub.UploadRows(requests(), metadata=USER)
    return {reply.seq: reply for reply in replies}


def commit(channel, name, space, ids):
    request = dataset_pb2.CommitDatasetRequest(
        name=name,
        space=messages.space_to_proto(space),
        row_ids=ids,
        classes=dataset_pb2.ClassLabels(names=["a", "b"], indices=[0, 0, 1, 1]),
        idempotency_key=name,
    )
    return dataset_pb2_grpc.DatasetServiceStub(channel).CommitDataset(request, metadata=USER).dataset


def code_of(reply):
    return error_pb2.ErrorCode.Name(reply.error.code).removeprefix("ERROR_CODE_")


def publish(gateway, channel, **fields):
    """Publish a model `head` through a job, as a lane does."""
    if not gateway.store.datasets.list("default"):
        upload(channel, chunk(features(), EXACT))
        commit(channel, "d", EXACT, ids_of(4, EXACT, "float32"))
    store = gateway.store
    job = store.jobs.submit("default", JobSpec("head", "d", "fake", 8), str(len(store.jobs.list("default"))))
    record = ModelRecord(
        "", "", 0, "classification", ("a", "b"), 2, EXACT, "", ("pooled",), {}, "d@1", "", "", {}, "", 0.0, **fields
    )
    return store.jobs.succeed(job.id, store.jobs.lease("lane", 60.0).fence, record)


def test_a_tuning_comes_through_whole(gateway, channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    request = catalog_pb2.TuneBackboneRequest(backbone="fake", cut="mid", input_size=16, again=True)
    reply = stub.TuneBackbone(request, metadata=USER)
    assert messages.tuning_from_proto(reply) == fakes.fake_tuning("mid", 16)
    assert stub.TuneBackbone(catalog_pb2.TuneBackboneRequest(), metadata=USER).cut == "input"
    assert gateway.engine.tunings_asked == [("mid", 16, True), ("", 0, False)]
    reader = (("authorization", f"Bearer {fakes.READER_TOKEN}"),)
    error = refused(lambda: stub.TuneBackbone(request, metadata=reader))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    error = refused(lambda: stub.TuneBackbone(catalog_pb2.TuneBackboneRequest(cut="nowhere"), metadata=USER))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_the_cluster_names_its_codecs(channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    info = stub.GetServerInfo(catalog_pb2.GetServerInfoRequest(), metadata=USER)
    assert list(info.codecs) == [*CODECS, "images"]


def test_a_cut_is_described_with_all_that_it_costs(gateway, channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    request = catalog_pb2.DescribeCutRequest(backbone="fake", cut="mid", input_size=16)
    reply = stub.DescribeCut(request, metadata=USER)
    assert messages.cut_cost_from_proto(reply.cost) == fakes.fake_cost(fakes.fake_spec(16).cut("mid"))
    assert stub.DescribeCut(catalog_pb2.DescribeCutRequest(cut="mid"), metadata=USER).cost.cut.name == "mid"
    assert gateway.engine.costs_asked == [("mid", 16), ("mid", 0)]


@pytest.mark.parametrize("fields", [{"backbone": "nobody", "cut": "mid"}, {"cut": "nowhere"}, {}])
def test_a_cut_that_is_not_there_is_not_found(channel, fields):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    error = refused(lambda: stub.DescribeCut(catalog_pb2.DescribeCutRequest(**fields), metadata=USER))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_class_names_come_with_one_backbone_and_not_with_the_list(channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    one = stub.DescribeBackbone(catalog_pb2.DescribeBackboneRequest(backbone="fake"), metadata=USER).backbone
    assert tuple(one.class_names) == fakes.CLASS_NAMES
    (listed,) = stub.ListBackbones(catalog_pb2.ListBackbonesRequest(), metadata=USER).backbones
    assert not listed.class_names
    one.ClearField("class_names")
    assert listed == one


@pytest.mark.parametrize(
    ("asked", "precision", "space", "error"),
    [("", "float32", EXACT, 0.0), ("float32", "float32", EXACT, 0.0), ("int8", "int8", QUANTISED, 0.02)],
)
def test_a_stem_comes_in_the_precision_asked_for_and_says_so(channel, asked, precision, space, error):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    request = catalog_pb2.FetchStemRequest(backbone="fake", cut="mid", precision=asked)
    header = next(stub.FetchStem(request, metadata=USER)).header
    assert (header.precision, header.embedding_error) == (precision, error)
    assert messages.space_from_proto(header.space) == space


def test_a_precision_that_no_stem_has_is_refused(channel):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    request = catalog_pb2.FetchStemRequest(backbone="fake", cut="mid", precision="int2")
    error = refused(lambda: stub.FetchStem(request, metadata=USER))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "float32, int8" in error.details()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("space", [EXACT, QUANTISED], ids=["float32", "int8"])
def test_features_reach_the_engine_as_they_were_sent_and_the_reply_says_how(gateway, channel, codec, space):
    rows = pack(features(), codec, MID.channel_axis)
    reply = inference_pb2_grpc.InferenceServiceStub(channel).Extract(extract(rows, space), metadata=USER)
    arrived = gateway.engine.last_rows
    assert codec_of(arrived) == codec
    if isinstance(rows, PackedRows):
        assert arrived.nbytes == rows.nbytes, "they are not unpacked on the way"
        np.testing.assert_array_equal(unpack(arrived), unpack(rows))
    else:
        np.testing.assert_array_equal(arrived, rows)
    quantised = space == QUANTISED
    assert reply.codec_use.codec == codec + ("@int8" if quantised else "")
    expected = fakes.CODEC_ERRORS.get(codec, 0.0) + (fakes.INT8_STEM_ERROR if quantised else 0.0)
    assert reply.codec_use.embedding_error == pytest.approx(expected)
    assert (reply.codec_use.trained_codec, reply.codec_use.trained_error) == ("", 0.0)


def test_a_prediction_says_what_its_model_was_trained_on(gateway, channel):
    publish(gateway, channel, codec="int8@int8", codec_error=0.03, candidates=(Candidate(("pooled",), 3, 0.0, None),))
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.PredictRequest(
        space=messages.space_to_proto(EXACT), features=codecs.encode_rows(pack(features(), "int8")), model="head"
    )
    use = stub.Predict(request, metadata=USER).codec_use
    assert (use.codec, use.trained_codec, use.trained_error) == ("int8", "int8@int8", 0.03)
    assert use.embedding_error == fakes.CODEC_ERRORS["int8"]

    def requests():
        yield inference_pb2.StreamPredictRequest(seq=0, predict=request)
        yield inference_pb2.StreamPredictRequest(seq=1, end=error_pb2.EndOfStream(num_messages=1))

    assert next(stub.StreamPredict(requests(), metadata=USER)).result.codec_use == use


def test_packed_rows_count_for_the_reply_and_for_memory_with_their_scales(gateway, channel, monkeypatch):
    from trunkline_worker.serving import replies

    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = extract(pack(features(5), "int8"), EXACT)
    monkeypatch.setattr(replies, "MAX_PAYLOAD_BYTES", 4 * 3 * 4)
    assert "at most 4 rows" in refused(lambda: stub.Extract(request, metadata=USER)).details()
    monkeypatch.undo()
    scales = len(request.features.affine.scale) + len(request.features.affine.offset)
    gateway.budget.limit = request.ByteSize() - scales
    error = refused(lambda: stub.Extract(request, metadata=USER))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    gateway.budget.limit += scales
    assert stub.Extract(request, metadata=USER).embedding.shape[0] == 5


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("space", [EXACT, QUANTISED], ids=["float32", "int8"])
def test_a_dataset_keeps_its_rows_packed_and_says_how_they_were_made(gateway, channel, codec, space):
    rows = pack(features(), codec, MID.channel_axis)
    ids = ids_of(4, space, codec)
    assert upload(channel, chunk(rows, space, ids))[0].ack.num_new_rows == 4
    stored = chunks.read_rows(gateway.blobs, gateway.store.rows.locate("default", ids))
    assert codec_of(stored) == codec
    if isinstance(rows, PackedRows):
        assert stored.nbytes == rows.nbytes
        np.testing.assert_array_equal(unpack(stored), unpack(rows))
    else:
        np.testing.assert_array_equal(stored, rows)
    dataset = commit(channel, "d", space, ids)
    assert dataset.codec == codec + ("@int8" if space == QUANTISED else "")
    stub = dataset_pb2_grpc.DatasetServiceStub(channel)
    assert stub.GetDataset(dataset_pb2.GetDatasetRequest(dataset="d"), metadata=USER).dataset == dataset
    assert list(stub.ListDatasets(dataset_pb2.ListDatasetsRequest(), metadata=USER).datasets) == [dataset]
    jobs = training_pb2_grpc.TrainingServiceStub(channel)
    submit = training_pb2.SubmitJobRequest(spec=training_pb2.JobSpec(model="m", dataset="d"), idempotency_key="j")
    assert jobs.SubmitJob(submit, metadata=USER).job.spec.backbone == "fake"


def test_images_and_pixels_have_their_codec_too(gateway, channel):
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    space = fakes.images_space()
    upload(channel, chunk(pixels, space))
    assert commit(channel, "pixels", space, ids_of(4, space, "uint8")).codec == "uint8"
    tensor = codecs.encode_images([b"one", b"two", b"three", b"four"])
    files = dataset_pb2.RowChunk(
        space=messages.space_to_proto(IMAGES), row_ids=ids_of(4, IMAGES, "images"), rows=tensor, sha256=digest(tensor)
    )
    assert upload(channel, files)[0].ack.num_new_rows == 4
    assert commit(channel, "files", IMAGES, ids_of(4, IMAGES, "images")).codec == "images"


def test_rows_of_two_codecs_or_two_stems_make_no_dataset(channel):
    ids = {}
    for codec, space in (("int8", EXACT), ("int4", EXACT), ("int8", QUANTISED)):
        ids[codec, space] = ids_of(4, space, codec)
        upload(channel, chunk(pack(features(), codec), space, ids[codec, space]))
    for other in (("int4", EXACT), ("int8", QUANTISED)):
        mixed = ids["int8", EXACT][:2] + ids[other][2:]
        error = refused(lambda mixed=mixed: commit(channel, "mixed", EXACT, mixed))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


def damaged(message, **changes):
    for name, value in changes.items():
        setattr(message.rows.affine, name, value)
    return message


def unknown_codec():
    message = chunk(pack(features(1), "int8"), EXACT)
    message.rows.codec = 77
    return message


PIXELS = fakes.images_space()
BAD_CHUNKS = {
    "wrong channel axis": (chunk(pack(features(1), "int8", 1), EXACT), "SHAPE_MISMATCH", "axis 1"),
    "wrong shape": (chunk(pack(features(1, (3, 2, 3)), "int4"), EXACT), "SHAPE_MISMATCH", "(3, 2, 2)"),
    "one dimension": (chunk(pack(features(1, (12,)), "bfloat16"), EXACT), "SHAPE_MISMATCH", "(3, 2, 2)"),
    "at input": (chunk(pack(features(1, (8, 8, 3)), "int8", 2), PIXELS), "DTYPE_MISMATCH", "images are uint8"),
    "bfloat16 at input": (chunk(pack(features(1, (8, 8, 3)), "bfloat16"), PIXELS), "DTYPE_MISMATCH", "uint8"),
    "no backbone": (chunk(pack(features(1), "int8"), IMAGES), "INVALID_ARGUMENT", "encoded images"),
    "foreign fingerprint": (
        chunk(pack(features(1), "int8"), FeatureSpace("fake", "mid", 8, "f" * 64)),
        "INCOMPATIBLE",
        "fetch the stem again",
    ),
    "no fingerprint": (chunk(features(1), FeatureSpace("fake", "mid", 8, "")), "INCOMPATIBLE", "fetch the stem again"),
    "no fingerprint at input": (
        chunk(np.zeros((1, 8, 8, 3), np.uint8), FeatureSpace("fake", "input", 8, "")),
        "INCOMPATIBLE",
        "fetch the stem again",
    ),
    "damaged scale": (
        damaged(chunk(pack(features(1), "int8"), EXACT), scale=np.ones(3, "<f4").tobytes()),
        "CORRUPT_DATA",
        "sha256",
    ),
    "damaged offset": (
        damaged(chunk(pack(features(1), "int8"), EXACT), offset=np.ones(3, "<f4").tobytes()),
        "CORRUPT_DATA",
        "sha256",
    ),
    "unknown codec": (unknown_codec(), "INVALID_ARGUMENT", "CODEC_AFFINE"),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_a_bad_chunk_is_refused_and_nothing_of_it_is_kept(gateway, channel, name):
    message, code, what = BAD_CHUNKS[name]
    reply = upload(channel, message)[0]
    assert (code_of(reply), what in reply.error.message) == (code, True), reply.error
    assert gateway.store.rows.missing("default", list(message.row_ids)) == [0]


def test_bfloat16_has_no_channels_to_count_wrongly(gateway, channel):
    """On the wire it names no axis, so none can be asked for, whatever the cut's own is."""
    rows = pack(features(1), "bfloat16", 2)
    assert upload(channel, chunk(rows, EXACT))[0].ack.num_new_rows == 1


def test_a_codec_from_a_newer_wire_is_not_supported(channel):
    tensor = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_UINT8, codec=77, shape=[1, 3, 2, 2], data=bytes(12))
    request = inference_pb2.ExtractRequest(space=messages.space_to_proto(EXACT), features=tensor)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    assert refused(lambda: stub.Extract(request, metadata=USER)).code() is grpc.StatusCode.UNIMPLEMENTED
    message = dataset_pb2.RowChunk(
        space=messages.space_to_proto(EXACT), row_ids=[bytes(32)], rows=tensor, sha256=digest(tensor)
    )
    assert code_of(upload(channel, message)[0]) == "UNSUPPORTED"


def test_a_dataset_of_other_weights_is_refused_when_a_job_is_submitted(gateway, channel):
    foreign = FeatureSpace("fake", "mid", 8, "f" * 64)
    ids = ids_of(4, foreign, "int8")
    sha256 = chunks.write_chunk(gateway.blobs, pack(features(), "int8"))
    gateway.store.rows.add_chunk("default", sha256, foreign, "int8@int8", ids)
    assert commit(channel, "old", foreign, ids).codec == "int8@int8"
    submit = training_pb2.SubmitJobRequest(spec=training_pb2.JobSpec(model="m", dataset="old"), idempotency_key="j")
    error = refused(lambda: training_pb2_grpc.TrainingServiceStub(channel).SubmitJob(submit, metadata=USER))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "upload the images again" in error.details()


def test_candidates_come_with_one_model_and_not_with_the_list(gateway, channel):
    candidates = (Candidate(("a", "pooled"), 6, -0.25, 0.75), Candidate(("pooled",), 3, 0.5, None))
    publish(gateway, channel, codec="int4", codec_error=0.04, candidates=candidates)
    stub = registry_pb2_grpc.RegistryServiceStub(channel)
    model = stub.GetModel(registry_pb2.GetModelRequest(model="head"), metadata=USER).model
    assert (model.codec, model.codec_error) == ("int4", 0.04)
    assert [
        (tuple(one.slices), one.width, one.score, one.accuracy if one.HasField("accuracy") else None)
        for one in model.candidates
    ] == [(one.slices, one.width, one.score, one.accuracy) for one in candidates]
    (listed,) = stub.ListModels(registry_pb2.ListModelsRequest(), metadata=USER).models
    assert not listed.candidates
    model.ClearField("candidates")
    assert listed == model


def test_no_batch_carries_a_models_candidates(gateway, channel, monkeypatch):
    publish(gateway, channel, candidates=(Candidate(("pooled",), 3, 0.0, None),) * 50)
    seen = []
    predict = gateway.engine.predict

    async def spy(space, rows, model, **keywords):
        seen.append(model)
        return await predict(space, rows, model, **keywords)

    monkeypatch.setattr(gateway.engine, "predict", spy)
    request = inference_pb2.PredictRequest(
        space=messages.space_to_proto(EXACT), features=codecs.encode_rows(features()), model="head"
    )
    inference_pb2_grpc.InferenceServiceStub(channel).Predict(request, metadata=USER)
    assert [(one.reference, one.candidates) for one in seen] == [("head@1", ())]
