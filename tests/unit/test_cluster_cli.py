"""The operator's commands, as far as they can be known wrong before anything is started."""

import json

import pytest
from trunkline_wire.local import LocalCluster, write_local_cluster
from trunkline_worker.cluster import cli
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
        (["--device", "auto", "--backbone", "a", "--backbone", "a"], "each once"),
    ],
)
@pytest.mark.parametrize("command", ["up", "serve"])
def test_bad_arguments_start_nothing_and_exit_with_2(command, arguments, what):
    result = runner.invoke(cli.app, [command, *arguments])
    assert result.exit_code == 2, result.output
    assert what in result.stderr
    assert result.stdout == ""


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
