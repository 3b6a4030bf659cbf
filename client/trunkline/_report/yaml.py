"""As much of YAML as the head of a model card needs. Every text is quoted, so that none means anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ESCAPES = {'"': '\\"', "\\": "\\\\"}


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return mappings, sequences, texts and finite numbers as YAML. Keys are ours, and are written as they are."""
    return "".join(f"{line}\n" for line in _lines(values))


def _lines(value: Mapping[str, Any] | Sequence[Any]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _entry(f"{key}:", one)
    else:
        for one in value:
            yield from _item(one)


def _entry(start: str, value: Any) -> Iterator[str]:
    if not _is_nested(value):
        yield f"{start} {_scalar(value)}"
        return
    yield start
    yield from (f"  {line}" for line in _lines(value))


def _item(value: Any) -> Iterator[str]:
    if not _is_nested(value):
        yield f"- {_scalar(value)}"
        return
    for number, line in enumerate(_lines(value)):
        yield f"{'  ' if number else '- '}{line}"


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and bool(value)


def _scalar(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return "{}" if isinstance(value, Mapping) else "[]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    return f'"{"".join(map(_character, str(value)))}"'


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    digits, exponent, power = repr(value).partition("e")
    # Without a point it would be a text for parsers of YAML 1.1, and without a sign too.
    digits = digits if "." in digits else f"{digits}.0"
    sign = "" if power.startswith("-") or not exponent else "+"
    return f"{digits}{exponent}{sign}{power.lstrip('+')}"


def _character(one: str) -> str:
    if one in _ESCAPES:
        return _ESCAPES[one]
    if one.isprintable():
        return one
    code = ord(one)
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
