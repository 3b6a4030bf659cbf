"""Stems: the file's cache, and the session it becomes."""

import hashlib
import pickle  # noqa: TID251 - what these tests made themselves

import numpy as np
import pytest
from trunkline import errors
from trunkline._calls import FetchedStem
from trunkline.stems import Stem, StemCache
from trunkline_wire.specs import FeatureSpace, Preprocessing

PREPROCESSING = Preprocessing(4, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SPACE = FeatureSpace("net", "half", 4, "ab" * 32)


def fetched(data=b"onnx", space=SPACE):
    return FetchedStem(space, PREPROCESSING, (3, 2, 2), hashlib.sha256(data).hexdigest(), data)


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


def test_round_trip(cache, tmp_path):
    assert cache.load(SPACE.fingerprint) is None
    cache.store(fetched())
    data, facts = cache.load(SPACE.fingerprint)
    assert data == b"onnx" and facts["space"]["cut"] == "half"
    assert sorted(path.suffix for path in (tmp_path / "stems").iterdir()) == [".json", ".onnx"]


@pytest.mark.parametrize("suffix", [".onnx", ".json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_damage_counts_as_missing(cache, tmp_path, suffix, content):
    cache.store(fetched())
    (path,) = tmp_path.rglob(f"*{suffix}")
    path.write_bytes(content)
    assert cache.load(SPACE.fingerprint) is None


def test_interrupted_write_leaves_the_old_one(cache, tmp_path, monkeypatch):
    cache.store(fetched())

    def no_replace(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", no_replace)
    with pytest.raises(KeyboardInterrupt):
        cache.store(fetched(b"other"))
    assert cache.load(SPACE.fingerprint)[0] == b"onnx"
    assert not [path for path in (tmp_path / "stems").iterdir() if path.name.startswith(".")]


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "stems").write_text("a file")
    StemCache(tmp_path).store(fetched())
    assert StemCache(tmp_path).load(SPACE.fingerprint) is None


@pytest.mark.parametrize("fingerprint", ["../../etc/passwd", "", "AB", "a/b"])
def test_fingerprints_name_no_paths(cache, fingerprint):
    with pytest.raises(errors.CorruptDataError):
        cache.load(fingerprint)


def test_features(onnx_bytes):
    stem = Stem(onnx_bytes, SPACE, PREPROCESSING, (3, 4, 4), dtype="float32", threads=1)
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


@pytest.mark.parametrize("keywords", [{"dtype": "int8"}, {"threads": 0}])
def test_what_cannot_be_asked_for(keywords):
    with pytest.raises(errors.InvalidArgumentError):
        Stem(b"", SPACE, PREPROCESSING, (3, 4, 4), **keywords)
