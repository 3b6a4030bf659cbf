"""Which codec is taken: without a server."""

import numpy as np
import pytest
from trunkline import _codecs, errors
from trunkline.records import ServerInfo
from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_wire.quantise import CODECS, PackedRows, parse_codec
from trunkline_wire.specs import CodecCost, CutCost, CutSpec, StemCost, codec_label

CUT = CutSpec("half", (8, 4, 4), "ab" * 32, ("pooled",))
COST = CutCost(
    CUT,
    (
        CodecCost("float32", 512, 0.0),
        CodecCost("float16", 256, 0.001),
        CodecCost("float16+zstd", 90, 0.001),
        CodecCost("int8", 128, 0.01),
        CodecCost("int8+zstd", 100, 0.01),
        CodecCost("int4", 64, 0.2),
        CodecCost("int2", 32, 0.0),
        CodecCost("images", 10, 0.0),
    ),
    (StemCost("float32", 1000, 0.0), StemCost("int8", 300, 0.03)),
    400.0,
    "made up",
)


def info(codecs):
    return ServerInfo("9.9", 1, {}, 0, 0, 0.0, "", True, "", codecs)


@pytest.mark.parametrize(
    ("precision", "offered", "max_error", "expected"),
    [
        ("float32", CODECS, MAX_CODEC_ERROR, "float16+zstd"),
        ("float32", CODECS, 0.3, "int4"),
        ("float32", CODECS, 0.0, "float32"),
        ("float32", ("float32", "int8"), MAX_CODEC_ERROR, "int8+zstd"),
        ("int8", CODECS, 0.035, "float16+zstd"),
        ("int8", CODECS, 0.03, "float32"),
        ("int8", CODECS, 0.23, "int4"),
    ],
)
def test_fewest_bytes_within_the_bound(precision, offered, max_error, expected):
    assert _codecs.choose_codec(COST, precision, offered, max_error).codec == expected


def test_of_equal_sizes_the_one_that_loses_less():
    cost = CutCost(
        CUT,
        (CodecCost("int8+zstd", 9, 0.01), CodecCost("int8", 9, 0.01), CodecCost("bfloat16", 9, 0.02)),
        (StemCost("float32", 1, 0.0),),
        1.0,
        "",
    )
    assert [one.codec for one in _codecs.usable_codecs(cost, CODECS)] == ["int8", "int8+zstd", "bfloat16"]


def test_none_within_the_bound():
    with pytest.raises(errors.UnsupportedError) as caught:
        _codecs.choose_codec(COST, "int8", CODECS, 0.01)
    text = str(caught.value)
    assert "float32 0.03" in text and "float16+zstd 0.031" in text and "int4 0.23" in text and "within 0.01" in text
    assert "0.03 of the int8 stem" in text and "precision='float32'" in text
    assert "int2" not in text and "images" not in text


@pytest.mark.parametrize(
    ("stems", "said"),
    [((StemCost("float32", 1, 0.0),), "makes none"), ((StemCost("int8", 1, 0.2, "too far off"),), "too far off")],
)
def test_stem_that_is_not_offered(stems, said):
    cost = CutCost(CUT, COST.codecs, stems, 1.0, "")
    for choose in (
        lambda: _codecs.choose_codec(cost, "int8", CODECS, 1.0),
        lambda: _codecs.check_error(cost, "int8", parse_codec("int8"), 1.0),
    ):
        with pytest.raises(errors.UnsupportedError, match=said):
            choose()


def test_codec_that_is_named():
    assert _codecs.check_error(COST, "float32", parse_codec("int8"), 0.01) == 0.01
    assert _codecs.check_error(COST, "float32", parse_codec("int4+zstd"), 0.2) == 0.2
    with pytest.raises(errors.UnsupportedError, match=r"int8@int8 at half is 0.04; at most 0.03"):
        _codecs.check_error(COST, "int8", parse_codec("int8"), 0.03)
    with pytest.raises(errors.UnsupportedError, match="does not offer the codec bfloat16"):
        _codecs.check_error(COST, "float32", parse_codec("bfloat16"), 1.0)


@pytest.mark.parametrize("codecs", [(), ("float32", "float16", "int2", "images")])
def test_what_both_sides_know(codecs):
    assert _codecs.offered_codecs(info(codecs)) == ("float32", "float16")
    assert _codecs.check_offered(parse_codec("fp16+zstd"), info(codecs)).codec == "float16"
    with pytest.raises(errors.UnsupportedError, match=r"version 9.9.*int8; it reads float32, float16"):
        _codecs.check_offered(parse_codec("int8"), info(codecs))


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("", ("float16", "float32")),
        ("int4", ("int4", "float32")),
        ("int8@int8", ("int8", "int8")),
        ("float32@int8", ("float32", "int8")),
    ],
)
def test_labels(label, parts):
    assert _codecs.parse_label(label) == parts
    assert codec_label(*parts) == (label or "float16")


@pytest.mark.parametrize("bound", [-0.1, float("inf"), float("nan"), "0.1", True])
def test_bounds_that_are_none(bound):
    with pytest.raises(errors.InvalidArgumentError, match="max_error"):
        _codecs.check_max_error(bound)


def test_bounds():
    assert (_codecs.check_max_error(None), _codecs.check_max_error(0)) == (MAX_CODEC_ERROR, 0.0)


def test_packing_names_the_row():
    features = np.zeros((3, 2, 4), np.float32)
    assert isinstance(_codecs.packed(features, "int8", 0), PackedRows)
    features[1, 0, 0] = np.nan
    with pytest.raises(errors.NotFiniteError, match="row 1"):
        _codecs.packed(features, "int8", 0)
