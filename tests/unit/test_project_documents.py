"""Tables in the documents say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from trunkline_wire.errors import RETRYABLE_CODES, STATUS_BY_CODE, ErrorCode

ROOT = Path(__file__).resolve().parent.parent.parent


def table_rows(path: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose header's first cell is ``first``."""
    lines = (ROOT / path).read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_the_table_of_errors_is_the_code() -> None:
    errors = pytest.importorskip("trunkline.errors")
    rows = table_rows("docs/errors.md", "code")
    assert [row[0] for row in rows] == [f"`{code.name}`" for code in ErrorCode]
    for code, row in zip(ErrorCode, rows, strict=True):
        assert row[1] == STATUS_BY_CODE[code]
        assert row[2] == f"`{errors.EXCEPTION_BY_CODE[code].__name__}`"
        assert row[4] == ("yes" if code in RETRYABLE_CODES else "")


def test_the_table_of_settings_is_the_code() -> None:
    settings = pytest.importorskip("trunkline_worker.cluster.settings").Settings
    rows = {row[0].strip("`"): row for row in table_rows("docs/operations.md", "setting")}
    assert list(rows) == list(settings.model_fields)
    for name, field in settings.model_fields.items():
        assert rows[name][2] == field.description
        assert rows[name][1] == f"`{_shown(field.default)}`" if field.default_factory is None else "`{}`", name


def _shown(default: object) -> str:
    if default is None or default == "":
        return "none"
    if isinstance(default, tuple):
        return ", ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_the_table_of_calls_is_the_code() -> None:
    auth = pytest.importorskip("trunkline_worker.serving.auth")
    rows = table_rows("docs/operations.md", "call")
    documented = {row[0].strip("`"): row[1] for row in rows}
    wire = {method.removeprefix("/trunkline_wire.v1."): role for method, role in auth.ACCESS.items()}
    expected = {method.lstrip("/"): role.name.lower() for method, role in wire.items()}
    assert documented == expected


def test_the_changelog_has_the_version_of_the_project() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "## [Unreleased]" in text or f"## [{version}]" in text


def test_every_variable_of_a_client_is_documented() -> None:
    source = (ROOT / "client/trunkline/config.py").read_text() + (ROOT / "proto/trunkline_wire/local.py").read_text()
    used = set(re.findall(r'"(TRUNKLINE_[A-Z_]+[A-Z])"', source))
    rows = table_rows("docs/operations.md", "variable")
    assert used == {name for row in rows for name in re.findall(r"`(TRUNKLINE_[A-Z_]+)`", row[0])}
