"""Bottlenecks: fitted through a remote trunk, put on a cluster, and used as stems, without Ray."""

import hashlib

import numpy as np
import pytest
import torch
import trunkline
from small_backbones import small_backbone
from trunk_gateway import TrunkGateway
from trunkline.bottlenecks import BottleneckStem, install_bottleneck
from trunkline.torch import Bottleneck, ChannelLinear, RemoteTrunk, fit_bottleneck
from trunkline_wire import quantise
from trunkline_wire.specs import FeatureSpace
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.serving.bottlenecks import load_bottleneck

SIZE, CUT = 64, "layer2"
SPACE = FeatureSpace("net", "cut", 64, "a" * 64)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateway")
    blobs = []
    backbones = [load_backbone("resnet18", allow_untrained=True), small_backbone()]
    served = TrunkGateway(folder, backbones, load_bottleneck=lambda sha256: load_bottleneck(blobs[0], sha256))
    blobs.append(served.blobs)
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(gateway, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        with gateway.connect() as connected:
            yield connected


@pytest.fixture(scope="module")
def images():
    """Smooth pictures: noise at 6 x 6, enlarged."""
    draw = np.random.default_rng(0)
    small = torch.from_numpy(draw.random((48, 3, 6, 6)))
    large = torch.nn.functional.interpolate(small, size=SIZE, mode="bicubic").clamp(0, 1)
    return (large.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted(client, images):
    return fit_bottleneck(
        client, images, backbone="resnet18", cut=CUT, input_size=SIZE, code_channels=6, epochs=4, batch_rows=16
    )


def test_principal_components_keep_what_there_is(client):
    """Features that live in three dimensions need no more than three channels."""
    draw = torch.Generator().manual_seed(0)
    for axis, shape in ((0, (3, 4, 4)), (2, (4, 4, 3)), (1, (5, 3))):
        inner = torch.randn(20, *shape, generator=draw)
        mix = torch.randn(10, 3, generator=draw)
        features = (inner.movedim(axis + 1, -1) @ mix.T + 1).movedim(-1, axis + 1)
        made = Bottleneck.from_features(features, SPACE, axis, 3, "float32")
        torch.testing.assert_close(made(features), features, atol=1e-4, rtol=1e-4)
        assert made.code_shape[axis] == 3


@pytest.mark.parametrize("codec", ["float16", "int8", "int4", "bfloat16"])
def test_what_learns_sees_the_codec_as_it_is(codec):
    features = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    made = Bottleneck.from_features(features, SPACE, 0, 5, codec)
    codes = made.encode(features)
    plain = made.encoder(features).detach()
    packed = quantise.pack(plain.numpy(), codec, 0)
    arrived = quantise.unpack(packed) if isinstance(packed, quantise.PackedRows) else packed.astype(np.float32)
    np.testing.assert_array_equal(codes.detach().numpy(), arrived)
    # Backward as if nothing was lost.
    codes.sum().backward()
    weight = made.encoder.weight.grad.clone()
    made.encoder.zero_grad()
    made.encoder(features).sum().backward()
    torch.testing.assert_close(weight, made.encoder.weight.grad)


def test_a_linear_layer_over_channels_is_a_convolution_of_one_by_one():
    layer = ChannelLinear(8, 5, 0)
    with torch.no_grad():
        for one in layer.parameters():
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 8, 3, 4)
    expected = torch.nn.functional.conv2d(x, layer.weight[:, :, None, None], layer.bias)
    torch.testing.assert_close(layer(x), expected)
    np.testing.assert_allclose(layer.to_wire().apply(x.numpy(), 0), expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_training_lowers_the_error_of_the_embedding(fitted):
    assert fitted.losses[-1] < fitted.losses[0]
    assert 0 < fitted.embedding_error < fitted.start_error
    assert fitted.row_bytes == quantise.row_bytes((6, 8, 8), "int8", 0)


def test_equal_seeds_give_equal_files(client, images):
    def fit():
        return fit_bottleneck(
            client, images, backbone="resnet18", cut=CUT, input_size=SIZE, code_channels=2, epochs=1, batch_rows=16
        ).to_bytes()

    assert fit() == fit()


def test_its_stem_is_used_like_any_other(client, fitted, images, gateway, tmp_path):
    stem = fitted.install(client)
    assert isinstance(stem, BottleneckStem)
    sha256 = hashlib.sha256(fitted.to_bytes()).hexdigest()
    assert stem.space.bottleneck == sha256
    assert client.stem("resnet18", cut=CUT, input_size=SIZE, bottleneck=sha256).space == stem.space
    # What arrives is what the module said it would be.
    exact = client.stem("resnet18", cut=CUT, input_size=SIZE, codec="float32")
    slices = client.describe("resnet18", input_size=SIZE).cut(CUT).slices
    narrow = RemoteTrunk(
        client, "resnet18", cut=CUT, input_size=SIZE, outputs=slices, decoder=fitted.bottleneck.decoder
    )
    with torch.no_grad():
        expected = narrow(fitted.bottleneck.encode(torch.from_numpy(exact(images[:5])))).numpy()
    got = client.extract(images[:5], stem=stem)
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()  # the runtime may be bfloat16
    # The error that it announces is about what these pictures show.
    whole = client.extract(images, stem=exact)
    error = np.linalg.norm(client.extract(images, stem=stem) - whole) / np.linalg.norm(whole)
    assert error < 2 * fitted.embedding_error
    # Another client finds it by its file.
    fitted.save(tmp_path / "narrow.bottleneck")
    assert install_bottleneck(client, tmp_path / "narrow.bottleneck").space == stem.space
    data = client.upload(images, np.arange(48) % 2, name="narrow", stem=stem)
    assert (data.space, data.codec) == (stem.space, "int8")
    assert client.upload(images, np.arange(48) % 2, name="narrow", stem=stem).report.rows_sent == 0


def test_another_tenant_does_not_find_it(client, fitted, gateway):
    from serving_fakes import OTHER_TOKEN

    stem = fitted.install(client)
    with gateway.connect(OTHER_TOKEN) as other:
        with pytest.raises(trunkline.NotFoundError, match="bottleneck"):
            other.stem("resnet18", cut=CUT, input_size=SIZE, bottleneck=stem.space.bottleneck)
        codes = np.zeros((2, *stem.feature_shape), np.float32)
        with pytest.raises(trunkline.TrunklineError):
            other.upload_features(codes, [0, 1], name="x", space=stem.space)


def test_files_that_are_not_for_this_cluster_are_refused(client, fitted):
    wire = fitted.bottleneck.to_wire(0.1)
    from dataclasses import replace

    from trunkline_wire import bottleneck_file

    elsewhere = replace(wire, space=replace(wire.space, fingerprint="0" * 64))
    with pytest.raises(trunkline.IncompatibleModelError, match="train it again"):
        install_bottleneck(client, bottleneck_file.to_bytes(elsewhere))
    with pytest.raises(trunkline.CorruptDataError):
        install_bottleneck(client, fitted.to_bytes()[:-7])
    with pytest.raises(trunkline.NotFoundError):
        client.stem("resnet18", cut=CUT, input_size=SIZE, bottleneck="e" * 64)
    with pytest.raises(trunkline.InvalidArgumentError, match="exact stem"):
        client.stem("resnet18", cut=CUT, input_size=SIZE, bottleneck="e" * 64, precision="int8")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"code_channels": 0}, trunkline.InvalidArgumentError, "1 to 128"),
        ({"code_channels": 129}, trunkline.InvalidArgumentError, "1 to 128"),
        ({"codec": "int3"}, trunkline.UnsupportedError, "int3"),
        ({"codec": "int8+zstd"}, trunkline.UnsupportedError, "zstd"),
        ({"epochs": -1}, trunkline.InvalidArgumentError, "epochs"),
        ({"validation": 0.0}, trunkline.InvalidArgumentError, "validation"),
        ({"cut": "input"}, trunkline.InvalidArgumentError, "input"),
        ({"cut": "layer9"}, trunkline.NotFoundError, "layer9"),
        ({"images": []}, trunkline.EmptyBatchError, "no images"),
        ({"images": np.zeros((3, 8, 8), np.uint8)}, trunkline.InvalidArgumentError, "at least 8"),
    ],
)
def test_what_makes_no_sense_is_refused(client, images, options, error, message):
    chosen = {"images": images, "cut": CUT, "code_channels": 4, "epochs": 0, **options}
    with pytest.raises(error, match=message):
        fit_bottleneck(client, chosen.pop("images"), backbone="resnet18", input_size=SIZE, **chosen)
