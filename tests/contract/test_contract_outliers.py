"""How unlike its training rows a row is: asked for, answered, and where nobody can say."""

import io

import numpy as np
import pytest
import trunkline
from PIL import Image


@pytest.fixture
def images(pictures):
    """Make pictures like those of ``pictures``, and some that are unlike them."""
    known, labels = pictures(12)
    strange = np.full_like(known[:4], 255)
    return known, labels, strange


@pytest.fixture
def model(client, server, pictures, unique):
    """Train a model on pictures."""
    data = client.upload(*pictures(60), name=unique("data"), input_size=server.input_size)
    return client.train(data, name=unique("model")).result(120)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("batch_size", [None, 3])
def test_strange_rows_are_told_from_usual_ones(model, images, batch_size):
    known, labels, strange = images
    found = model.predict(np.concatenate([known, strange]), outliers=True, batch_size=batch_size)
    assert model.has_outlier_scores and model.to_dict()["has_outlier_scores"]
    assert found.outlier_distances.shape == found.outlier_scores.shape == (16,)
    assert found.outlier_distances.dtype == found.outlier_scores.dtype == np.float32
    assert ((found.outlier_scores >= 0) & (found.outlier_scores <= 1)).all()
    assert found.outlier_distances[12:].min() > found.outlier_distances[:12].max()
    assert found.unusual(1.0)[12:].all() and not found.unusual(1.0)[:12].all()
    assert found.indices[:12].tolist() == labels.tolist()
    assert found[15].outlier_score == 1.0 and found[15].outlier_distance == found.outlier_distances[15]
    row = found.to_dict()["rows"][15]
    assert (row["outlier_score"], row["outlier_distance"]) == (1.0, float(found.outlier_distances[15]))


def test_nobody_asked(model, images):
    found = model.predict(images[0])
    assert found.outlier_scores is None and found.outlier_distances is None and found[0].outlier_score is None
    assert "outlier_score" not in found.to_dict()["rows"][0]
    with pytest.raises(trunkline.UnsupportedError, match=r"not asked for.*outliers=True"):
        found.unusual()


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_shares_that_are_none(model, images, share):
    with pytest.raises(trunkline.InvalidArgumentError, match="share is"):
        model.predict(images[0], outliers=True).unusual(share)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_rows_that_fail_have_no_score(model, images, batch_size):
    rows = [png(one) for one in images[0]]
    rows[5] = rows[5][:40]
    found = model.predict(rows, stem=False, outliers=True, batch_size=batch_size)
    assert set(found.errors) == {5}
    assert np.isnan(found.outlier_scores[5]) and np.isnan(found.outlier_distances[5])
    assert np.isfinite(np.delete(found.outlier_distances, 5)).all()
    assert not found.unusual()[5] and "outlier_score" not in found.to_dict()["rows"][5]


def test_features_at_hand(client, server, pictures, images, unique):
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)
    data = client.upload(*pictures(60), name=unique("data"), stem=stem)
    model = client.train(data, name=unique("model")).result(120)
    by_hand = model.predict_features(stem(images[2]), space=stem.space, outliers=True)
    np.testing.assert_allclose(
        by_hand.outlier_distances, model.predict(images[2], stem=stem, outliers=True).outlier_distances, rtol=0.01
    )


def test_a_head_on_a_map_has_none(client, server, pictures, unique):
    data = client.upload(*pictures(30), name=unique("data"), input_size=server.input_size)
    model = client.train(data, name=unique("model"), head="conv", epochs=2).result(120)
    assert not model.has_outlier_scores
    with pytest.raises(trunkline.UnsupportedError, match="its head reads a map"):
        model.predict(pictures(3)[0], outliers=True)
    assert len(model.predict(pictures(3)[0])) == 3


class TestOldCluster:
    """It takes no notice of what it does not know."""

    def test_a_model_that_it_trained(self, fake, fake_client, pictures):
        fake.faults.is_old = True
        fake_client.upload(*pictures(12), name="d")
        model = fake_client.train("d", name="m").result(20)
        for call in (lambda x: model.predict(x, outliers=True), lambda x: model.predict_features(x, outliers=True)):
            with pytest.raises(trunkline.UnsupportedError, match="m@1 has no outlier scores: an older cluster"):
                call(pictures(3)[0])
        assert not fake.calls["Predict"]
        assert len(model.predict(pictures(3)[0])) == 3

    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_a_part_of_it_that_is_older_than_the_model(self, fake, fake_client, pictures, batch_size):
        fake_client.upload(*pictures(12), name="d")
        model = fake_client.train("d", name="m").result(20)
        fake.faults.is_old = True
        with pytest.raises(trunkline.UnsupportedError, match=r"of an earlier version.*upgrade"):
            model.predict(pictures(6)[0], outliers=True, batch_size=batch_size)


def test_a_server_refuses_it_itself(fake, fake_client, pictures):
    """The client could be wrong about a model; who serves it knows."""
    import dataclasses

    fake_client.upload(*pictures(12), name="d")
    model = fake_client.train("d", name="m", head="conv").result(20)
    model.record = dataclasses.replace(model.record, has_outlier_scores=True)
    with pytest.raises(trunkline.UnsupportedError, match="train it again"):
        model.predict(pictures(3)[0], outliers=True)
