"""Commands from elsewhere: the worker's join through the entry-point group ``trunkline.commands``."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trunkline.cli.output import next_command, report_error
from trunkline.errors import MissingExtraError

GROUP = "trunkline.commands"

CLUSTER_COMMANDS = ("up", "down", "status", "serve", "validate")
"""The worker's commands, to be named even where it is not installed."""


class PluginGroup(TyperGroup):
    """Our commands at once; those of others only when one of them, or help, is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return every command's name."""
        own = list(super().list_commands(ctx))
        return own + [name for name in self._others() if name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command: ours, else another's."""
        return super().get_command(ctx, cmd_name) or self._others().get(cmd_name)

    def _others(self) -> dict[str, Any]:
        if not hasattr(self, "_loaded"):
            self._loaded = load_commands()
        return self._loaded


def load_commands() -> dict[str, Any]:
    """Return the commands of every entry point, and a stand-in for those that cannot be loaded."""
    commands: dict[str, Any] = {}
    reason = "its entry point is not there"
    for entry in entry_points(group=GROUP):
        try:
            loaded: typer.Typer = entry.load()
        except ImportError as error:
            reason = str(error)
            continue
        commands.update(_commands_of(loaded))
    for name in CLUSTER_COMMANDS:
        if name not in commands:
            commands[name] = _stand_in(name, reason)
    return commands


def _commands_of(app: typer.Typer) -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    # A Typer of one command is that command; of several, a group of them.
    return dict(getattr(command, "commands", None) or {command.name: command})


def _stand_in(name: str, reason: str) -> Any:
    app = typer.Typer(add_completion=False)

    @app.command(name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def explain(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        """Needs the worker: pip install 'trunkline[worker]'."""
        error = MissingExtraError(
            f"`trunkline {name}` needs the worker, which is not installed ({reason})",
            hint="Run: pip install 'trunkline[worker]'",
        )
        report_error(error, next_command(error, "", name), as_json="--json" in (arguments or []))
        raise typer.Exit(1)

    return _commands_of(app)[name]
