"""The command line against a server: output, exit codes, and what it says to do next."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from trunkline import doctor
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


def test_what_cuts_cost(run, folder):
    stages = run("backbones", "show", "fake_net", "--input-size", "32").stdout
    assert stages == run("backbones", "fake_net", "--input-size", "32").stdout
    assert "half" in stages and "quarter" not in stages and "--all shows every one" in stages
    assert "quarter" in run("backbones", "show", "fake_net", "--all").stdout
    one = run("backbones", "show", "fake_net", "--cut", "quarter", "--images", folder, "--max-error", "0.001")
    assert "refused: its error 0.25 is over the bound 0.05" in one.stdout and "as the files are" in one.stdout
    assert "over 0.001" in one.stdout and "next: trunkline upload" in one.stderr
    data = json.loads(run("backbones", "show", "fake_net", "--all", "--measure", "--json").stdout)
    assert [row["name"] for row in data["table"]] == ["input", "half", "quarter"]
    assert all(row["measured"] for row in data["table"]) and data["jpeg"]["resized"] > 0
    codecs = {one["codec"]: one for one in data["table"][1]["codecs"]}
    assert codecs["int4"]["bytes_per_row"] == 24 + 8 * 3 and codecs["int4"]["is_allowed"]


def test_bench(run, folder):
    found = run("bench", "stem", "fake_net:half", "--seconds", "0.1", "--threads", "1", "--threads", "2")
    assert found.exit_code == 0 and found.stdout.count("int8 ") >= 3 and "generated pictures" in found.stdout
    words = ("bench", "stem", "fake_net:quarter", "--seconds", "0.1", "--images", folder, "--json")
    data = json.loads(run(*words).stdout)
    assert [(one["precision"], one["threads"]) for one in data["runs"]] == [("float32", 1)]
    assert "over the bound" in data["refused"]["int8"] and data["pictures"].startswith("12 pictures of ")
    assert data["bytes_per_row"]["float32"]["int4"] == 6 + 8 * 3


def test_codecs_and_precisions(run, folder, tmp_path):
    stem = ("--stem", "fake_net:half", "--codec", "int8+zstd", "--precision", "int8", "--threads", "1")
    first = run("upload", "photos", folder, *stem)
    assert first.exit_code == 0 and "12 sent as int8@int8" in first.stdout
    assert "int8@int8" in run("datasets").stdout and "int8@int8" in run("datasets", "photos").stdout
    assert run("train", "photos", "--name", "m").exit_code == 0
    shown = run("models", "m").stdout
    assert "int8@int8, embedding error" in shown and "tried in cross-validation, all 3" in shown
    assert "grid, pooled" in shown and "SCORE" in shown
    assert len(json.loads(run("models", "m", "--json").stdout)["candidates"]) == 3
    used = json.loads(run("predict", "m", folder / "b", "--json").stdout)["codec_use"]
    assert used["codec"] == used["trained_codec"] == "int8@int8"
    for words, codec in (
        (("--codec", "float16"), "float16@int8"),
        (("--precision", "float32"), "int8"),
        (("--codec", "auto", "--threads", "1"), "int4@int8"),
        (("--stem", "fake_net:quarter"), "float16"),
        (("--send-images",), "uint8"),
    ):
        found = json.loads(run("evaluate", "m", folder, *words, "--json").stdout)
        assert (found["codec_use"]["codec"], found["accuracy"]) == (codec, 1.0)
    assert "rows sent as int8@int8, embedding error" in run("evaluate", "m", folder).stdout
    mixed = run("predict", "m", folder / "b", "--send-images", "--codec", "int8")
    assert mixed.exit_code == 2 and "Leave one or the other out" in mixed.stderr
    out = tmp_path / "e.npy"
    assert run("extract", folder, "--out", out, *stem, "--slice", "pooled").exit_code == 0
    assert np.load(out).shape == (12, 3)
    too_strict = run("extract", folder, "--out", out, "--stem", "fake_net:half", "--codec", "int4", "--max-error", "0")
    assert too_strict.exit_code == 1 and "at most 0 is allowed" in too_strict.stderr


@pytest.fixture
def local_file(tmp_path):
    """Write a local model: the mean of each channel."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["x"], ["y"])],
        "local",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 3, 1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "edge.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_local_model(run, folder, local_file):
    local = ("--local", local_file, "--local-input-size", "8")
    stem = ("--stem", "fake_net:half")
    first = run("upload", "photos", folder, *stem, *local)
    assert first.exit_code == 0 and "12 rows, 24 sent as float16 and float32" in first.stdout
    assert "fake_net + edge" in run("datasets").stdout
    shown = run("datasets", "photos").stdout
    assert "features of fake_net at half" in shown and "local features of edge, float32" in shown
    assert [one["local_model"] for one in json.loads(run("datasets", "photos", "--json").stdout)["more_inputs"]] == [
        "edge"
    ]
    done = run("train", "photos", "--name", "m", "--head", "mlp", "--hidden", "8", "--fuse", "add", "--fuse-width", "4")
    assert done.exit_code == 0 and "reads: fake_net (grid) and edge (edge)" in done.stdout
    shown = run("models", "m").stdout
    assert "local features of edge" in shown and "mlp, hidden 8, relu, fused by add at width 4" in shown
    assert "fake_net + edge" in run("models").stdout and " mlp " in run("models").stdout
    data = json.loads(run("models", "m", "--json").stdout)
    assert data["head"]["fuse"] == "add" and data["more_inputs"][0]["width"] == 3
    assert run("predict", "m", folder / "b", *local).stdout.count(" b ") == 4
    assert "accuracy 1.0000" in run("evaluate", "m", folder, *local, "--send-images").stdout
    without = run("predict", "m", folder / "b")
    assert without.exit_code == 2 and "needs the local model 'edge'" in without.stderr
    renamed = run("predict", "m", folder / "b", *local, "--local-name", "other")
    assert renamed.exit_code == 2 and "Give it with local=, under the name 'edge'" in renamed.stderr


def test_local_model_alone(run, folder, local_file):
    local = ("--local", local_file, "--local-input-size", "8", "--local-name", "colour")
    first = run("upload", "photos", folder, *local, "--no-remote")
    assert first.exit_code == 0 and "12 rows, 12 sent as float32" in first.stdout
    assert run("train", "photos", "--name", "m", "--head", "prototype").exit_code == 0
    assert "local features of colour" in run("models", "m").stdout
    assert "accuracy 1.0000" in run("evaluate", "m", folder, *local).stdout


def test_several_backbones_and_heads(run, folder):
    assert run("upload", "photos", folder).exit_code == 0
    two = ("--backbone", "fake_net", "--backbone", "other_net")
    conv = ("--head", "conv", "--channels", "8", "--channels", "4", "--tap", "half", "--dropout", "0.1")
    found = run("train", "photos", "--name", "m", *two, *conv, "--hidden", "8", "--activation", "gelu", "--batch-norm")
    assert found.exit_code == 0 and "reads: fake_net (half.map) and other_net (grid)" in found.stdout
    text = "conv, 8-4 channels at half, hidden 8, gelu with batch norm, dropout 0.1"
    assert text in run("models", "m").stdout
    job = json.loads(run("jobs", "--json").stdout)[0]
    assert job["head"]["channels"] == [8, 4] and job["more_backbones"][0]["backbone"] == "other_net"
    shown = run("jobs", job["id"]).stdout
    assert "fake_net, other_net" in shown and text in shown
    assert run("predict", "m", folder / "b").stdout.count(" b ") == 4


def test_loss(run, folder):
    assert run("upload", "photos", folder).exit_code == 0
    started = run("train", "photos", "--name", "m", "--loss", "huber", "--huber-delta", "2", "--no-wait")
    assert started.exit_code == 0
    loss = json.loads(run("jobs", started.stdout.strip(), "--json").stdout)["loss"]
    assert (loss["kind"], loss["huber_delta"]) == ("huber", 2.0)
    assert "huber" in run("jobs", started.stdout.strip()).stdout
    assert run("train", "photos", "--name", "m", "--loss", "l1").exit_code == 2


def test_model_of_pictures_has_no_stem(run, trained, folder):
    found = run("predict", "m", folder / "b", "--codec", "int8")
    assert found.exit_code == 1 and "was trained on pictures" in found.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("backbones",),
        ("backbones", "fake_net"),
        ("backbones", "show", "fake_net", "--cut", "half"),
        ("bench", "stem", "fake_net:half", "--seconds", "0.1"),
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
        (("train", "d", "--name", "m", "--head", "linear", "--hidden", "8"), 2, "'linear' has no hidden"),
        (("train", "d", "--name", "m", "--channels", "8"), 2, "'linear' has no channels"),
        (("upload", "d", "x", "--local-name", "a"), 2, "Give --local PATH.onnx"),
        (("upload", "d", "x", "--local", "a.onnx"), 2, "Give --local-input-size"),
        (("predict", "m", __file__, "--local", "/no/such.onnx", "--local-input-size", "8"), 2, "cannot be read"),
        (("jobs", "nobody"), 1, "next:  trunkline jobs"),
        (("jobs", "--wait"), 2, "need the id"),
        (("predict", "m"), 2, "Missing argument"),
        (("upload", "d", "/no/such/folder"), 2, "is not a folder"),
        (("upload", "d", "x", "--stem", "fake_net"), 2, "BACKBONE:CUT"),
        (("backbones", "nobody"), 1, "next:  trunkline backbones"),
        (("backbones", "show"), 2, "trunkline backbones show NAME"),
        (("backbones", "--all"), 2, "about one backbone"),
        (("backbones", "a", "b"), 2, "trunkline backbones show NAME"),
        (("backbones", "show", "fake_net", "--all", "--cut", "half"), 2, "Leave one of them out"),
        (("backbones", "show", "fake_net", "--cut", "nowhere"), 1, "the cuts near it are"),
        (("upload", "d", "x", "--codec", "int8"), 2, "Give --stem"),
        (("upload", "d", "x", "--stem", "fake_net:half", "--codec", "int3"), 1, "bfloat16"),
        (("upload", "d", "x", "--stem", "fake_net:half", "--precision", "int4"), 1, "float32, int8"),
        (("upload", "d", "x", "--stem", "fake_net:nowhere"), 1, "the cuts near it are"),
        (("bench", "stem", "fake_net"), 2, "trunkline bench stem --help"),
        (("bench", "stem", "fake_net:quarter", "--precision", "int8"), 2, "over the bound"),
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


def test_doctor_answers_within_three_seconds():
    """By its own limits: those of the connection, and then the longest of what runs side by side."""
    assert doctor.TCP_TIMEOUT_S + max(doctor.CALL_TIMEOUT_S, doctor.DIRECT_TIMEOUT_S) + 0.3 < 3.0


@pytest.fixture
def patient(monkeypatch):
    """A doctor whom a machine with other work does not deceive."""
    for name in ("TCP_TIMEOUT_S", "CALL_TIMEOUT_S", "DIRECT_TIMEOUT_S"):
        monkeypatch.setattr(doctor, name, 60.0)


def test_doctor(run, fake, monkeypatch, patient):
    healthy = run("doctor")
    assert healthy.exit_code == 0
    assert "fail" not in healthy.stdout and fake.token not in healthy.stdout
    found = {one["name"]: one for one in json.loads(run("doctor", "--json").stdout)["checks"]}
    wanted = {"client", "onnxruntime", "cache", "address", "token", "reachable", "tls", "health", "login"}
    assert wanted | {"cluster", "clock", "storage", "direct"} == set(found)
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
    fake._server.stop(0).wait(60)
    found = run("doctor")
    assert found.exit_code == 1
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


def test_runtimes_and_which_is_used(run):
    found = run("tune", "fake_net")
    assert found.exit_code == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if "torch-" in line and "in use" not in line]
    assert [line.split()[:2] for line in lines] == [
        ["*", "torch-fp32"],
        ["torch-bf16", "inf"],
        ["torch-compile-fp32", "-"],
    ]
    assert "ROWS/S AT 1" in found.stdout and "ROWS/S AT 8" in found.stdout and "50.0" in lines[0]
    assert lines[1].endswith("differs from float32 torch by inf") and lines[2].endswith("not tried at start")
    assert "torch-fp32 in batches of 8" in found.stdout
    assert "next: trunkline tune fake_net --cut input --again" in found.stderr
    again = run("tune", "fake_net", "--cut", "half", "--input-size", 16, "--again", "--json")
    data = json.loads(again.stdout)
    assert (data["chosen"], data["cut"], data["input_size"]) == ("torch-compile-fp32", "half", 16)
    assert data["runtimes"][1]["error"] is None and data["libraries"] == {"torch": "2"}
    assert run("tune").exit_code == 0
    missing = run("tune", "fake_net", "--cut", "nowhere")
    assert missing.exit_code == 1 and "nowhere" in missing.stderr and "next:  trunkline backbones" in missing.stderr


def test_outlier_scores(run, trained, folder):
    Image.new("RGB", (16, 16), "white").save(folder / "strange.png")
    plain = run("predict", "m", folder / "a").stdout
    assert "NEARER" not in plain
    found = run("predict", "m", folder / "a", folder / "strange.png", "--outliers")
    header, *rows = found.stdout.strip().splitlines()
    assert header.split() == ["IMAGE", "LABEL", "PROBABILITY", "DISTANCE", "NEARER"]
    assert rows[-1].split()[-1] == "1.000" and "strange.png" in rows[-1]
    data = json.loads(run("predict", "m", folder / "strange.png", "--outliers", "--json").stdout)
    assert data["rows"][0]["outlier_score"] == 1.0 and data["rows"][0]["outlier_distance"] > 0
    assert json.loads(run("models", "m", "--json").stdout)["has_outlier_scores"]
    (folder / "bad.png").write_bytes(b"nothing")
    failed = run("predict", "m", folder / "bad.png", folder / "strange.png", "--outliers")
    assert failed.exit_code == 1 and "failed" in failed.stdout and "1.000" in failed.stdout
