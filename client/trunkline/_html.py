"""Small HTML for notebooks. Everything that comes from outside is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trunkline.records import Candidate


def facts(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values under a title."""
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
        for name, value in rows
        if value not in (None, "")
    )
    return f"<b>{html.escape(title)}</b><table>{body}</table>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table with a header."""
    head = "".join(f"<th>{html.escape(one)}</th>" for one in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(one))}</td>" for one in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def candidates(tried: Sequence[Candidate]) -> str:
    """Return a table of sets of slices and their scores in cross-validation, best first; nothing for none."""
    if not tried:
        return ""
    rows = [
        (", ".join(one.slices), one.width, f"{one.score:.3f}", "" if one.accuracy is None else f"{one.accuracy:.4f}")
        for one in tried
    ]
    body = table(("slices", "columns", "score", "accuracy"), rows)
    return f"<details><summary>{len(tried)} sets of slices tried in cross-validation</summary>{body}</details>"
