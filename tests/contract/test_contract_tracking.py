"""Jobs recorded by TensorBoard and MLflow, read back from what they wrote."""

import json
import logging
import os
import shutil
import socket
import sys
import threading
from pathlib import Path

import pytest
import trunkline
from event_files import Run
from mlflow import MlflowClient
from trunkline._track import recorder
from trunkline._track.sink import Sink
from trunkline.cli.app import app
from trunkline.track import MLflow, TensorBoard, Tracker
from trunkline_wire.errors import ErrorCode, WireError
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def a_store_of_files(monkeypatch):
    """MLflow keeps runs in files here: its own default needs more than its client has."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def data(fake_client, pictures):
    """Upload a dataset of images."""
    images, labels = pictures(30)
    return fake_client.upload(images, labels, name="d", input_size=8)


@pytest.fixture
def address(tmp_path):
    """Return where MLflow keeps its runs."""
    return f"file://{tmp_path / 'mlruns'}"


def runs_of(address, experiment="trunkline"):
    client = MlflowClient(address)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, found


def folder_of(root, job):
    (found,) = root.glob(f"*-{job.id[:12]}")
    return found


class TestTensorBoard:
    def test_a_job_and_its_model(self, fake_client, data, tmp_path):
        job = fake_client.train(data, name="m", seed=3, track=TensorBoard(tmp_path / "runs"))
        model = job.result(60)
        found = Run(folder_of(tmp_path / "runs", job))
        events = list(job.events())
        (loss,) = [one for one in events if one.phase == "fit"]
        assert found.values("fit/loss") == [(loss.seq, 0.5)]
        assert found.scalars["fit/loss"][0][2] == pytest.approx(loss.time.timestamp(), abs=1e-3)
        assert found.values("progress/embed") == [(2, 0.5)] and found.values("progress/end") == [(len(events), 1.0)]
        measured = {name: round(value, 5) for name, value in model.metrics.items()}
        assert measured and measured == {name: found.values(f"model/{name}")[0][1] for name in measured}
        assert found.settings["seed"] == 3.0 and found.settings["head.kind"] == "linear"
        assert found.settings["model.slices"] == ", ".join(model.slices)
        assert found.settings["version.cluster"] == "0.0-fake"
        assert data.digest in found.texts["model"] and "m@1" in found.texts["model"]
        assert found.texts["state"] == "SUCCEEDED" and found.texts["warnings"] == "None."
        assert "grid" in found.texts["candidates"] and found.texts["card"].startswith("# m@1")

    def test_a_job_that_fails(self, fake, fake_client, data, tmp_path):
        fake.faults.job_error = WireError(ErrorCode.WORKER_OOM, "no memory for `that`")
        job = fake_client.train(data, name="m", track=TensorBoard(tmp_path))
        with pytest.raises(trunkline.JobFailedError):
            job.result(60)
        found = Run(folder_of(tmp_path, job))
        assert "FAILED" in found.texts["state"] and "no memory for `that`" in found.texts["state"]
        assert "progress/embed" in found.scalars and "model" not in found.texts

    def test_waiting_again_hides_what_was_there(self, fake, fake_client, data, tmp_path):
        fake.faults.hold_jobs = threading.Event()
        job = fake_client.train(data, name="m", track=TensorBoard(tmp_path))
        with pytest.raises(trunkline.DeadlineExceededError):
            job.result(0.3)
        fake.faults.hold_jobs.set()
        job.result(60)
        found = Run(folder_of(tmp_path, job))
        assert (len(found.files), found.num_starts) == (2, 1)
        assert found.texts["state"] == "SUCCEEDED" and len(found.scalars["fit/loss"]) == 1

    def test_names_of_the_cluster_lead_nowhere(self, fake, fake_client, data, tmp_path):
        job = fake_client.train(data, name="m")
        job.result(60)
        fake.job("default", job.id).message.spec.model = "../../elsewhere"
        fake_client.job(job.id).result(track=TensorBoard(tmp_path / "in" / "here"))
        assert [one.name for one in tmp_path.glob("*")].count("in") == 1
        assert folder_of(tmp_path / "in" / "here", job).name.startswith("_.._elsewhere")

    def test_a_folder_that_cannot_be(self, fake, fake_client, data, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(trunkline.TrackingError, match="cannot be made"):
            fake_client.train(data, name="m", track=TensorBoard(tmp_path / "file" / "runs"))
        assert fake.calls["SubmitJob"] == 0


class TestMLflow:
    def test_a_job_and_its_model(self, fake_client, data, address, tmp_path):
        job = fake_client.train(data, name="m", l2=0.25, track=MLflow(address, experiment="mine"))
        model = job.result(60)
        client, (run,) = runs_of(address, "mine")
        assert run.info.status == "FINISHED" and run.info.run_name == f"m-{job.id[:8]}"
        params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
        assert params["l2"] == "0.25" and params["solver"] == "lbfgs" and params["dataset"] == data.reference
        assert params["loss.kind"] == "auto" and params["version.numpy"]
        assert params["version.client"] == trunkline.__version__
        assert tags["trunkline.model"] == "m@1" and tags["trunkline.job"] == job.id
        assert tags["trunkline.dataset_digest"] == data.digest and tags["trunkline.state"] == "SUCCEEDED"
        assert model.metrics == {name: metrics[f"model/{name}"] for name in model.metrics}
        (loss,) = client.get_metric_history(run.info.run_id, "fit/loss")
        (event,) = [one for one in job.events() if one.phase == "fit"]
        assert (loss.value, loss.step) == (0.5, event.seq)
        assert loss.timestamp == round(1000 * event.time.timestamp())
        kept = {one.path for one in client.list_artifacts(run.info.run_id)}
        assert kept == {"report.html", "card.md", "candidates.json"}
        read = {name: self.artifact(client, run, name, tmp_path) for name in kept}
        assert "Report on m@1" in read["report.html"] and "# m@1" in read["card.md"]
        table = json.loads(read["candidates.json"])
        assert table["columns"][0] == "slices" and len(table["data"]) == len(model.candidates)

    def artifact(self, client, run, name, folder):
        return Path(client.download_artifacts(run.info.run_id, name, str(folder))).read_text(encoding="utf-8")

    def test_a_job_that_fails(self, fake, fake_client, data, address):
        fake.faults.job_error = WireError(ErrorCode.WORKER_OOM, "no memory for that")
        job = fake_client.train(data, name="m", track=MLflow(address))
        with pytest.raises(trunkline.JobFailedError):
            job.result(60)
        _, (run,) = runs_of(address)
        assert run.info.status == "FAILED" and "no memory for that" in run.data.tags["trunkline.error"]

    def test_a_job_that_is_cancelled(self, fake, fake_client, data, address):
        fake.faults.hold_jobs = threading.Event()
        job = fake_client.train(data, name="m", track=MLflow(address))
        job.cancel()
        with pytest.raises(trunkline.JobCancelledError):
            job.result(60)
        _, (run,) = runs_of(address)
        assert run.info.status == "KILLED" and "trunkline.error" not in run.data.tags

    def test_waiting_again_goes_on_with_the_run(self, fake, fake_client, data, address):
        fake.faults.hold_jobs = threading.Event()
        job = fake_client.train(data, name="m", track=MLflow(address))
        with pytest.raises(trunkline.DeadlineExceededError):
            job.result(0.5)
        _, (run,) = runs_of(address)
        assert run.info.status == "RUNNING"
        fake.faults.hold_jobs.set()
        fake_client.job(job.id).result(60, track=MLflow(address))
        client, (again,) = runs_of(address)
        assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
        assert len(client.get_metric_history(run.info.run_id, "progress/embed")) == 1
        assert len(client.get_metric_history(run.info.run_id, "progress/end")) == 1
        # Once more, and nothing is there twice.
        fake_client.job(job.id).result(60, track=MLflow(address))
        client, (again,) = runs_of(address)
        assert len(client.get_metric_history(run.info.run_id, "fit/loss")) == 1
        assert len(client.get_metric_history(run.info.run_id, "model/accuracy")) == 1

    def test_an_experiment_that_was_deleted(self, fake, fake_client, data, address):
        client = MlflowClient(address)
        client.delete_experiment(client.create_experiment("gone"))
        with pytest.raises(trunkline.TrackingError, match="was deleted"):
            fake_client.train(data, name="m", track=MLflow(address, experiment="gone"))
        assert fake.calls["SubmitJob"] == 0

    def test_a_server_that_is_away(self, fake, fake_client, data):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(trunkline.TrackingError, match=r"MLflow at http://127\.0\.0\.1") as caught:
            fake_client.train(data, name="m", track=MLflow(address))
        assert "secret" not in str(caught.value) and fake.calls["SubmitJob"] == 0

    def test_a_server_that_does_not_answer(self, fake, fake_client, data, monkeypatch):
        monkeypatch.setattr(recorder, "OPEN_S", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            with pytest.raises(trunkline.TrackingError, match=r"does not answer within 0\.3 s"):
                fake_client.train(data, name="m", track=MLflow(address))
        assert fake.calls["SubmitJob"] == 0

    def test_a_store_that_goes_away_costs_one_warning_and_no_model(self, fake, fake_client, data, tmp_path, caplog):
        fake.faults.hold_jobs = threading.Event()
        address = f"file://{tmp_path / 'mlruns'}"
        job = fake_client.train(data, name="m", track=[MLflow(address), TensorBoard(tmp_path / "runs")])
        with pytest.raises(trunkline.DeadlineExceededError):
            job.result(0.5)
        shutil.rmtree(tmp_path / "mlruns")
        (tmp_path / "mlruns").write_text("no folder any more")
        fake.faults.hold_jobs.set()
        with caplog.at_level(logging.WARNING, "trunkline"):
            model = job.result(60)
        assert model.reference == "m@1"
        (warning,) = [one for one in caplog.records if "job is not concerned" in one.getMessage()]
        assert "MLflow at file" in warning.getMessage()
        assert Run(folder_of(tmp_path / "runs", job)).texts["state"] == "SUCCEEDED"


class Hanging(Tracker, Sink):
    """A tracker that takes events until it is told to hang, and counts what it was told."""

    def __init__(self, *, hangs=False, fails=False):
        self.told, self.hangs, self.fails, self.released = [], hangs, fails, threading.Event()

    def load(self):
        pass

    def open(self):
        return self

    def _tell(self, what):
        self.told.append(what)
        if self.hangs and what == "event":
            self.released.wait(30)
        if self.fails:
            raise ConnectionError("gone")

    def begin(self, job, facts):
        self._tell("begin")

    def event(self, event):
        self._tell("event")

    def model(self, material):
        self._tell("model")

    def course(self, material):
        self._tell("course")

    def papers(self, material):
        self._tell("papers")

    def end(self, state, reason):
        self._tell(state.name)

    def close(self):
        self._tell("close")


def test_a_tracker_that_hangs_holds_nobody_up_for_long(fake_client, data, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "FLUSH_S", 0.2)
    tracker = Hanging(hangs=True)
    with caplog.at_level(logging.WARNING, "trunkline"):
        assert fake_client.train(data, name="m", track=tracker).result(60).reference == "m@1"
    assert [one.getMessage() for one in caplog.records if "within 0.2 s" in one.getMessage()]
    assert tracker.told == ["begin", "event"]
    tracker.released.set()


def test_every_call_is_tried_and_the_first_failure_is_told(fake_client, data, caplog):
    tracker = Hanging(fails=True)
    with caplog.at_level(logging.WARNING, "trunkline"):
        job = fake_client.train(data, name="m", track=tracker)
        job.result(60)
    events = ["event"] * len(list(job.events()))
    assert tracker.told == ["begin", *events, "model", "course", "papers", "SUCCEEDED", "close"]
    assert len([one for one in caplog.records if "failed: gone" in one.getMessage()]) == 1


def test_what_was_recorded_is_not_recorded_twice(fake_client, data):
    tracker = Hanging()
    job = fake_client.train(data, name="m", track=tracker)
    job.result(60)
    before = list(tracker.told)
    assert job.result(60).reference == "m@1" and tracker.told == before


def test_things_that_are_no_tracker(fake, fake_client, data):
    with pytest.raises(trunkline.InvalidArgumentError, match="TensorBoard"):
        fake_client.train(data, name="m", track=["runs"])
    assert fake.calls["SubmitJob"] == 0


@pytest.mark.parametrize(
    ("tracker", "module", "extra"),
    [(TensorBoard("runs"), "tensorboardX", "tensorboard"), (MLflow(), "mlflow", "mlflow")],
    ids=["tensorboard", "mlflow"],
)
def test_a_library_that_is_missing(fake, fake_client, data, monkeypatch, tmp_path, tracker, module, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, module)
    sys.path_importer_cache.clear()
    with pytest.raises(trunkline.MissingExtraError) as caught:
        fake_client.sweep(data, name="m", l2=[1.0, 2.0], track=[tracker])
    assert caught.value.hint == f"Run: pip install 'trunkline[{extra}]'"
    assert fake.calls["SubmitJob"] == 0 and not os.listdir(tmp_path)


class TestCommands:
    @pytest.fixture
    def run(self, fake, monkeypatch):
        """Run a command as a logged-in user."""
        monkeypatch.setenv("TRUNKLINE_ADDRESS", fake.address)
        monkeypatch.setenv("TRUNKLINE_TOKEN", fake.token)
        return lambda *words: CliRunner().invoke(app, [str(one) for one in words])

    @pytest.mark.parametrize("words", [("train",), ("sweep", "--l2", "1")], ids=["train", "sweep"])
    def test_both_at_once(self, run, data, address, tmp_path, words):
        options = ("--tensorboard", tmp_path / "runs", "--mlflow", address, "--mlflow-experiment", "mine")
        done = run(words[0], data.reference, "--name", "m", *words[1:], *options)
        assert done.exit_code == 0, done.output
        _, (found,) = runs_of(address, "mine")
        assert found.info.status == "FINISHED"
        (folder,) = (tmp_path / "runs").glob("m-*")
        assert Run(folder).texts["state"] == "SUCCEEDED"
        if words[0] == "sweep":
            assert found.data.params["sweep.l2"] == "1.0"

    def test_nobody_records_what_nobody_waits_for(self, run, fake, data, tmp_path):
        done = run("train", data.reference, "--name", "m", "--tensorboard", tmp_path / "runs", "--no-wait")
        assert done.exit_code == 2 and "--no-wait" in done.stderr and fake.calls["SubmitJob"] == 0

    def test_a_job_of_before_is_recorded_too(self, run, data, tmp_path):
        submitted = run("train", data.reference, "--name", "m", "--no-wait", "--json")
        job = json.loads(submitted.stdout)["id"]
        idle = run("jobs", job, "--tensorboard", tmp_path / "runs")
        assert idle.exit_code == 2 and "--wait" in idle.stderr
        done = run("jobs", job, "--wait", "--tensorboard", tmp_path / "runs")
        assert done.exit_code == 0, done.output
        (folder,) = (tmp_path / "runs").glob("m-*")
        assert Run(folder).texts["state"] == "SUCCEEDED"
