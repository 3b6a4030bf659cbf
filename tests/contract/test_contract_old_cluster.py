"""A cluster of before there were codecs, and one whose stems are not what they should be."""

import hashlib
import json
import threading

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


class TestOldClusterAndWhatARowHas:
    """An old cluster takes no notice of what it does not know: nothing must be trained without it."""

    @pytest.fixture
    def local(self):
        return trunkline.local_model(lambda x: x.mean(axis=(1, 2)), name="colour", version="1", input_size=8)

    @pytest.mark.parametrize("remote", [True, False])
    def test_local_features(self, fake, old_client, local, pictures, remote):
        with pytest.raises(trunkline.UnsupportedError, match=r"version 0.0-fake\) does not know local features"):
            old_client.upload(*pictures(6), name="d", local=local, remote=remote)
        assert not fake.rows["default"] and not fake.calls["CommitDataset"]

    def test_no_stem_has_run_in_vain(self, fake, old_client, local, pictures, monkeypatch):
        stem = old_client.stem("fake_net", cut="half")
        monkeypatch.setattr(stem, "run", lambda rows: pytest.fail("the stem has run"))
        with pytest.raises(trunkline.UnsupportedError, match="local features"):
            old_client.upload(*pictures(6), name="d", local=local, stem=stem)

    def test_local_features_that_it_has_stored_by_chance(self, fake, old_client, local, pictures):
        """Rows are found by id alone; the dataset that comes back tells."""
        images, labels = pictures(6)
        fake.faults.is_old = False
        old_client.upload(images, labels, name="d", local=local)
        fake.faults.is_old = True
        with pytest.raises(trunkline.UnsupportedError, match="several inputs: it made e@1 of the first one alone"):
            old_client.upload(images, labels, name="e", local=local)

    def test_several_stems(self, old_client, pictures):
        stems = [old_client.stem(name, cut="half") for name in ("fake_net", "other_net")]
        with pytest.raises(trunkline.UnsupportedError, match="does not know several inputs"):
            old_client.upload(*pictures(6), name="d", stem=stems)

    def test_several_classes(self, fake, old_client, pictures):
        with pytest.raises(trunkline.UnsupportedError, match="does not know several classes a row"):
            old_client.upload(pictures(3)[0], [["a"], ["a", "b"], []], name="d")
        assert ("dataset", "default", "d") not in fake.kept

    @pytest.mark.parametrize(
        ("keywords", "said"),
        [
            ({"backbone": ["fake_net", "other_net"]}, "several backbones; job [0-9a-f]+ was cancelled"),
            ({"head": trunkline.MLP((8,), batch_norm=True)}, "the head .*with batch norm"),
            ({"head": trunkline.MLP((8,), activation="gelu")}, "the head .*gelu"),
            ({"head": trunkline.Linear(fuse="add")}, "the head .*fused by add"),
            ({"loss": "huber"}, "the loss's kind 'huber'"),
            ({"head": "mlp", "optimiser": trunkline.Optimiser(ema=0.5)}, "the optimiser's ema 0.5"),
            ({"class_weights": "balanced"}, "the loss's balanced True"),
        ],
        ids=str,
    )
    def test_jobs(self, fake, old_client, pictures, keywords, said):
        images, labels = pictures(6)
        old_client.upload(images, labels * 0.5 if "loss" in keywords else labels, name="d")
        fake.faults.hold_jobs = threading.Event()
        with pytest.raises(trunkline.UnsupportedError, match=f"does not know {said}"):
            old_client.train("d", name="m", **keywords)
        (job,) = old_client.jobs()
        with pytest.raises(trunkline.JobCancelledError):
            job.result(20)
        assert old_client.models() == []

    @pytest.mark.parametrize("head", ["conv", "prototype"])
    def test_heads_that_it_refuses_itself(self, old_client, pictures, head):
        old_client.upload(*pictures(6), name="d")
        with pytest.raises(trunkline.UnsupportedError, match="is not known here"):
            old_client.train("d", name="m", head=head)

    def test_what_it_knows_goes_on(self, old_client, pictures):
        images, labels = pictures(12)
        old_client.upload(images, labels, name="d")
        model = old_client.train("d", name="m", head=trunkline.MLP((8,), dropout=0.1)).result(20)
        assert model.predict(images).indices.tolist() == labels.tolist()


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
    monkeypatch.setattr(fake_backbone, "stem", lambda cut, size, precision, name: whole(cut, size, "float32", name))
    with pytest.raises(trunkline.CorruptDataError, match="another stem"):
        fake_client.stem("fake_net", cut="half", precision="int8")
