"""The README's code is the example, the documents point at what exists, and the report shows what it is given."""

from __future__ import annotations

import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_code_in_the_readme_is_the_quickstart() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = (ROOT / "examples/quickstart.py").read_text()
    docstring, _, code = source.partition("\n\n")
    assert docstring.startswith('"""')
    assert block == code
    statements = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(statements) <= 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} points at {target}"


def test_every_decision_is_listed_and_has_its_three_parts() -> None:
    folder = ROOT / "docs/adr"
    decisions = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == [path.name for path in decisions]
    for number, path in enumerate(decisions, start=1):
        text = path.read_text()
        assert path.name.startswith(f"{number:04d}-")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]


# --- the report -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page holds, and whether its elements are closed in order."""

    VOID: ClassVar = {"meta", "link", "img", "br", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report() -> ModuleType:
    pytest.importorskip("jinja2")
    return example("digits_report")


def make(report: ModuleType, predicted: list[int], **changes: object):
    number = len(predicted)
    fields = {
        "methods": [report.Method("A", 0.9, "note <i>"), report.Method("B", 0.95, "", is_ours=True)],
        "class_names": ["zero", "one", "two & <b>"],
        "true_N": np.arange(number) % 3,
        "predicted_N": np.array(predicted),
        "confidence_N": np.linspace(0.5, 1.0, number),
        "images_NHW": np.full((number, 8, 8), 100, np.uint8),
        "facts": {"Label": "<script>alert(1)</script>"},
    }
    return report.DigitsReport(**(fields | changes))


def test_the_report_is_one_whole_page_and_needs_nothing_else(report: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    report.write(make(report, [0, 1, 2, 0, 1, 1, 2, 1, 2]), path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.stack == []
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text
    assert "url(" not in text
    assert "<script" not in text
    assert page.tags.count("rect") == 2 + 9
    assert page.tags.count("img") == 9
    joined = " ".join(page.text)
    for expected in ("90.0 %", "95.0 %", "2 of 9 are wrong", "two & <b>", "<script>alert(1)</script>"):
        assert expected in joined
    assert "nan" not in joined.lower()


def test_the_confusion_matrix_counts_right_class_by_prediction(report: ModuleType) -> None:
    counts = make(report, [0, 1, 2, 2, 1, 1]).confusion()
    assert counts.tolist() == [[1, 0, 1], [0, 2, 0], [0, 1, 1]]
    page = Page(report.render(make(report, [0, 1, 2, 2, 1, 1])))
    assert "1 of class zero predicted as two & <b>" in page.text
    assert "2 of class one predicted as one" in page.text


def test_mistakes_come_the_most_confident_first_and_are_capped(report: ModuleType) -> None:
    many = make(report, [(row + (row % 2)) % 3 for row in range(120)])
    wrong, right = report._chosen_rows(many)
    assert len(wrong) == report.MAX_MISTAKES
    assert wrong == sorted(wrong, reverse=True)
    assert all(row % 2 for row in wrong)
    assert right == sorted(right)
    assert not any(row % 2 for row in right)
    assert right[0] == 0
    assert right[-1] == 118
    assert f"{report.MAX_MISTAKES} of 60" in report.render(many)


@pytest.mark.parametrize("predicted", [[0, 1, 2], [1, 2, 0], [0]], ids=["all right", "all wrong", "one row"])
def test_a_report_of_extremes_still_renders(report: ModuleType, predicted: list[int]) -> None:
    page = Page(report.render(make(report, predicted)))
    assert page.stack == []
    assert ("There are none." in " ".join(page.text)) == (predicted != [1, 2, 0])


def test_bars_start_below_the_lowest_accuracy(report: ModuleType) -> None:
    for lowest, start in ((0.87, 0.8), (0.91, 0.8), (0.96, 0.9), (0.02, 0.0), (1.0, 0.9)):
        assert report._axis_start([lowest, 1.0]) == pytest.approx(start)


# --- the demo's draw --------------------------------------------------------------------------------------------------


def test_the_demo_draws_equal_classes_and_holds_the_rest_out() -> None:
    pytest.importorskip("trunkline", reason="the client")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        demo = example("digits_demo")
    finally:
        sys.path.remove(str(ROOT / "examples"))
    digits = demo.draw_digits(20, seed=1)
    assert np.bincount(digits.labels_N[digits.labelled]).tolist() == [20] * 10
    assert len(digits.labelled) + len(digits.held_out) == 1797
    assert not set(digits.labelled) & set(digits.held_out)
    assert digits.images_NHW.dtype == np.uint8
    assert digits.images_NHW.max() == 255
    assert (demo.draw_digits(20, seed=1).labelled == digits.labelled).all()
    assert (demo.draw_digits(20, seed=2).labelled != digits.labelled).any()
