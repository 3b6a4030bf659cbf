"""The inputs of a request behind its first, over engines that compute on pixels."""

import asyncio
import dataclasses

import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire import codecs, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import pack
from trunkline_wire.specs import local_space
from trunkline_wire.v1 import inference_pb2
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.fusion import more_columns
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.records import ModelInput, ModelRecord

EDGE = local_space("edge", "ab" * 32)
SECOND = dataclasses.replace(fakes.images_space(), backbone="second")
FILES = [b"one", b"two", b"three"]
OWN = np.arange(12, dtype=np.float32).reshape(3, 4)


class Second(fakes.FakeEngine):
    """Another backbone: its first row fails, the others have their number as the embedding."""

    async def describe(self, input_size=0):
        return dataclasses.replace(fakes.fake_spec(input_size or 8), name="second")

    async def extract(self, space, rows, slices=(), *, timeout_s=None):
        self.last_rows = rows
        embedding = np.tile(np.arange(len(rows), dtype=np.float32)[:, None], (1, 3))
        embedding[0] = np.nan
        errors = {0: WireError(ErrorCode.CORRUPT_IMAGE, "the first")}
        return fakes.Extraction(embedding, fakes.fake_spec().slices[1:], errors, codec_use=fakes.fake_use(space, rows))


@pytest.fixture
def backends(tmp_path):
    blobs = BlobStore(f"file://{tmp_path}/data")
    engines = {"fake": fakes.FakeEngine(blobs), "second": Second(blobs)}
    return Backends(engines, metadata=None, blobs=blobs)


def model(*inputs):
    fingerprint = fakes.fake_spec().embedding_fingerprint
    needed = {
        "edge": ModelInput(EDGE, "", ("edge",), 4, "float32"),
        "second": ModelInput(SECOND, fingerprint, ("pooled",), 3, "images"),
    }
    return ModelRecord(
        tenant="default",
        name="m",
        version=1,
        task="classification",
        class_names=("a", "b"),
        num_outputs=2,
        space=fakes.images_space(),
        embedding_fingerprint=fingerprint,
        slices=("pooled",),
        metrics={},
        dataset="d@1",
        dataset_digest="",
        head_sha256="",
        versions={},
        job_id="j",
        create_time=0.0,
        more_inputs=tuple(needed[one] for one in inputs),
    )


def sent(space, rows=None):
    features = None if rows is None else codecs.encode_rows(rows)
    return inference_pb2.Input(space=messages.space_to_proto(space), features=features)


def gather(backends, record, inputs, first=FILES):
    return asyncio.run(more_columns(record, first, inputs, backends, tenant="default", timeout_s=5.0))


def test_nothing_is_needed_and_nothing_sent(backends):
    assert gather(backends, model(), []).more_BE is None


def test_local_features_and_another_backbones_slices_stand_in_the_models_order(backends):
    both = gather(backends, model("second", "edge"), [sent(EDGE, OWN), sent(SECOND)])
    assert both.more_BE.shape == (3, 7)
    np.testing.assert_array_equal(both.more_BE[1:, :3], [[1, 1, 1], [2, 2, 2]])
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
        (("edge",), [sent(EDGE, OWN.astype(np.uint8))], ErrorCode.DTYPE_MISMATCH, "floats"),
        (("edge",), [sent(EDGE)], ErrorCode.INVALID_ARGUMENT, "without rows"),
        (
            ("second",),
            [sent(dataclasses.replace(SECOND, input_size=16))],
            ErrorCode.INCOMPATIBLE,
            "was trained on embeddings",
        ),
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
