"""What ``up`` and ``serve`` have in common: the options that become settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pydantic
import typer

from trunkline_worker.cluster.settings import Settings


@dataclass(frozen=True)
class ClusterOptions:
    """What was given on the command line. None: not given. Names are those of ``Settings``, singular in two cases."""

    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. Default: 50051.")] = None
    backbone: Annotated[list[str] | None, typer.Option(help="Backbone to serve; may be repeated.")] = None
    own_backbone: Annotated[
        list[str] | None, typer.Option(help="Manifest or folder of a backbone of your own; may be repeated.")
    ] = None
    weights: Annotated[list[str] | None, typer.Option(help="NAME=FILE: weights of a backbone; may be repeated.")] = None
    samples: Annotated[
        str | None, typer.Option(help="Folder of pictures that errors are measured on. Default: generated pictures.")
    ] = None
    allow_untrained: Annotated[
        bool | None, typer.Option("--allow-untrained", help="Serve backbones without weights.")
    ] = None
    token_file: Annotated[
        str | None, typer.Option(help="File of tokens. Default: one is made in the state folder.")
    ] = None
    tls_cert: Annotated[str | None, typer.Option(help="PEM file with the certificate chain.")] = None
    tls_key: Annotated[str | None, typer.Option(help="PEM file with the private key.")] = None
    tls_client_ca: Annotated[
        str | None, typer.Option(help="PEM file; clients must show a certificate of this authority.")
    ] = None
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Allow plaintext beyond loopback, or no tokens.")
    ] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None

    @property
    def are_given(self) -> bool:
        """Whether there is any."""
        return any(value is not None for value in asdict(self).values())

    def settings(self) -> Settings:
        """Return the settings, checked as far as they can be before anything is started.

        Raises:
            ValueError: It says what is wrong.
        """
        given = asdict(self)
        backbones, own = given.pop("backbone"), given.pop("own_backbone")
        given |= {"backbones": backbones, "own_backbones": own, "weights": _weights(given["weights"])}
        try:
            settings = Settings(**{name: value for name, value in given.items() if value is not None})
        except pydantic.ValidationError as error:
            problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ValueError("; ".join(problems)) from error
        if settings.token_file is None and not settings.insecure:
            settings.model_copy(update={"token_file": "made later"}).listener.check()
        else:
            settings.listener.check()
        return settings


def with_cluster_options(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function that takes ``ClusterOptions`` first, followed by options of its own."""
    names = [one.name for one in fields(ClusterOptions)]
    hints = get_type_hints(ClusterOptions, include_extras=True)

    @functools.wraps(function)
    def command(**arguments: Any) -> None:
        function(ClusterOptions(**{name: arguments.pop(name) for name in names}), **arguments)

    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[name], default=None) for name in names
    ]
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    parameters = [*shared, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)]
    del command.__wrapped__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _weights(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    pairs = {}
    for one in given:
        name, separator, path = one.partition("=")
        if not separator or not Path(path).is_file():
            raise ValueError(f"--weights {one}: expected NAME=FILE with a file that is there")
        pairs[name] = str(Path(path).absolute())
    return pairs
