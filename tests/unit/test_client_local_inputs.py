"""Which rows go into which local model."""

import numpy as np
import pytest
from PIL import Image
from trunkline import errors, local_features, local_model
from trunkline._local_inputs import GivenImages, bind_local

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)


def mean(name="mean", **keywords):
    return local_model(lambda x: x.reshape(len(x), -1).mean(axis=1), name=name, version="1", **keywords)


def features(bound):
    return bound.local.compute(bound.rows, range(bound.num_rows))


def test_images_go_in():
    as_they_are, decoded = bind_local([mean("a"), mean("b", input_size=6)], None, GivenImages(IMAGES))
    np.testing.assert_allclose(features(as_they_are), features(decoded))
    assert (as_they_are.name, as_they_are.num_rows, as_they_are.codec) == ("a", 4, "float32")


def test_an_iterator_of_images_serves_everyone():
    given = GivenImages(iter(IMAGES))
    one, other = bind_local([mean("a"), mean("b", input_size=6)], None, given)
    assert one.num_rows == other.num_rows == len(given.pictures) == 4


def test_other_rows_go_in():
    table = np.arange(8.0).reshape(4, 2)
    (alone,) = bind_local(mean(), table, GivenImages(None))
    assert features(alone).ravel().tolist() == [0.5, 2.5, 4.5, 6.5]
    first, second = bind_local([mean("a"), mean("b", input_size=6)], {"a": table}, GivenImages(IMAGES))
    assert features(first).ravel().tolist() == [0.5, 2.5, 4.5, 6.5] and second.num_rows == 4


def test_features_at_hand():
    rows = np.random.default_rng(0).random((3, 2)).astype(np.float32)
    (bound,) = bind_local(local_features(rows, name="s", version="1"), None, GivenImages(None))
    assert (bound.name, bound.num_rows, bound.space.local_model) == ("s", 3, "s")
    (batch,) = bound.feed().batches(10)
    np.testing.assert_array_equal(batch.rows, rows)
    assert len(set(bound.source().row_ids)) == 3


def test_width_is_found_before_anything_is_asked_of_the_space():
    (bound,) = bind_local(mean(), None, GivenImages(IMAGES))
    assert bound.local.width is None
    assert bound.space == bound.local.space and bound.local.width == 1


def test_files_are_decoded_for_a_size_only(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    for images in ([tmp_path / "a.png"], [str(tmp_path / "a.png")], tmp_path, [(tmp_path / "a.png").read_bytes()]):
        with pytest.raises(errors.InvalidArgumentError, match="the images are files"):
            bind_local(mean(), None, GivenImages(images))
    (bound,) = bind_local(mean(input_size=6), None, GivenImages(tmp_path))
    assert features(bound).ravel().tolist() == [pytest.approx(IMAGES[0].mean())]


@pytest.mark.parametrize(
    ("local", "inputs", "images", "said"),
    [
        (lambda: len, None, IMAGES, "expected a local model"),
        (lambda: [mean(), 7], None, IMAGES, "local is a int"),
        (lambda: [mean(), mean()], None, IMAGES, "two local models are called 'mean'"),
        (lambda: mean(), None, None, "no rows for the local model 'mean'"),
        (lambda: None, IMAGES, IMAGES, "there is none"),
        (lambda: local_features(np.ones((4, 1)), name="s", version="1"), IMAGES, IMAGES, "there is none"),
        (lambda: [mean("a"), mean("b")], IMAGES, IMAGES, "says nothing of which of 2"),
        (lambda: mean(), {"other": IMAGES}, IMAGES, "has rows for 'other'; the local models are mean"),
        (lambda: mean(input_size=6), None, None, "no rows"),
    ],
    ids=range(9),
)
def test_what_does_not_go_together(local, inputs, images, said):
    with pytest.raises(errors.InvalidArgumentError, match=said):
        bind_local(local(), inputs, GivenImages(images))


def test_no_images_for_a_backbone():
    with pytest.raises(errors.InvalidArgumentError, match="images is None"):
        _ = GivenImages(None).pictures
