"""Kill -9 of every part of a running cluster, each at work: nothing is lost, and service comes back by itself."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import trunkline
from clusters import digits
from trunkline_wire.rows import content_digest, row_id
from trunkline_wire.specs import IMAGES

pytestmark = pytest.mark.ray

BACK_WITHIN_S = 120.0
"""A bound that only a hang would break; how long it takes is measured in ``benchmarks/``."""


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def stem(client):
    return client.stem("efficientnet_lite0", cut="blocks.2", input_size=96)


@pytest.fixture(scope="module")
def data(client, stem):
    pictures, labels = digits(400)
    return client.upload(pictures, labels, name="faults", stem=stem)


@pytest.fixture(scope="module")
def model(client, data):
    return client.train(data, name="before-the-faults", embedding="pooled").result(progress=False)


def kill(cluster, title):
    os.kill(cluster.pid_of(title), signal.SIGKILL)


def predicting(model, pictures, stop, answers, failures):
    while not stop.is_set():
        try:
            answers.append(model.predict(pictures, timeout_s=BACK_WITHIN_S).labels)
        except Exception as error:
            failures.append(error)
            return


@pytest.mark.parametrize("title", ["ray::ServeReplica:trunkline-backbone", "ray::ServeReplica:trunkline-gateway"])
def test_predictions_in_flight_survive_the_death_of_a_replica(cluster, model, title):
    pictures, _ = digits(16)
    expected = model.predict(pictures).labels
    stop, answers, failures = threading.Event(), [], []
    worker = threading.Thread(target=predicting, args=(model, pictures, stop, answers, failures))
    worker.start()
    try:
        kill(cluster, title)
        # Two answers more than at the time of death: one may have been on its way.
        done = len(answers) + 2
        deadline = time.monotonic() + BACK_WITHIN_S
        while len(answers) < done and worker.is_alive() and time.monotonic() < deadline:
            worker.join(0.1)
    finally:
        stop.set()
        worker.join(BACK_WITHIN_S)
    assert failures == []
    assert len(answers) >= done
    assert all(labels == expected for labels in answers)


def test_a_job_outlives_the_worker_of_its_lane(cluster, client, data):
    job = client.train(data, name="outlives-its-lane", head=trunkline.MLP(hidden=(256,)), epochs=3000, seed=1)
    for event in job.events():
        if event.phase == "fit":
            break
    kill(cluster, "ray::RayTrainWorker")
    restarted = next(event for event in job.events() if event.phase == "restart")
    assert restarted.seq > event.seq
    job.cancel()
    with pytest.raises(trunkline.JobCancelledError):
        job.result(progress=False, timeout_s=BACK_WITHIN_S)
    assert job.status().num_restarts == 1
    # The lane is as good as new.
    again = client.train(data, name="after-the-lane", embedding="pooled").result(
        progress=False, timeout_s=BACK_WITHIN_S
    )
    assert again.metrics["accuracy"] > 0.5


def test_a_job_taken_back_from_a_dead_worker_finishes(cluster, client, stem):
    pictures, labels = digits(900)
    data = client.upload(pictures, labels, name="more-faults", stem=stem)
    job = client.train(data, name="taken-back", embedding="pooled", seed=5)
    for event in job.events():
        if event.phase == "embed" and event.progress > 0:
            break
    kill(cluster, "ray::RayTrainWorker")
    model = job.result(progress=False, timeout_s=BACK_WITHIN_S)
    assert (model.name, model.version) == ("taken-back", 1)
    assert job.status().num_restarts == 1
    # What was embedded before the death was kept.
    last = [event for event in job.events() if event.phase == "embed"][-1]
    assert last.metrics["cached"] >= 400


def test_a_killed_controller_loses_nothing(cluster, client, data, model):
    before = {one.reference for one in client.models()}
    running = client.train(data, name="through-the-controllers-death", seed=2)
    queued = client.train(data, name="queued-when-it-died", embedding="pooled", seed=3)
    kill(cluster, "ray::Controller")
    # Predictions do not need it.
    pictures, _ = digits(4)
    assert len(model.predict(pictures, timeout_s=BACK_WITHIN_S).labels) == 4
    for job in (running, queued):
        assert job.result(progress=False, timeout_s=BACK_WITHIN_S).version == 1
    after = {one.reference for one in client.models()}
    assert after == before | {"through-the-controllers-death@1", "queued-when-it-died@1"}
    seqs = [event.seq for event in running.events()]
    assert seqs == list(range(1, len(seqs) + 1))


UPLOADER = """
import numpy as np, sys, trunkline
pictures = np.load(sys.argv[1])
client = trunkline.connect(sys.argv[2], token=sys.argv[3])
client.upload(pictures, np.arange(len(pictures)) % 2, name="killed")
"""


def test_a_client_killed_in_the_middle_of_an_upload_sends_only_the_rest(cluster, client, tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, size=(400, 160, 160, 3), dtype=np.uint8)  # noise: 77 KB of PNG each
    np.save(tmp_path / "pictures.npy", pictures)
    ids = [row_id(IMAGES, "images", content_digest(one)) for one in pictures]

    def missing():
        return len(client._calls.datasets.find_missing(ids, client._deadline(None)))

    assert missing() == len(ids)
    uploader = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, str(tmp_path / "pictures.npy"), cluster.address, cluster.token],
        env=cluster.environment,
    )
    try:
        deadline = time.monotonic() + BACK_WITHIN_S
        while missing() == len(ids):
            assert uploader.poll() is None, "it was done before it could be killed"
            assert time.monotonic() < deadline
    finally:
        uploader.kill()
        uploader.wait()
    data = client.upload(pictures, np.arange(len(pictures)) % 2, name="killed")
    assert data.num_rows == len(pictures)
    assert 0 < data.report.rows_sent < len(pictures)
    again = client.upload(pictures, np.arange(len(pictures)) % 2, name="killed")
    assert (again.report.rows_sent, again.version) == (0, data.version)
