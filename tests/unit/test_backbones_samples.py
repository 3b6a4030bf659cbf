"""Sample pictures: the same ones whoever asks, much like photographs, and an operator's own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import preprocess_image
from trunkline_wire.specs import Preprocessing
from trunkline_worker.backbones import samples as module
from trunkline_worker.backbones.leaves import LEAVES_VERSION, dead_leaves
from trunkline_worker.backbones.samples import BUNDLED, CALIBRATION_PICTURES, Samples


def _at(size: int) -> Preprocessing:
    return Preprocessing(size, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


AT_64 = _at(64)


def _jpeg_bytes(picture: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return len(buffer.getvalue())


def _write(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 70), (colour, 255 - colour, 100)).save(path)


def _colours(pictures_BHWC: np.ndarray) -> list[int]:
    return [int(value) for value in pictures_BHWC[:, 0, 0, 0]]


def test_a_picture_is_the_same_whoever_asks_for_it() -> None:
    pictures = BUNDLED.pictures(AT_64, 4)
    assert (pictures.shape, pictures.dtype) == ((4, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(BUNDLED.pictures(AT_64, 1, start=3)[0], pictures[3])
    np.testing.assert_array_equal(BUNDLED.pictures(AT_64, 4), pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_a_picture_shows_the_same_at_every_size() -> None:
    small, large = (BUNDLED.pictures(_at(size), 1)[0] for size in (64, 192))
    shrunk = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BICUBIC))
    assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.95  # crops may differ by a part of a pixel


def test_whoever_changes_the_pictures_must_change_their_version() -> None:
    means = [dead_leaves(index).mean() for index in range(3)]
    spreads = [dead_leaves(index).std() for index in range(3)]
    assert LEAVES_VERSION == 1
    assert means == pytest.approx([106.713, 126.290, 130.066], abs=0.01)
    assert spreads == pytest.approx([48.030, 63.041, 49.868], abs=0.01)


@pytest.mark.parametrize("size", [96, 224])
def test_generated_pictures_are_like_photographs(size: int) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    photographs = [preprocess_image(Image.fromarray(one), _at(size)) for one in datasets.load_sample_images().images]
    pictures = BUNDLED.pictures(_at(size), 12)
    expected = np.mean([_jpeg_bytes(one) for one in photographs])
    sizes = [_jpeg_bytes(one) for one in pictures]
    assert 0.75 * expected < np.mean(sizes) < 1.35 * expected
    assert min(sizes) > expected / 3 and max(sizes) < 2 * expected
    for one in pictures:
        assert one.std() > 20
        assert np.ptp(one.astype(int), axis=2).mean() > 8  # in colour


def test_errors_are_measured_on_other_pictures_than_stems_are_calibrated_on() -> None:
    calibration, held_out = BUNDLED.calibration(AT_64), BUNDLED.held_out(AT_64, 3)
    assert (len(calibration), len(held_out)) == (CALIBRATION_PICTURES, 3)
    np.testing.assert_array_equal(held_out, BUNDLED.pictures(AT_64, 3, start=CALIBRATION_PICTURES))
    assert not {one.tobytes() for one in calibration} & {one.tobytes() for one in held_out}


def test_a_folder_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path / "a" / f"{number}.png", 10 * number)
        _write(tmp_path / "b" / f"other {3 - number}.PNG", 10 * number)
    first, renamed = Samples.from_folder(tmp_path / "a"), Samples.from_folder(str(tmp_path / "b"))
    assert first.num_pictures == 3
    assert first.description == "3 pictures of the operator's"
    assert first.digest == renamed.digest
    np.testing.assert_array_equal(first.pictures(AT_64, 3), renamed.pictures(AT_64, 3))
    _write(tmp_path / "b" / "other 1.PNG", 77)
    changed = Samples.from_folder(tmp_path / "b")
    assert len({first.digest, changed.digest, BUNDLED.digest}) == 3
    assert len({one.calibration_digest for one in (first, changed, BUNDLED)}) == 3
    assert first.calibration_digest == renamed.calibration_digest != first.digest


def test_pictures_of_a_folder_are_prepared_as_a_clients_are(tmp_path: Path) -> None:
    picture = dead_leaves(0)
    Image.fromarray(picture).save(tmp_path / "one.png")
    expected = preprocess_image(Image.fromarray(picture), AT_64)
    np.testing.assert_array_equal(Samples.from_folder(tmp_path).pictures(AT_64, 5), expected[None])


def test_files_of_subfolders_count_and_hidden_or_other_ones_do_not(tmp_path: Path) -> None:
    _write(tmp_path / "cats" / "1.png", 10)
    _write(tmp_path / "dogs" / "small" / "1.jpeg", 20)
    _write(tmp_path / "dogs" / "2.webp", 30)
    _write(tmp_path / ".cache" / "3.png", 40)
    _write(tmp_path / ".4.png", 50)
    _write(tmp_path / "5.bmp", 60)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    assert Samples.from_folder(tmp_path).num_pictures == 3


def test_of_many_pictures_every_subfolder_has_its_share(tmp_path: Path) -> None:
    for number in range(12):
        _write(tmp_path / f"class{number // 4}" / f"{number:02}.png", 20 * number)
    few = Samples.from_folder(tmp_path, max_pictures=3)
    assert sorted(_colours(few.pictures(AT_64, 3))) == [0, 80, 160]


def test_equal_files_count_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        _write(tmp_path / name, 10)
    _write(tmp_path / "d.png", 20)
    assert Samples.from_folder(tmp_path).num_pictures == 2


@pytest.mark.parametrize(("num", "for_calibration"), [(1, 1), (2, 1), (5, 3), (7, 3), (8, 3)])
def test_few_pictures_are_split_half_and_half(
    num: int, for_calibration: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALIBRATION_PICTURES", 3)
    for number in range(num):
        _write(tmp_path / f"{number}.png", 10 * number)
    own = Samples.from_folder(tmp_path)
    calibration, held_out = _colours(own.calibration(AT_64)), _colours(own.held_out(AT_64, 100))
    assert len(calibration) == for_calibration
    if num == 1:
        assert calibration == held_out
    else:
        assert sorted(calibration + held_out) == [10 * number for number in range(num)]
    assert len(own.held_out(AT_64, 1)) == 1


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    for folder, words in ((tmp_path / "gone", "no folder"), (tmp_path / "notes.txt", "no folder"), (tmp_path, ".webp")):
        with pytest.raises(WireError, match=words) as caught:
            Samples.from_folder(folder)
        assert caught.value.code is ErrorCode.NOT_FOUND


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "whole.png", 10)
    _write(tmp_path / "half.png", 20)
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:100])
    with pytest.raises(WireError, match=r"half\.png") as caught:
        Samples.from_folder(tmp_path)
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


def test_a_file_too_large_is_named_and_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "large.png", 10)
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 10)
    monkeypatch.setattr("trunkline_wire.preprocess.MAX_IMAGE_BYTES", 10)
    with pytest.raises(WireError, match=r"large\.png.*11 bytes") as caught:
        Samples.from_folder(tmp_path)
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


def test_pictures_that_change_after_the_folder_was_read_are_not_used(tmp_path: Path) -> None:
    _write(tmp_path / "one.png", 10)
    own = Samples.from_folder(tmp_path)
    _write(tmp_path / "one.png", 20)
    with pytest.raises(WireError, match=r"one\.png.*changed") as caught:
        own.pictures(AT_64, 1)
    assert caught.value.code is ErrorCode.CORRUPT_DATA
    (tmp_path / "one.png").unlink()
    with pytest.raises(WireError, match=r"one\.png") as caught:
        own.pictures(AT_64, 1)
    assert caught.value.code is ErrorCode.NOT_FOUND


@pytest.mark.parametrize(("num", "start"), [(0, 0), (1, 2), (1, -1), (-1, 0)])
def test_no_pictures_at_all_is_an_error(num: int, start: int, tmp_path: Path) -> None:
    _write(tmp_path / "1.png", 10)
    _write(tmp_path / "2.png", 20)
    own = Samples.from_folder(tmp_path)
    assert len(own.pictures(AT_64, 9, start=1)) == 1
    with pytest.raises(WireError) as caught:
        own.pictures(AT_64, num, start=start)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
