"""Options that several commands share: which stem, and how its features travel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trunkline.errors import InvalidArgumentError

if TYPE_CHECKING:
    from trunkline.augment import Augment
    from trunkline.client import Client
    from trunkline.local_models import LocalModel
    from trunkline.models import Model
    from trunkline.stems import Stem

StemOption = Annotated[
    str | None,
    typer.Option("--stem", help="BACKBONE:CUT. Send features computed here instead of images.", metavar="BACKBONE:CUT"),
]
InputSize = Annotated[int | None, typer.Option(help="Side of the square images are brought to, in pixels.", min=1)]
Codec = Annotated[
    str | None,
    typer.Option(help="How features travel: float32, float16, bfloat16, int8, int4, each also with +zstd, or auto."),
]
Precision = Annotated[str | None, typer.Option(help="Stem to run here: float32, or int8 (smaller, not quite exact).")]
MaxError = Annotated[
    float | None, typer.Option(help="Largest embedding error of codec and stem together. With auto: 0.05.", min=0)
]
Threads = Annotated[int | None, typer.Option(help="Threads of the stem. 1: the calling one alone.", min=1)]
_LOCAL = "Local model"
LocalFile = Annotated[
    Path | None,
    typer.Option("--local", help="ONNX file whose output goes along.", metavar="PATH.onnx", rich_help_panel=_LOCAL),
]
LocalName = Annotated[
    str | None, typer.Option(help="Its name. Left out: the file's, without .onnx.", rich_help_panel=_LOCAL)
]
LocalInputSize = Annotated[
    int | None, typer.Option(help="Side of the square it takes images at, in pixels.", min=1, rich_help_panel=_LOCAL)
]


_VIEWS = "Views"
Views = Annotated[
    int, typer.Option(help="Of each picture: itself and changed ones.", min=1, max=64, rich_help_panel=_VIEWS)
]
AugmentOption = Annotated[
    str | None,
    typer.Option(
        "--augment",
        help="How views change, such as crop=0.8,flip=0. Left out: as trunkline.Augment() does.",
        metavar="NAME=NUMBER,...",
        rich_help_panel=_VIEWS,
    ),
]
ViewSeed = Annotated[int, typer.Option(help="Of the views.", rich_help_panel=_VIEWS)]


def find_augment(text: str | None) -> Augment | None:
    """Return how views change, as ``NAME=NUMBER,...`` says, or None.

    Raises:
        InvalidArgumentError: It says something that is not known, or out of range.
    """
    if text is None:
        return None
    from dataclasses import fields

    from trunkline.augment import Augment

    known = [one.name for one in fields(Augment)]
    given: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (one.strip() for one in part.partition("="))
        try:
            if name not in known or not equals:
                raise ValueError
            given[name] = float(number)
        except ValueError:
            raise InvalidArgumentError(
                f"--augment {part!r} says nothing; expected NAME=NUMBER", hint=f"The names are {', '.join(known)}"
            ) from None
    return Augment(**given)


def split_stem(text: str) -> tuple[str, str]:
    """Return the backbone and the cut that ``BACKBONE:CUT`` names."""
    backbone, colon, cut = text.partition(":")
    if not backbone or not colon or not cut:
        raise InvalidArgumentError(
            f"{text!r} names no stem; expected BACKBONE:CUT", hint="`trunkline backbones` has the names of both"
        )
    return backbone, cut


def find_local(path: Path | None, name: str | None, input_size: int | None) -> LocalModel | None:
    """Return the local model in a file, or None.

    Raises:
        InvalidArgumentError: Its input size is missing, or something is said about it and there is none.
    """
    if path is None:
        if name is not None or input_size is not None:
            raise InvalidArgumentError(
                "--local-name and --local-input-size are about a local model", hint="Give --local PATH.onnx too"
            )
        return None
    if input_size is None:
        raise InvalidArgumentError("a local model takes images at a size of its own", hint="Give --local-input-size")
    from trunkline.local_models import local_model

    return local_model(path, name=name or path.stem, input_size=input_size)


def find_stem(
    client: Client,
    text: str | None,
    input_size: int | None,
    *,
    codec: str | None,
    precision: str | None,
    max_error: float | None,
    threads: int | None,
) -> Stem | None:
    """Return the stem that ``BACKBONE:CUT`` names, or None.

    Raises:
        InvalidArgumentError: Something is said about a stem, and there is none.
    """
    if text is None:
        if any(one is not None for one in (codec, precision, max_error, threads)):
            raise InvalidArgumentError(
                "--codec, --precision, --max-error and --threads are about the features of a stem; images go as they "
                "are",
                hint="Give --stem BACKBONE:CUT too, or leave them out",
            )
        return None
    backbone, cut = split_stem(text)
    return client.stem(
        backbone,
        cut=cut,
        input_size=input_size,
        codec=codec or "float16",
        precision=precision or "float32",
        max_error=max_error,
        threads=threads,
    )


def find_model_stem(
    client: Client,
    model: Model,
    text: str | None,
    *,
    send_images: bool,
    codec: str | None,
    precision: str | None,
    max_error: float | None,
    threads: int | None,
) -> Stem | Literal[False] | None:
    """Return the stem for a model's rows: the one named, else its own; None leaves it the choice, False has none.

    Raises:
        InvalidArgumentError: Something is said about a stem, and images are to be sent.
    """
    asked = any(one is not None for one in (codec, precision, max_error, threads))
    if send_images and (asked or text is not None):
        raise InvalidArgumentError(
            "--send-images sends no features; --stem, --codec, --precision, --max-error and --threads are about those",
            hint="Leave one or the other out",
        )
    if text is not None:
        return find_stem(
            client,
            text,
            model.space.input_size,
            codec=codec,
            precision=precision,
            max_error=max_error,
            threads=threads,
        )
    if asked:
        return model.stem(codec=codec, precision=precision, max_error=max_error, threads=threads)
    return False if send_images else None
