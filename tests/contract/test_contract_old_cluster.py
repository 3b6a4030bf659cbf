"""A cluster of before there were codecs, and one whose stems are not what they should be."""

import hashlib
import json

import numpy as np
import pytest
import trunkline


@pytest.fixture
def old_client(fake):
    fake.faults.is_old = True
    with trunkline.connect(fake.address, token=fake.token, timeout_s=20.0) as client:
        yield client


class TestOldCluster:
    @pytest.mark.parametrize("codec", ["bfloat16", "int8", "int4+zstd"])
    def test_other_codecs_are_refused_before_anything_is_computed(self, fake, old_client, pictures, codec):
        with pytest.raises(trunkline.UnsupportedError, match="it reads float32, float16"):
            old_client.stem("fake_net", cut="half", codec=codec)
        stem = old_client.stem("fake_net", cut="half", codec="float32")
        features = stem(pictures(2)[0])
        for call in (old_client.extract_features, lambda x, **k: old_client.upload_features(x, [0, 1], name="d", **k)):
            with pytest.raises(trunkline.UnsupportedError, match="it reads float32, float16"):
                call(features, space=stem.space, codec=codec)
        assert not fake.calls["Extract"] and not fake.calls["FindMissingRows"]

    def test_packed_rows_are_refused_too(self, old_client, pictures):
        from trunkline_wire.quantise import pack

        stem = old_client.stem("fake_net", cut="half", codec="float32")
        with pytest.raises(trunkline.UnsupportedError, match="does not read features in int8"):
            old_client.extract_features(pack(stem(pictures(2)[0]), "int8"), space=stem.space)

    @pytest.mark.parametrize("codec", ["float16", "float32+zstd"])
    def test_what_it_knows_goes_on(self, old_client, pictures, codec):
        images, labels = pictures(12)
        data = old_client.upload(images, labels, name="d", stem=old_client.stem("fake_net", cut="half", codec=codec))
        assert old_client.train(data, name="m").result(20).predict(images).indices.tolist() == labels.tolist()

    def test_no_quantised_stem(self, old_client, tmp_path):
        with pytest.raises(trunkline.UnsupportedError, match="no stems of precision int8"):
            old_client.stem("fake_net", cut="half", precision="int8")
        assert not list(tmp_path.rglob("*.onnx"))

    def test_no_choice(self, old_client):
        with pytest.raises(trunkline.UnsupportedError, match="does not know this call"):
            old_client.stem("fake_net", cut="half", codec="auto")

    def test_cut_that_is_none(self, fake, old_client):
        with pytest.raises(trunkline.NotFoundError, match="the cuts near it are 'input', 'half', 'quarter'"):
            old_client.stem("fake_net", cut="nowhere")
        assert fake.calls["FetchStem"] == 1


def foreign_model():
    """Make a valid file whose operator needs a library of its own."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Anything", ["images"], ["features"], domain="com.example")],
        "stem",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 8, 8, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 3, 4, 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def external_model():
    """Make a file whose weights lie in another file."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.ones(3, np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "../../secret"
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["features"])],
        "stem",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 8, 8, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [3])],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


UNSAFE = {"foreign operator": foreign_model, "external weights": external_model, "no ONNX": lambda: b"text" * 9}


@pytest.fixture
def no_onnxruntime(monkeypatch):
    """Fail where ONNX Runtime gets to see a file."""
    import onnxruntime

    def never(*_, **__):
        raise AssertionError("ONNX Runtime was given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", never)


class TestUnsafeStems:
    @pytest.mark.parametrize("make", UNSAFE.values(), ids=UNSAFE)
    def test_from_the_cluster(self, fake, fake_client, tmp_path, make, no_onnxruntime):
        fake.faults.stem_data = make()
        with pytest.raises((trunkline.UnsupportedError, trunkline.CorruptDataError), match="is refused"):
            fake_client.stem("fake_net", cut="half")
        assert not list(tmp_path.rglob("*.onnx"))

    @pytest.mark.parametrize("make", UNSAFE.values(), ids=UNSAFE)
    def test_from_the_cache(self, fake, fake_client, tmp_path, pictures, make):
        fake_client.stem("fake_net", cut="half")
        (path,) = tmp_path.rglob("*.onnx")
        (facts_path,) = tmp_path.rglob("*.json")
        good, bad = path.read_bytes(), make()
        path.write_bytes(bad)
        facts = json.loads(facts_path.read_text())
        facts_path.write_text(json.dumps({**facts, "sha256": hashlib.sha256(bad).hexdigest()}))
        with trunkline.connect(fake.address, token=fake.token) as again:
            assert len(again.stem("fake_net", cut="half")(pictures(2)[0])) == 2
        assert path.read_bytes() == good and fake.calls["FetchStem"] == 2

    def test_file_that_onnxruntime_does_not_load(self, fake, fake_client, monkeypatch, pictures):
        import onnxruntime

        def fail(*_, **__):
            raise RuntimeError("no such operator version")

        stem = fake_client.stem("fake_net", cut="half")
        monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
        with pytest.raises(trunkline.UnsupportedError, match="no such operator version"):
            stem(pictures(1)[0])


def test_other_stem_than_the_one_described(fake, fake_client, monkeypatch):
    import fake_backbone

    whole = fake_backbone.stem
    monkeypatch.setattr(fake_backbone, "stem", lambda cut, size, precision: whole(cut, size, "float32"))
    with pytest.raises(trunkline.CorruptDataError, match="another stem"):
        fake_client.stem("fake_net", cut="half", precision="int8")
