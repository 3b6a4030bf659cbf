"""Progress for people: rich on stderr in a terminal, a line of HTML in a notebook, nothing anywhere else."""

from __future__ import annotations

import html
import sys
import time
from types import TracebackType
from typing import Any

REFRESH_S = 0.1
"""Shortest time between two updates in a notebook."""


class Progress:
    """A bar that shows nothing: the base of those that do."""

    def __init__(self, title: str, total: float) -> None:
        """Keep what is measured.

        Args:
            title: What is being done.
            total: At how much it is done. 0: not known.
        """
        self.title = title
        self.total = total
        self.done = 0.0
        self.note = ""

    def __enter__(self) -> Progress:
        """Start to show."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop to show."""

    def advance(self, amount: float = 1.0) -> None:
        """Add to what is done."""
        self.update(self.done + amount)

    def update(self, done: float, *, total: float | None = None, note: str | None = None) -> None:
        """Set what is done."""
        self.done = done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note
        self._draw()

    def _draw(self) -> None:
        """Show the present state."""


class _RichProgress(Progress):
    """A bar of rich's on stderr."""

    def __enter__(self) -> Progress:
        from rich import progress as rich_progress
        from rich.console import Console

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.total or None, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _draw(self) -> None:
        self._bar.update(self._task, completed=self.done, total=self.total or None, note=self.note)


class _NotebookProgress(Progress):
    """A bar of our own in a notebook: those of rich and tqdm ask for ipywidgets."""

    def __enter__(self) -> Progress:
        # Looked up rather than imported: it is there if this is a notebook, and no dependency if not.
        self._html = sys.modules["IPython.display"].HTML
        self._last = time.monotonic()
        self._handle: Any = sys.modules["IPython.display"].display(self._html(self._text()), display_id=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.update(self._html(self._text()))

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._last >= REFRESH_S:
            self._last = now
            self._handle.update(self._html(self._text()))

    def _text(self) -> str:
        bar = f'<progress value="{self.done:g}" max="{self.total:g}"></progress>' if self.total else "<progress/>"
        return f"{html.escape(self.title)} {bar} {html.escape(self.note)}"


def show_progress(title: str, total: float, wanted: bool | None = None) -> Progress:
    """Return a bar that fits where this runs.

    Args:
        title: What is being done.
        total: At how much it is done. 0: not known.
        wanted: None: if somebody can see it. False: never. True: in a terminal or notebook.
    """
    if wanted is False:
        return Progress(title, total)
    if in_notebook():
        return _NotebookProgress(title, total)
    if sys.stderr is not None and sys.stderr.isatty():
        return _RichProgress(title, total)
    return Progress(title, total)


def say(text: str, wanted: bool | None = None) -> None:
    """Say something in a line, wherever a bar would be seen.

    Args:
        text: What to say.
        wanted: As for ``show_progress``.
    """
    if not is_seen(wanted):
        return
    if in_notebook():
        sys.modules["IPython.display"].display(sys.modules["IPython.display"].HTML(html.escape(text)))
        return
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, highlight=False)


def is_seen(wanted: bool | None = None) -> bool:
    """Whether somebody can see what is shown, and it is wanted."""
    return wanted is not False and (in_notebook() or (sys.stderr is not None and sys.stderr.isatty()))


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel. Loads nothing."""
    if "IPython.display" not in sys.modules:
        return False
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"
