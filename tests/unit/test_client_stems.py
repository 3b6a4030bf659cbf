"""Stems: the file's cache, and the session it becomes."""

import hashlib
import json
import os
import pickle  # noqa: TID251 - what these tests made themselves

import numpy as np
import pytest
from trunkline import errors
from trunkline._calls import FetchedStem
from trunkline._stem_files import StemCache
from trunkline.stems import Stem
from trunkline_wire.quantise import PackedRows, unpack
from trunkline_wire.specs import FeatureSpace, Preprocessing

PREPROCESSING = Preprocessing(4, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SPACE = FeatureSpace("net", "half", 4, "ab" * 32)


def fetched(data, precision="float32", embedding_error=0.0):
    digest = hashlib.sha256(data).hexdigest()
    return FetchedStem(SPACE, PREPROCESSING, (3, 2, 2), digest, data, precision, embedding_error)


@pytest.fixture
def cache(tmp_path):
    return StemCache(tmp_path)


@pytest.fixture(scope="module")
def onnx_bytes():
    """Export uint8 (B, 4, 4, 3) to float32 (B, 3, 4, 4), times 1000."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["float", "k"], ["scaled"]),
            helper.make_node("Transpose", ["scaled"], ["features"], perm=[0, 3, 1, 2]),
        ],
        "stem",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 4, 4, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 3, 4, 4])],
        [numpy_helper.from_array(np.array(1000, np.float32), "k")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def test_round_trip(cache, tmp_path, onnx_bytes):
    assert cache.load(SPACE.fingerprint) is None
    cache.store(fetched(onnx_bytes, "int8", 0.01))
    file = cache.load(SPACE.fingerprint)
    assert (file.data, file.embedding_error) == (onnx_bytes, 0.01)
    assert sorted(path.suffix for path in (tmp_path / "stems").iterdir()) == [".json", ".onnx"]


@pytest.mark.parametrize("facts", [{}, {"embedding_error": "0.1"}, {"embedding_error": float("nan")}], ids=str)
def test_error_that_was_not_told(cache, tmp_path, onnx_bytes, facts):
    """Files that an earlier version kept say nothing of errors."""
    cache.store(fetched(onnx_bytes))
    (path,) = tmp_path.rglob("*.json")
    path.write_text(json.dumps({"sha256": hashlib.sha256(onnx_bytes).hexdigest(), **facts}))
    assert cache.load(SPACE.fingerprint).embedding_error is None


@pytest.mark.parametrize("suffix", [".onnx", ".json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_damage_counts_as_missing(cache, tmp_path, onnx_bytes, suffix, content):
    cache.store(fetched(onnx_bytes))
    (path,) = tmp_path.rglob(f"*{suffix}")
    path.write_bytes(content)
    assert cache.load(SPACE.fingerprint) is None


def test_file_that_is_no_stem_counts_as_missing(cache):
    cache.store(fetched(b"its checksum is right"))
    assert cache.load(SPACE.fingerprint) is None


def test_interrupted_write_leaves_the_old_one(cache, tmp_path, onnx_bytes, monkeypatch):
    cache.store(fetched(onnx_bytes))

    def no_replace(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", no_replace)
    with pytest.raises(KeyboardInterrupt):
        cache.store(fetched(b"other"))
    assert cache.load(SPACE.fingerprint).data == onnx_bytes
    assert not [path for path in (tmp_path / "stems").iterdir() if path.name.startswith(".")]


def test_directory_that_cannot_be_written(tmp_path, onnx_bytes):
    (tmp_path / "stems").write_text("a file")
    StemCache(tmp_path).store(fetched(onnx_bytes))
    assert StemCache(tmp_path).load(SPACE.fingerprint) is None


@pytest.mark.parametrize("fingerprint", ["../../etc/passwd", "", "AB", "a/b"])
def test_fingerprints_name_no_paths(cache, fingerprint):
    with pytest.raises(errors.CorruptDataError):
        cache.load(fingerprint)


def test_features(onnx_bytes):
    stem = Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 4, 4), codec="float32", threads=1)
    images = np.random.default_rng(0).integers(0, 60, (70, 4, 4, 3)).astype(np.uint8)
    features = stem(images)
    np.testing.assert_array_equal(features, images.transpose(0, 3, 1, 2).astype(np.float32) * 1000)
    assert stem._session is not None
    again = pickle.loads(pickle.dumps(stem))
    assert again._session is None
    np.testing.assert_array_equal(again(images[:2]), features[:2])


def test_features_beyond_float16(onnx_bytes):
    stem = Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 4, 4), threads=1)
    assert stem(np.full((1, 4, 4, 3), 60, np.uint8)).dtype == np.float16
    with pytest.raises(errors.NotFiniteError, match="float32"):
        stem(np.full((1, 4, 4, 3), 200, np.uint8))


def test_file_of_another_shape(onnx_bytes):
    with pytest.raises(errors.IncompatibleModelError):
        Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 9, 9), threads=1)(np.zeros((1, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "keywords", [{"codec": "int3"}, {"codec": "auto"}, {"threads": 0}, {"threads": 1.5}, {"threads": True}], ids=str
)
def test_what_cannot_be_asked_for(keywords):
    with pytest.raises((errors.InvalidArgumentError, errors.UnsupportedError)):
        Stem(b"", SPACE, PREPROCESSING, (3, 4, 4), **keywords)


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_packed_features(onnx_bytes, codec):
    stem = Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 4, 4), codec=f"{codec}+zstd", threads=1)
    assert (stem.codec, stem.row_codec, stem.compress) == (f"{codec}+zstd", codec, True)
    images = np.random.default_rng(0).integers(0, 60, (5, 4, 4, 3)).astype(np.uint8)
    features = stem(images)
    assert features.dtype == (np.float16 if codec == "float16" else np.float32)
    packed = stem.pack(features)
    assert packed.nbytes == 5 * stem.row_bytes
    if isinstance(packed, PackedRows):
        assert packed.codec == codec
        packed = unpack(packed)
    np.testing.assert_allclose(packed, features, rtol=0.01, atol=60_000 / 15 if codec == "int4" else 60_000 / 255)


def test_features_that_cannot_be_packed(onnx_bytes):
    stem = Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 4, 4), codec="float16")
    with pytest.raises(errors.NotFiniteError, match="row 1"):
        stem.pack(np.stack([np.zeros((3, 4, 4), np.float32), np.full((3, 4, 4), 1e6, np.float32)]))


def tasks():
    """Return the threads of this process."""
    return set(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_those_asked_for(onnx_bytes, threads):
    import onnxruntime  # noqa: F401  # what it starts when it is loaded is not the session's

    images = np.zeros((40, 4, 4, 3), np.uint8)
    before = tasks()
    stem = Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 4, 4), codec="int8", threads=threads)
    stem.pack(stem(images))
    # The thread that calls is one of them.
    assert len(tasks() - before) == threads - 1


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_session_does_not_spin(onnx_bytes, threads):
    stem = Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 4, 4), threads=threads)
    stem.load()
    options = stem._session.get_session_options()
    for entry in ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning"):
        assert options.get_session_config_entry(entry) == "0"
    assert options.execution_mode.name == "ORT_SEQUENTIAL"
    if threads is not None:
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
