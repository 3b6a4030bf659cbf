"""Stems of one's own: what a local model makes takes the place of the features at a cut, and of no others."""

import numpy as np
import pytest
import trunkline


@pytest.fixture
def cut(client, server):
    return client.describe(server.backbone, input_size=server.input_size).cut(server.cut)


@pytest.fixture
def make_local(cut):
    """Make a local model that paints the mean colour over the channels of the cut."""

    def paint(x):
        channels = np.arange(cut.feature_shape[0]) % 3
        colour = (x.mean(axis=(1, 2)) / 255)[:, channels]
        return np.broadcast_to(colour[:, :, None, None], (len(x), *cut.feature_shape))

    def make(function=paint, **keywords):
        return trunkline.local_model(function, **{"name": "painter", "version": "1", "input_size": 4, **keywords})

    return make


@pytest.fixture
def make_own(client, server, make_local):
    """Put a local model in the place of the stem."""

    def make(codec="float16", **keywords):
        place = {"cut": server.cut, "input_size": server.input_size}
        return client.own_stem(make_local(**keywords), server.backbone, codec=codec, **place)

    return make


@pytest.fixture
def model(client, make_own, pictures, unique):
    data = client.upload(*pictures(45), name=unique("data"), stem=make_own())
    return client.train(data, name=unique("model"), embedding="pooled").result(120)


def nothing_was_asked(server, *methods):
    """Whether none of these calls reached a fake, which counts them."""
    return server.fake is None or not any(server.fake.calls[one] for one in methods)


def test_space(client, server, make_own, make_local, cut):
    own = make_own()
    space = own.space
    assert (space.backbone, space.cut, space.input_size) == (server.backbone, server.cut, server.input_size)
    assert (space.local_model, space.is_own, space.is_local) == ("painter", True, False)
    assert (own.feature_shape, own.channel_axis) == (cut.feature_shape, cut.channel_axis)
    assert space == make_own(codec="int8+zstd").space
    others = [make_own(version="2"), make_own(input_size=8), make_own(name="other")]
    assert len({one.space for one in (own, *others)}) == 4
    assert space.fingerprint not in (cut.fingerprint, make_local().space.fingerprint)


def test_only_what_is_missing_is_computed_and_sent(client, make_own, pictures, unique):
    images, labels = pictures(9)
    own = make_own(name=unique("p")[:60])
    first = client.upload(images, labels, name=unique("d"), stem=own)
    assert (first.space, first.codec, first.report.rows_sent) == (own.space, "float16", 9)
    assert client.upload(images, labels, name=first.name, stem=own).report.rows_sent == 0
    assert client.upload(images, labels, name=first.name, stem=make_own(version="2")).report.rows_sent == 9


def test_train_and_predict(client, model, make_own, pictures):
    assert (model.space, model.codec) == (make_own().space, "float16")
    images, labels = pictures(15)
    own = make_own(codec="float16+zstd")
    prediction = model.predict(images, stem=own, batch_size=4)
    assert (prediction.indices == labels).mean() > 0.6
    at_hand = model.predict_features(own(images), space=own.space)
    np.testing.assert_allclose(at_hand.outputs_NK, prediction.outputs_NK, atol=1e-4)
    assert model.evaluate(images, labels, stem=own).accuracy == (prediction.indices == labels).mean()
    assert client.extract(images, stem=own).shape[0] == 15


def test_beside_a_local_model(client, make_own, pictures, unique):
    images, labels = pictures(30)
    local = trunkline.local_model(lambda x: x.mean(axis=(1, 2)), name="colour", version="1", input_size=8)
    own = make_own()
    data = client.upload(images, labels, name=unique("d"), stem=own, local=local)
    assert [one.space for one in data.inputs] == [own.space, local.space]
    model = client.train(data, name=unique("m"), embedding="pooled").result(120)
    assert (model.predict(images, stem=own, local=local).indices == labels).mean() > 0.6


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"version": "2"}, r"painter .*of fingerprint \w{12}; these are .*painter .*of fingerprint \w{12}"),
        ({"name": "other"}, "these are features of the stem of one's own other"),
        ({"codec": "float32"}, "in float16; these travel in float32"),
    ],
    ids=["version", "name", "codec"],
)
def test_another_one_is_refused_before_anything_is_sent(server, model, make_own, pictures, keywords, said):
    own, images = make_own(**keywords), pictures(2)[0]
    with pytest.raises(trunkline.IncompatibleModelError, match=said):
        model.predict(images, stem=own)
    with pytest.raises(trunkline.IncompatibleModelError, match=said):
        model.predict_features(own(images), space=own.space)
    assert nothing_was_asked(server, "Predict", "StreamPredict")


def test_nothing_takes_its_place(client, server, model, pictures):
    images = pictures(2)[0]
    for choice in (None, False):
        with pytest.raises(trunkline.InvalidArgumentError, match="images cannot take their place"):
            model.predict(images, stem=choice)
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)
    with pytest.raises(trunkline.IncompatibleModelError, match="of the stem of one's own painter"):
        model.predict(images, stem=stem)
    with pytest.raises(trunkline.IncompatibleModelError, match="of the stem of one's own painter"):
        model.predict_features(stem(images), space=stem.space)
    with pytest.raises(trunkline.UnsupportedError, match="a stem of your own"):
        model.stem()
    assert nothing_was_asked(server, "Predict", "StreamPredict")


def test_it_takes_no_stems_place(client, server, make_own, pictures, unique):
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)
    data = client.upload(*pictures(9), name=unique("d"), stem=stem)
    model = client.train(data, name=unique("m"), embedding="pooled").result(120)
    with pytest.raises(trunkline.IncompatibleModelError, match="these are features of the stem of one's own painter"):
        model.predict(pictures(2)[0], stem=make_own())
    assert nothing_was_asked(server, "Predict", "StreamPredict")


@pytest.mark.parametrize("change", [lambda x: x[:, :-1], lambda x: x.reshape(len(x), -1), lambda x: x[..., None]])
def test_output_of_another_shape(client, server, make_local, cut, change):
    local = make_local(lambda x: change(np.zeros((len(x), *cut.feature_shape))))
    with pytest.raises(trunkline.ShapeMismatchError, match="local model 'painter' gave"):
        client.own_stem(local, server.backbone, cut=server.cut, input_size=server.input_size)


def test_what_is_no_stem(client, server, make_local, pictures, unique):
    place = {"cut": server.cut, "input_size": server.input_size}
    with pytest.raises(trunkline.InvalidArgumentError, match="a stem takes pictures"):
        client.own_stem(make_local(input_size=None), server.backbone, **place)
    at_hand = trunkline.local_features(np.ones((2, 3)), name="a", version="1")
    with pytest.raises(trunkline.InvalidArgumentError, match="expected a local model"):
        client.own_stem(at_hand, server.backbone, **place)
    with pytest.raises(trunkline.InvalidArgumentError, match="images go there as they are"):
        client.own_stem(make_local(), server.backbone, cut="input")
    with pytest.raises(trunkline.NotFoundError):
        client.own_stem(make_local(), server.backbone, cut="nowhere")
    for codec in ("int3", "auto"):
        with pytest.raises(trunkline.UnsupportedError):
            client.own_stem(make_local(), server.backbone, codec=codec, **place)
    with pytest.raises(trunkline.InvalidArgumentError, match="stem is a LocalModel; expected a stem"):
        client.upload(*pictures(3), name=unique("d"), stem=make_local())


def test_features_that_are_not_finite(client, make_own, pictures, cut, unique):
    own = make_own(function=lambda x: np.full((len(x), *cut.feature_shape), np.nan if x.any() else 0))
    with pytest.raises(trunkline.NotFiniteError):
        client.upload(*pictures(3), name=unique("d"), stem=own)


def test_old_cluster_refuses(fake, fake_client, pictures):
    """What it does not know of a space it drops, and finds features of unknown weights."""
    local = trunkline.local_model(lambda x: x.transpose(0, 3, 1, 2), name="p", version="1", input_size=4)
    own = fake_client.own_stem(local, "fake_net", cut="half")
    fake.faults.is_old = True
    with pytest.raises(trunkline.IncompatibleModelError):
        fake_client.upload(*pictures(3), name="d", stem=own)
    assert not fake.kept
