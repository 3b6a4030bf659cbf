"""Progress: in a terminal, in a notebook, and nowhere else."""

import subprocess
import sys
import types

import pytest
from trunkline import _html
from trunkline.progress import show_progress


def test_nothing_where_nobody_looks(capsys):
    with show_progress("Working", 3) as bar:
        bar.advance()
        bar.update(2, total=4, note="half")
    assert (bar.done, bar.total, bar.note) == (2, 4, "half")
    assert capsys.readouterr() == ("", "")
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom trunkline.progress import show_progress\n"
            "with show_progress('x', 1) as bar: bar.advance()\nprint('rich' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "False" and loaded.stderr == ""


def test_terminal_draws_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_progress("Working", 3) as bar:
        bar.advance(3)
        bar._bar.refresh()
    out, err = capsys.readouterr()
    assert out == "" and "Working" in err and "100%" in err
    with show_progress("Working", 3, False) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


@pytest.fixture
def notebook(monkeypatch):
    """Pretend to be in a Jupyter kernel."""
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what)

    class ZMQInteractiveShell:
        pass

    display = types.ModuleType("IPython.display")
    display.HTML = str
    display.display = lambda what, display_id: shown.append(what) or Handle()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = ZMQInteractiveShell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_notebook(notebook, capsys):
    with show_progress("<b>Working", 4) as bar:
        for _ in range(4):
            bar.advance()
        bar.update(4, note="done & dusted")
    assert notebook[0].startswith("&lt;b&gt;Working") and 'value="4"' in notebook[-1] and "done &amp;" in notebook[-1]
    assert len(notebook) <= 4
    assert capsys.readouterr() == ("", "")


def test_html_is_escaped():
    text = _html.facts("<t>", [("<n>", "<v>"), ("none", None)]) + _html.table(("<h>",), [("<c>",)])
    assert not any(f"<{letter}>" in text for letter in "tnvhc") and "none" not in text
