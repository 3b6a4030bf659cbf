"""The main job on a real cluster: Ray, Serve, a lane, real weights, real pictures."""

import io
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import trunkline
from clusters import digits, trunkline_command
from PIL import Image
from trunkline_worker.cluster.processes import processes_of

pytestmark = pytest.mark.ray

BACKBONE = "efficientnet_lite0"


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def stem(client):
    return client.stem(BACKBONE, cut="blocks.2", input_size=96)


@pytest.fixture(scope="module")
def model(client, stem):
    pictures, labels = digits(300)
    data = client.upload(pictures, labels, name="main-digits", stem=stem)
    return client.train(data, name="main-head").result(progress=False)


def test_a_model_trained_from_features_knows_digits_it_has_not_seen(model):
    pictures, labels = digits(700)
    report = model.evaluate(pictures[300:], labels[300:])
    assert report.accuracy > 0.93


def test_the_same_model_reads_whole_pictures_of_a_client_without_a_stem(cluster, client, model):
    pictures, _ = digits(332)
    # Nothing is rounded on the way, so that the answers are the same however near a row is to another class.
    stem = client.stem(BACKBONE, cut="blocks.2", input_size=96, codec="float32")
    with_stem = model.predict(pictures[300:], stem=stem)
    features = stem(pictures[300:])
    assert features.shape == (32, 40, 12, 12)
    encoded = []
    for picture in pictures[300:]:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    folder = cluster.folder / "pictures"
    folder.mkdir()
    paths = []
    for index, data in enumerate(encoded):
        paths.append(folder / f"{index}.png")
        paths[-1].write_bytes(data)
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import trunkline, json\n"
        f"model = trunkline.connect({cluster.address!r}, token={cluster.token!r}).model('main-head')\n"
        f"found = model.predict(sorted({[str(path) for path in paths]!r}, key=len))\n"
        "print(json.dumps(found.probabilities.tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=cluster.environment, capture_output=True, text=True, check=True
    )
    ordered = sorted(range(32), key=lambda index: len(str(paths[index])))
    without = np.array(json.loads(done.stdout))
    np.testing.assert_allclose(without, with_stem.probabilities[ordered], atol=1e-3)


def test_a_second_upload_sends_no_row_and_a_second_head_costs_no_trunk_call(client, stem, model):
    pictures, labels = digits(300)
    data = client.upload(pictures, labels, name="main-digits", stem=stem)
    assert (data.version, data.report.rows_sent, data.report.feature_bytes_sent) == (1, 0, 0)
    job = client.train(data, name="second", embedding="pooled")
    job.result(progress=False)
    embeds = [event for event in job.events() if event.phase == "embed"]
    assert [event.metrics["cached"] for event in embeds] == [300.0]
    # A subset in another order is made of the same rows.
    order = np.random.default_rng(0).permutation(300)[:150]
    subset = client.upload(pictures[order], labels[order], name="subset", stem=stem)
    assert (subset.num_rows, subset.report.rows_sent) == (150, 0)


def test_pictures_as_they_are_can_be_the_dataset(client):
    pictures, labels = digits(120)
    data = client.upload(pictures, labels, name="pictures")
    model = client.train(data, name="from-pictures", backbone=BACKBONE, input_size=96, embedding="pooled").result(
        progress=False
    )
    assert model.evaluate(pictures, labels).accuracy > 0.9


def test_a_corrupt_picture_fails_its_row_alone(client, model):
    pictures, _ = digits(3)
    good = io.BytesIO()
    Image.fromarray(pictures[0]).save(good, format="PNG")
    prediction = model.predict([good.getvalue(), good.getvalue()[:40], good.getvalue()])
    assert [row for row in prediction.errors] == [1]
    assert prediction.labels[1] is None
    assert prediction.labels[0] == prediction.labels[2] is not None


def test_regression_and_an_mlp(client, stem):
    pictures, labels = digits(200)
    ink = pictures.reshape(200, -1).mean(axis=1) / 255
    data = client.upload(pictures, ink.astype(np.float32), name="ink", stem=stem)
    model = client.train(data, name="ink-head").result(progress=False)
    assert model.metrics["r2"] > 0.5
    data = client.upload(pictures, labels, name="digits-200", stem=stem)
    head = trunkline.MLP(hidden=(64,), dropout=0.1)
    model = client.train(data, name="mlp", head=head, embedding="pooled", epochs=30, seed=3).result(progress=False)
    assert model.metrics["train_accuracy"] > 0.9


def test_a_queued_job_and_a_running_one_can_be_cancelled(client, stem):
    pictures, labels = digits(200)
    data = client.upload(pictures, labels, name="digits-200", stem=stem)
    slow = client.train(data, name="slow", head=trunkline.MLP(hidden=(512,)), epochs=100_000)
    waiting = client.train(data, name="waiting")
    waiting.cancel()
    assert waiting.status().state.name == "CANCELLED"
    for event in slow.events():
        if event.phase == "fit":
            break
    slow.cancel()
    with pytest.raises(trunkline.JobCancelledError):
        slow.result(progress=False, timeout_s=60)
    assert slow.status().state.name == "CANCELLED"
    assert {"slow", "waiting"}.isdisjoint({model.name for model in client.models()})


def test_wrong_features_are_refused_with_what_to_do(client, model, stem):
    pictures, _ = digits(2)
    with pytest.raises(trunkline.IncompatibleModelError):
        model.predict(pictures, stem=client.stem(BACKBONE, cut="blocks.2", input_size=64))
    with pytest.raises(trunkline.NotFoundError):
        client.stem(BACKBONE, cut="blocks.99")
    with pytest.raises(trunkline.NotFoundError):
        client.model("main-head@99")


def test_wrong_tokens_and_no_tokens_are_refused(cluster):
    with pytest.raises(trunkline.AuthenticationError):
        trunkline.connect(cluster.address, token="not-the-token-of-this-cluster")


def test_the_command_line_finds_the_cluster_by_itself(cluster, model):
    backbones = json.loads(cluster.run("backbones", "--json").stdout)
    assert backbones[0]["name"] == BACKBONE
    assert "blocks.2" in json.dumps(backbones)
    models = json.loads(cluster.run("models", "--json").stdout)
    assert "main-head" in json.dumps(models)
    status = json.loads(cluster.run("status", "--json").stdout)
    assert status["up"] and status["serving"]
    again = json.loads(cluster.run("up", "--json").stdout)
    assert again["already_up"] and again["address"] == cluster.address
    doctor = cluster.run("doctor", "--json")
    assert json.loads(doctor.stdout)


def test_everything_listens_on_loopback_only(cluster):
    """Reads what listens from the kernel, process by process."""
    strangers = []
    for pid in [*processes_of(cluster.id), cluster.holder]:
        inodes = set()
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        for table in ("tcp", "tcp6"):
            try:
                lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
            except OSError:
                continue
            for line in lines:
                words = line.split()
                if words[3] == "0A" and words[9] in inodes and not is_loopback(words[1].split(":")[0]):
                    title = Path(f"/proc/{pid}/cmdline").read_bytes()[:60]
                    strangers.append((title, words[1]))
    assert strangers == []


def is_loopback(hexadecimal):
    raw = bytes.fromhex(hexadecimal)
    words = [raw[start : start + 4][::-1] for start in range(0, len(raw), 4)]
    if len(words) == 1:
        return words[0][0] == 127
    address = b"".join(words)
    mapped = address[:12] == b"\0" * 10 + b"\xff\xff"
    return address == socket.inet_pton(socket.AF_INET6, "::1") or (mapped and address[12] == 127)


def test_loopback_is_told_from_other_addresses():
    assert is_loopback("0100007F")
    assert is_loopback("0000000000000000FFFF00000100007F")
    assert is_loopback("00000000000000000000000001000000")
    assert not is_loopback("00000000")
    assert not is_loopback("00000000000000000000000000000000")
    assert not is_loopback("0000000000000000FFFF00000A00000A")


def test_a_sweep_of_names_that_are_not_names(client, stem):
    pictures, labels = digits(20)
    for name in ("", "../up", "a/b", "x" * 200, "a b"):
        with pytest.raises(trunkline.TrunklineError):
            client.upload(pictures, labels, name=name, stem=stem)


def test_a_cluster_that_is_not_there_is_told_within_seconds(cluster):
    start = time.monotonic()
    done = subprocess.run(
        trunkline_command("backbones"),
        env={**cluster.environment, "TRUNKLINE_ADDRESS": "127.0.0.1:1", "TRUNKLINE_TOKEN": "x" * 20},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "trunkline up" in done.stderr
    assert time.monotonic() - start < 30
