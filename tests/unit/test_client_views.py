"""Views on the client: what they are made from, what they are called, what is refused, what they cost."""

import io

import numpy as np
import pytest
from PIL import Image
from trunkline._local_inputs import GivenImages
from trunkline._row_sources import ImageRows
from trunkline._views import View, check_views, given_views, with_views
from trunkline.augment import Augment
from trunkline.cli.options import find_augment
from trunkline.errors import CorruptImageError, InvalidArgumentError
from trunkline.estimates import UploadEstimate, measured_row_bytes
from trunkline.images import pictures
from trunkline.local_models import local_model
from trunkline.local_vectors import local_features
from trunkline.predictions import Prediction, averaged
from trunkline_wire.rows import content_digest
from trunkline_wire.specs import Preprocessing, Timings

STILL = Augment(crop=1, stretch=1, flip=0, rotate=0, brightness=0, contrast=0, saturation=0)


def photo(seed=0, width=60, height=40):
    """Return smooth colours, different on every side."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def changed(augment, image, seed=0):
    return augment(image, np.random.default_rng(seed))


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class TestAugment:
    def test_nothing_asked_for_changes_nothing(self):
        image = photo()
        assert np.array_equal(np.asarray(changed(STILL, image)), np.asarray(image))

    def test_a_mirrored_picture_is_mirrored(self):
        view = changed(Augment(**{**vars(STILL), "flip": 1}), photo())
        assert np.array_equal(np.asarray(view), np.asarray(photo())[:, ::-1])

    def test_half_are_mirrored_if_half_are_asked_for(self):
        augment = Augment(**{**vars(STILL), "flip": 0.5})
        image = photo()
        mirrored = sum(not np.array_equal(changed(augment, image, seed), image) for seed in range(200))
        assert 75 < mirrored < 125

    def test_a_crop_is_a_part_in_the_pictures_proportions(self):
        # Each pixel says where it is.
        places = np.zeros((100, 150, 3), np.uint8)
        places[..., 0], places[..., 1] = np.arange(150)[None], np.arange(100)[:, None]
        image = Image.fromarray(places)
        shares = []
        for seed in range(60):
            view = np.asarray(changed(Augment(**{**vars(STILL), "crop": 0.3}), image, seed)).astype(int)
            height, width = view.shape[:2]
            assert abs(width / height - 1.5) < 0.05
            across, down = np.ptp(view[..., 0]) + 1, np.ptp(view[..., 1]) + 1
            assert abs(across - width) <= 2 and abs(down - height) <= 2
            shares.append(width * height / (150 * 100))
        assert 0.28 < min(shares) < 0.4 and 0.9 < max(shares) <= 1.0

    def test_a_turn_is_by_the_angle_and_goes_on_at_the_edge(self):
        augment = Augment(**{**vars(STILL), "rotate": 30})
        white = Image.new("RGB", (50, 40), (200, 100, 50))
        for seed in range(10):
            assert np.abs(np.asarray(changed(augment, white, seed)).astype(int) - (200, 100, 50)).max() <= 1
        line = np.zeros((81, 81, 3), np.uint8)
        line[40, 41:] = 255  # from the centre to the right
        angles = []
        for seed in range(40):
            view = np.asarray(changed(augment, Image.fromarray(line), seed))[..., 0].astype(float)
            rows, columns = np.nonzero(view > 60)
            inner = np.hypot(rows - 40, columns - 40) < 38
            angles.append(np.degrees(np.arctan2(rows[inner].mean() - 40, columns[inner].mean() - 40)))
        assert -31 < min(angles) < -20 and 20 < max(angles) < 31

    def test_a_mirrored_and_turned_picture_is_one_that_was_mirrored_and_turned(self):
        image = photo(width=80, height=80)
        turned = Augment(**{**vars(STILL), "rotate": 20})
        both = Augment(**{**vars(STILL), "rotate": 20, "flip": 1})
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # To mirror and then to look through a turned frame, is to look through a frame turned the other way and mirror.
        expected = np.asarray(changed(turned, mirrored, 3)).astype(int)
        got = np.asarray(changed(both, image, 3)).astype(int)
        back = np.asarray(changed(turned, image, 3)).astype(int)[:, ::-1]
        assert np.abs(got - back).mean() < 1.0
        assert np.abs(got - expected).mean() > 5.0

    def test_a_slant_moves_rows_against_each_other(self):
        line = np.zeros((81, 81, 3), np.uint8)
        line[:, 40] = 255
        view = np.asarray(changed(Augment(**{**vars(STILL), "shear": 20}), Image.fromarray(line), 1))[..., 0]
        centres = [view[row].astype(float) @ np.arange(81) / view[row].sum() for row in (10, 40, 70)]
        assert abs(centres[1] - 40) < 1
        assert abs((centres[2] - centres[1]) + (centres[0] - centres[1])) < 1
        assert 1 < abs(centres[2] - centres[0]) < 23

    def test_colours_change_as_far_as_asked_for(self):
        grey = Image.new("RGB", (4, 4), (100, 100, 100))
        augment = Augment(**{**vars(STILL), "brightness": 0.5})
        levels = [int(np.asarray(changed(augment, grey, seed))[0, 0, 0]) for seed in range(100)]
        assert 50 <= min(levels) < 60 and 140 < max(levels) <= 150
        red = Image.new("RGB", (4, 4), (200, 40, 40))
        turned = {
            tuple(np.asarray(changed(Augment(**{**vars(STILL), "hue": 0.5}), red, seed))[0, 0]) for seed in range(30)
        }
        assert any(one[1] > 150 for one in turned) and any(one[2] > 150 for one in turned)
        dull = [
            np.ptp(np.asarray(changed(Augment(**{**vars(STILL), "saturation": 1}), red, one))[0, 0])
            for one in range(50)
        ]
        assert min(dull) < 20
        flat = [
            np.asarray(changed(Augment(**{**vars(STILL), "contrast": 0.9}), photo(), one)).std() for one in range(50)
        ]
        assert min(flat) < 0.3 * np.asarray(photo()).std()

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (8, 8)])
    def test_small_and_narrow_pictures_stay_pictures(self, size):
        for seed in range(20):
            view = changed(Augment(rotate=45, shear=20, hue=0.1), photo(width=size[0], height=size[1]), seed)
            assert view.mode == "RGB" and 1 <= view.width <= size[0] + 1 and 1 <= view.height <= size[1] + 1

    @pytest.mark.parametrize(
        "wrong",
        [
            *({"crop": 0}, {"crop": 1.1}, {"stretch": 0.9}, {"flip": 2}, {"rotate": -1}, {"shear": 90}, {"hue": 0.6}),
            *({"brightness": 1}, {"contrast": float("nan")}, {"saturation": "0.2"}, {"flip": True}),
        ],
    )
    def test_out_of_range(self, wrong):
        (name,) = wrong
        with pytest.raises(InvalidArgumentError, match=f"{name} is .*; expected a number from"):
            Augment(**wrong)

    def test_on_the_command_line(self):
        assert find_augment(None) is None
        assert find_augment("crop=0.8, flip=0") == Augment(crop=0.8, flip=0)
        for text in ("zoom=1", "crop", "crop=wide", ""):
            with pytest.raises(InvalidArgumentError, match="expected NAME=NUMBER"):
                find_augment(text)


class TestViews:
    def test_a_picture_comes_first_and_then_its_views(self):
        rows = with_views(pictures([photo(0), photo(1)]), 3, Augment(), 0)
        assert [type(one) is View for one in rows] == [False, True, True] * 2
        assert np.array_equal(np.asarray(rows[3].decoded()), np.asarray(photo(1)))

    def test_what_a_view_is_follows_from_content_seed_number_and_change(self):
        def digests(images, seed=0, augment=None):
            return [one.digest() for one in with_views(pictures(images), 3, augment or Augment(), seed)]

        first = digests([photo(0), photo(1)])
        assert len(set(first)) == 6
        assert digests([photo(1), photo(0)]) == first[3:] + first[:3], "wherever they stand"
        assert digests([photo(0)], seed=1)[0] == first[0]
        assert set(digests([photo(0)], seed=1)[1:]).isdisjoint(first)
        assert set(digests([photo(0)], augment=Augment(flip=0))[1:]).isdisjoint(first)
        pixels = [np.asarray(one.decoded()) for one in with_views(pictures([photo(0)]), 3, Augment(), 0)]
        again = [np.asarray(one.decoded()) for one in with_views(pictures([photo(0)]), 3, Augment(), 0)]
        assert all(np.array_equal(a, b) for a, b in zip(pixels, again, strict=True))
        assert pixels[1].shape != pixels[2].shape or not np.array_equal(pixels[1], pixels[2])

    def test_no_view_is_made_to_say_what_it_is_called(self):
        class Broken:
            def size(self):
                raise AssertionError("nothing is decoded")

            decoded = encoded = size
            name = "row 0"

            def digest(self):
                return b"d" * 32

        assert len(View(Broken(), 1, Augment(), 0).digest()) == 32

    def test_views_of_a_function_are_called_by_their_pixels(self):
        def turned(image, random):
            return image.rotate(90 * int(random.integers(1, 4)))

        rows = with_views(pictures([photo(width=40, height=40)]), 5, turned, 0)
        assert rows[1].digest() == content_digest(np.asarray(rows[1].decoded()))
        assert 2 <= len({one.digest() for one in rows[1:]}) <= 3

    @pytest.mark.parametrize(("kind", "start"), [("JPEG", b"\xff\xd8"), ("PNG", b"\x89PNG"), ("WEBP", b"\x89PNG")])
    def test_views_of_jpeg_files_travel_as_jpeg_and_all_others_as_png(self, kind, start):
        _, view = with_views(pictures([encoded(photo(), kind)]), 2, Augment(), 0)
        data = view.encoded()
        assert data.startswith(start)
        apart = np.asarray(Image.open(io.BytesIO(data))).astype(int) - np.asarray(view.decoded())
        assert np.abs(apart).mean() < (3 if kind == "JPEG" else 1e-9)
        assert len(data) < view.num_bytes()

    def test_a_view_enters_the_network_as_its_pixels_would(self):
        _, view = with_views(pictures([photo()]), 2, Augment(), 0)
        form = Preprocessing(16, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3)
        assert np.array_equal(view.preprocessed(form), pictures([view.decoded()])[0].preprocessed(form))

    def test_a_damaged_picture_says_so_by_name(self):
        _, view = with_views(pictures([b"no picture"]), 2, Augment(), 0)
        for call in (view.decoded, view.encoded, view.num_bytes):
            with pytest.raises(CorruptImageError, match="row 0"):
                call()

    @pytest.mark.parametrize("made", [None, np.zeros((4, 4, 3), np.uint8), b"png"])
    def test_what_is_no_picture_is_refused(self, made):
        _, view = with_views(pictures([photo()]), 2, lambda image, random: made, 0)
        said = f"view 1 of row 0: augment returned a {type(made).__name__}, which is no picture"
        for call in (view.digest, view.decoded, view.encoded):
            with pytest.raises(InvalidArgumentError, match=said):
                call()

    def test_grey_views_become_pictures_in_colour(self):
        _, view = with_views(pictures([photo()]), 2, lambda image, random: image.convert("L"), 0)
        assert view.decoded().mode == "RGB"

    @pytest.mark.parametrize("views", [0, -1, 65, 1000, 2.0, True, "4", None])
    def test_numbers_of_views_out_of_range(self, views):
        with pytest.raises(InvalidArgumentError, match=r"views is .*; expected 1 to 64"):
            check_views(views, None)

    def test_parts_that_do_not_go_together(self):
        with pytest.raises(InvalidArgumentError, match="there are none") as caught:
            check_views(1, Augment())
        assert caught.value.hint == "Give views= 2 or more too"
        with pytest.raises(InvalidArgumentError, match="augment is a str; expected"):
            check_views(2, "flip")
        with pytest.raises(InvalidArgumentError, match=r"seed is 0\.5"):
            given_views(GivenImages([photo()]), 2, None, 0.5, None, None)
        assert check_views(1, None) is None
        assert check_views(2, None) == Augment()

    def test_only_local_models_that_read_pictures_have_views(self):
        def model(rows):
            return rows.reshape(len(rows), -1)[:, :4].astype(np.float32)

        images = np.zeros((2, 8, 8, 3), np.uint8)
        given = GivenImages(images)
        rows = local_model(model, name="rows", version="1")
        vectors = local_features(np.zeros((2, 4), np.float32), name="vectors", version="1")
        for local, inputs in ((rows, None), (rows, images), (vectors, None), ([vectors], None)):
            with pytest.raises(
                InvalidArgumentError, match=r"views are made of pictures, and '(rows|vectors)' reads rows"
            ):
                given_views(given, 2, None, 0, local, inputs)
        seeing = local_model(model, name="seeing", version="1", input_size=8)
        assert len(given_views(given, 3, None, 0, seeing, None).pictures) == 6
        with pytest.raises(InvalidArgumentError, match="images is None"):
            given_views(GivenImages(None), 2, None, 0, None, None)


class TestEstimate:
    def test_it_says_what_it_costs_in_a_line(self):
        assert (
            str(UploadEstimate(1797, 4, 12_300_000)) == "4 views of 1,797 pictures: 7,188 rows, about 12.3 MB to send"
        )
        assert str(UploadEstimate(20, 1, 4_000)) == "20 rows, about 4.0 KB to send"

    def test_a_few_rows_stand_for_all(self):
        images = [photo(seed, 30 + seed % 7, 40) for seed in range(60)]
        source = ImageRows(with_views(pictures(images), 4, Augment(), 0))
        every = range(240)
        exact = sum(len(one) for chunk in source.chunks(every) for one in chunk.rows)
        assert abs(measured_row_bytes(source, every) * 240 / exact - 1) < 0.15
        few = ImageRows(pictures(images[:2]))
        assert measured_row_bytes(few, [1]) == len(few._rows[1].encoded())


def said(outputs, errors=None, names=("a", "b"), task="classification"):
    labels = [None] * len(outputs)
    return Prediction("m@1", names, np.float32(outputs), labels, errors or {}, Timings(), 0.1, task=task)


class TestAveraged:
    def test_the_mean_of_the_views_decides(self):
        found = averaged(said([[0.6, 0.4], [0.1, 0.9], [0.9, 0.1], [0.8, 0.2]]), 2)
        np.testing.assert_allclose(found.probabilities, [[0.35, 0.65], [0.85, 0.15]])
        assert (list(found.labels), found.views, len(found), dict(found.errors)) == (["b", "a"], 2, 2, {})

    def test_views_that_failed_are_left_out_and_a_picture_without_others_fails(self):
        nan = float("nan")
        errors = {number: CorruptImageError(f"view {number}") for number in (1, 2, 3)}
        found = averaged(said([[0.6, 0.4], [nan, nan], [nan, nan], [nan, nan], [0.2, 0.8], [0.4, 0.6]], errors), 2)
        np.testing.assert_allclose(found.probabilities, [[0.6, 0.4], [nan, nan], [0.3, 0.7]])
        assert list(found.labels) == ["a", None, "b"]
        assert {row: error.message for row, error in found.errors.items()} == {1: "view 2"}
        assert found[1].error is found.errors[1]

    def test_numbers_and_several_classes(self):
        values = averaged(said([[1.0], [2.0], [5.0], [7.0]], names=(), task="regression"), 2)
        assert values.values.tolist() == [[1.5], [6.0]]
        assert list(values.labels) == [None, None]
        several = averaged(said([[0.9, 0.2], [0.7, 0.9]], task="multi_label"), 2)
        assert list(several.labels) == [("a", "b")]

    def test_one_view_is_the_picture(self):
        one = said([[0.6, 0.4]])
        assert averaged(one, 1) is one
