"""A stem of one's own out of a torch module, over a real gateway and a real engine, without Ray."""

import numpy as np
import pytest
import torch
import trunkline
from torch import nn
from trunk_gateway import TrunkGateway
from trunkline.torch import RemoteTrunk
from trunkline_worker.backbones.catalogue import load_backbone

PLACE = {"cut": "layer1", "input_size": 64}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    torch.set_num_threads(1)
    served = TrunkGateway(tmp_path_factory.mktemp("gateway"), [load_backbone("resnet18", allow_untrained=True)])
    with served.connect() as connected:
        yield connected
    served.close()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Upsample(size=(16, 16)))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)


def own_stem(client, net, codec="float32"):
    return client.own_stem(
        trunkline.local_model(net, name="net", input_size=8, version="1", batch_rows=2),
        "resnet18",
        codec=codec,
        **PLACE,
    )


def test_what_is_computed_here_enters_the_trunk(client, net, images):
    trunk = RemoteTrunk(client, "resnet18", **PLACE)
    own = own_stem(client, net)
    assert own.feature_shape == trunk.feature_shape and net.training
    with torch.inference_mode():
        features = net.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255)
        expected = trunk(features)
    np.testing.assert_allclose(own(images), features, rtol=1e-5, atol=1e-6)
    got = client.extract(images, stem=own, slices=["pooled"])
    # The engine may serve in bfloat16; the remote trunk computes in float32.
    assert np.linalg.norm(got - expected.numpy()) < 0.02 * np.linalg.norm(expected)
    at_hand = client.extract_features(own(images), space=own.space, slices=["pooled"])
    np.testing.assert_array_equal(at_hand, got)


@pytest.mark.parametrize("codec", ["float16", "int8+zstd"])
def test_features_travel_in_its_codec(client, net, images, codec):
    own = own_stem(client, net, codec)
    exact = client.extract(images, stem=own_stem(client, net), slices=["pooled"])
    lossy = client.extract(images, stem=own, slices=["pooled"])
    assert 0 < np.abs(lossy - exact).max() < 0.05 * np.abs(exact).max()
    assert own.row_bytes < 4 * 64 * 16 * 16


def test_weights_that_learn_make_another_stem(client, net):
    before = own_stem(client, net).space
    assert own_stem(client, net).space == before
    with torch.no_grad():
        net[0].bias += 1e-3
    assert own_stem(client, net).space.fingerprint != before.fingerprint


def test_bytes_on_the_cluster_are_told_apart(client, net, images):
    """Rows of one picture through two stems are two rows."""
    labels = [0, 1, 0, 1, 0]
    first = client.upload(images, labels, name="rows", stem=own_stem(client, net))
    assert client.upload(images, labels, name="rows", stem=own_stem(client, net)).report.rows_sent == 0
    with torch.no_grad():
        net[0].bias += 1
    second = client.upload(images, labels, name="rows", stem=own_stem(client, net))
    assert (first.report.rows_sent, second.report.rows_sent) == (5, 5) and first.digest != second.digest


def test_output_that_does_not_fit(client, net):
    with pytest.raises(trunkline.ShapeMismatchError, match=r"gave \(64, 17, 17\) a row; .* are \(64, 16, 16\)"):
        own_stem(client, nn.Sequential(net, nn.Upsample(size=(17, 17))))
