"""Predictions and embeddings, and every way in which they can be wrong."""

import io

import numpy as np
import pytest
import trunkline
from PIL import Image
from trunkline_wire.limits import MAX_BATCH_ROWS


@pytest.fixture
def stem(client, server):
    return client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)


@pytest.fixture
def model(client, stem, pictures, unique):
    """Train a model on features."""
    data = client.upload(*pictures(60), name=unique("data"), stem=stem)
    return client.train(data, name=unique("model")).result(120)


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_features_and_images_agree(model, stem, pictures):
    images, labels = pictures(10)
    by_stem, by_choice, by_images = (model.predict(images, stem=one) for one in (stem, None, False))
    for prediction in (by_stem, by_choice, by_images):
        assert prediction.labels == [str(one) for one in labels]
        assert prediction.model == model.reference
        np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1.0, atol=1e-4)
    assert np.abs(by_stem.probabilities - by_images.probabilities).max() < 0.05
    assert by_stem.timings.total_s >= 0 and by_stem.wall_s > 0


@pytest.mark.parametrize("stem_choice", [None, False])
def test_many_batches_keep_their_order(model, pictures, stem_choice):
    images, labels = pictures(41)
    prediction = model.predict(images, stem=stem_choice, batch_size=4, max_in_flight=3)
    assert prediction.indices.tolist() == labels.tolist()
    assert len(prediction) == 41 and not prediction.errors


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("stem_choice", [None, False])
def test_corrupt_image_among_good_ones(model, pictures, stem_choice, batch_size):
    images, labels = pictures(6)
    rows = [jpeg(one) for one in images]
    rows[2] = rows[2][: len(rows[2]) // 2]
    prediction = model.predict(rows, stem=stem_choice, batch_size=batch_size)
    assert set(prediction.errors) == {2}
    assert isinstance(prediction.errors[2], trunkline.CorruptImageError)
    assert prediction.labels[2] is None and prediction.indices[2] == -1
    assert np.isnan(prediction.probabilities[2]).all() and prediction[2].error is not None
    good = [0, 1, 3, 4, 5]
    assert [prediction.labels[row] for row in good] == [str(labels[row]) for row in good]
    assert "error" in prediction.to_dict()["rows"][2]
    with pytest.raises(trunkline.CorruptImageError):
        prediction.raise_for_errors()


@pytest.mark.parametrize("stem_choice", [None, False])
def test_nothing_but_corrupt_images(model, stem_choice):
    with pytest.raises(trunkline.CorruptImageError):
        model.predict([b"no", b"image"], stem=stem_choice)


def test_corrupt_image_leaves_no_hole_in_an_embedding(client, server, pictures):
    rows = [*pictures(3)[0], b"no image"]
    with pytest.raises(trunkline.CorruptImageError):
        client.extract(rows, backbone=server.backbone, input_size=server.input_size)


def test_features_at_hand(client, model, stem, pictures):
    images, labels = pictures(5)
    prediction = client.predict_features(stem(images), model=model.reference)
    assert prediction.indices.tolist() == labels.tolist()
    embedding = client.extract_features(stem(images), space=stem.space)
    np.testing.assert_allclose(embedding, client.extract(images, stem=stem), rtol=1e-4, atol=1e-4)


def test_slices_in_the_order_wanted(client, server, stem, pictures):
    images, _ = pictures(4)
    spec = client.describe(server.backbone, input_size=server.input_size)
    available = [one for one in spec.slices if one.name in spec.cut(server.cut).slices]
    last, first = available[-1], available[0]
    embedding = client.extract(images, stem=stem, slices=[last.name, first.name], batch_size=2)
    assert embedding.shape == (4, last.width + first.width)
    whole = client.extract(images, stem=stem, slices=[last.name])
    np.testing.assert_allclose(embedding[:, : last.width], whole, rtol=1e-3, atol=1e-3)
    with pytest.raises(trunkline.NotFoundError, match="no_such_slice"):
        client.extract(images, stem=stem, slices=["no_such_slice"])


def test_wrong_features(model, stem, pictures):
    features = stem(pictures(3)[0])
    with pytest.raises(trunkline.ShapeMismatchError):
        model.predict_features(features[:, :-1])
    with pytest.raises(trunkline.DtypeMismatchError):
        model.predict_features((features * 9).astype(np.int64))
    with pytest.raises(trunkline.EmptyBatchError):
        model.predict_features(features[:0])
    features[1] = np.inf
    with pytest.raises(trunkline.NotFiniteError, match="row 1"):
        model.predict_features(features)


def test_stem_of_another_input_size(client, server, model, pictures):
    other = client.stem(server.backbone, cut=server.cut, input_size=32)
    with pytest.raises(trunkline.IncompatibleModelError, match="input size"):
        model.predict(pictures(2)[0], stem=other)


def test_batch_over_the_limit(model, pictures):
    images = np.zeros((MAX_BATCH_ROWS + 1, 4, 4), np.uint8)
    with pytest.raises(trunkline.PayloadTooLargeError, match="batch_size="):
        model.predict(images, stem=False, batch_size=MAX_BATCH_ROWS + 1)


def test_deadline_already_past(client, model, pictures):
    images, _ = pictures(2)
    for call in (
        lambda: model.predict(images, timeout_s=0),
        lambda: client.extract(images, timeout_s=-1),
        lambda: client.upload(images, [0, 1], name="d", timeout_s=0),
        lambda: client.model(model.name, timeout_s=0),
    ):
        with pytest.raises(trunkline.DeadlineExceededError):
            call()


def test_evaluate(model, pictures):
    images, labels = pictures(30)
    report = model.evaluate(images, labels)
    assert report.accuracy == 1.0 and report.num_rows == 30 and report.num_failed == 0
    assert report.confusion_KK.trace() == 30
    wrong = model.evaluate(images, np.roll(labels, 1))
    assert wrong.accuracy == 0.0 and "accuracy 0.0000" in wrong.summary()
    with pytest.raises(trunkline.BadLabelsError, match="'9'"):
        model.evaluate(images, np.full(30, 9))
    with pytest.raises(trunkline.BadLabelsError):
        model.evaluate(images, labels[:-1])


def test_numbers(client, server, pictures, unique):
    images, labels = pictures(40)
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)
    data = client.upload(images, labels.astype(np.float32), name=unique("data"), stem=stem)
    model = client.train(data, name=unique("model")).result(120)
    prediction = model.predict(images)
    assert prediction.values.shape == (40, 1) and prediction.labels == [None] * 40
    with pytest.raises(trunkline.UnsupportedError):
        _ = prediction.probabilities
    assert model.evaluate(images, labels.astype(np.float32)).r2 > 0.5
