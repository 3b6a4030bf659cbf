"""Metrics against scikit-learn, and reports to read."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from trunkline.errors import UnsupportedError
from trunkline.predictions import Prediction, label_sets
from trunkline.reports import calibration_error, classification_report, multi_label_report, regression_report
from trunkline_wire.specs import Timings


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60), classes=st.integers(2, 6))
def test_classification_against_scikit_learn(seed, rows, classes):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, rows)
    probabilities = rng.dirichlet(np.ones(classes), rows).astype(np.float32)
    report = classification_report("m@1", [str(k) for k in range(classes)], truth, probabilities)
    predicted = probabilities.argmax(axis=1)
    assert report.accuracy == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert report.macro_f1 == pytest.approx(metrics.f1_score(truth, predicted, average="macro", zero_division=0))
    labels = range(classes)
    np.testing.assert_array_equal(report.confusion_KK, metrics.confusion_matrix(truth, predicted, labels=labels))
    expected = metrics.precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    for index, name in enumerate(("precision", "recall", "f1", "support")):
        np.testing.assert_allclose([getattr(one, name) for one in report.classes], expected[index], atol=1e-12)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["num_rows"] == rows


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 40), outputs=st.integers(1, 3))
def test_regression_against_scikit_learn(seed, rows, outputs):
    rng = np.random.default_rng(seed)
    truth, values = (rng.normal(size=(rows, outputs)).astype(np.float32) for _ in range(2))
    report = regression_report("m@1", truth, values)
    assert report.r2 == pytest.approx(metrics.r2_score(truth, values), rel=1e-4, abs=1e-5)
    assert report.mae == pytest.approx(metrics.mean_absolute_error(truth, values), rel=1e-4)
    assert report.rmse == pytest.approx(np.sqrt(metrics.mean_squared_error(truth, values)), rel=1e-4)


def test_constant_truth():
    same = np.ones((3, 1), np.float32)
    assert regression_report("m", same, same).r2 == 1.0 and regression_report("m", same, same + 1).r2 == 0.0


def test_calibration_error_by_hand():
    # Two bins: 0.6 (one of two right) and 0.9 (both right): (|1 - 1.2| + |2 - 1.8|) / 4.
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]], np.float32)
    assert calibration_error(np.array([0, 1, 0, 0]), probabilities) == pytest.approx(0.1, abs=1e-6)
    assert calibration_error(np.array([0, 0]), np.array([[1.0, 0.0]] * 2, np.float32)) == 0.0


def test_reports_are_readable_and_escaped():
    truth, probabilities = np.array([0, 1]), np.eye(2, dtype=np.float32)
    report = classification_report("m@1", ["<cat>", "dog"], truth, probabilities, num_failed=1)
    assert "accuracy 1.0000 on 2 rows (1 could not be predicted)" in report.summary() and "<cat>" in report.summary()
    html = report._repr_html_()
    assert "&lt;cat&gt;" in html and "<cat>" not in html
    numbers = regression_report("m@1", np.ones((2, 1), np.float32), np.ones((2, 1), np.float32))
    assert "R2" in numbers.summary() and "R2" in numbers._repr_html_() and numbers.to_dict()["task"] == "regression"


def test_many_classes_are_cut_short():
    names = [f"class{k}" for k in range(40)]
    report = classification_report("m@1", names, np.arange(40), np.eye(40, dtype=np.float32))
    assert "and 10 more classes" in report.summary() and "true" not in report._repr_html_()


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), classes=st.integers(1, 5))
def test_several_classes_against_scikit_learn(seed, rows, classes):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (rows, classes))
    probabilities = rng.random((rows, classes)).astype(np.float32)
    said = (probabilities > 0.5).astype(int)
    report = multi_label_report("m@1", [str(k) for k in range(classes)], truth, probabilities)
    assert report.subset_accuracy == pytest.approx((truth == said).all(axis=1).mean())
    flat = metrics.f1_score(truth.ravel(), said.ravel(), zero_division=0)
    assert report.micro_f1 == pytest.approx(flat)
    scores = [metrics.f1_score(truth[:, k], said[:, k], zero_division=np.nan) for k in range(classes)]
    assert report.macro_f1 == pytest.approx(np.nanmean(scores) if not np.isnan(scores).all() else 0.0)
    for k, one in enumerate(report.classes):
        expected = metrics.precision_recall_fscore_support(truth[:, k], said[:, k], labels=[1], zero_division=0)
        np.testing.assert_allclose([one.precision, one.recall, one.f1, one.support], np.ravel(expected), atol=1e-12)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["task"] == "multi_label"


def test_report_on_several_classes_is_readable_and_escaped():
    truth, probabilities = np.array([[1, 0], [1, 1]]), np.array([[0.9, 0.6], [0.9, 0.6]], np.float32)
    report = multi_label_report("m@1", ["<cat>", "dog"], truth, probabilities, num_failed=1)
    text = report.summary()
    assert "micro F1 0.8571 on 2 rows (1 could not be predicted)" in text
    assert "all classes right in 0.5000 of the rows" in text and "<cat>" in text and "support" in text
    html = report._repr_html_()
    assert "&lt;cat&gt;" in html and "<cat>" not in html and "subset accuracy" in html
    assert "micro_f1=0.8571" in repr(report)


class TestPredictionOfSeveralClasses:
    outputs = np.array([[0.9, 0.5, 0.51], [0.1, 0.2, 0.3], [np.nan] * 3], np.float32)

    @pytest.fixture
    def prediction(self):
        names = ("a", "b", "c")
        labels = label_sets(self.outputs, names)
        error = UnsupportedError("failed")
        return Prediction("m@1", names, self.outputs, labels, {2: error}, Timings(), 0.1, task="multi_label")

    def test_labels(self, prediction):
        assert prediction.labels == [("a", "c"), (), None] == prediction.label_sets()
        assert prediction.label_sets(0.25) == [("a", "b", "c"), ("c",), None]
        assert prediction[0].label == ("a", "c") and prediction.probabilities.shape == (3, 3)
        assert [one.text for one in prediction][:2] == ["a, c", "none"]

    def test_plain_values(self, prediction):
        data = prediction.to_dict()
        assert data["task"] == "multi_label" and data["rows"][0]["labels"] == ("a", "c")
        assert "error" in data["rows"][2] and "a, c" in prediction._repr_html_()

    def test_what_it_has_not(self, prediction):
        with pytest.raises(UnsupportedError, match="label_sets"):
            _ = prediction.indices
        with pytest.raises(UnsupportedError, match=r"Use \.labels or \.probabilities"):
            _ = prediction.values
        single = Prediction("m@1", ("a", "b"), self.outputs[:, :2], ["a", "b", None], {}, Timings(), 0.1)
        with pytest.raises(UnsupportedError, match="one class in a row"):
            single.label_sets()
        assert single.indices.tolist() == [0, 1, -1]
