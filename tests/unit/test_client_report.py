"""Reports and cards: whole, safe, and with scikit-learn's numbers."""

import base64
import io
import json
import math
import os
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import example
from hypothesis import given as drawn_by
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from sklearn import metrics
from sklearn.calibration import calibration_curve
from trunkline._deadline import Deadline
from trunkline._report import course, figures, files, findings, plots, text
from trunkline._report.markdown import code, plain
from trunkline._report.material import Material
from trunkline._report.page import Markup, join, label, tag
from trunkline._report.pictures import Gallery
from trunkline._report.report import report_path
from trunkline._report.scales import scale_of
from trunkline._report.yaml import to_yaml
from trunkline.cli import report as command
from trunkline.cli.app import app
from trunkline.cli.output import Session
from trunkline.errors import (
    CorruptDataError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    ServiceUnavailableError,
    UnsupportedError,
)
from trunkline.models import Model
from trunkline.records import (
    Candidate,
    Evaluation,
    FineTuning,
    FitConfig,
    JobEvent,
    JobSpec,
    JobState,
    JobStatus,
    LabelSuspect,
    ModelInput,
    ModelRecord,
    Trial,
)
from trunkline_wire.fits import FineTuneConfig, LossConfig, OptimiserConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import FeatureSpace, local_space
from typer.testing import CliRunner

TASKS = ("classification", "ordinal", "multi_label", "regression")
SECTIONS = {
    "classification": {"confusion", "calibration", "classes"},
    "ordinal": {"confusion", "calibration", "classes"},
    "multi_label": {"calibration", "classes"},
    "regression": {"numbers"},
}
EVERYWHERE = {"summary", "data", "curves", "search", "mistakes", "suspects", "timings", "again"}
START = datetime(2025, 3, 1, 12, 0, tzinfo=UTC)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</title></style></svg><b>",
    "\u202egpj.exe",
    "a\x00b\nc\t\ud800",
    "&lt;&amp;",
    "]]>--><!--",
    "x" * 10_000,
    "Zoë, 貓 and 🐈",
    "`]($(javascript:alert(1)) | **b**",
    ": - [yaml, {a: b}] # 'no'",
)


class Page(HTMLParser):
    """A page taken apart: every element must be closed in its turn."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source, self.stack, self.elements, self.sections = source, [], [], {}
        self.tables, self.words, self.owners = {}, [], []
        self.feed(source)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"

    @property
    def section(self):
        """The id of the section that is being read."""
        return next((attributes["id"] for name, attributes in self.stack if name == "section"), "")

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice: {attributes}"
        self.elements.append((name, dict(attributes), self.section))
        if name not in ("meta", "img", "br"):
            self.stack.append((name, dict(attributes)))
        if name == "section":
            self.sections[dict(attributes)["id"]] = ""
        if name == "table":
            self.tables.setdefault(self.section, []).append([])
        if name == "tr":
            self.tables[self.section][-1].append([])
        if name in ("td", "th"):
            self.tables[self.section][-1][-1].append("")

    def handle_startendtag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((name, dict(attributes), self.section))

    def handle_endtag(self, name):
        assert self.stack and self.stack[-1][0] == name, f"</{name}> in {[one for one, _ in self.stack]}"
        self.stack.pop()

    def handle_data(self, data):
        self.words.append(data)
        self.owners.append(self.stack[-1][1] if self.stack else {})
        if self.section:
            self.sections[self.section] += data
        if any(name in ("td", "th") for name, _ in self.stack):
            self.tables[self.section][-1][-1][-1] += data

    def rows(self, section, number=0):
        """Return the body of a table."""
        return self.tables[section][number][1:]

    def all(self, name, section=None):
        """Return the attributes of every element of a name."""
        return [given for one, given, where in self.elements if one == name and section in (None, where)]


def assert_self_contained(page):
    names = {name for name, _, _ in page.elements}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "use", "image"}
    ids = [given["id"] for _, given, _ in page.elements if "id" in given]
    assert len(set(ids)) == len(ids)
    for name, given, _ in page.elements:
        for key, value in given.items():
            assert not key.startswith("on"), (name, key)
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith("data:image/jpeg;base64,") or value[1:] in ids, value[:80]
            assert ("url(" not in value and "javascript" not in value) or key in ("alt", "aria-label")
    (style,) = [page.source[page.source.index("<style>") : page.source.index("</style>")]]
    assert "url(" not in style and "@import" not in style and "//" not in style
    for svg in page.all("svg"):
        assert svg["role"] == "img"
    assert page.source.count("<svg") == page.source.count("<title>") - 1 - page.source.count("<g><title>")
    page.source.encode("utf-8")


class FakeClient:
    """What a model asks of a client."""

    def __init__(self, record, evaluation=None, status=None, events=(), error=None, job_error=None):
        self.record, self._evaluation, self.asked = record, evaluation, []
        self._status, self._events, self._error, self._job_error = status, events, error, job_error
        self._calls = SimpleNamespace(registry=self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def _deadline(self, timeout_s):
        return Deadline(30.0 if timeout_s is None else timeout_s)

    def get(self, reference, deadline):
        self.asked.append(("get", reference))
        return self.record

    def evaluation(self, reference, deadline):
        self.asked.append(("evaluation", reference))
        if self._error is not None:
            raise self._error
        return self._evaluation

    def job(self, job_id, *, timeout_s=None):
        if self._status is None:
            raise self._job_error or NotFoundError(f"no job {job_id}")
        return self

    def model(self, reference):
        return Model(self, self.record)

    @property
    def _last(self):
        return self._status

    def events(self, *, timeout_s=None):
        yield from self._events
        if self._job_error is not None:
            raise self._job_error


def drawn(task, *, rows=150, outputs=4, seed=0, names=None, **fields):
    """Return a record and an evaluation of drawn answers."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.choice(rows * 5, rows, replace=False)).astype(np.int64)
    classes = targets = None
    suspects = ()
    if task in ("classification", "ordinal"):
        classes = np.minimum(rng.geometric(0.35, rows) - 1, outputs - 1).astype(np.int64)
        logits = rng.normal(size=(rows, outputs)) * 1.5
        logits[np.arange(rows), classes] += 2.5
        answers = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        if task == "classification":
            suspects = tuple(LabelSuspect(int(places[at]), int(classes[at]), 0, 0.9 - at / 100) for at in range(7))
    elif task == "multi_label":
        targets = (rng.random((rows, outputs)) < 0.3).astype(np.float32)
        answers = 1 / (1 + np.exp(-(rng.normal(size=(rows, outputs)) + 3 * targets - 1.5)))
    else:
        targets = (rng.normal(size=(rows, outputs)) * 10 ** np.arange(outputs)).astype(np.float32)
        answers = targets + rng.normal(size=targets.shape) * 10 ** np.arange(outputs) * 0.2
    losses = tuple(float(one) for one in 3.0 * 0.95 ** np.arange(60))
    evaluation = Evaluation(
        rows=places,
        num_held_out=rows,
        classes_N=classes,
        targets_NK=targets,
        answers_NK=answers.astype(np.float32),
        curves={"loss": losses, "validation_loss": tuple(one + 0.3 for one in losses)},
        suspects=suspects,
    )
    headline = {"regression": "r2", "multi_label": "f1_micro"}.get(task, "accuracy")
    scores = {headline: 0.9, f"{headline}_low": 0.85, f"{headline}_high": 0.94, f"train_{headline}": 0.99}
    if task != "regression":
        scores |= {"ece": 0.0213, "ece_uncalibrated": 0.0534, "temperature": 1.37}
    record = ModelRecord(
        name="pets",
        version=3,
        task=task,
        class_names=tuple(names or [f"class {one}" for one in range(outputs)]) if task != "regression" else (),
        num_outputs=outputs,
        space=FeatureSpace("resnet18", "layer2", 96, "f" * 64),
        embedding_fingerprint="e" * 64,
        slices=("layer3", "pooled"),
        metrics={
            "num_rows": 750.0,
            "num_train_rows": 600.0,
            "num_validation_rows": float(rows),
            "num_features": 768.0,
            "l2": 0.01,
            "train_s": 4.2,
            "best_epoch": 41.0,
            **scores,
        },
        dataset="photos@2",
        dataset_digest="d" * 64,
        head_sha256="a" * 64,
        versions={"torch": "2.11.0", "python": "3.12.1"},
        job_id="job-1",
        create_time=START,
        codec="float16",
        codec_error=0.001,
        head=HeadConfig(),
        warnings=("3 of 150 held-out rows have the same content as a training row",),
        candidates=(
            Candidate(("pooled", "layer3"), 768, -0.31, None if task == "regression" else 0.91),
            Candidate(("pooled",), 512, -0.4, None if task == "regression" else 0.88),
        ),
    )
    return replace(record, **fields), evaluation


def job(**fields):
    fit = FitConfig("lbfgs", 0, 0, 0.0, -1.0, 0.2, True, 7)
    spec = JobSpec("pets", "photos@2", "resnet18", 96, "auto", (), HeadConfig(), fit)
    ended = START + timedelta(seconds=20)
    status = JobStatus("job-1", JobState.SUCCEEDED, spec, None, "pets@3", 0, START, START, ended)
    return replace(status, **fields)


def events():
    def event(seq, at_s, phase, progress=0.0, metrics=None, message=""):
        return JobEvent(seq, START + timedelta(seconds=at_s), phase, progress, metrics or {}, message)

    return [
        event(1, 0, "queued"),
        event(2, 1.5, "embed", 0.0, {"rows": 750.0, "cached": 500.0}, "resnet18"),
        event(3, 9.5, "embed", 1.0, {"rows": 750.0, "cached": 500.0, "sent_bytes": 2_500_000.0}, "resnet18"),
        event(4, 10, "select"),
        event(5, 13, "fit"),
        event(6, 17, "assess"),
        event(7, 18, "publish"),
        event(8, 18.5, "end", 1.0),
    ]


def reported(folder, record, evaluation, images=None, **client):
    """Write a report and take it apart."""
    model = Model(FakeClient(record, evaluation, **client), record)
    path = model.report(folder / "report.html", images=images)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert_self_contained(page)
    return page


@pytest.fixture
def whole(tmp_path):
    """Report on everything there can be."""

    def make(task, images=None, **fields):
        record, evaluation = drawn(task, **fields)
        return reported(tmp_path, record, evaluation, images, status=job(), events=events())

    return make


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("has_images", [False, True])
def test_every_section_of_every_task(task, has_images, whole):
    images = np.random.default_rng(0).integers(0, 256, (700, 9, 9, 3), dtype=np.uint8) if has_images else None
    page = whole(task, images)
    assert set(page.sections) == EVERYWHERE | SECTIONS[task]
    assert [given["href"] for given in page.all("a")] == [f"#{one}" for one in page.sections]
    for name, words in page.sections.items():
        assert len(words) > 40, name
    summary = page.sections["summary"]
    for words in ("0.9000", "95 % interval 0.8500 to 0.9400", "photos@2", "features of resnet18 at layer2", "linear"):
        assert words in summary
    assert "What speaks against it" in summary and "same content as a training row" in summary
    assert "0.9900" in summary and "fitted once more" in summary and "2025-03-01 12:00 UTC" in page.source
    assert bool(page.all("img", "mistakes")) == has_images == bool(page.all("img", "data"))
    assert 'lang="en"' in page.source and page.source.startswith("<!doctype html>\n")
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source
    for drawing in page.all("svg"):
        width, height = map(float, drawing["viewbox"].split()[2:])
        assert 0 < width <= 1200 and 0 < height <= 1200


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("error", [None, UnsupportedError("old"), NotFoundError("gone")])
def test_an_older_cluster(task, error, tmp_path):
    """Neither an evaluation, nor the job, nor candidates, intervals, warnings or versions."""
    record, _ = drawn(task, candidates=(), warnings=(), versions={}, create_time=None, head=None)
    metrics_of_old = {name: value for name, value in record.metrics.items() if not name.endswith(("_low", "_high"))}
    page = reported(tmp_path, replace(record, metrics=metrics_of_old), None, error=error)
    assert set(page.sections) == EVERYWHERE | SECTIONS[task]
    for name in SECTIONS[task] | {"data", "mistakes"}:
        assert "keeps no answers on held-out rows" in page.sections[name]
    assert "keeps no learning curves" in page.sections["curves"]
    assert "keeps no list of doubtful labels" in page.sections["suspects"]
    assert "Nothing was searched" in page.sections["search"]
    assert "events are gone" in page.sections["timings"]
    assert "the cluster does not say" in page.sections["again"].lower() and "is gone" in page.sections["again"]
    assert "interval" not in page.sections["summary"].replace("95 % interval", "", 1)
    assert "speaks against" not in page.source


def test_nothing_was_held_out(tmp_path):
    record, _ = drawn("classification", metrics={"num_rows": 20.0, "l2": 1.0})
    none = np.zeros(0, np.int64)
    page = reported(tmp_path, record, Evaluation(none, 0, none, None, np.zeros((0, 0), np.float32), {}, ()))
    assert "nothing was measured" in page.sections["summary"]
    assert "No rows were held out" in page.sections["confusion"] and "not calibrated" in page.sections["calibration"]
    assert "in one go" in page.sections["curves"] and "none looks wrong" in page.sections["suspects"]


def test_damaged_answers_are_said_to_be(tmp_path):
    record, _ = drawn("classification")
    page = reported(tmp_path, record, None, error=CorruptDataError("the evaluation is damaged"))
    assert "cannot be read: the evaluation is damaged" in page.sections["confusion"]


@pytest.mark.parametrize("error", [ServiceUnavailableError("nobody answers"), DeadlineExceededError("too late")])
def test_a_cluster_that_does_not_answer_is_an_error(error, tmp_path):
    record, _ = drawn("classification")
    path = tmp_path / "r.html"
    with pytest.raises(type(error)):
        Model(FakeClient(record, error=error), record).report(path)
    assert not path.exists()


def test_a_job_that_cannot_be_watched(tmp_path):
    """What is told of the job can do without it, and what was heard before is kept."""
    record, evaluation = drawn("classification")
    page = reported(
        tmp_path, record, evaluation, status=job(), events=events()[:4], job_error=DeadlineExceededError("too late")
    )
    assert "embed" in page.sections["timings"] and "select" not in page.sections["timings"]
    waiting = job(state=JobState.RUNNING, end_time=None)
    assert "events are gone" in reported(tmp_path, record, evaluation, status=waiting, events=events()).source


def broken(evaluation, what):
    bad = evaluation.answers_NK.copy()
    if what == "rows":
        return replace(evaluation, rows=evaluation.rows[:-1])
    if what == "width":
        return replace(evaluation, answers_NK=bad[:, :-1])
    if what == "shape":
        return replace(evaluation, answers_NK=bad.ravel())
    if what == "nan":
        return replace(evaluation, answers_NK=bad * np.nan)
    if what == "truth":
        return replace(evaluation, classes_N=None, targets_NK=None)
    classes = evaluation.classes_N
    if classes is None:
        return replace(evaluation, targets_NK=evaluation.targets_NK[:-1])
    return replace(evaluation, classes_N=classes + (100 if what == "high" else -100))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("what", ["rows", "width", "shape", "nan", "truth", "high", "low"])
def test_answers_that_do_not_go_with_the_model(task, what, tmp_path):
    record, evaluation = drawn(task)
    page = reported(tmp_path, record, broken(evaluation, what))
    for name in SECTIONS[task] | {"data", "mistakes"}:
        assert "does not go with the model" in page.sections[name]


def test_rows_that_are_not_finite_are_left_out(tmp_path):
    record, evaluation = drawn("classification")
    evaluation.answers_NK[3] = np.nan
    page = reported(tmp_path, record, evaluation)
    assert sum(int(row[1]) for row in page.rows("classes")) == 149
    record, evaluation = drawn("regression", outputs=1)
    evaluation.targets_NK[3] = np.nan
    evaluation.answers_NK[4] = np.inf
    page = reported(tmp_path, record, evaluation)
    (dots,) = [given["d"] for given in page.all("path", "numbers") if "dots" in given.get("class", "")]
    assert dots.count("h0") == 148 and "nan" not in page.source


# --- names from strangers ---------------------------------------------------------------------------------------------


def hostile(task):
    evil = HOSTILE[0]
    record, evaluation = drawn(
        task,
        outputs=len(HOSTILE),
        names=HOSTILE,
        name=HOSTILE[1],
        dataset=HOSTILE[3],
        dataset_digest=evil,
        head_sha256=evil,
        job_id=evil,
        codec=evil,
        slices=HOSTILE,
        versions=dict.fromkeys(HOSTILE, evil),
        warnings=HOSTILE * 5,
        space=FeatureSpace(evil, HOSTILE[1], 96, evil),
        embedding_fingerprint=evil,
        candidates=tuple(Candidate((one, evil), 3, -0.5, 0.5) for one in HOSTILE),
        trials=tuple(Trial((one,), 0.1, (), 0.0, 0.0, (), 0.0, one, 1.0, False) for one in HOSTILE),
        more_inputs=(ModelInput(local_space(evil, evil), evil, (evil,), 3, evil, math.nan),),
    )
    curves = {one: (1.0, 2.0, math.nan, math.inf) for one in HOSTILE}
    suspects = (*evaluation.suspects, LabelSuspect(4_000_000_000, 4_000_000_000, 77, math.nan))
    told = [
        JobEvent(at, START + timedelta(seconds=at), one, 0.0, {one: 1.0, "b": math.nan}, one)
        for at, one in enumerate(HOSTILE)
    ]
    told += [JobEvent(99, None, "embed", 0.0, {one: math.inf for one in HOSTILE}, evil)]
    measured = {**record.metrics, **dict.fromkeys(HOSTILE, 1.0), "kappa": math.nan, "roc_auc": math.inf}
    record = replace(record, metrics=measured)
    spec = replace(job().spec, model=evil, fit=replace(job().spec.fit, solver=evil, select_by=evil))
    return record, replace(evaluation, curves=curves, suspects=suspects), job(spec=spec), told


@pytest.mark.parametrize("task", TASKS)
def test_hostile_names_are_shown_and_do_nothing(task, tmp_path):
    record, evaluation, status, told = hostile(task)
    page = reported(tmp_path, record, evaluation, [b"nothing"] * 5, status=status, events=told)
    words = "".join(page.words)
    assert "<script>alert(1)</script>" in words and "'>" not in {given.get("class") for _, given, _ in page.elements}
    assert "\u202e" not in page.source and "\\u202egpj.exe" in words and "\\u0000b\\u000ac" in words
    assert "Zoë, 貓 and 🐈" in words and "x" * 1000 not in page.source
    assert page.all("b", "summary") and len(page.source) < 1_000_000
    assert not any(given.get("src") == "x" for given in page.all("img"))


def test_markup_is_escaped_once():
    assert tag("td", "a < b", Markup("<i>c</i>"), None, 3, class_="x", data_row=1.50, title='"&') == (
        '<td class="x" data-row="1.5" title="&quot;&amp;">a &lt; b<i>c</i>3</td>'
    )
    assert tag("img", src="x", alt=None) == '<img src="x"/>'
    assert label("<b>") == "<bdi>&lt;b&gt;</bdi>" and join(["<", Markup("<br/>")]) == "&lt;<br/>"


def test_texts():
    assert text.shorten("abcdefghij", 6) == "abcd…j" and text.shorten("abc", 3) == "abc"
    assert text.clean("a\u2066b\ufeff\ud800é🐈") == "a\\u2066b\\ufeff\\ud800é🐈"
    assert [text.number(one) for one in (0.0, -0.0, 1234.5678, 1e-7, 2.5e20, math.nan)] == [
        "0",
        "0",
        "1235",
        "1e-7",
        "2.5e20",
        "\u2013",
    ]
    assert [text.score(one) for one in (0.0, 0.98765, 1e-5, 12345.6)] == ["0.0000", "0.9877", "1e-5", "12346"]
    assert text.amount(1, "row") == "1\u00a0row" and text.amount(2000, "class") == "2,000\u00a0classes"
    spans = [text.seconds(one).replace("\u00a0", " ") for one in (0.5, 12.34, 150, 5400, 86_400)]
    assert spans == ["0.50 s", "12.3 s", "2 min 30 s", "1 h 30 min", "24 h 0 min"]
    assert text.num_bytes(999) == "999\u00a0bytes" and text.num_bytes(2.5e6) == "2.5\u00a0MB"
    assert text.num_bytes(3e12) == "3,000.0\u00a0GB"


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "ordinal"])
def test_classes_against_scikit_learn(task, whole):
    page = whole(task, rows=400, outputs=5, seed=3)
    _, evaluation = drawn(task, rows=400, outputs=5, seed=3)
    truth, said = evaluation.classes_N, evaluation.answers_NK.argmax(axis=1)
    expected = metrics.precision_recall_fscore_support(truth, said, labels=range(5), zero_division=0)
    matrix = metrics.confusion_matrix(truth, said, labels=range(5))
    for index, row in enumerate(page.rows("classes")):
        assert row[0] == f"class {index}" and int(row[1]) == expected[3][index]
        np.testing.assert_allclose([float(one) for one in row[2:5]], [one[index] for one in expected[:3]], atol=6e-4)
        others = matrix[index] * (np.arange(5) != index)
        assert row[5] == f"class {others.argmax()} ({others.max()})"
    shown = [[int(one) for one in row[1:]] for row in page.rows("confusion")]
    np.testing.assert_array_equal(shown, matrix)
    squares = [given["fill-opacity"] for given in page.all("rect", "confusion")]
    assert len(squares) == (matrix > 0).sum() and max(map(float, squares)) <= 1.0
    wrong = matrix.sum() - matrix.trace()
    assert f"{wrong} of 400\u00a0rows are wrong" in page.sections["confusion"]


def test_labels_against_scikit_learn(whole):
    page = whole("multi_label", rows=300, outputs=5, seed=4)
    _, evaluation = drawn("multi_label", rows=300, outputs=5, seed=4)
    truth, answers = evaluation.targets_NK.astype(int), evaluation.answers_NK
    expected = metrics.precision_recall_fscore_support(truth, answers > 0.5, zero_division=0)
    for index, row in enumerate(page.rows("classes")):
        assert int(row[1]) == expected[3][index]
        np.testing.assert_allclose([float(one) for one in row[2:5]], [one[index] for one in expected[:3]], atol=6e-4)
        assert float(row[5]) == pytest.approx(
            metrics.average_precision_score(truth[:, index], answers[:, index]), abs=6e-4
        )


@drawn_by(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60), levels=st.integers(1, 60))
def test_average_precision_with_ties(seed, rows, levels):
    rng = np.random.default_rng(seed)
    truth, scores = rng.random(rows) < 0.4, rng.integers(0, levels, rows) / levels
    found = figures.average_precision(truth, scores)
    if truth.any():
        assert found == pytest.approx(metrics.average_precision_score(truth, scores))
    else:
        assert found is None


@pytest.mark.parametrize("task", ["classification", "multi_label"])
def test_reliability_against_scikit_learn(task, whole):
    page = whole(task, rows=300, outputs=5, seed=5)
    _, evaluation = drawn(task, rows=300, outputs=5, seed=5)
    if task == "classification":
        confidence = evaluation.answers_NK.max(axis=1)
        true = evaluation.answers_NK.argmax(axis=1) == evaluation.classes_N
    else:
        confidence, true = evaluation.answers_NK.ravel(), evaluation.targets_NK.ravel() > 0.5
    accuracy, said = calibration_curve(true, confidence, n_bins=15, strategy="quantile")
    rows = page.rows("calibration")
    assert len(rows) == 15 and {int(row[3]) for row in rows} == {len(true) // 15}
    np.testing.assert_allclose([float(row[0]) for row in rows], said, atol=6e-4)
    np.testing.assert_allclose([float(row[1]) for row in rows], accuracy, atol=6e-4)
    for row in rows:
        low, high = map(float, row[2].split(" to "))
        assert low <= float(row[1]) <= high
    for words in ("0.0213", "0.0534", "1.37", f"{np.abs(accuracy - said).mean():.4f} apart"):
        assert words in page.sections["calibration"]


def test_reliability_of_equal_confidences_and_of_few():
    bins = figures.reliability(np.full(30, 0.8), np.arange(30) < 12)
    assert len(bins) == 15 and all(one.accuracy == pytest.approx(0.4) for one in bins)
    assert figures.calibration_error(bins) == pytest.approx(0.4)
    assert [one.count for one in figures.reliability(np.array([0.1, 0.9]), np.array([False, True]))] == [1, 1]
    assert figures.reliability(np.zeros(0), np.zeros(0, bool)) == []
    sure = figures.reliability(np.ones(50), np.ones(50, bool), 1)[0]
    assert sure.high == pytest.approx(1.0) and sure.low == pytest.approx(0.9287, abs=1e-4)  # 50 / (50 + 1.96 ** 2)


def test_many_classes(whole):
    page = whole("classification", rows=2000, outputs=400, seed=6)
    _, evaluation = drawn("classification", rows=2000, outputs=400, seed=6)
    truth, said = evaluation.classes_N, evaluation.answers_NK.argmax(axis=1)
    assert not page.all("svg", "confusion")
    pairs = page.rows("confusion")
    matrix = metrics.confusion_matrix(truth, said, labels=range(400))
    np.fill_diagonal(matrix, 0)
    assert [int(row[2]) for row in pairs] == sorted(matrix.ravel(), reverse=True)[: findings.MAX_PAIRS]
    for true, other, count, share in pairs:
        cell = tuple(int(one.split()[1]) for one in (true, other))
        assert matrix[cell] == int(count)
        assert share == f"{100 * int(count) / (truth == cell[0]).sum():.1f}\u00a0%"
    shown = [float(row[4]) for row in page.rows("classes")]
    assert len(shown) <= findings.MAX_CLASSES and shown == sorted(shown)
    assert len(page.all("rect", "data")) == 40 and len(page.source) < 300_000


def test_surest_mistakes_of_classes(whole):
    page = whole("classification", rows=200, outputs=4, seed=7)
    _, evaluation = drawn("classification", rows=200, outputs=4, seed=7)
    said = evaluation.answers_NK.argmax(axis=1)
    wrong = [
        at
        for at in np.argsort(-evaluation.answers_NK.max(axis=1), kind="stable")
        if said[at] != evaluation.classes_N[at]
    ]
    rows = page.rows("mistakes")
    assert [int(row[0]) for row in rows] == [evaluation.rows[at] for at in wrong[:24]]
    first, at = rows[0], wrong[0]
    assert first[1:3] == [f"class {evaluation.classes_N[at]}", f"class {said[at]}"]
    assert first[3] == f"{100 * evaluation.answers_NK[at].max():.1f}\u00a0%"
    assert f"{min(24, len(wrong))} of {len(wrong)}, the surest" in page.sections["mistakes"]


def test_surest_mistakes_of_labels(whole):
    page = whole("multi_label", rows=200, outputs=4, seed=8)
    _, evaluation = drawn("multi_label", rows=200, outputs=4, seed=8)
    off = np.abs(evaluation.answers_NK - evaluation.targets_NK)
    order = np.argsort(-off.max(axis=1), kind="stable")
    rows = page.rows("mistakes")
    assert [int(row[0]) for row in rows] == [evaluation.rows[at] for at in order[:24]]
    worst = int(off[order[0]].argmax())
    assert rows[0][3] == f"class {worst}: {100 * evaluation.answers_NK[order[0], worst]:.1f}\u00a0%"
    there = [f"class {one}" for one in np.flatnonzero(evaluation.targets_NK[order[0]])]
    assert rows[0][1] == (", ".join(there) or "none")


def test_largest_errors_of_numbers(whole):
    page = whole("regression", rows=200, outputs=2, seed=9)
    _, evaluation = drawn("regression", rows=200, outputs=2, seed=9)
    error = evaluation.answers_NK.astype(float) - evaluation.targets_NK
    off = np.abs(error) / evaluation.targets_NK.astype(float).std(axis=0)
    order = np.argsort(-off.max(axis=1), kind="stable")[:24]
    rows = page.rows("mistakes")
    assert [int(row[0]) for row in rows] == [evaluation.rows[at] for at in order]
    worst = int(off[order[0]].argmax())
    assert rows[0][4] == f"output {worst + 1}" and float(rows[0][3]) == pytest.approx(error[order[0], worst], rel=1e-3)
    dots = [given["d"] for given in page.all("path", "numbers") if "dots" in given.get("class", "")]
    assert [one.count("h0") for one in dots] == [200, 200]
    assert "output 2" in page.sections["numbers"] and "predicted minus true" in page.sections["numbers"]


def test_nothing_is_wrong(tmp_path):
    record, evaluation = drawn("classification")
    right = np.eye(4, dtype=np.float32)[evaluation.classes_N]
    page = reported(tmp_path, record, replace(evaluation, answers_NK=right, suspects=()))
    assert "None of 150\u00a0held-out rows is wrong" in page.sections["mistakes"]
    assert "0 of 150\u00a0rows are wrong" in page.sections["confusion"]
    record, evaluation = drawn("regression", outputs=1)
    page = reported(tmp_path, record, replace(evaluation, answers_NK=evaluation.targets_NK))
    assert "None of" in page.sections["mistakes"] and "true value" in page.sections["numbers"]


def test_many_numbers_are_cut_short(whole):
    page = whole("regression", outputs=9)
    assert len(page.all("svg", "numbers")) == 12 and "first 6 of 9" in page.sections["numbers"]
    assert len(page.all("svg", "data")) == 6


def test_a_sample_says_that_it_is_one(tmp_path):
    record, evaluation = drawn("classification")
    page = reported(tmp_path, record, replace(evaluation, num_held_out=9000))
    assert "are of 150 of the 9,000\u00a0rows held out" in page.sections["data"]


def test_suspects(whole):
    page = whole("classification", names=("ant", "bee", "cat", "dog"))
    _, evaluation = drawn("classification")
    rows = page.rows("suspects")
    assert [int(row[0]) for row in rows] == [one.row for one in evaluation.suspects]
    assert rows[0][2:] == ["ant", "0.90"]
    assert "only where each row is of one class" in whole("ordinal").sections["suspects"]


# --- how training went ------------------------------------------------------------------------------------------------


def test_curves(whole, tmp_path):
    page = whole("classification")
    (words,) = [given for given in page.sections["curves"].split("\n") if given]
    assert "loss from 3 to 0.1455" in words and "validation loss from 3.3 to" in words and "logarithmic" not in words
    assert "after epoch 41" in words and "before the last one on all rows" in words and "epoch" in words
    lines = [given for given in page.all("path", "curves") if given.get("class", "").startswith("curve s")]
    assert len(lines) == 4  # two curves, and two dashes of the legend
    (box,) = [given["viewbox"].split() for given in page.all("svg", "curves")]
    for line in lines[2:]:  # the last of 60 epochs lies where the axis ends
        assert float(line["d"].rpartition("L")[2].split()[0]) == pytest.approx(float(box[2]) - 24, abs=0.1)
    record, evaluation = drawn("classification", metrics={"accuracy": 1.0})
    steep = {"loss": tuple(10.0 ** -np.linspace(0, 5, 700)), "validation_accuracy": (0.5,), "rate": (math.nan,)}
    page = reported(tmp_path, record, replace(evaluation, curves=steep))
    words = page.sections["curves"]
    assert "loss, logarithmic" in words and "1e-5" in words and "share of the training, %" in words
    assert "validation accuracy" in words and "rate" not in words and "epoch" not in words
    assert len(page.all("svg", "curves")) == 2
    points = max(given["d"].count("L") for given in page.all("path", "curves"))
    assert 400 < points < 500


def test_candidates(whole):
    rows = whole("classification").rows("search")
    assert rows[0] == ["★\u00a0chosen", "pooled, layer3", "768", "-0.3100", "0.9100"] and rows[1][0] == ""


def trial(number, **fields):
    known = Trial(("pooled",), 10.0**-number, (64,), 0.01, 0.1, (0.5, 0.6), 0.9 - number / 100, "", 0.5, False)
    return replace(known, **fields)


def test_trials(whole):
    trials = [trial(number % 8) for number in range(60)]
    trials += [trial(0, score=0.0, scores=(), error="the loss was <not> finite"), trial(5, won=True)]
    words = whole("regression", trials=tuple(trials)).sections["search"]
    page = whole("regression", trials=tuple(trials))
    rows, folded = page.rows("search", 1), page.rows("search", 2)
    assert len(rows + folded) == course.MAX_TRIALS and "12 more are not shown" in words and "of which 1 failed" in words
    assert len(rows) == 12 and "38 more configurations" in words
    assert rows[0][0] == "★\u00a0won" and [row[0] for row in rows[1:]] == [""] * 11
    # Nothing stands in the first column of those that are folded, so it is left out.
    scores = [float(row[1]) for row in rows[1:]] + [float(row[0]) for row in folded]
    assert scores == sorted(scores, reverse=True)
    assert rows[1][2:8] == ["± 0.071", "1", "64", "0.01", "0.1", "pooled"]
    early = [trial(0, won=True), trial(1, dropped=True, scores=(0.99,), score=0.99), trial(2)]
    page = whole("regression", trials=tuple(early))
    assert [row[0] for row in page.rows("search", 1)] == ["★\u00a0won", "", "dropped\u00a0early"]
    assert "of which 1 dropped early" in page.sections["search"] and "a fifth of the epochs" in page.sections["search"]
    few = whole("regression", trials=tuple(trials[-3:])).rows("search", 1)
    assert few[-1][1] == "failed" and few[-1][-1] == "the loss was <not> finite" and len(few) == 3


def test_timings(whole):
    page = whole("classification")
    words = page.sections["timings"].replace("\u00a0", " ")
    for expected in ("queued 1.50 s", "embed 8.50 s", "select 3.00 s", "fit 4.00 s", "assess 1.00 s", "publish 0.50 s"):
        assert expected in words
    assert "750 rows, 500 of them known already, 2.5 MB sent" in words
    assert "from submission to model20.0 s" in words and "training alone4.20 s" in words
    assert len(page.all("rect", "timings")) == 6


def test_what_is_needed_to_do_it_again(whole):
    words = whole("classification").sections["again"]
    for expected in ("d" * 64, "a" * 64, "e" * 64, "f" * 64, "job-1", "lbfgs", "cross_entropy", "2.11.0", '"seed": 7'):
        assert expected in words


# --- drawings ---------------------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False)


@drawn_by(values=st.lists(numbers, min_size=1, max_size=5), whole=st.booleans())
def test_scales_hold_their_numbers_between_round_ticks(values, whole):
    scale = scale_of(values, whole=whole)
    places = [one.value for one in scale.ticks]
    assert 2 <= len(places) <= 9 and places == sorted(places) and len(set(places)) == len(places)
    if max(map(abs, values)) < 1e200:
        assert all(-1e-6 <= scale.share(one) <= 1 + 1e-6 for one in values)
    assert all(math.isfinite(scale.share(one)) for one in values)
    assert len({one.text for one in scale.ticks}) == len(places)
    assert all(
        float(one.text.replace(",", "")) == pytest.approx(one.value, rel=1e-6, abs=1e-300) for one in scale.ticks
    )
    if whole:
        assert all(one == round(one) for one in places)


@drawn_by(values=st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=5))
def test_logarithmic_scales(values):
    scale = scale_of(values, is_log=True)
    assert 2 <= len(scale.ticks) <= 8
    if min(values) > 1e-240 and max(values) < 1e240:
        assert all(-1e-6 <= scale.share(one) <= 1 + 1e-6 for one in values)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 1], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([3, 97], ["0", "20", "40", "60", "80", "100"]),
        ([0, 12_345], ["0", "5,000", "10,000", "15,000"]),
        ([-0.02, 0.031], ["-0.02", "0.00", "0.02", "0.04"]),
        ([2, 2], ["1.8", "1.9", "2.0", "2.1", "2.2"]),
        ([0, 0], ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        ([0, 4e-9], ["0", "1e-9", "2e-9", "3e-9", "4e-9"]),
        ([0, 3e9], ["0", "1e9", "2e9", "3e9"]),
    ],
)
def test_ticks(values, texts):
    assert [one.text for one in scale_of(values).ticks] == texts


@drawn_by(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 300), scale=st.floats(1e-20, 1e20))
def test_histograms_count_every_row(seed, rows, scale):
    values = np.random.default_rng(seed).normal(size=rows) * scale
    page = Page(f"<section id='x'>{plots.columns('t', 'x', values)}</section>")
    heights = np.array([float(one["height"]) for one in page.all("rect")])
    # Ticks of the rows stand to the left of the axis, at the height of their number.
    ticks = [word for word, given in zip(page.words, page.owners, strict=True) if given.get("text-anchor") == "end"]
    largest = max(int(one.replace(",", "")) for one in ticks)
    assert sum(heights) / (300 - 12 - 46) * largest == pytest.approx(rows, rel=0.01, abs=1e-4 * len(heights) * largest)


def test_constant_and_wild_numbers_are_drawn(tmp_path):
    for values in (np.zeros((5, 1)), np.full((5, 1), 3e38), np.array([[-3e38], [3e38], [0], [1], [1e-40]])):
        record, evaluation = drawn("regression", rows=5, outputs=1)
        same = replace(evaluation, targets_NK=values.astype(np.float32), answers_NK=values[::-1].astype(np.float32))
        page = reported(tmp_path, record, same)
        for name in ("numbers", "data"):
            for given in page.all("rect", name) + page.all("text", name):
                assert "nan" not in str(given) and "inf" not in str(given)


def test_bars_of_nothing_and_of_wide_names():
    source = plots.bars("t", "w", "rows", [("貓" * 30, 0.0, "0"), ("b", 0.0, "0")], whole=True)
    page = Page(f"<section id='x'>{source}</section>")
    assert all(float(given["width"]) == 0.0 for given in page.all("rect"))
    assert min(float(given["x"]) for given in page.all("rect")) > 12 * 18


# --- pictures ---------------------------------------------------------------------------------------------------------


def opened(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_pictures_are_those_of_the_rows(whole):
    shades = np.arange(750) % 250
    images = np.broadcast_to(shades[:, None, None, None], (750, 200, 140, 3)).astype(np.uint8)
    page = whole("classification", images, rows=150)
    found = page.all("img", "mistakes")
    _, evaluation = drawn("classification")
    assert len(found) == 24 == len({given["alt"] for given in found})
    for given in page.all("img"):
        row = int(given["alt"].removeprefix("row ").partition(",")[0])
        picture = opened(given["src"])
        assert max(picture.size) == 128 and picture.format == "JPEG" and given["class"] == "picture"
        assert abs(int(np.asarray(picture).mean()) - shades[row]) <= 2 and row in evaluation.rows
    strips = page.all("img", "data")
    true = dict(zip(evaluation.rows.tolist(), evaluation.classes_N.tolist(), strict=True))
    for given in strips:
        row, name = given["alt"].removeprefix("row ").split(", ")
        assert name == f"class {true[int(row)]}"
    assert len(strips) == sum(min(6, int(one)) for one in np.bincount(evaluation.classes_N))
    assert len(page.all("img", "suspects")) == 7


def test_pictures_of_several_classes_and_numbers(whole):
    images = np.zeros((750, 8, 8), np.uint8)
    page = whole("multi_label", images, outputs=12)
    assert len(page.all("img", "data")) == 48 and "8 largest" in page.sections["data"]
    assert page.all("img", "data")[0]["class"] == "picture small"
    page = whole("regression", images, outputs=1)
    assert len(page.all("img", "data")) == 6 and "off by " in page.sections["mistakes"]


def test_pictures_that_are_not_there(whole, tmp_path):
    folder = tmp_path / "photos"
    for name in "ab":
        (folder / name).mkdir(parents=True)
    files_of = [folder / "ab"[row % 2] / f"{row:03}.png" for row in range(400)]
    for row, path in enumerate(files_of):
        Image.new("RGB", (20, 20), (row % 256, 0, 0)).save(path)
    for path in files_of[:200]:
        path.write_bytes(b"not a picture")
    page = whole("classification", folder)
    boxes = [given for given in page.all("span") if given.get("class") == "picture missing"]
    assert boxes and page.all("img", "mistakes")
    assert "not a readable" in page.source and "only 400 pictures were given" in page.source
    # As an upload numbers them: one class folder after the other. The even ones from 200 on are readable in the first.
    picture = opened(Page(Gallery(folder).picture(150, "")).all("img")[0]["src"])
    assert abs(np.asarray(picture)[..., 0].mean() - (150 * 2) % 256) < 4


def test_forms_of_pictures(tmp_path):
    array = np.zeros((3, 8, 8), np.uint8)
    Image.fromarray(array[0]).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,label\na.png,x\n")
    for given, count in (
        (array, 3),
        (list(array), 3),
        (iter(list(array)), 3),
        ([Image.fromarray(one) for one in array], 3),
        (tmp_path, 1),
        (str(tmp_path / "a.png"), 1),
        (tmp_path / "t.csv", 1),
        ([(tmp_path / "a.png").read_bytes()] * 2, 2),
    ):
        gallery = Gallery(given)
        assert gallery and "<img" in gallery.picture(count - 1, "x") and "only" in gallery.picture(count, "x")
        assert "only" in gallery.picture(-1, "x")
    assert not Gallery()
    for bad in (tmp_path / "nowhere", array.astype(float), [None]):
        with pytest.raises(InvalidArgumentError):
            Gallery(bad)


def test_a_report_is_small(tmp_path):
    """The worst there is: noise, many rows, classes and numbers, and long names."""
    images = np.random.default_rng(0).integers(0, 256, (1000, 160, 160, 3), dtype=np.uint8)
    names = [f"{'&' * 400}{one}" for one in range(30)]
    record, evaluation = drawn("classification", rows=1000, outputs=30, names=names)
    evaluation = replace(
        evaluation,
        rows=np.arange(1000),
        curves={f"curve {one}": tuple(np.random.default_rng(one).normal(size=5000)) for one in range(50)},
        suspects=tuple(LabelSuspect(one, 1, 2, 0.5) for one in range(200)),
    )
    page = reported(tmp_path, record, evaluation, images, status=job(), events=events())
    assert len(page.source.encode()) < 2_000_000 and len(page.all("img")) > 90
    for given in page.all("img"):
        assert max(opened(given["src"]).size) <= 128 and len(given["src"]) < 10_000
    record, evaluation = drawn("regression", rows=4000, outputs=20)
    assert len(reported(tmp_path, record, evaluation).source) < 500_000
    record, evaluation = drawn("classification", rows=20, outputs=100_000)
    assert len(reported(tmp_path, record, evaluation).source) < 500_000


# --- files ------------------------------------------------------------------------------------------------------------


def test_where_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record, evaluation = drawn("classification")
    model = Model(FakeClient(record, evaluation), record)
    path = model.report()
    assert str(path) == "pets-3.html" and path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [tmp_path / "pets-3.html"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.report("~/r.html") == tmp_path / "r.html"
    assert [str(report_path(one, 1)) for one in ("../../etc/passwd", ".hidden", "", "a b/c", "x" * 500)] == [
        "_.._etc_passwd-1.html",
        "hidden-1.html",
        "model-1.html",
        "a_b_c-1.html",
        f"{'x' * 128}-1.html",
    ]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    record, evaluation = drawn("classification")
    client = FakeClient(record, evaluation)
    model = Model(client, record)
    path = tmp_path / "r.html"
    path.write_text("before")
    plain_file = tmp_path / "plain"
    plain_file.write_text("")
    assert model.report(path) == path and len(path.read_text()) > 1000
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain_file.stat().st_mode)
    path.write_text("before")

    def fails(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(InvalidArgumentError, match="No space left"):
        model.report(path)
    monkeypatch.undo()
    assert path.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["plain", "r.html"]
    client.asked.clear()
    for bad in (tmp_path, tmp_path / "no" / "r.html"):
        with pytest.raises(InvalidArgumentError):
            model.report(bad)
        with pytest.raises(InvalidArgumentError):
            model.card(bad)
    with pytest.raises(InvalidArgumentError):
        model.report(path, images=tmp_path / "nowhere")
    assert client.asked == [] and path.read_text() == "before"


def test_equal_models_have_equal_reports(tmp_path):
    record, evaluation = drawn("classification")
    first = reported(tmp_path, record, evaluation, status=job(), events=events()).source
    assert first == reported(tmp_path, record, evaluation, status=job(), events=events()).source


def test_a_model_out_of_a_list_is_asked_for(tmp_path):
    record, evaluation = drawn("classification")
    client = FakeClient(record, evaluation)
    listed = Model(client, replace(record, candidates=()), is_whole=False)
    assert "★\u00a0chosen" in listed.report(tmp_path / "r.html").read_text()
    assert client.asked == [("get", "pets@3"), ("evaluation", "pets@3")]


# --- the card ---------------------------------------------------------------------------------------------------------


def carded(task, **fields):
    record, evaluation = drawn(task, **fields)
    card = Model(FakeClient(record, evaluation, status=job()), record).card()
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("task", TASKS)
def test_card(task):
    head, body = carded(task)
    assert head["library_name"] == "trunkline" and head["datasets"] == ["photos"]
    assert head["pipeline_tag"] == ("tabular-regression" if task == "regression" else "image-classification")
    assert {"trunkline", "resnet18", task.replace("_", "-")} <= set(head["tags"])
    (found,) = head["model-index"]
    (results,) = found["results"]
    assert found["name"] == "pets" and results["dataset"]["name"] == "photos@2"
    first = results["metrics"][0]
    assert first["value"] == 0.9 and "0.8500 to 0.9400" in first["name"] and first["type"] in head["metrics"]
    titles = [one.removeprefix("## ") for one in body.splitlines() if one.startswith("## ")]
    assert titles == [
        "Description",
        "Intended use",
        "Training data",
        "How it was trained",
        "Evaluation",
        "Calibration",
        "Limitations",
        "How to use it",
        "Environment",
    ]
    for words in (
        "0.8500 to 0.9400",
        "same content as a training row",
        "`2.11.0`",
        'model("pets@3")',
        "`lbfgs`",
        "embedding of `resnet18`",
    ):
        assert words in body
    assert ("`class 0`" in body) == (task != "regression") == ("0.0213" in body)


def test_card_of_hostile_names(tmp_path):
    for task in TASKS:
        record, evaluation, status, _ = hostile(task)
        path = tmp_path / "README.md"
        card = Model(FakeClient(record, evaluation, status=status), record).card(path)
        assert path.read_text(encoding="utf-8") == card
        head, body = card.split("\n---\n", 1)
        known = yaml.safe_load(head.removeprefix("---\n"))
        assert known["model-index"][0]["name"] == text.clean(record.name)
        assert known["datasets"] == [text.clean(record.dataset)] and HOSTILE[0] in known["tags"]
        markdown = MarkdownIt("commonmark").enable("table")
        for token in markdown.parse(body):
            for inner in [token, *(token.children or ())]:
                assert inner.type not in ("html_block", "html_inline", "link_open", "image", "strong_open", "em_open")
        shown = Page(markdown.render(body).replace("<hr />", ""))
        words = "".join(shown.words)
        if task != "regression":
            for name in HOSTILE:
                assert text.shorten(name) in words
        for warning in HOSTILE:
            assert text.shorten(warning, 1000).strip() in words


def test_card_of_local_features_alone():
    record, _ = drawn("classification", space=local_space("edge", "f" * 64), slices=("edge",))
    card = Model(FakeClient(record), record).card()
    assert "tabular-classification" in card and "predict(None, local=local)" in card and "features of `edge`" in card
    own = replace(record, space=FeatureSpace("resnet18", "layer2", 96, "f" * 64, local_model="mine"))
    card = Model(FakeClient(own), own).card()
    assert 'predict(["picture.jpg"], stem=stem)' in card and "stems of your own: `mine`" in card


def test_card_of_little(tmp_path):
    record, _ = drawn("classification", metrics={}, versions={}, dataset="", dataset_digest="", warnings=())
    bare = replace(record, head_sha256="", job_id="", create_time=None, candidates=(), head=None)
    card = Model(FakeClient(bare, error=UnsupportedError("old")), bare).card(tmp_path / "c.md")
    head = yaml.safe_load(card.split("---\n")[1])
    assert set(head) == {"library_name", "pipeline_tag", "tags"} and "nothing was measured" in card


plain_values = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"])) | st.integers() | st.booleans() | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]+x", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@drawn_by(value=st.dictionaries(st.from_regex(r"[a-z]+x", fullmatch=True), plain_values, max_size=4))
def test_yaml_is_read_as_it_was_meant(value):
    assert (yaml.safe_load(to_yaml(value)) or {}) == value


def test_yaml_of_nan():
    assert math.isnan(yaml.safe_load(to_yaml({"a": math.nan}))["a"])


@drawn_by(
    given_text=st.text(max_size=60) | st.text("\\`*_[]<>#|~$&!:/() ab1.-+=", max_size=20) | st.sampled_from(HOSTILE)
)
@example(given_text="`a` ``b``")
@example(given_text="**a** __b__ [c](d) ![e](f) <g@h.i> http://j.k")
def test_markdown_shows_texts_as_they_are(given_text):
    markdown = MarkdownIt("commonmark")
    for written in (plain(given_text), code(given_text, 10_000)):
        (item,) = [one for one in markdown.parse(f"- {written}x") if one.type == "inline"] or [None]
        shown = "".join(one.content for one in item.children)
        assert shown.strip() in (f"{text.clean(given_text)}x".strip(), f"{text.clean(given_text)}".strip() + "x") or (
            text.clean(given_text).strip() == ""
        )
        assert {one.type for one in item.children} <= {"text", "code_inline", "text_special"}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command against a client that is not there, and keep what is opened."""
    monkeypatch.chdir(tmp_path)
    record, evaluation = drawn("classification")
    opened_pages = []
    monkeypatch.setattr(Session, "connect", lambda self: FakeClient(record, evaluation, status=job(), events=events()))
    monkeypatch.setattr("webbrowser.open", opened_pages.append)

    def invoke(*words, is_terminal=False):
        terminal = SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: is_terminal))
        monkeypatch.setattr(command, "sys", terminal)
        return CliRunner().invoke(app, ["report", *map(str, words)])

    invoke.opened = opened_pages
    return invoke


def test_command(run, tmp_path):
    found = run("pets")
    assert found.exit_code == 0 and found.stdout == "pets-3.html\n" and run.opened == []
    assert Page((tmp_path / "pets-3.html").read_text()).sections
    both = run("pets@3", "--output", tmp_path / "x.html", "--card", tmp_path / "card.md", "--json", is_terminal=True)
    assert json.loads(both.stdout) == {
        "model": "pets@3",
        "report": str(tmp_path / "x.html"),
        "card": str(tmp_path / "card.md"),
    }
    assert run.opened == [] and (tmp_path / "card.md").read_text().startswith("---\n")
    run("pets", "--no-open", is_terminal=True)
    assert run.opened == []
    run("pets", "--output", "y z.html", is_terminal=True)
    assert run.opened == [(tmp_path / "y z.html").resolve().as_uri()]


def test_command_with_pictures_and_mistakes(run, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert run("pets", "--images", tmp_path).exit_code == 0
    assert "only 1 pictures were given" in (tmp_path / "pets-3.html").read_text()
    for words in (("pets", "--images", "nowhere"), ("pets", "--output", "no/x.html"), ("pets", "--card", tmp_path)):
        found = run(*words)
        assert found.exit_code == 2 and "error:" in found.stderr and "next:" in found.stderr


def test_material_without_metrics_is_no_error():
    record, evaluation = drawn("classification", metrics={"accuracy": math.nan})
    assert Material(record, evaluation=evaluation).metrics == {}


def test_fine_tuning_says_whether_it_was_kept_and_what_it_changed(whole):
    tuned = FineTuning(
        kept=False,
        reason="not kept: what they gain may be <chance>",
        cut="blocks.4",
        metric="cross_entropy",
        gain=0.01,
        low=-0.1,
        high=0.1,
        before={"accuracy": 0.91, "f1_macro": 0.9},
        after={"accuracy": 0.92},
        num_trained=1234567,
        epochs=3,
        num_workers=2,
        num_resumed=1,
        seconds=75.0,
    )
    page = whole("classification", fine_tuning=tuned)
    words = page.sections["tuning"].replace("\u00a0", " ")
    assert "The blocks behind blocks.4 were not kept: what they gain may be <chance>." in words
    assert "The model is the head alone" in words and "before calibration" in words
    assert "1,234,567, the head's included" in words and "2 workers, resumed 1 time" in words
    assert page.rows("tuning") == [["accuracy", "0.9100", "0.9200"]]
    assert "columns that the head reads" in page.sections["summary"]
    assert "Nothing was searched" not in page.sections["search"] and "tuning" not in whole("classification").sections
    numbers_alone = whole("regression", fine_tuning=replace(tuned, before={"mae": 1.0}, after={"mae": 2.0}))
    assert numbers_alone.rows("tuning") == [["mean absolute error", "1.0000", "2.0000"]]
    assert "calibration" not in numbers_alone.sections["tuning"]


def test_fine_tuning_says_how_it_was_done_and_how_it_went(tmp_path):
    both = {name: 0.5 for name in ("zeta", "cross_entropy", "roc_auc", "accuracy")}
    tuned = FineTuning(
        *(True, "kept: better beyond chance", "blocks.4", "cross_entropy", 0.1, 0.05, 0.2, both, both, 10, 3, 1, 0, 1.0)
    )
    record, evaluation = drawn("classification", fine_tuning=tuned)
    solved = {name: value for name, value in record.metrics.items() if name != "best_epoch"}
    record = replace(record, metrics=solved)
    evaluation = replace(evaluation, curves={"loss": (2.0, 1.0), "tune_loss": (0.9, 0.4, 0.25)})
    status = job()
    asked = FineTuneConfig(cut="blocks.4", lora_rank=4, learning_rate=0.002, layer_decay=0.5)
    spec = replace(status.spec, fine_tune=asked, fit=replace(status.spec.fit, optimiser=OptimiserConfig(mixup=0.2)))
    page = reported(tmp_path, record, evaluation, status=replace(status, spec=spec), events=events())
    words = page.sections["tuning"].replace("\u00a0", " ")
    assert "The model has blocks of its own, and its scores are theirs." in words
    assert [row[0] for row in page.rows("tuning")] == [
        *("accuracy", "area under the ROC curve", "cross-entropy, nats a row", "zeta")
    ]
    assert "weightsadditions of rank 4" in words and "learning rate of the last stage0.002" in words
    assert "0.5 times that of the stage behind it" in words and "left to the clusterrows a step, weight decay" in words
    assert "keeps the statistics of the pretraining" in words
    # Its curve is by epochs, whatever the head's is by, and stands where it belongs.
    assert "training loss from 0.9 to 0.25" in words and "epoch" in words and "step" in page.sections["curves"]
    assert len(page.all("svg", "tuning")) == len(page.all("svg", "curves")) == 1
    assert "mixed in pairs" in words and "mixed in pairs" in page.sections["curves"]
    assert "tune" not in page.sections["curves"].replace("fine-tuning", "")
    assert (
        "of the head alone" in page.sections["curves"] and "columns that the head reads" not in page.sections["summary"]
    )
    card = Model(FakeClient(record, evaluation, status=status), record).card(tmp_path / "card.md")
    assert "Head and blocks were trained together" in card and "frozen" not in card
    assert "trained behind `blocks.4`, of `resnet18`" in card


def test_what_sweeps_were_won_by_is_named(tmp_path):
    def score(task, select_by="", loss=LossConfig(), **hidden):
        record, evaluation = drawn(task, trials=(trial(1, won=True), *hidden.get("more", ())))
        status = job()
        fit = replace(status.spec.fit, select_by=select_by, loss=loss)
        status = replace(status, spec=replace(status.spec, fit=fit))
        return reported(tmp_path, record, evaluation, status=status).sections["search"]

    assert "The score is minus the cross-entropy, the mean over folds" in score("classification")
    assert "The score is F1, mean over classes, the mean" in score("classification", "f1_macro")
    assert "The score is minus the root mean squared error, the mean" in score("regression", "rmse")
    assert "The score is minus the mean absolute error, the mean" in score("regression", loss=LossConfig("huber"))
    assert "The score is R², the mean" in score("regression")
    failed = [trial(number, error="no", scores=()) for number in range(14)]
    assert "3 more configurations, 3 of them failed" in score("classification", more=failed)


def test_groups_views_and_outlier_scores_are_named(whole):
    record, _ = drawn("classification")
    metrics = {**record.metrics, "num_groups": 31.0, "num_views": 4.0}
    words = whole("classification", metrics=metrics, has_outlier_scores=True).sections["summary"]
    assert "groups, none of them on both sides31" in words and "views of each, to train on4" in words
    assert "outlier scoresyes" in words
    assert "outlier" not in whole("classification").sections["summary"]


def test_an_interval_without_width_is_none(whole):
    record, _ = drawn("classification")
    metrics = {**record.metrics, "balanced_accuracy": 1.0, "balanced_accuracy_low": 1.0, "balanced_accuracy_high": 1.0}
    words = whole("classification", metrics=metrics).sections["summary"]
    assert "1.0000 to 1.0000" not in words and "0.8500 to 0.9400" in words


def test_what_paper_shows_of_a_folded_list(whole):
    page = whole("regression", trials=tuple(trial(number) for number in range(14)))
    folded = page.all("details", "search")
    assert [one.get("class") for one in folded] == ["rest"], "paper says that there are more"
    assert {one.get("class") for one in page.all("details", "again")} == {None}
    (style,) = [words for words in page.words if "@media print" in words]
    on_paper = style[style.index("@media print") :]
    assert "details:not([open]):not(.rest) { display: none; }" in on_paper
    assert "min-width: 0 !important" in on_paper, "nothing can be scrolled there"


def test_mistakes_of_labels_say_what_is_in_brackets(whole):
    images = np.random.default_rng(0).integers(0, 256, (700, 9, 9, 3), dtype=np.uint8)
    assert "In brackets the class that is most wrong" in whole("multi_label", images).sections["mistakes"]
    assert "In brackets" not in whole("classification", images).sections["mistakes"]


@pytest.mark.parametrize(("uneven", "said"), [(False, "of the 8 first classes"), (True, "of the 8 largest classes")])
def test_classes_of_one_size_are_not_told_apart_by_it(uneven, said, tmp_path):
    record, evaluation = drawn("classification", outputs=10, rows=100)
    classes = np.arange(100) % 10
    classes[0] = 1 if uneven else 0
    images = np.zeros((500, 9, 9, 3), dtype=np.uint8)
    words = reported(tmp_path, record, replace(evaluation, classes_N=classes), images).sections["data"]
    assert said in words
    assert ("10 of each class" in words.replace("\u00a0", " ")) is not uneven
