"""Groups, views and mixup, from the client to a server and back."""

import logging

import numpy as np
import pytest
import trunkline
from PIL import Image
from trunkline import _upload
from trunkline.cli.app import app
from typer.testing import CliRunner

AUGMENT = trunkline.Augment(flip=0, rotate=3)


@pytest.fixture
def stem(client, server):
    return client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)


@pytest.mark.parametrize("has_stem", [True, False])
def test_views_are_sent_once(client, stem, pictures, unique, has_stem):
    images, labels = pictures(6)
    keywords = {"views": 4, "augment": AUGMENT, "stem": stem if has_stem else None}
    first = client.upload(images, labels, name=unique("d"), **keywords)
    assert (first.num_rows, first.views, first.report.rows_sent, first.report.num_rows) == (24, 4, 24, 24)
    again = client.upload(images, labels, name=first.name, **keywords)
    assert (again.reference, again.report.rows_sent) == (first.reference, 0)
    # A seed of its own makes other views of the same pictures.
    other = client.upload(images, labels, name=first.name, seed=1, **keywords)
    assert (other.version, other.report.rows_sent) == (2, 18)
    # Fewer views are the first of them; the pictures alone are there too.
    keywords["views"] = 2
    assert client.upload(images, labels, name=unique("two"), **keywords).report.rows_sent == 0
    plain = client.upload(images, labels, name=unique("plain"), stem=keywords["stem"])
    assert (plain.report.rows_sent, plain.views, plain.num_groups) == (0, 1, 0)
    found = client.dataset(first.reference)
    assert (found.views, found.to_dict()["views"]) == (4, 4)


def test_a_function_of_ones_own_makes_views_and_repeats_send_nothing(client, pictures, unique):
    images, labels = pictures(4)

    def augment(image, random):
        return Image.fromarray(np.asarray(image) // int(random.integers(2, 5)))

    first = client.upload(images, labels, name=unique("d"), views=3, augment=augment)
    again = client.upload(images, labels, name=first.name, views=3, augment=augment)
    assert (again.reference, again.report.rows_sent) == (first.reference, 0)
    with pytest.raises(trunkline.InvalidArgumentError, match="view 1 of row 0: augment returned a ndarray"):
        client.upload(images, labels, name=unique("e"), views=2, augment=lambda image, random: np.asarray(image))


def test_groups_are_kept_and_of_every_view(client, stem, pictures, unique):
    images, labels = pictures(6)
    groups = ["p1", "p2", "p3", "p4", "p1", "p2"]
    data = client.upload(images, labels, name=unique("d"), stem=stem, groups=groups, views=2, augment=AUGMENT)
    assert (data.num_groups, data.views, data.num_rows) == (4, 2, 12)
    assert client.dataset(data.reference).num_groups == 4
    features = stem(images)
    of_features = client.upload_features(features, labels, name=unique("f"), space=stem.space, groups=groups)
    assert of_features.num_groups == 4
    regrouped = client.upload_features(features, labels, name=of_features.name, space=stem.space, groups=[1, 2] * 3)
    assert (regrouped.version, regrouped.report.rows_sent) == (2, 0)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"groups": [1, 2]}, "2 groups for 6 rows"),
        ({"groups": [1, 2, 3, None, 4, 5]}, "the group of row 3 is missing"),
        ({"groups": [1] * 6}, "all 6 rows are in one group"),
        ({"groups": "patient"}, "groups names a column, 'patient', and the images are no table"),
        ({"views": 0}, "views is 0; expected 1 to 64"),
        ({"views": 1000}, "views is 1000; expected 1 to 64"),
        ({"augment": AUGMENT}, "augment= says how changed views are made, and there are none"),
        ({"views": 2, "augment": 3}, "augment is a int; expected"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(fake, fake_client, pictures, keywords, match):
    images, labels = pictures(6)
    with pytest.raises(trunkline.InvalidArgumentError, match=match) as caught:
        fake_client.upload(images, labels, name="d", **keywords)
    assert caught.value.request_id == ""
    assert not fake.calls["FindMissingRows"] and not fake.calls["UploadRows"] and not fake.calls["CommitDataset"]


def test_views_of_what_are_no_pictures(fake_client, pictures):
    images, labels = pictures(6)
    vectors = trunkline.local_features(np.zeros((6, 3), np.float32), name="sensor", version="1")
    for keywords in ({"local": vectors}, {"local": vectors, "remote": False}):
        with pytest.raises(trunkline.InvalidArgumentError, match="views are made of pictures, and 'sensor' reads rows"):
            fake_client.upload(images, labels, name="d", views=2, **keywords)


def test_what_an_upload_would_cost_is_known_before_it_is_paid(fake, fake_client, pictures):
    images, labels = pictures(40)
    stem = fake_client.stem("fake_net", cut="half", threads=1)
    asked = sum(fake.calls.values())
    exact = fake_client.estimate_upload(images, stem=stem, views=3)
    about = fake_client.estimate_upload(images, views=3, augment=AUGMENT)
    assert sum(fake.calls.values()) == asked, "nobody is asked"
    sent = fake_client.upload(images, labels, name="d", stem=stem, views=3).report
    assert (exact.num_rows, exact.num_bytes) == (120, sent.feature_bytes_sent)
    sent = fake_client.upload(images, labels, name="e", views=3, augment=AUGMENT).report
    assert abs(about.num_bytes / sent.feature_bytes_sent - 1) < 0.1
    assert str(about).startswith("3 views of 40 pictures: 120 rows, about ")


def test_what_an_upload_costs_is_said_before_it_is_paid(fake, fake_client, pictures, monkeypatch):
    said = []
    monkeypatch.setattr(_upload, "is_seen", lambda wanted: wanted is not False)
    monkeypatch.setattr(_upload, "say", lambda text, wanted: said.append((text, fake.calls["UploadRows"])))
    images, labels = pictures(5)
    fake_client.upload(images, labels, name="d", views=4)
    (text, sent_before) = said.pop()
    assert text.startswith("d: 4 views of 5 pictures: 20 rows, about ") and text.endswith(" KB to send")
    assert sent_before == 0
    fake_client.upload(images, labels, name="d", views=4)  # nothing is left to send
    fake_client.upload(images, labels, name="e", views=3, seed=1, progress=False)
    fake_client.upload(images, labels, name="f")
    assert said == []


def test_predictions_are_means_over_views(client, stem, pictures, unique):
    images, labels = pictures(12)
    data = client.upload(images, labels, name=unique("d"), stem=stem)
    model = client.train(data, name=unique("m")).result(60)
    held, held_labels = pictures(5)

    def turned(image, random):
        return image.rotate(90 * int(random.integers(4)))

    found = model.predict(held, views=3, augment=turned, seed=5)
    from trunkline._views import with_views
    from trunkline.images import pictures as rows_of

    rows = with_views(rows_of(held), 3, turned, 5)
    every = model.predict([one.decoded() for one in rows])
    np.testing.assert_allclose(found.probabilities, every.probabilities.reshape(5, 3, -1).mean(axis=1), atol=1e-6)
    assert list(found.labels) == [model.class_names[one] for one in found.probabilities.argmax(axis=1)]
    assert (found.views, len(found)) == (3, 5)
    with pytest.raises(trunkline.UnsupportedError, match="not of the average over their views"):
        found.sets()
    report = model.evaluate(held, held_labels, views=3, augment=turned)
    assert report.num_rows == 5
    assert model.predict(held, views=1).views == 1


def test_a_picture_that_cannot_be_read_fails_alone(client, stem, pictures, unique):
    images, labels = pictures(9)
    data = client.upload(images, labels, name=unique("d"), stem=stem)
    model = client.train(data, name=unique("m")).result(60)
    found = model.predict([images[0], b"no picture", images[2]], views=3, augment=AUGMENT)
    assert list(found.errors) == [1]
    assert isinstance(found.errors[1], trunkline.CorruptImageError)
    assert np.isnan(found.probabilities[1]).all() and found.labels[1] is None
    assert np.isfinite(found.probabilities[[0, 2]]).all()
    with pytest.raises(trunkline.CorruptImageError):
        model.predict([b"no picture"], views=2)


def test_an_older_cluster_makes_no_dataset_without_what_was_asked_for(fake, pictures):
    fake.faults.is_old = True
    images, labels = pictures(6)
    with trunkline.connect(fake.address, token=fake.token, timeout_s=20.0) as client:
        with pytest.raises(trunkline.UnsupportedError, match="does not know groups"):
            client.upload(images, labels, name="d", groups=[1, 2, 3, 4, 5, 6])
        with pytest.raises(trunkline.UnsupportedError, match="does not know views of pictures"):
            client.upload(images, labels, name="d", views=2)
        assert client.upload(images, labels, name="d").views == 1


def test_mixup_reaches_the_cluster(fake, fake_client, pictures, caplog):
    caplog.set_level(logging.ERROR)
    images, labels = pictures(9)
    data = fake_client.upload(images, labels, name="d")
    job = fake_client.train(data, name="m", optimiser=trunkline.Optimiser(mixup=0.3))
    taken = job.status().spec.fit
    assert (taken.optimiser.mixup, taken.solver) == (0.3, "adamw")
    for keywords, match in (
        ({"solver": "lbfgs"}, "mixup is for what learns in minibatches"),
        ({"head": "prototype"}, "mixup is for what learns in minibatches"),
        ({"ordinal": ["0", "1", "2"]}, "classes in order are not mixed"),
    ):
        with pytest.raises(trunkline.InvalidArgumentError, match=match):
            fake_client.train(data, name="m", optimiser=trunkline.Optimiser(mixup=0.3), **keywords)
    for mixup in (-1, 1000, "much"):
        with pytest.raises(trunkline.InvalidArgumentError, match=r"mixup|wrong type"):
            fake_client.train(data, name="m", optimiser=trunkline.Optimiser(mixup=mixup))


class TestCommandLine:
    @pytest.fixture
    def run(self, fake, monkeypatch):
        monkeypatch.setenv("TRUNKLINE_ADDRESS", fake.address)
        monkeypatch.setenv("TRUNKLINE_TOKEN", fake.token)
        return lambda *words: CliRunner().invoke(app, [str(one) for one in words])

    @pytest.fixture
    def table(self, tmp_path, pictures):
        images, labels = pictures(12)
        lines = ["path,label,patient"]
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(tmp_path / f"{row:02}.png")
            lines.append(f"{row:02}.png,{'abc'[label]},p{row // 2}")
        path = tmp_path / "table.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    def test_groups_and_views(self, run, fake, table):
        words = ("d", table, "--groups-column", "patient", "--views", 3, "--augment", "flip=0,crop=0.9")
        estimate = run("upload", *words, "--estimate")
        assert estimate.stdout.startswith("3 views of 12 pictures: 36 rows, about ")
        assert not fake.calls["UploadRows"]
        done = run("upload", *words)
        assert done.exit_code == 0 and "36 rows (3 views of each picture), 36 sent" in done.stdout
        assert "36, 3 views each of 12 pictures, in 6 groups" in run("datasets", "d").stdout
        assert "36 rows (3 views of each picture), 0 sent" in run("upload", *words).stdout
        assert run("train", "d", "--name", "m", "--mixup", 0.2).exit_code == 0
        assert run("predict", "m", table, "--views", 2, "--augment", "flip=0").exit_code == 0
        assert "on 12 rows" in run("evaluate", "m", table, "--views", 2).stdout

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--groups-column", "camera"), "no column of groups"),
            (("--augment", "flip=0"), "there are none"),
            (("--views", 2, "--augment", "zoom=2"), "expected NAME=NUMBER"),
            (("--views", 2, "--augment", "flip=7"), "flip is 7"),
        ],
    )
    def test_what_is_refused(self, run, table, words, said):
        found = run("upload", "d", table, *words)
        assert found.exit_code != 0 and said in found.stderr and "next:" in found.stderr
