"""The command line against a server: output, exit codes, and what it says to do next."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from trunkline.cli.app import app
from trunkline_wire.errors import ErrorCode, WireError
from typer.testing import CliRunner


@pytest.fixture
def run(fake, monkeypatch):
    """Run a command as a logged-in user."""
    monkeypatch.setenv("TRUNKLINE_ADDRESS", fake.address)
    monkeypatch.setenv("TRUNKLINE_TOKEN", fake.token)
    return lambda *words: CliRunner().invoke(app, [str(one) for one in words])


@pytest.fixture
def folder(tmp_path, pictures):
    """Make a folder of class folders."""
    images, labels = pictures(12)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "photos" / "abc"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{row:02}.png")
    return tmp_path / "photos"


@pytest.fixture
def trained(run, folder):
    """Upload and train."""
    assert run("upload", "photos", folder).exit_code == 0
    assert run("train", "photos", "--name", "m").exit_code == 0


def test_the_whole_way(run, folder, tmp_path):
    found = run("backbones")
    assert found.exit_code == 0 and "fake_net" in found.stdout and "next: trunkline backbones" in found.stderr
    assert "half" in run("backbones", "fake_net").stdout
    first = run("upload", "photos", folder, "--stem", "fake_net:half")
    assert first.exit_code == 0 and "12 rows, 12 sent" in first.stdout and "trunkline train photos@1" in first.stderr
    assert "12 rows, 0 sent" in run("upload", "photos", folder, "--stem", "fake_net:half").stdout
    assert "photos@1" in run("datasets").stdout and "3 classes" in run("datasets", "photos").stdout
    done = run("train", "photos@1", "--name", "m", "--seed", "4")
    assert done.exit_code == 0 and done.stdout.startswith("m@1: accuracy 1.0000")
    assert "SUCCEEDED" in run("jobs").stdout
    assert "m@1" in run("models").stdout and "a, b, c" in run("models", "m").stdout
    predicted = run("predict", "m", folder / "b")
    lines = predicted.stdout.splitlines()
    assert predicted.exit_code == 0 and len(lines) == 5 and all(" b " in f" {line} " for line in lines[1:])
    assert "accuracy 1.0000 on 12 rows" in run("evaluate", "m", folder).stdout
    out = tmp_path / "embedding.npy"
    assert run("extract", folder, "--out", out, "--slice", "pooled").exit_code == 0
    assert np.load(out).shape == (12, 3)


@pytest.mark.parametrize(
    "words",
    [
        ("backbones",),
        ("backbones", "fake_net"),
        ("datasets",),
        ("datasets", "photos"),
        ("jobs",),
        ("models",),
        ("models", "m"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_json_is_all_there_is_on_stdout(run, trained, words):
    found = run(*words, "--json")
    assert found.exit_code == 0
    assert json.loads(found.stdout)


def test_json_of_what_does_something(run, folder):
    assert json.loads(run("upload", "photos", folder, "--json").stdout)["upload"]["rows_sent"] == 12
    trained = json.loads(run("train", "photos", "--name", "m", "--json").stdout)
    assert trained["model"]["name"] == "m"
    job = json.loads(run("jobs", trained["job"], "--json").stdout)
    assert job["state"] == "SUCCEEDED"
    rows = json.loads(run("predict", "m", folder / "a", "--json").stdout)["rows"]
    assert [one["label"] for one in rows] == ["a"] * 4 and rows[0]["path"].endswith(".png")
    assert json.loads(run("evaluate", "m", folder, "--json").stdout)["accuracy"] == 1.0


def test_gate(run, trained, folder, tmp_path):
    assert run("evaluate", "m", folder, "--min-accuracy", "0.9").exit_code == 0
    (folder / "b").rename(folder / "x")
    (folder / "a").rename(folder / "b")
    (folder / "x").rename(folder / "a")
    missed = run("evaluate", "m", folder, "--min-accuracy", "0.9")
    assert missed.exit_code == 3 and "accuracy is 0.3333; at least 0.9" in missed.stderr and "next:" in missed.stderr
    assert "accuracy 0.3333" in missed.stdout
    assert run("evaluate", "m", folder, "--min-r2", "0.9").exit_code == 2


def test_corrupt_picture_among_good_ones(run, trained, folder):
    (folder / "a" / "bad.png").write_bytes(b"nothing")
    found = run("predict", "m", folder / "a")
    assert found.exit_code == 1 and "failed" in found.stdout and "bad.png" in found.stderr and "next:" in found.stderr
    assert found.stdout.count(" a ") == 4


def test_not_logged_in(run, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_TOKEN", "wrong")
    found = run("models")
    assert found.exit_code == 4 and found.stdout == "" and "next:  trunkline doctor" in found.stderr
    error = json.loads(run("models", "--json").stderr)["error"]
    assert error["code"] == "UNAUTHENTICATED" and error["next"] and error["request_id"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("models", "nobody"), 1, "next:  trunkline models"),
        (("train", "nobody", "--name", "m"), 1, "next:  trunkline datasets"),
        (("train", "nobody", "--name", "m", "--head", "deep"), 2, "trunkline train --help"),
        (("jobs", "nobody"), 1, "next:  trunkline jobs"),
        (("jobs", "--wait"), 2, "need the id"),
        (("predict", "m"), 2, "Missing argument"),
        (("upload", "d", "/no/such/folder"), 2, "is not a folder"),
        (("upload", "d", "x", "--stem", "fake_net"), 2, "BACKBONE:CUT"),
        (("backbones", "nobody"), 1, "next:  trunkline backbones"),
        (("nonsense",), 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_exit_codes(run, words, code, said):
    found = run(*words)
    assert found.exit_code == code, found.output
    assert said in found.stderr and found.stdout == ""


def test_jobs(run, fake, trained):
    fake.faults.hold_jobs = threading.Event()
    job = run("train", "photos", "--name", "m", "--no-wait").stdout.strip()
    assert "RUNNING" in run("jobs", job).stdout
    assert run("jobs", job, "--cancel").exit_code == 0
    waited = run("jobs", job, "--wait")
    assert waited.exit_code == 2 and "cancelled" in waited.stderr and f"next:  trunkline jobs {job}" in waited.stderr
    again = run("jobs", job, "--cancel")
    assert again.exit_code == 1 and "has ended" in again.stderr
    events = run("jobs", job, "--events", "--json")
    assert events.exit_code == 0 and '"phase": "end"' in events.stdout
    fake.faults.hold_jobs = None
    fake.faults.job_error = WireError(ErrorCode.WORKER_OOM, "out of memory")
    failed = run("train", "photos", "--name", "m")
    assert failed.exit_code == 1 and "out of memory" in failed.stderr


def test_doctor(run, fake, monkeypatch, tmp_path):
    started = time.monotonic()
    healthy = run("doctor")
    assert healthy.exit_code == 0 and time.monotonic() - started < 3.0
    assert "fail" not in healthy.stdout and fake.token not in healthy.stdout
    found = {one["name"]: one for one in json.loads(run("doctor", "--json").stdout)["checks"]}
    wanted = {"client", "onnxruntime", "cache", "address", "token", "reachable", "tls", "health", "login"}
    assert wanted | {"cluster", "clock", "storage"} == set(found)
    assert "TRUNKLINE_ADDRESS" in found["address"]["detail"]

    fake.faults.clock_offset_s = 3600.0
    fake.faults.storage_shared = False
    sick = run("doctor")
    assert sick.exit_code == 1 and "3600 s ahead" in sick.stdout and "shared mount" in sick.stdout

    fake.faults.wire_version = 7
    assert "wire version 7" in run("doctor").stdout
    monkeypatch.setenv("TRUNKLINE_TOKEN", "wrong")
    stranger = run("doctor")
    assert stranger.exit_code == 1 and "fail  login" in stranger.stdout


def test_doctor_where_nobody_answers(run, fake, monkeypatch):
    fake._server.stop(0).wait(5)
    started = time.monotonic()
    found = run("doctor")
    assert found.exit_code == 1 and time.monotonic() - started < 3.0
    assert "fail  reachable" in found.stdout and "do: trunkline up" in found.stdout


def test_a_process_of_its_own(fake, tmp_path):
    environment = {
        **os.environ,
        "TRUNKLINE_ADDRESS": fake.address,
        "TRUNKLINE_TOKEN": fake.token,
        "TRUNKLINE_STATE_DIR": str(tmp_path),
        "NO_COLOR": "1",
    }
    command = [sys.executable, "-c", "from trunkline.cli import main; main()"]
    good = subprocess.run([*command, "backbones", "--json"], env=environment, capture_output=True, text=True)
    assert good.returncode == 0 and json.loads(good.stdout)[0]["name"] == "fake_net" and good.stderr == ""
    environment["TRUNKLINE_TOKEN"] = "wrong"
    bad = subprocess.run([*command, "backbones"], env=environment, capture_output=True, text=True)
    assert bad.returncode == 4 and bad.stdout == "" and "Traceback" not in bad.stderr and "\x1b" not in bad.stderr
