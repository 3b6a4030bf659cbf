"""Texts from elsewhere in Markdown: shown as they are, whatever they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trunkline._report.text import NAME_LENGTH, clean, shorten

_MARKS = re.compile(r"[\\`*_\[\]<>#|~$&]|:(?=//)|(?<=www)\.|@(?=\S*\.)")
"""What has a meaning anywhere in a line, addresses that become links included."""

_LEADING = re.compile(r"^(\s*\d*)([-+=.)])")


def plain(text: str) -> str:
    """Return a sentence none of whose characters mean anything to Markdown, or to HTML within."""
    marked = _MARKS.sub(lambda match: f"\\{match[0]}", clean(text))
    return _LEADING.sub(lambda match: f"{match[1]}\\{match[2]}", marked)


def code(text: str, most: int = NAME_LENGTH) -> str:
    """Return a name as code, outside of tables."""
    text = shorten(text, most)
    fence = "`" * (1 + _longest_run(text))
    space = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


def block(lines: Iterable[str], language: str = "python") -> str:
    """Return lines of code."""
    body = "\n".join(lines)
    fence = "`" * max(3, 1 + _longest_run(body))
    return f"{fence}{language}\n{body}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _longest_run(text: str) -> int:
    return max((len(one) for one in re.findall("`+", text)), default=0)
