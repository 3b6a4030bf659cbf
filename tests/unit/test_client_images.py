"""Pictures in whatever form, and the ids that they get."""

import io

import numpy as np
import pytest
from PIL import Image
from trunkline import errors
from trunkline.images import labelled, picture_paths, pictures, read_csv, read_folder
from trunkline_wire.limits import MAX_IMAGE_BYTES
from trunkline_wire.preprocess import preprocess_image
from trunkline_wire.rows import content_digest
from trunkline_wire.specs import Preprocessing

PREPROCESSING = Preprocessing(8, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 255, (4, 12, 10, 3)).astype(np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_gives_the_same_pixels(array, tmp_path):
    (tmp_path / "a.png").write_bytes(png(array[0]))
    expected = preprocess_image(Image.fromarray(array[0]), PREPROCESSING)
    for form in (
        array[:1],
        [array[0]],
        [Image.fromarray(array[0])],
        Image.fromarray(array[0]),
        [png(array[0])],
        png(array[0]),
        [tmp_path / "a.png"],
        [str(tmp_path / "a.png")],
        tmp_path / "a.png",
        str(tmp_path),
        np.array([str(tmp_path / "a.png")]),
        iter([array[0]]),
    ):
        (row,) = pictures(form)
        np.testing.assert_array_equal(row.preprocessed(PREPROCESSING), expected)
        (again,) = pictures([row.encoded()])
        np.testing.assert_array_equal(again.preprocessed(PREPROCESSING), expected)


def test_grey_pictures(array):
    grey = array[..., 0]
    for form in (grey, grey[..., None]):
        row = pictures(form)[2]
        np.testing.assert_array_equal(np.asarray(row.decoded())[..., 1], grey[2])


def test_files_travel_as_they_are_and_are_named_by_their_bytes(array, tmp_path):
    (tmp_path / "a.png").write_bytes(png(array[0]))
    (row,) = pictures(tmp_path / "a.png")
    assert row.encoded() == png(array[0]) and row.digest() == content_digest(png(array[0]))
    assert pictures(array)[1].digest() == content_digest(array[1])
    assert len({row.digest() for row in pictures(array)}) == 4


def test_anything_with_an_array_inside(array):
    class Tensor:
        def __array__(self, dtype=None, copy=None):
            return array

    assert len(pictures(Tensor())) == 4


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_tables(library, array, tmp_path):
    module = pytest.importorskip(library)
    for row in range(4):
        (tmp_path / f"{row}.png").write_bytes(png(array[row]))
    table = module.DataFrame(
        {"path": [str(tmp_path / f"{row}.png") for row in range(4)], "label": list("abab"), "score": [0.1, 2, 3, 4]}
    )
    found, labels = labelled(table, None)
    assert len(pictures(found)) == 4 and list(labels) == list("abab")
    assert list(labelled(table, "score")[1]) == [0.1, 2, 3, 4]
    with pytest.raises(errors.BadLabelsError, match="no column of labels"):
        labelled(table, "colour")
    with pytest.raises(errors.InvalidArgumentError, match="no column of paths"):
        pictures(table.rename(columns={"path": "where"}) if library == "pandas" else table.rename({"path": "where"}))


def test_folder_of_class_folders(array, tmp_path):
    for row, name in enumerate(["b/1.png", "b/deep/2.PNG", "a/3.jpg", "a/notes.txt"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(array[row]))
    (tmp_path / ".hidden").mkdir()
    paths, labels = read_folder(tmp_path)
    assert [path.name for path in paths] == ["3.jpg", "1.png", "2.PNG"] and labels == ["a", "b", "b"]
    assert labelled(str(tmp_path), None) == (paths, labels)
    assert len(picture_paths(tmp_path)) == 3
    with pytest.raises(errors.InvalidArgumentError, match="not a folder"):
        read_folder(tmp_path / "a" / "notes.txt")
    with pytest.raises(errors.EmptyBatchError):
        read_folder(tmp_path / "a")


def test_csv(tmp_path):
    (tmp_path / "t.csv").write_text("file,class\na.png,cat\nb.png,dog\n")
    assert read_csv(tmp_path / "t.csv") == ([tmp_path / "a.png", tmp_path / "b.png"], ["cat", "dog"])
    (tmp_path / "t.csv").write_text("file\n")
    with pytest.raises(errors.EmptyBatchError):
        read_csv(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(errors.InvalidArgumentError, match="it has a, b"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(errors.InvalidArgumentError, match="cannot be read"):
        read_csv(tmp_path / "missing.csv")


BAD = {
    "floats": (np.zeros((2, 4, 4, 3)), errors.DtypeMismatchError, "uint8"),
    "channels first": (np.zeros((2, 3, 8, 8), np.uint8), errors.ShapeMismatchError, "np.moveaxis"),
    "four channels": (np.zeros((2, 8, 8, 4), np.uint8), errors.ShapeMismatchError, "fourth"),
    "single": (np.zeros((8, 8, 3), np.uint8), errors.ShapeMismatchError, "Put it in a list"),
    "flat": (np.zeros((8, 8), np.uint8), errors.ShapeMismatchError, "single"),
    "five dimensions": (np.zeros((1, 1, 8, 8, 3), np.uint8), errors.ShapeMismatchError, "height"),
    "no rows": (np.zeros((0, 8, 8), np.uint8), errors.EmptyBatchError, "no images"),
    "nothing": ([], errors.EmptyBatchError, "no images"),
    "hole": ([np.zeros((8, 8), np.uint8), None], errors.InvalidArgumentError, "row 1"),
}


@pytest.mark.parametrize(("images", "kind", "said"), BAD.values(), ids=BAD)
def test_what_is_no_picture(images, kind, said):
    with pytest.raises(kind, match=said):
        pictures(images)


def test_files_that_are_none(tmp_path):
    missing, broken, huge = (pictures(tmp_path / name)[0] for name in ("missing.png", "broken.png", "huge.png"))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(errors.CorruptImageError, match=r"row 0 \(missing.png\): No such file"):
        missing.encoded()
    with pytest.raises(errors.CorruptImageError, match=r"broken.png"):
        broken.decoded()
    with pytest.raises(errors.PayloadTooLargeError, match="Scale it down"):
        huge.encoded()
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.EmptyBatchError):
        pictures(tmp_path / "empty")


def test_truncated_pil_picture(array):
    data = png(array[0])
    with pytest.raises(errors.CorruptImageError):
        pictures([Image.open(io.BytesIO(data[: len(data) // 2]))])


def test_no_labels_at_all(array):
    with pytest.raises(errors.BadLabelsError, match="there are no labels"):
        labelled(array, None)
