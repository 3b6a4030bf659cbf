"""What a cluster says about itself, and its stems."""

import numpy as np
import pytest
import trunkline
from trunkline_wire import WIRE_VERSION


def test_info(client):
    assert client.info.wire_version == WIRE_VERSION
    assert client.info.tenant
    assert client.info.max_batch_rows > 0 and client.info.max_message_bytes > 0
    assert client.info.storage_shared


def test_backbones_and_describe_agree(client, server):
    listed = client.backbones()
    assert server.backbone in [one.name for one in listed]
    described = client.describe(server.backbone)
    assert described.cuts == next(one for one in listed if one.name == server.backbone).cuts
    assert described.cut("input") is not None and described.cut(server.cut) is not None
    assert described.slices and described.slices[0].start == 0


def test_input_size_is_part_of_the_fingerprint(client, server):
    one, other = (client.describe(server.backbone, input_size=size) for size in (server.input_size, 32))
    assert other.preprocessing.input_size == 32
    assert one.cut(server.cut).fingerprint != other.cut(server.cut).fingerprint


def test_unknown_backbone(client):
    with pytest.raises(trunkline.NotFoundError, match="no_such_net"):
        client.describe("no_such_net")


def test_unknown_cut(client, server):
    with pytest.raises(trunkline.NotFoundError, match="nowhere") as caught:
        client.stem(server.backbone, cut="nowhere")
    assert server.cut in str(caught.value)


def test_what_was_measured_of_the_runtimes(client, server):
    tuning = client.tune(server.backbone)
    assert (tuning.backbone, tuning.cut) == (server.backbone, "input")
    chosen = tuning.runtime(tuning.chosen)
    assert not chosen.refused and tuning.batch_rows in [one.batch_rows for one in chosen.speeds]
    assert tuning.runtime("torch-fp32").error == 0 and "torch" in dict(tuning.libraries)
    other = client.tune(server.backbone, cut=server.cut, input_size=server.input_size)
    assert (other.cut, other.input_size) == (server.cut, server.input_size)
    assert client.tune().backbone == client.backbones()[0].name


def test_runtimes_of_what_is_not_there(client, server):
    with pytest.raises(trunkline.NotFoundError, match="nowhere"):
        client.tune(server.backbone, cut="nowhere")
    with pytest.raises(trunkline.NotFoundError, match="no_such_net"):
        client.tune("no_such_net")


def test_runtimes_are_measured_again_where_that_is_asked(fake_client, fake):
    assert fake_client.tune().chosen == "torch-fp32"
    assert fake_client.tune(again=True).chosen == "torch-compile-fp32"
    fake.faults.is_old = True
    with pytest.raises(trunkline.UnsupportedError):
        fake_client.tune()


def test_no_stem_before_the_input(client, server):
    with pytest.raises(trunkline.InvalidArgumentError, match="Leave stem= out"):
        client.stem(server.backbone, cut="input")


def test_stem_runs_and_is_kept(client, server, pictures, tmp_path):
    images, _ = pictures(5)
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)
    features = stem(images)
    assert features.dtype == np.float16 and features.shape == (5, *stem.feature_shape)
    assert len(list((tmp_path / "cache" / "stems").glob("*.onnx"))) == 1
    with server.connect() as again:
        np.testing.assert_array_equal(
            again.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)(images), features
        )


def test_stem_and_trunk_equal_the_whole(client, server, pictures):
    images, _ = pictures(6)
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, codec="float32")
    # Behind a later cut only some slices can still be computed.
    slices = client.describe(server.backbone, input_size=server.input_size).cut(server.cut).slices
    through_stem = client.extract(images, stem=stem)
    whole = client.extract(images, backbone=server.backbone, input_size=server.input_size, slices=slices)
    assert through_stem.shape == whole.shape and through_stem.dtype == np.float32
    scale = np.abs(whole).max()
    np.testing.assert_allclose(through_stem / scale, whole / scale, atol=1e-3)
