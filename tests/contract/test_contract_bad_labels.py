"""Labels that do not go with the model, the data or what can be held: each is said as soon as it is known."""

import numpy as np
import pytest
import trunkline
from trunkline_wire import sizes


@pytest.fixture
def data(client, server, pictures, unique):
    """Upload a dataset of three classes, with their pictures."""
    images, labels = pictures(30)
    return client.upload(images, labels, name=unique("d"), input_size=server.input_size)


@pytest.fixture
def model(client, server, data, unique):
    """Train on it."""
    return client.train(data, name=unique("m"), backbone=server.backbone, embedding="pooled").result(120)


def test_classes_that_the_rows_to_measure_do_not_have(model, pictures):
    images, labels = pictures(30)
    some = labels != 2
    report = model.evaluate(images[some], labels[some], stem=False)
    assert [one.support for one in report.classes] == [10, 10, 0]
    assert report.num_rows == 20 and report.confusion_KK[2].sum() == 0
    assert np.isfinite([report.accuracy, report.macro_f1, report.calibration_error]).all()


def test_classes_that_the_model_does_not_have(model, pictures):
    images, labels = pictures(6)
    with pytest.raises(trunkline.BadLabelsError, match=r"knows no class '7'") as caught:
        model.evaluate(images, np.where(labels == 2, 7, labels), stem=False)
    assert "0, 1, 2" in caught.value.hint


@pytest.mark.parametrize("labels", [[0, 1, None], [0, 1, float("nan")], [0, 1]], ids=["none", "nan", "too few"])
def test_labels_to_measure_by_that_are_missing(model, pictures, labels):
    images, _ = pictures(3)
    with pytest.raises(trunkline.BadLabelsError):
        model.evaluate(images, labels, stem=False)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"0": -1.0}, "at least 0; got -1"),
        ({"0": float("nan")}, "at least 0; got nan"),
        ({"0": 0, "1": 0, "2": 0}, "all class weights are 0"),
        ({"7": 1.0}, "'7', which is none"),
    ],
    ids=str,
)
def test_class_weights_that_cannot_be(client, data, unique, weights, said):
    before = len(client.jobs())
    with pytest.raises(trunkline.InvalidArgumentError, match=said):
        client.train(data, name=unique("m"), class_weights=weights)
    assert len(client.jobs()) == before


def test_more_answers_than_a_training_holds(fake, fake_client, pictures, monkeypatch):
    images, labels = pictures(30)
    data = fake_client.upload(images, labels, name="d", input_size=8)
    monkeypatch.setattr(sizes, "MAX_ANSWERS", 89)
    with pytest.raises(trunkline.BadLabelsError, match=r"30 rows of 3 classes.*Leave rare classes out"):
        fake_client.train(data, name="m")
    assert fake.calls["SubmitJob"] == 0
