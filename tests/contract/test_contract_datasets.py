"""Uploads, and every way in which they can be wrong."""

import dataclasses

import numpy as np
import pytest
import trunkline
from PIL import Image
from trunkline_wire.specs import IMAGES


@pytest.fixture
def stem(client, server):
    return client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)


def test_second_upload_sends_nothing(client, stem, pictures, unique):
    images, labels = pictures(12)
    first = client.upload(images, labels, name=unique("d"), stem=stem)
    again = client.upload(images, labels, name=first.name, stem=stem)
    assert first.report.rows_sent == 12
    assert first.report.feature_bytes_sent == 12 * 2 * int(np.prod(stem.feature_shape))
    assert (again.report.rows_sent, again.report.feature_bytes_sent, again.report.chunks_sent) == (0, 0, 0)
    assert (again.version, again.digest) == (first.version, first.digest)
    assert first.num_rows == 12 and first.class_names == ("0", "1", "2")


def test_only_new_rows_are_sent(client, stem, pictures, unique):
    images, labels = pictures(9)
    first = client.upload(images[:6], labels[:6], name=unique("d"), stem=stem)
    more = client.upload(images, labels, name=first.name, stem=stem)
    assert (more.report.rows_sent, more.num_rows, more.version) == (3, 9, first.version + 1)
    subset = client.upload(images[2:5], labels[2:5], name=unique("fold"), stem=stem)
    assert subset.report.rows_sent == 0


def test_equal_rows_are_sent_once(client, pictures, unique):
    images, labels = pictures(3)
    data = client.upload(np.concatenate([images] * 3), np.tile(labels, 3), name=unique("d"))
    assert (data.report.rows_sent, data.num_rows) == (3, 9)


def test_labels_are_part_of_the_digest(client, pictures, unique):
    images, labels = pictures(6)
    one = client.upload(images, labels, name=unique("d"))
    other = client.upload(images, labels[::-1], name=one.name)
    assert other.report.rows_sent == 0
    assert (other.version, other.digest != one.digest) == (2, True)


def test_images_travel_as_they_are(client, pictures, unique, tmp_path):
    images, labels = pictures(6)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row}.png")
    data = client.upload(tmp_path / "photos", name=unique("d"))
    sizes = sum(path.stat().st_size for path in (tmp_path / "photos").rglob("*.png"))
    assert data.report.feature_bytes_sent == sizes
    assert data.space == IMAGES and data.class_names == ("class0", "class1", "class2")


def test_get_and_list(client, pictures, unique):
    images, labels = pictures(4)
    made = client.upload(images, labels, name=unique("d"))
    assert client.dataset(made.name) == made
    assert client.dataset(made.reference).digest == made.digest
    assert made in client.datasets()
    assert made.create_time is not None


def test_numbers_to_be_predicted(client, pictures, unique):
    images, labels = pictures(4)
    one = client.upload(images, labels * 0.5, name=unique("one"))
    two = client.upload(images, np.stack([labels, labels], axis=1) * 0.5, name=unique("two"))
    assert (one.class_names, one.record.num_targets, two.record.num_targets) == ((), 1, 2)


@pytest.mark.parametrize("reference", ["nobody", "nobody@3"])
def test_unknown_dataset(client, reference):
    with pytest.raises(trunkline.NotFoundError):
        client.dataset(reference)


@pytest.mark.parametrize("reference", ["../etc", "", "a@b", "a" * 200])
def test_names_that_are_none(client, reference, pictures):
    with pytest.raises(trunkline.InvalidArgumentError):
        client.dataset(reference)
    with pytest.raises(trunkline.InvalidArgumentError):
        client.upload(*pictures(4), name=reference or "/")


BAD_LABELS = {
    "missing": [0, 1, None, 1],
    "nan": [0.5, 1.0, float("nan"), 2.0],
    "too few": [0, 1, 1],
    "one class": [1, 1, 1, 1],
    "mixed": [0, "cat", 1, "dog"],
    "empty text": ["a", "b", "", "a"],
    "none at all": None,
}


@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_are_found_before_anything_is_sent(client, server, pictures, labels):
    with pytest.raises(trunkline.BadLabelsError):
        client.upload(pictures(4)[0], labels, name="d")
    if server.fake is not None:
        assert not server.fake.rows["default"]


BAD_FEATURES = {
    "shape": (lambda good: good[:, :, 1:], trunkline.ShapeMismatchError),
    "channels": (lambda good: good[:, 1:], trunkline.ShapeMismatchError),
    "dtype": (lambda good: (good * 9).astype(np.int32), trunkline.DtypeMismatchError),
    "nan": (lambda good: np.where(np.arange(len(good))[:, None, None, None] == 2, np.nan, good), None),
    "infinite": (lambda good: good / 0.0, trunkline.NotFiniteError),
    "empty": (lambda good: good[:0], trunkline.EmptyBatchError),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("spoil", "error"), BAD_FEATURES.values(), ids=BAD_FEATURES)
def test_bad_features_are_found_before_anything_is_sent(client, server, stem, pictures, spoil, error):
    images, labels = pictures(4)
    features = spoil(stem(images).astype(np.float32))
    with pytest.raises(error or trunkline.NotFiniteError):
        client.upload_features(features, labels[: len(features)], name="d", space=stem.space)
    if server.fake is not None:
        assert not server.fake.rows["default"]


def test_features_at_hand(client, stem, pictures, unique):
    images, labels = pictures(4)
    data = client.upload_features(stem(images), labels, name=unique("d"), space=stem.space)
    assert (data.num_rows, data.report.rows_sent, data.space) == (4, 4, stem.space)


def test_features_of_other_weights(client, server, stem, pictures):
    images, labels = pictures(4)
    other = dataclasses.replace(stem.space, fingerprint="0" * 64)
    with pytest.raises(trunkline.IncompatibleModelError):
        client.upload_features(stem(images), labels, name="d", space=other)
    if server.fake is not None:
        assert not server.fake.calls["FindMissingRows"] and not server.fake.calls["UploadRows"]


def test_corrupt_image_is_named(client, pictures, tmp_path):
    images, labels = pictures(3)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    rows = [Image.fromarray(images[0]), tmp_path / "broken.png", images[2]]
    with pytest.raises(trunkline.CorruptImageError, match=r"row 1 \(broken.png\)"):
        client.upload(rows, labels, name="d")


BAD_IMAGES = {
    "floats": (np.zeros((3, 8, 8, 3)), trunkline.DtypeMismatchError),
    "channels": (np.zeros((3, 8, 8, 5), np.uint8), trunkline.ShapeMismatchError),
    "channels first": (np.zeros((3, 3, 8, 8), np.uint8), trunkline.ShapeMismatchError),
    "no pixels": (np.zeros((3, 0, 8, 3), np.uint8), trunkline.ShapeMismatchError),
    "one image": (np.zeros((8, 8, 3), np.uint8), trunkline.ShapeMismatchError),
    "none": (np.zeros((0, 8, 8, 3), np.uint8), trunkline.EmptyBatchError),
    "empty list": ([], trunkline.EmptyBatchError),
}


@pytest.mark.parametrize(("images", "error"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_what_is_no_image(client, images, error):
    with pytest.raises(error):
        client.upload(images, list(range(len(images))), name="d")
