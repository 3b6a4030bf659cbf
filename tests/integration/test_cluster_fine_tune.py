"""Fine-tuning on a cluster: several workers, one of them lost; told to stop; and what comes of it is served."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import trunkline
from clusters import digits
from trunkline_worker.cluster.processes import processes_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SIZE = 64


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def data(client):
    pictures, labels = digits(900)
    stem = client.stem("efficientnet_lite0", cut="blocks.4", input_size=SIZE)
    return client.upload(pictures, labels, name="fine-tune", stem=stem), stem


def train_workers(cluster):
    """Return the processes of Ray Train's workers, the lane's included."""
    found = set()
    for pid in processes_of(cluster.id):
        try:
            if b"ray::RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
        except OSError:
            continue
    return found


def test_a_run_of_two_workers_goes_on_after_one_is_killed_and_is_served(cluster, client, data):
    rows, stem = data
    lanes = train_workers(cluster)
    tuning = trunkline.FineTune(cut="blocks.4", epochs=6, batch_size=32, learning_rate=5e-4, workers=2)
    job = client.train(rows, name="fine-tuned", embedding="pooled", validation=0.4, fine_tune=tuning, refit=False)
    killed, resumed = None, ""
    for event in job.events(timeout_s=500):
        # Well past the first checkpoint, at step 10 of 102: Ray Train's controller asks for them now and then only.
        if killed is None and event.phase == "tune" and event.metrics.get("step", 0) > 35:
            killed = sorted(train_workers(cluster) - lanes)
            assert len(killed) == 2, cluster.titles()
            os.kill(killed[1], signal.SIGKILL)
        resumed = resumed or (event.message if "going on from step" in event.message else "")
    model = job.result(progress=False)
    assert killed
    assert "with 2 workers" in resumed
    assert int(resumed.split("from step ")[1].split(" of")[0]) >= 10
    tuned = model.fine_tuning
    assert (tuned.num_resumed, tuned.num_workers, tuned.cut) == (1, 2, "blocks.4")
    assert tuned.kept, tuned.reason
    assert model.head.kind == "tail"
    # Judged by these scores, and served with the same weights.
    assert model.metrics["accuracy"] == tuned.after["accuracy"]
    pictures, labels = digits(1100)
    fresh = slice(900, 1100)
    said = model.predict(pictures[fresh], stem=stem)
    assert np.mean([one == str(truth) for one, truth in zip(said.labels, labels[fresh], strict=True)]) > 0.8
    plain = client.train(rows, name="plain", embedding="pooled").result(progress=False)
    assert plain.predict(pictures[fresh], stem=stem).labels is not None


def test_a_run_that_is_cancelled_ends_and_leaves_no_worker(cluster, client, data):
    rows, _ = data
    lanes = train_workers(cluster)
    tuning = trunkline.FineTune(cut="blocks.5", epochs=2000)
    job = client.train(rows, name="never", embedding="pooled", fine_tune=tuning)
    next(one for one in job.events(timeout_s=300) if one.phase == "tune" and one.metrics.get("step", 0) > 1)
    job.cancel()
    with pytest.raises(trunkline.JobCancelledError):
        job.result(progress=False)
    deadline = time.monotonic() + 60
    while train_workers(cluster) - lanes:
        assert time.monotonic() < deadline, cluster.titles()
        time.sleep(0.1)
