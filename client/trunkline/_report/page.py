"""Pieces of an HTML page. A text is escaped where it is put in, unless it is a ``Markup``."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

from trunkline._report.style import STYLE
from trunkline._report.text import NAME_LENGTH, clean, shorten

_EMPTY = frozenset({"meta", "img", "br", "circle", "line", "path", "rect"})
"""Elements without content."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may load for the page: nothing but what it holds."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | None
"""What an element can hold: ``Markup`` as it is, anything else as text."""


def tag(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        children: What stands in it.
        attributes: ``class_`` stands for ``class``, ``font_size`` for ``font-size``. None leaves one out.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in _EMPTY:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Return pieces one behind the other."""
    return Markup("".join(_escaped(one) for one in children if one is not None))


def label(text: str, most: int = NAME_LENGTH) -> Markup:
    """Return a name from elsewhere, kept apart from the text around it, whatever its direction."""
    return tag("bdi", shorten(text, most))


def labels(texts: Sequence[str], *, shown: int = 8, most: int = NAME_LENGTH) -> Markup:
    """Return several names, of many the first."""
    parts: list[Child] = []
    for text in texts[:shown]:
        parts += [", ", label(text, most)]
    more = f" and {len(texts) - shown:,} more" if len(texts) > shown else ""
    return join([*parts[1:], more])


def paragraph(*children: Child) -> Markup:
    """Return a sentence or several."""
    return tag("p", *children)


def note(*children: Child) -> Markup:
    """Return a remark."""
    return tag("p", *children, class_="note")


def section(identifier: str, title: str, *children: Child) -> Markup:
    """Return a part of the page under its title."""
    return tag("section", tag("h2", title), *children, id=identifier)


def facts(rows: Iterable[tuple[str, Child]]) -> Markup:
    """Return names and values; those without a value are left out."""
    pairs = [join((tag("dt", name), tag("dd", value))) for name, value in rows if value not in (None, "")]
    return tag("dl", *pairs) if pairs else Markup()


def table(header: Sequence[str], rows: Iterable[Sequence[Child]], *, right: Collection[int] = ()) -> Markup:
    """Return a table.

    Args:
        header: Titles of the columns.
        rows: Cells.
        right: Numbers of the columns that are aligned to the right.
    """

    def sides(column: int) -> str | None:
        return "right" if column in right else None

    head = tag("tr", *(tag("th", one, scope="col", class_=sides(at)) for at, one in enumerate(header)))
    body = [tag("tr", *(tag("td", one, class_=sides(at)) for at, one in enumerate(row))) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def figure(drawing: Markup, *caption: Child) -> Markup:
    """Return a drawing and what it says in words."""
    below = tag("figcaption", *caption) if caption else None
    return tag("figure", tag("div", drawing, class_="scroll"), below)


def folded(summary: str, *children: Child, is_rest: bool = False) -> Markup:
    """Return what is seen once it is asked for. Of the rest of a list paper says at least that there is one."""
    return tag("details", tag("summary", summary), *children, class_="rest" if is_rest else None)


def document(title: str, heading: Markup, sections: Sequence[tuple[str, str, Markup]]) -> str:
    """Return a whole page.

    Args:
        title: Of the window.
        heading: What stands above everything.
        sections: Id, title and content of each.
    """
    links = [tag("li", tag("a", text, href=f"#{identifier}")) for identifier, text, _ in sections]
    contents = tag("nav", tag("ul", *links), aria_label="Contents")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="trunkline"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    parts = [section(identifier, text, content) for identifier, text, content in sections]
    body = tag("body", tag("main", heading, contents, *parts))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _escaped(child: Child) -> str:
    return child if isinstance(child, Markup) else html.escape(clean(str(child)))


def _attribute(key: str, value: Child) -> str:
    name = key.rstrip("_").replace("_", "-")
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(clean(text))}"'
