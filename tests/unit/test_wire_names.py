"""One allow-list for every name that a user gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_NAME_LENGTH
from trunkline_wire.names import Reference, check_backbone_name, check_name, parse_reference

GOOD = ["a", "Z9", "digits-head", "v1.2_b", "0", "a" * MAX_NAME_LENGTH]
BAD = [
    "",
    " ",
    ".",
    "..",
    "-a",
    "_a",
    "a/b",
    "../etc/passwd",
    "a\\b",
    "a b",
    "a\n",
    "\na",
    "a\0",
    "é",
    "٣",  # a digit, but not an ASCII one
    "a@1",
    "a:b",
    "a?b",
    "a*",
    "a" * (MAX_NAME_LENGTH + 1),
]


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    assert check_name(name, "model") == name
    assert parse_reference(name, "model") == Reference(name, None)
    assert parse_reference(f"{name}@12", "model") == Reference(name, 12)


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name: str) -> None:
    with pytest.raises(WireError, match="is not a model name") as caught:
        check_name(name, "model")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    if "@" not in name:
        with pytest.raises(WireError):
            parse_reference(name, "model")


@pytest.mark.parametrize(
    "text", ["a@", "a@0", "a@-1", "a@1.5", "a@01", "a@latest", "@1", "a@1@2", "a@1\n", "a@" + "9" * 10]
)
def test_bad_references(text: str) -> None:
    with pytest.raises(WireError, match="expected 'name' or 'name@version'") as caught:
        parse_reference(text, "model")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@given(st.text())
def test_what_passes_is_safe_anywhere(text: str) -> None:
    try:
        check_name(text, "dataset")
    except WireError as error:
        assert len(error.message) < 600  # a megabyte of name is not sent back
        return
    assert text.isascii()
    assert not set(text) & set("/\\\0\n\r \t'\"@:;$`")
    assert not text.startswith((".", "-"))


def test_a_reference_prints_as_it_is_written() -> None:
    assert [str(parse_reference(text, "model")) for text in ("a", "a@3")] == ["a", "a@3"]


@pytest.mark.parametrize("name", [*GOOD, *(f"timm/{name}" for name in GOOD), "a" * MAX_NAME_LENGTH + "/b"])
def test_good_backbone_names(name: str) -> None:
    assert check_backbone_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in BAD if name != "a/b"),
        *(f"timm/{name}" for name in BAD),
        *(f"{name}/net" for name in BAD),
        "/net",
        "timm//net",
        "timm/a/b",
        "timm/",
        "timm\\net",
        "timm/net\n",
        "timm /net",
    ],
)
def test_bad_backbone_names(name: str) -> None:
    with pytest.raises(WireError, match="is not a backbone name") as caught:
        check_backbone_name(name)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert len(caught.value.message) < 600


@given(st.from_regex(r"[a-z./\\@-]{1,12}", fullmatch=True))
def test_a_backbone_name_is_one_name_or_two(text: str) -> None:
    parts = text.split("/")
    try:
        for part in parts:
            check_name(part, "backbone")
        allowed = len(parts) <= 2
    except WireError:
        allowed = False
    try:
        assert (check_backbone_name(text) == text) == allowed
    except WireError:
        assert not allowed
