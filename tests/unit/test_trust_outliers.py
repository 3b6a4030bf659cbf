"""What says how unlike its training rows a row is: against scikit-learn, on digits, and where little is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.outliers import Detector, detector_from_bytes, detector_to_bytes, outliers_path
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, TrainingCancelled, train_head
from trunkline_worker.training.standardise import standardisation
from trunkline_worker.training.trust.outliers import MAX_QUANTILES, fit_detector, quantiles

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def fit(rows: Array, classes: Array | None = None, held_out: Array | None = None, seed: int = 0) -> Detector:
    width = rows.shape[1]
    held_out = rows[:0] if held_out is None else held_out
    known = None if classes is None else classes.astype(np.int64)
    as_tensor = [torch.from_numpy(np.ascontiguousarray(one, dtype=np.float32)) for one in (rows, held_out)]
    return fit_detector(as_tensor[0], known, as_tensor[1], [HeadInput(("s",), (width,))], seed)


def says(detector: Detector, rows: Array) -> Array:
    return detector.predict(torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))).numpy()


def clusters(num_rows: int, seed: int, width: int = 12, num_classes: int = 3) -> tuple[Array, Array]:
    """Rows around class means, stretched alike."""
    draw = np.random.default_rng(seed)
    classes = draw.permutation(np.arange(num_rows) % num_classes)
    means = 4 * np.random.default_rng(99).normal(size=(num_classes, width))
    return (means[classes] + draw.normal(size=(num_rows, width)) * np.linspace(0.5, 3, width)).astype(
        np.float32
    ), classes


def standardised(rows: Array, others: Array) -> tuple[Array, Array]:
    fitted = standardisation(torch.from_numpy(rows), [rows.shape[1]])
    mean, scale = fitted.mean_D.numpy().astype(float), fitted.scale_D.numpy().astype(float)
    return (rows - mean) / scale, (others - mean) / scale


def test_without_classes_it_is_the_mahalanobis_distance_of_scikit_learn() -> None:
    rows, others = clusters(500, 0)[0], clusters(50, 1)[0] * 2
    z, other_z = standardised(rows, others)
    expected = LedoitWolf(assume_centered=True).fit(z).mahalanobis(other_z) * 499 / 500 / rows.shape[1]
    np.testing.assert_allclose(says(fit(rows), others)[:, 0] ** 2, expected, rtol=2e-4)


def test_with_classes_it_is_that_of_the_nearest_one_under_one_covariance() -> None:
    rows, classes = clusters(600, 0)
    others = clusters(60, 1)[0]
    z, other_z = standardised(rows, others)
    means = np.stack([z[classes == one].mean(axis=0) for one in range(3)])
    within = LedoitWolf(assume_centered=True).fit(z - means[classes])
    squares = np.stack([within.mahalanobis(other_z - one) for one in means])
    np.testing.assert_allclose(
        says(fit(rows, classes), others)[:, 0] ** 2, squares.min(axis=0) * 597 / 600 / rows.shape[1], rtol=2e-4
    )
    between = (rows[classes == 0].mean(axis=0) + rows[classes == 1].mean(axis=0))[None] / 2
    # The middle of two classes is where no row lies; to whoever knows no classes it is near the mean.
    assert says(fit(rows, classes), between)[0, 1] > 0.95 > says(fit(rows), between)[0, 1] + 0.25


def test_the_training_rows_are_at_1_on_average() -> None:
    for width in (12, 300):
        rows, classes = clusters(900, 3, width)
        assert np.mean(says(fit(rows, classes), rows)[:, 0] ** 2) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("num_held_out", [0, 60])
@pytest.mark.parametrize("width", [6, 400])
def test_of_new_rows_as_many_are_called_unusual_as_was_said(num_held_out: int, width: int) -> None:
    scores = []
    for seed in range(8):
        rows, classes = clusters(200 + num_held_out, seed, width)
        detector = fit(rows[num_held_out:], classes[num_held_out:], rows[:num_held_out])
        assert detector.is_held_out == bool(num_held_out) and detector.num_rows == (num_held_out or 200)
        scores.append(says(detector, clusters(500, 100 + seed, width)[0])[:, 1])
    found = np.concatenate(scores)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)
    assert np.mean(found >= 0.9) == pytest.approx(0.1, abs=0.04)


def letters(count: int) -> Array:
    draw = np.random.default_rng(0)
    drawn = []
    for number in range(count):
        picture = Image.new("L", (64, 64))
        font = ImageFont.load_default(size=int(draw.integers(44, 60)))
        place = tuple(32 + draw.integers(-4, 5, size=2))
        ImageDraw.Draw(picture).text(place, "ABCEFHKMNRTWXZ"[number % 14], fill=16, font=font, anchor="mm")
        drawn.append(np.asarray(picture.resize((8, 8), Image.Resampling.BOX)).ravel())
    return np.array(drawn, dtype=np.float32)


def test_what_is_no_digit_is_told_from_digits_by_their_pixels() -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    training, held_out, new = order[:1000], order[1000:1300], digits.data[order[1300:]]
    detector = fit(digits.data[training], digits.target[training], digits.data[held_out])
    known = says(detector, new)
    noise = np.random.default_rng(1).integers(0, 17, size=(300, 64))
    for other, least in ((noise, 0.999), (16 - new, 0.999), (letters(300), 0.93)):
        found = says(detector, other)
        truth = np.r_[np.zeros(len(known)), np.ones(len(found))]
        assert roc_auc_score(truth, np.r_[known[:, 0], found[:, 0]]) > least
    assert np.mean(known[:, 1] >= 0.99) < 0.03
    assert np.mean(says(detector, noise)[:, 1] >= 0.99) > 0.99


@pytest.mark.parametrize("has_classes", [True, False])
def test_far_more_columns_than_rows(has_classes: bool) -> None:
    draw = np.random.default_rng(0)
    mixing = draw.normal(size=(5, 20_000))
    rows = (draw.normal(size=(60, 5)) @ mixing + 0.1 * draw.normal(size=(60, 20_000))).astype(np.float32)
    new = draw.normal(size=(20, 5)) @ mixing + 0.1 * draw.normal(size=(20, 20_000))
    strange = new + draw.normal(size=(20, 20_000))  # leaves the plane in which the rows lie
    detector = fit(rows[:40], np.arange(40) % 2 if has_classes else None, rows[40:])
    assert says(detector, strange)[:, 0].min() > 1.5 * says(detector, new)[:, 0].max()
    assert len(detector_to_bytes(detector)) < 2_000_000


def test_a_column_that_never_varied_and_now_does_is_seen() -> None:
    rows, classes = clusters(100, 0)
    rows[:, 3] = 7.0
    detector = fit(rows, classes)
    new = rows[:5].copy()
    usual = says(detector, new)
    new[:, 3] = 9.0
    assert (says(detector, new)[:, 1] == 1.0).all() and usual[:, 1].mean() < 0.99
    assert np.isfinite(says(detector, new)).all()


def test_rows_that_are_all_alike() -> None:
    detector = fit(np.ones((10, 4)))
    assert says(detector, np.ones((2, 4))).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert says(detector, np.zeros((1, 4)))[0, 1] == 1.0


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7])
def test_few_rows_and_one_a_class(num_rows: int) -> None:
    rows = np.random.default_rng(0).normal(size=(num_rows, 5))
    detector = detector_from_bytes(detector_to_bytes(fit(rows, np.arange(num_rows))))
    assert len(detector.centres_CP) == 1  # how far rows of one class lie apart, nobody knows
    found = says(detector, np.concatenate([rows, 1e6 + rows]))
    assert np.isfinite(found).all()
    assert found[num_rows:, 0].min() > found[:num_rows, 0].max() and (found[num_rows:, 1] == 1.0).all()


def test_a_class_with_a_single_row_among_larger_ones() -> None:
    rows, classes = clusters(60, 0)
    rows[0], classes[0] = 50.0, 7
    detector = fit(rows, classes, clusters(40, 1)[0])
    assert len(detector.centres_CP) == 4
    assert says(detector, rows[:1])[0, 0] < 0.1


def test_equal_arguments_give_equal_bytes_and_another_seed_another_sample() -> None:
    rows = np.random.default_rng(0).normal(size=(2300, 80))
    made = [detector_to_bytes(fit(rows, seed=seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_numbers_of_any_size_give_numbers() -> None:
    rows, classes = clusters(100, 0, width=100)
    rows[:, 0] *= 1e-20
    found = says(fit(rows, classes), np.float32([[1e38] * 100, [-1e38] * 100, [0.0] * 100]))
    assert np.isfinite(found).all() and found[0, 0] > found[2, 0] and found[:2, 1].tolist() == [1.0, 1.0]
    assert np.isnan(says(fit(rows, classes), np.full((1, 100), np.nan, np.float32))[0, 0])


def test_half_precision_rows_count_like_any() -> None:
    rows, classes = clusters(100, 0)
    detector = fit(rows, classes)
    half = torch.from_numpy(rows).half()
    torch.testing.assert_close(detector.predict(half), detector.predict(half.float()))


class TestQuantiles:
    def test_few_are_kept_as_they_are_and_ties_are_not_nearer(self) -> None:
        distances_Q, shares_R = quantiles(torch.tensor([3.0, 1.0, 2.0, 2.0]))
        found = shares_R[torch.bucketize(torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0]), distances_Q)]
        assert found.tolist() == [0.0, 0.0, 0.25, 0.25, 0.75, 0.75, 1.0]

    @pytest.mark.parametrize("num", [201, 1000, 20_000])
    def test_of_many_so_many_that_shares_are_never_too_large_and_little_too_small(self, num: int) -> None:
        drawn = torch.from_numpy(np.random.default_rng(num).gamma(2.0, size=num))
        distances_Q, shares_R = quantiles(drawn)
        assert len(distances_Q) <= MAX_QUANTILES and len(shares_R) == len(distances_Q) + 1
        asked = torch.from_numpy(np.random.default_rng(1).gamma(2.0, size=500)).float()
        truth = (drawn[None, :].float() < asked[:, None]).double().mean(dim=1)
        said = shares_R[torch.bucketize(asked, distances_Q)].double()
        assert bool((said <= truth + 1e-6).all()) and float((truth - said).max()) < 0.013
        rare = truth > 0.98
        assert float((truth - said)[rare].max()) < 0.002


@pytest.fixture
def detector() -> Detector:
    rows, classes = clusters(100, 0)
    return fit(rows, classes)


class TestFile:
    def test_comes_back_as_it_was(self, detector: Detector) -> None:
        data = detector_to_bytes(detector)
        again = detector_from_bytes(data)
        rows = clusters(9, 5)[0]
        assert detector_to_bytes(again) == data and says(again, rows).tolist() == says(detector, rows).tolist()
        assert (again.slices, again.more_width, again.num_rows, again.is_held_out) == (("s",), 0, 100, False)
        assert again.size_bytes == detector.size_bytes > 0

    @pytest.mark.parametrize(
        "change",
        [
            {"scale_D": torch.zeros(12)},
            {"scale_D": torch.ones(11)},
            {"mean_D": torch.full((12,), torch.nan)},
            {"whitening_PP": torch.ones(2, 2)},
            {"centres_CP": torch.ones(0, 12)},
            {"distances_Q": torch.tensor([2.0, 1.0]), "shares_R": torch.tensor([0.0, 0.5, 1.0])},
            {"shares_R": torch.zeros(3)},
            {"centres_CP": torch.tensor(1.0)},
            {"residual": -1.0},
            {"slices": ()},
            {"more_width": 12},
            {"more_width": -1},
        ],
        ids=lambda change: ",".join(change),
    )
    def test_parts_that_do_not_fit_are_found_out(self, detector: Detector, change: dict[str, Any]) -> None:
        self.is_damaged(detector_to_bytes(replace(detector, **change)))

    def test_bytes_that_are_none(self, detector: Detector) -> None:
        data = detector_to_bytes(detector)
        for damaged in (b"", b"nonsense", data[:100], data[:-4], b"\xff" * 8 + data[8:]):
            self.is_damaged(damaged)

    def test_a_format_of_the_future(self, detector: Detector) -> None:
        data = detector_to_bytes(detector).replace(b'\\"format\\":1', b'\\"format\\":2')
        with pytest.raises(WireError, match="Upgrade the worker") as caught:
            detector_from_bytes(data)
        assert caught.value.code is ErrorCode.UNSUPPORTED

    def test_paths(self) -> None:
        assert outliers_path("ab" * 32) == f"outliers/ab/{'ab' * 32}.safetensors"
        with pytest.raises(WireError):
            outliers_path("../secret")

    def test_columns_that_do_not_fit(self, detector: Detector) -> None:
        with pytest.raises(WireError, match=r"\(rows, 12\); got \(2, 3\)") as caught:
            detector.predict(torch.ones(2, 3))
        assert caught.value.code is ErrorCode.SHAPE_MISMATCH

    def is_damaged(self, data: bytes) -> None:
        with pytest.raises(WireError) as caught:
            detector_from_bytes(data)
        assert caught.value.code is ErrorCode.CORRUPT_DATA


class TestTraining:
    """What ``train_head`` makes of it."""

    SPEC = JobSpec("m", "d", "b", 0, embedding="pooled", l2=0.1, validation_fraction=0.25, epochs=2)

    def train(self, labels: Labels, rows: Array, **changes: Any) -> Any:
        spec = replace(self.SPEC, **changes)
        source = Source("b", rows, (SliceSpec("pooled", 0, rows.shape[1]),))
        return train_head([source], labels, spec, on_event=lambda event: None, should_stop=lambda: False)

    @pytest.mark.parametrize("kind", ["linear", "mlp", "prototype"])
    def test_heads_of_every_kind_have_one(self, kind: str) -> None:
        rows, classes = clusters(200, 0)
        config = HeadConfig(kind, (8,) if kind == "mlp" else ())
        solver = "adamw" if kind == "mlp" else "lbfgs"
        found = self.train(Labels(("a", "b", "c"), classes), rows, head=config, solver=solver).outliers
        assert len(found.centres_CP) == 3 and found.is_held_out and found.num_rows == 50
        assert found.slices == ("pooled",) and says(found, rows + 100)[:, 1].min() == 1.0

    def test_numbers_and_several_classes_have_one_mean(self) -> None:
        rows, classes = clusters(200, 0)
        several = np.eye(3, dtype=np.float32)[classes]
        for labels in (Labels((), None, rows[:, :1]), Labels(("a", "b", "c"), None, several)):
            assert len(self.train(labels, rows).outliers.centres_CP) == 1

    def test_where_nothing_is_held_out_the_rows_are_cross_validated(self) -> None:
        rows, classes = clusters(90, 0)
        found = self.train(Labels(("a", "b", "c"), classes), rows, validation_fraction=0.0).outliers
        assert not found.is_held_out and found.num_rows == 90

    def test_a_head_on_a_map_has_none(self) -> None:
        rows = np.random.default_rng(0).normal(size=(40, 4 * 3 * 3)).astype(np.float32)
        source = Source("b", rows, (SliceSpec("t.map", 0, 36),), map_shape=(4, 3, 3))
        spec = replace(
            self.SPEC,
            head=HeadConfig("conv", channels=(4,), tap="t"),
            solver="adamw",
            embedding="slices",
            slices=("t.map",),
        )
        labels = Labels(("a", "b"), np.arange(40) % 2)
        result = train_head([source], labels, spec, on_event=lambda event: None, should_stop=lambda: False)
        assert result.outliers is None

    def test_it_is_fitted_between_looks_for_a_wish_to_stop(self) -> None:
        def stop() -> None:
            raise TrainingCancelled

        with pytest.raises(TrainingCancelled):
            fit_detector(torch.ones(4, 3), None, torch.ones(0, 3), [HeadInput(("s",), (3,))], 0, check=stop)
