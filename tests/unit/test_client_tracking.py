"""What trackers are told of a job, read back from what they wrote."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from event_files import Run, events
from mlflow import MlflowClient
from tensorboardX.event_file_writer import EventsWriter
from trunkline._report.material import Material
from trunkline._track import facts, mlflow_sink
from trunkline.records import (
    Candidate,
    Evaluation,
    FitConfig,
    JobEvent,
    JobSpec,
    JobState,
    JobStatus,
    ModelRecord,
    ServerInfo,
    Trial,
)
from trunkline.track import MLflow, TensorBoard
from trunkline_wire.fits import LossConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import FeatureSpace

START = datetime(2025, 3, 1, 12, 0, tzinfo=UTC)
INFO = ServerInfo("0.9", 1, {"torch": "2.11"}, 1, 1, 0.0, "t", True, "")
FIT = FitConfig("adamw", 30, 64, 0.0, -1.0, 0.25, True, 5, LossConfig("focal", class_weights=(1.0, 2.5)))
SPEC = JobSpec(
    "m",
    "d@2",
    "net",
    64,
    "slices",
    ("a.mean", "pooled"),
    HeadConfig("mlp", hidden=(64, 32)),
    FIT,
    sweep=SweepConfig((1.0, 2.0)),
)
JOB = JobStatus("0123456789abcdef" * 2, JobState.RUNNING, SPEC, None, "", 0, START, START, None)
TRIALS = (
    Trial(("pooled",), 1.0, (), 0.0, 0.0, (-0.5, -0.7), -0.6, "", 0.25, False),
    Trial(("pooled",), 2.0, (64, 32), 0.01, 0.1, (-0.3, -0.5), -0.4, "", 1.5, True),
    Trial(("pooled",), 9.0, (8,), 0.02, 0.0, (), 0.0, "the loss | is not finite", 0.5, False),
)
RECORD = ModelRecord(
    name="m",
    version=3,
    task="classification",
    class_names=("cat", "dog"),
    num_outputs=2,
    space=FeatureSpace("net", "input", 64, "p"),
    embedding_fingerprint="e",
    slices=("a.mean", "pooled"),
    metrics={"accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.875, "ece": float("nan")},
    dataset="d@2",
    dataset_digest="f" * 64,
    head_sha256="0" * 64,
    versions={"torch": "2.11"},
    job_id=JOB.id,
    create_time=START,
    candidates=(Candidate(("pooled",), 8, -0.4, 0.75), Candidate(("a.mean",), 4, -0.9, None)),
    head=SPEC.head,
    warnings=("2 rows held out are *copies*", "few rows"),
    trials=TRIALS,
)
CURVES = {"loss": (0.5, 0.25, 0.125), "validation_loss": (0.75, 0.5, 0.625)}
EVALUATION = Evaluation(np.arange(4), 4, np.array([0, 1, 0, 1]), None, np.full((4, 2), 0.5, np.float32), CURVES, ())
MATERIAL = Material(RECORD, (("input", "pictures"),), EVALUATION, JOB)
EVENTS = [
    JobEvent(1, START, "queued", 0.0),
    JobEvent(2, START + timedelta(seconds=1), "embed", 1.0, {"rows": 100.0}),
    JobEvent(3, START + timedelta(seconds=2), "fit", 0.3, {"loss": 0.5, "validation_loss": 0.75, "epoch": 10.0}),
    JobEvent(4, START + timedelta(seconds=3), "fit", 0.9, {"refit_loss": 0.25, "epoch": 20.0}),
    JobEvent(5, START + timedelta(seconds=4), "assess", 1.0, {"accuracy": 0.75}, "fine"),
]


@pytest.fixture(autouse=True)
def a_store_of_files(monkeypatch):
    """MLflow keeps runs in files here: its own default needs more than its client has."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def record(sink, state=JobState.SUCCEEDED, reason="", told=EVENTS, material=MATERIAL):
    """Tell a sink everything of a job."""
    sink.begin(JOB, facts.spec_facts(JOB.spec, INFO))
    for event in told:
        sink.event(event)
    if state is JobState.SUCCEEDED:
        sink.model(material)
        sink.course(material)
        sink.papers(material)
    sink.end(state, reason)
    sink.close()


def test_what_was_asked_for_as_names_and_texts():
    found = facts.spec_facts(SPEC, INFO)
    assert found["l2"] == "auto" and found["solver"] == "adamw" and found["seed"] == "5"
    assert found["slices"] == "a.mean, pooled" and found["head.hidden"] == "64, 32" and found["sweep.l2"] == "1.0, 2.0"
    assert found["loss.kind"] == "focal" and found["loss.class_weights"] == "1.0, 2.5"
    assert found["version.cluster"] == "0.9" and found["version.torch"] == "2.11"
    assert "select_by" not in found and "fit" not in found and all(isinstance(one, str) for one in found.values())
    fixed = dataclasses.replace(SPEC, sweep=None, fit=dataclasses.replace(FIT, l2=0.125))
    assert facts.spec_facts(fixed, INFO)["l2"] == "0.125" and "sweep.l2" not in facts.spec_facts(fixed, INFO)


@pytest.mark.parametrize(
    ("event", "scalars", "step"),
    [
        (EVENTS[2], {"fit/loss": 0.5, "fit/validation_loss": 0.75}, 10),
        (EVENTS[4], {"assess/accuracy": 0.75}, 5),
        (JobEvent(9, None, "a b\n", 0.0, {"x\u0000:y": 1.0, "step": 7.0}), {"a b_/x__y": 1.0}, 7),
        (EVENTS[0], {}, 1),
    ],
)
def test_events_as_scalars(event, scalars, step):
    assert facts.event_scalars(event) == (scalars, step)


def test_tensorboard(tmp_path):
    record(TensorBoard(tmp_path).open())
    (folder,) = tmp_path.iterdir()
    found = Run(folder)
    assert found.values("fit/loss") == [(10, 0.5)] and found.values("fit/refit_loss") == [(20, 0.25)]
    assert found.scalars["fit/loss"][0][2] == pytest.approx((START + timedelta(seconds=2)).timestamp())
    assert found.values("progress/fit") == [(3, 0.3), (4, 0.9)]
    assert found.values("curve/validation_loss") == [(1, 0.75), (2, 0.5), (3, 0.625)]
    assert found.values("model/accuracy_low") == [(5, 0.5)] and "model/ece" not in found.scalars
    assert found.settings["batch_size"] == 64.0 and found.settings["loss.kind"] == "focal"
    assert "copies" in found.texts["warnings"] and "few rows" in found.texts["warnings"]
    assert found.texts["trials"].count("\n") == 1 + len(TRIALS) and r"is not finite" in found.texts["trials"]
    trials = [Run(folder / f"trial-{number:04d}") for number in range(3)]
    assert [one.settings["hidden"] for one in trials] == ["linear", "64-32", "8"]
    assert [one.settings["won"] for one in trials] == ["False", "True", "False"]
    assert trials[1].values("trial/score") == [(0, -0.4)]
    assert "trial/score" not in trials[2].scalars and "not finite" in trials[2].settings["error"]


def test_every_call_of_tensorboard_is_on_the_disk_at_once(tmp_path):
    sink = TensorBoard(tmp_path).open()
    sink.begin(JOB, {})
    (path,) = tmp_path.glob("*/events*")
    seen = []
    for event in EVENTS:
        sink.event(event)
        seen.append(len(list(events(path))))
    sink.close()
    assert seen == sorted(set(seen)) and len(seen) == len(EVENTS)


def test_a_disk_that_is_full_is_told(tmp_path, monkeypatch):
    sink = TensorBoard(tmp_path).open()
    sink.begin(JOB, {})

    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "flush", full)
        with pytest.raises(OSError, match="No space"):
            sink.event(EVENTS[2])
    sink.event(EVENTS[3])
    sink.close()
    assert Run(next(tmp_path.iterdir())).values("fit/refit_loss") == [(20, 0.25)]


def test_mlflow(tmp_path):
    address = f"file://{tmp_path / 'runs'}"
    record(MLflow(address, experiment="x").open())
    client = MlflowClient(address)
    every = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    (run,) = [one for one in every if "mlflow.parentRunId" not in one.data.tags]
    assert run.info.status == "FINISHED" and run.info.start_time == 1000 * round(START.timestamp())
    assert run.data.params["loss.kind"] == "focal" and run.data.params["model.slices"] == "a.mean, pooled"
    assert run.data.tags["trunkline.model"] == "m@3" and run.data.tags["trunkline.dataset_digest"] == "f" * 64
    assert "few rows" in run.data.tags["mlflow.note.content"]
    (loss,) = client.get_metric_history(run.info.run_id, "fit/loss")
    assert (loss.step, loss.value, loss.timestamp) == (10, 0.5, 1000 * round(START.timestamp()) + 2000)
    curve = client.get_metric_history(run.info.run_id, "curve/loss")
    assert [(one.step, one.value) for one in curve] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert {name: run.data.metrics[f"model/{name}"] for name in ("accuracy", "accuracy_low", "accuracy_high")} == {
        name: RECORD.metrics[name] for name in ("accuracy", "accuracy_low", "accuracy_high")
    }
    kept = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert kept == {"report.html", "card.md", "candidates.json", "trials.json", "warnings.txt"}
    table = json.loads(
        (tmp_path / "runs" / run.info.experiment_id / run.info.run_id / "artifacts/trials.json").read_text()
    )
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [one["score"] for one in rows] == [-0.6, -0.4, None] and [one["won"] for one in rows] == [False, True, False]
    nested = {one.info.run_name: one for one in every if one is not run}
    assert sorted(nested) == ["trial-0000", "trial-0001", "trial-0002"]
    assert {one.data.tags["mlflow.parentRunId"] for one in nested.values()} == {run.info.run_id}
    assert nested["trial-0001"].data.metrics["trial/score"] == -0.4
    assert nested["trial-0001"].data.params["hidden"] == "64-32"
    failed = nested["trial-0002"]
    assert failed.info.status == "FAILED" and "not finite" in failed.data.tags["trunkline.error"]


@pytest.mark.parametrize(
    ("state", "reason", "status"),
    [(JobState.FAILED, "no memory `for` that", "FAILED"), (JobState.CANCELLED, "", "KILLED")],
)
def test_how_runs_of_mlflow_end_without_a_model(tmp_path, state, reason, status):
    address = f"file://{tmp_path / 'runs'}"
    record(MLflow(address, experiment="x").open(), state, reason)
    client = MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert run.info.status == status and run.data.tags.get("trunkline.error", "") == reason


def test_of_many_configurations_the_best_have_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_sink, "MAX_NESTED", 2)
    address = f"file://{tmp_path / 'runs'}"
    record(MLflow(address, experiment="x").open())
    client = MlflowClient(address)
    every = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    nested = {one.info.run_name for one in every if "mlflow.parentRunId" in one.data.tags}
    assert nested == {"trial-0001", "trial-0000"}


def test_what_mlflow_did_not_take_is_written_with_what_comes_next(tmp_path, monkeypatch):
    address = f"file://{tmp_path / 'runs'}"
    sink = MLflow(address, experiment="x").open()
    with monkeypatch.context() as patch:

        def away(*args, **keywords):
            raise ConnectionError("away")

        patch.setattr(MlflowClient, "create_run", away)
        for call in (
            lambda: sink.begin(JOB, {"l2": "1"}),
            lambda: sink.event(EVENTS[1]),
            lambda: sink.event(EVENTS[2]),
        ):
            with pytest.raises(ConnectionError):
                call()
    sink.event(EVENTS[3])
    client = MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert run.data.params == {"l2": "1"} and run.info.status == "RUNNING"
    assert run.data.metrics["embed/rows"] == 100.0 and run.data.metrics["fit/refit_loss"] == 0.25
    assert run.data.tags["trunkline.last_event"] == "4"


def test_values_that_are_too_long_for_a_server_are_cut(tmp_path):
    address = f"file://{tmp_path / 'runs'}"
    sink = MLflow(address, experiment="x").open()
    sink.begin(JOB, {"slices": "s" * 10_000, **{f"p{number}": "1" for number in range(250)}})
    sink.end(JobState.FAILED, "r" * 10_000)
    client = MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert len(run.data.params) == 251 and len(run.data.params["slices"]) == 500
    assert len(run.data.tags["trunkline.error"]) == 4000


def test_no_password_is_shown():
    tracker = MLflow("https://me:secret@host.example/path", experiment="x")
    assert str(tracker) == "MLflow at https://host.example/path" and "secret" not in repr(tracker)
