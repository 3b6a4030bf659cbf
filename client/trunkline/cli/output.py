"""What all commands share: connection options, JSON or text on stdout, errors and exit codes."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.errors import (
    AuthenticationError,
    CallCancelledError,
    ConfigError,
    InvalidArgumentError,
    JobCancelledError,
    JobFailedError,
    MissingExtraError,
    NotFoundError,
    ServiceUnavailableError,
    TlsError,
    TrackingError,
    TrunklineError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from trunkline.client import Client
    from trunkline.config import Settings

EXIT_FAILED = 1
EXIT_MISUSED = 2
EXIT_GATE = 3
EXIT_LOGIN = 4

_PANEL = "Connection"

Address = Annotated[str | None, typer.Option("--address", help="HOST:PORT of the cluster.", rich_help_panel=_PANEL)]
TokenFile = Annotated[str | None, typer.Option("--token-file", help="File with the token.", rich_help_panel=_PANEL)]
CaFile = Annotated[str | None, typer.Option("--ca-file", help="Certificate to trust.", rich_help_panel=_PANEL)]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow an unencrypted connection.", rich_help_panel=_PANEL)]
Profile = Annotated[str | None, typer.Option("--profile", help="Profile in config.toml.", rich_help_panel=_PANEL)]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Deadline of one call, in seconds.", rich_help_panel=_PANEL)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

_SHARED = {
    "address": (Address, None),
    "token_file": (TokenFile, None),
    "ca_file": (CaFile, None),
    "insecure": (Insecure, False),
    "profile": (Profile, None),
    "timeout": (Timeout, None),
    "json_output": (Json, False),
}


class GateNotMetError(TrunklineError):
    """A measured figure is below what was asked for."""


@dataclass
class Session:
    """One run of one command."""

    address: str | None
    token_file: str | None
    ca_file: str | None
    insecure: bool
    profile: str | None
    timeout: float | None
    json_output: bool

    def settings(self) -> Settings:
        """Find the settings."""
        from trunkline.config import resolve

        return resolve(**self._arguments())

    def connect(self) -> Client:
        """Connect to the cluster."""
        from trunkline.connection import connect

        return connect(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "token_file": self.token_file,
            "ca_file": self.ca_file,
            "insecure": self.insecure or None,
            "profile": self.profile,
            "timeout_s": self.timeout,
        }

    def emit(self, data: Any, text: str, *, hint: str = "") -> None:
        """Print the result: JSON or text on stdout, and what to do next on stderr."""
        print(json.dumps(data, indent=2, allow_nan=False, default=str) if self.json_output else text, flush=True)
        if hint and not self.json_output:
            print(f"next: {hint}", file=sys.stderr)


def command(
    *, missing: str = "trunkline doctor", name: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes a ``Session`` first: connection options, errors and exit codes.

    Args:
        missing: What to type if something is not found.
        name: What is typed to run it. Default: the function's name.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapper(**arguments: Any) -> None:
            session = Session(**{name: arguments.pop(name) for name in _SHARED})
            _run(lambda: function(session, **arguments), session.json_output, missing, name or function.__name__)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, (annotation, default) in _SHARED.items()
        ]
        keyword_only = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        del wrapper.__wrapped__
        wrapper.__signature__ = inspect.Signature(keyword_only + shared)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {one.name: one.annotation for one in keyword_only + shared}
        return wrapper

    return decorate


def _run(function: Callable[[], None], as_json: bool, missing: str, name: str) -> None:
    try:
        function()
    except TrunklineError as error:
        report_error(error, next_command(error, missing, name), as_json)
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        raise typer.Exit(EXIT_MISUSED) from None
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_FAILED) from None


def exit_code(error: TrunklineError) -> int:
    """Return the exit code for an error: 1 failed, 2 cancelled or misused, 3 a gate not met, 4 not logged in."""
    if isinstance(error, GateNotMetError):
        return EXIT_GATE
    if isinstance(error, AuthenticationError):
        return EXIT_LOGIN
    if isinstance(error, (JobCancelledError, CallCancelledError, ConfigError)) or type(error) is InvalidArgumentError:
        return EXIT_MISUSED
    return EXIT_FAILED


def next_command(error: TrunklineError, missing: str, name: str) -> str:
    """Return what to type next."""
    if isinstance(error, MissingExtraError):
        return error.hint.removeprefix("Run: ")
    if isinstance(error, NotFoundError):
        return missing
    if isinstance(error, JobFailedError) and error.job_id:
        return f"trunkline jobs {error.job_id}"
    if isinstance(error, ServiceUnavailableError) and not isinstance(error, TlsError):
        return "trunkline up   (on this machine), or: trunkline doctor"
    if isinstance(error, (AuthenticationError, TlsError, ConfigError)):
        return "trunkline doctor"
    if isinstance(error, GateNotMetError):
        return "trunkline train --help"
    misused = isinstance(error, (InvalidArgumentError, UnsupportedError, TrackingError))
    return f"trunkline {name} --help" if misused else "trunkline doctor"


def report_error(error: TrunklineError, following: str, as_json: bool) -> None:
    """Say on stderr what went wrong and what to type next."""
    if as_json:
        code = error.code.name if error.code else type(error).__name__
        body = {"code": code, "message": error.message, "hint": error.hint, "next": following}
        if error.request_id:
            body["request_id"] = error.request_id
        print(json.dumps({"error": body}), file=sys.stderr)
        return
    print(f"{_red('error:')} {error.message}", file=sys.stderr)
    if error.hint and error.hint.removeprefix("Run: ") != following:
        print(f"       {error.hint}", file=sys.stderr)
    if error.request_id:
        print(f"       request {error.request_id}", file=sys.stderr)
    print(f"next:  {following}", file=sys.stderr)


def columns(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Collection[int] = ()) -> str:
    """Return a table in plain aligned columns: whole in a pipe, readable in a terminal.

    Args:
        header: Titles.
        rows: Cells.
        right: Numbers of the columns that are aligned to the right.
    """
    cells = [[str(one) for one in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def facts(rows: Sequence[tuple[str, object]]) -> str:
    """Return names and values, one pair a line."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows if value not in (None, ""))


def _red(text: str) -> str:
    return f"\x1b[1;31m{text}\x1b[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text
