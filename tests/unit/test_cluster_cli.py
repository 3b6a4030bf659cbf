"""The operator's commands, as far as they can be known wrong before anything is started."""

import json
import re
from dataclasses import asdict, fields

import pytest
from trunkline_wire.local import LocalCluster, write_local_cluster
from trunkline_worker.cluster import cli
from trunkline_worker.cluster.options import ClusterOptions
from trunkline_worker.cluster.settings import Settings
from typer.testing import CliRunner

runner = CliRunner()


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_STATE_DIR", str(tmp_path / "state"))

    def started(*arguments, **keywords):
        raise AssertionError("a process was started")

    monkeypatch.setattr(cli.subprocess, "Popen", started)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--host", "0.0.0.0"], "needs TLS"),
        (["--tls-cert", "cert.pem"], "both a certificate and its key"),
        (["--port", "70000"], "port"),
        (["--backbone", "../x"], "not a backbone name"),
        (["--weights", "resnet18"], "NAME=FILE"),
        (["--weights", "resnet18=/nowhere/w.safetensors"], "NAME=FILE"),
        (["--own-backbone", "/nowhere"], "expected a folder with a backbone.toml"),
        (["--samples", "/nowhere"], "not a folder"),
        (["--backbone", "a/b/c"], "not a backbone name"),
        (["--device", "auto", "--backbone", "a", "--backbone", "a"], "each once"),
    ],
)
@pytest.mark.parametrize("command", ["up", "serve"])
def test_bad_arguments_start_nothing_and_exit_with_2(command, arguments, what):
    result = runner.invoke(cli.app, [command, *arguments])
    assert result.exit_code == 2, result.output
    assert what in result.stderr
    assert result.stdout == ""


def test_every_option_becomes_the_setting_of_its_name(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "backbone.toml").write_text(
        'name = "mine"\nfactory = "net:build"\nweights = "w.safetensors"\n[preprocessing]\ninput_size = 32\n'
        'crop_fraction = 1.0\ninterpolation = "bilinear"\nmean = [0, 0, 0]\nstd = [1, 1, 1]\n'
    )
    given = ClusterOptions(
        host="127.0.0.2",
        port=5,
        backbone=["resnet18", "timm/resnet18"],
        own_backbone=[str(tmp_path)],
        weights=[f"resnet18={file}"],
        samples=str(tmp_path),
        allow_untrained=True,
        token_file="tokens",
        tls_cert="cert",
        tls_key="key",
        tls_client_ca="ca",
        insecure=True,
        device="cpu",
    )
    assert all(value is not None for value in asdict(given).values())
    settings = given.settings()
    for name, value in asdict(given).items():
        if name not in ("backbone", "own_backbone", "weights"):
            assert getattr(settings, name) == value
    assert settings.backbones == ("resnet18", "timm/resnet18", "mine")
    assert settings.own_backbones == (str(tmp_path),)
    assert settings.weights == {"resnet18": str(file)}
    assert ClusterOptions().settings() == Settings()


@pytest.mark.parametrize("command", ["up", "serve"])
def test_help_lists_every_option_once(command):
    text = runner.invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    for field in fields(ClusterOptions):
        option = f"--{field.name.replace('_', '-')}"
        assert len(re.findall(rf"{option}\s", text)) == 1, option
        assert f"--no-{field.name.replace('_', '-')}" not in text


def test_options_that_change_nothing_are_pointed_out(monkeypatch):
    running = LocalCluster(address="127.0.0.1:1", token_file="", ca_file="", pid=1, id="x")
    monkeypatch.setattr(cli, "_running", lambda: running)
    assert "changed nothing" not in runner.invoke(cli.app, ["up"]).stderr
    assert "changed nothing" in runner.invoke(cli.app, ["up", "--backbone", "resnet18"]).stderr


def test_without_a_cluster_down_does_nothing_and_status_says_so():
    down = runner.invoke(cli.app, ["down", "--json"])
    assert (down.exit_code, json.loads(down.stdout)) == (0, {"ended": False})
    status = runner.invoke(cli.app, ["status"])
    assert status.exit_code == 1
    assert "trunkline up" in status.stderr


def test_the_file_of_a_cluster_that_died_does_not_stand_in_the_way(monkeypatch):
    dead = LocalCluster(address="127.0.0.1:1", token_file="", ca_file="", pid=2**22 - 1, id="gone")
    write_local_cluster(dead)
    status = json.loads(runner.invoke(cli.app, ["status", "--json"]).stdout)
    assert (status["up"], status["processes"]) == (False, 0)
    assert cli._running() is None
    assert runner.invoke(cli.app, ["down", "--json"]).exit_code == 0
