"""The manifest of a backbone of one's own: ``backbone.toml``, read strictly. Loads no network and no torch."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.names import check_name
from trunkline_wire.specs import Preprocessing

MANIFEST_NAME = "backbone.toml"
"""Name of the manifest in a folder that is given instead of a file."""

_REFERENCE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_MAX_REPORTED = 8


@dataclass(frozen=True)
class Manifest:
    """A backbone of the operator's own, as its manifest describes it. All paths are absolute.

    Attributes:
        file: The manifest itself.
        name: By which the backbone is served.
        factory: ``package.module:function`` that returns the network.
        path: Folder that is searched for the factory's module.
        weights: The safetensors file.
        preprocessing: At the network's own input size.
        arguments: Passed to the factory by name.
        labels: What the network's outputs mean; empty where the manifest does not say.
        resizable: Whether the network takes other input sizes than its own.
        leaves: ``package.module:Class`` of modules that tracing must not look into.
    """

    file: Path
    name: str
    factory: str
    path: Path
    weights: Path
    preprocessing: Preprocessing
    arguments: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    resizable: bool = False
    leaves: tuple[str, ...] = ()


_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
_Reference = Annotated[str, Field(pattern=f"^{_REFERENCE.pattern}$")]


class _PreprocessingTable(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input_size: Annotated[int, Field(strict=True, ge=8, le=2048)]
    crop_fraction: Annotated[float, Field(strict=True, gt=0, le=1)]
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    mean: tuple[_Number, _Number, _Number]
    std: tuple[_Positive, _Positive, _Positive]


class _ManifestTable(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    factory: _Reference
    path: str = "."
    arguments: dict[str, Any] = {}
    weights: str
    preprocessing: _PreprocessingTable
    labels: str | list[str] = []
    resizable: Annotated[bool, Field(strict=True)] = False
    leaves: list[_Reference] = []


def load_manifest(path: str | Path) -> Manifest:
    """Read a manifest. Nothing that it names is imported or opened but the file of labels.

    Args:
        path: The manifest, or the folder with a ``backbone.toml``. What is named in it is relative to its folder.

    Raises:
        WireError: NOT_FOUND where it or the file of labels is not there, INVALID_ARGUMENT where a key is unknown,
            missing or of a wrong kind: all of them are named.
    """
    file = Path(path).absolute()
    if file.is_dir():
        file = file / MANIFEST_NAME
    if not file.is_file():
        raise WireError(
            ErrorCode.NOT_FOUND, f"no backbone at {path}: expected a folder with a {MANIFEST_NAME}, or such a file"
        )
    try:
        table = _ManifestTable.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except pydantic.ValidationError as error:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"{file}: {_problems(error)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"{file} is not TOML: {error}") from error
    try:
        check_name(table.name, "backbone")
    except WireError as error:
        raise WireError(error.code, f"{file}: {error.message}") from error
    folder = file.parent
    preprocessing = Preprocessing(**table.preprocessing.model_dump())
    return Manifest(
        file=file,
        name=table.name,
        factory=table.factory,
        path=folder / table.path,
        weights=folder / table.weights,
        preprocessing=preprocessing,
        arguments=table.arguments,
        labels=_labels(file, table.labels),
        resizable=table.resizable,
        leaves=tuple(table.leaves),
    )


def _labels(manifest: Path, given: str | list[str]) -> tuple[str, ...]:
    file, labels = manifest, given
    if isinstance(given, str):
        file = manifest.parent / given
        try:
            labels = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise WireError(
                ErrorCode.NOT_FOUND, f"the labels {file} cannot be read; expected a text file with one label a line"
            ) from error
    for number, label in enumerate(labels, start=1):
        if not label.strip():
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"{file}: label {number} is empty; every output needs one")
    return tuple(label.strip() for label in labels)


def _problems(error: pydantic.ValidationError) -> str:
    """Say what is wrong with each key, unknown ones first: a misspelt key is also a missing one."""
    found = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    lines = []
    for one in found[:_MAX_REPORTED]:
        place = ".".join(str(part) for part in one["loc"] if part not in ("str", "list[str]"))[:80]
        if one["type"] == "extra_forbidden":
            lines.append(f"unknown key {place!r}{_known_beside(one['loc'])}")
        elif one["type"] == "missing":
            lines.append(f"{place!r} is missing")
        elif one["type"] == "string_pattern_mismatch":
            lines.append(f"{place!r} must be package.module:name, got {str(one['input'])[:80]!r}")
        else:
            lines.append(f"{place!r}: {one['msg'][0].lower()}{one['msg'][1:]}")
    if len(found) > _MAX_REPORTED:
        lines.append(f"and {len(found) - _MAX_REPORTED} more")
    return "; ".join(lines)


def _known_beside(place: tuple[int | str, ...]) -> str:
    table = _PreprocessingTable if place[0] == "preprocessing" else _ManifestTable
    known = list(table.model_fields)
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known are {', '.join(known)})"
