"""The command line without a server: plugins, help, exit codes."""

import sys

import pytest
import trunkline
import typer
from trunkline.cli import output, plugins
from trunkline.cli.app import app
from trunkline.errors import EXCEPTION_BY_CODE
from trunkline_wire.errors import ErrorCode
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    for name in ("ADDRESS", "TOKEN", "TOKEN_FILE", "CA_FILE", "INSECURE", "PROFILE", "TIMEOUT_S"):
        monkeypatch.delenv(f"TRUNKLINE_{name}", raising=False)
    monkeypatch.setenv("TRUNKLINE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("TRUNKLINE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TRUNKLINE_CACHE_DIR", str(tmp_path / "cache"))


class Entry:
    """An entry point that loads what it is told to."""

    def __init__(self, loaded):
        self.loaded = loaded

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def entry_points(monkeypatch):
    """Set the entry points of the group."""

    def use(*loaded):
        monkeypatch.setattr(plugins, "entry_points", lambda group: [Entry(one) for one in loaded])

    return use


def run(*words):
    return CliRunner().invoke(app, list(words))


def test_version():
    found = run("--version")
    assert found.exit_code == 0 and found.stdout == f"trunkline {trunkline.__version__}\n"


def test_commands_join(entry_points):
    worker = typer.Typer()

    @worker.command()
    def up(port: int = 1) -> None:
        """Start it."""
        typer.echo(f"up on {port}")

    @worker.command()
    def down() -> None:
        """End it."""

    single = typer.Typer()

    @single.command("polish")
    def polish() -> None:
        """Shine."""
        typer.echo("shining")

    entry_points(worker, single)
    assert run("up", "--port", "7").stdout == "up on 7\n"
    assert run("polish").stdout == "shining\n"
    text = run("--help").stdout
    assert "Start it." in text and "Shine." in text and "backbones" in text


@pytest.mark.parametrize("command", plugins.CLUSTER_COMMANDS)
def test_without_the_worker(entry_points, command):
    entry_points(ImportError("No module named 'ray'"))
    found = run(command, "--port", "7", "anything")
    assert found.exit_code == 1 and found.stdout == ""
    assert "next:  pip install 'trunkline[worker]'" in found.stderr and "No module named 'ray'" in found.stderr
    assert "pip install" in run("--help").stdout


def test_other_failures_of_a_plugin_are_not_hidden(entry_points):
    entry_points(ZeroDivisionError("a bug"))
    assert isinstance(run("up").exception, ZeroDivisionError)


def test_our_commands_load_no_plugin(monkeypatch):
    def never(group):
        raise AssertionError("plugins were loaded")

    monkeypatch.setattr(plugins, "entry_points", never)
    assert run("backbones", "--help").exit_code == 0
    assert run("models").exit_code == 1


def test_no_cluster():
    found = run("models")
    assert found.exit_code == 1 and found.stdout == ""
    assert found.stderr.splitlines()[-1].startswith("next:  trunkline up")
    assert run("doctor").exit_code == 1


@pytest.mark.parametrize("name", [*sorted(one.name for one in app.registered_commands), "bench stem"])
def test_every_command_has_json_and_help(name):
    text = run(*name.split(), "--help").stdout
    assert "--json" in text and "--address" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (trunkline.InternalError("x"), 1),
        (trunkline.CorruptImageError("x"), 1),
        (trunkline.NotFoundError("x"), 1),
        (trunkline.JobFailedError("x"), 1),
        (trunkline.JobCancelledError("x"), 2),
        (trunkline.InvalidArgumentError("x"), 2),
        (trunkline.ConfigError("x"), 2),
        (output.GateNotMetError("x"), 3),
        (trunkline.AuthenticationError("x"), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error, code):
    assert output.exit_code(error) == code


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_says_what_to_type_next(code):
    following = output.next_command(EXCEPTION_BY_CODE[code]("x"), "trunkline models", "predict")
    assert following.startswith(("trunkline ", "pip "))


def test_interrupted(monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(output.Session, "connect", interrupt)
    found = run("models")
    assert found.exit_code == 2 and "cancelled" in found.stderr


def test_colour_only_in_a_terminal_that_wants_it(monkeypatch):
    assert output._red("x") == "x"
    monkeypatch.setattr(sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" in output._red("x")
    monkeypatch.setenv("NO_COLOR", "1")
    assert output._red("x") == "x"


def test_columns():
    assert output.columns(("A", "LONG"), [("one", 1), ("x", 22)], right=(1,)) == "A    LONG\none     1\nx      22"
    assert output.columns(("A", "LONG"), [("one", 1), ("x", 22)]) == "A    LONG\none  1\nx    22"
