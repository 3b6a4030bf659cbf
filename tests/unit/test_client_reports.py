"""Metrics against scikit-learn, and reports to read."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from trunkline.reports import calibration_error, classification_report, regression_report


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
