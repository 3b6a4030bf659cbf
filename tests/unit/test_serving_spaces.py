"""Whether uploaded rows belong into the space that they come with: local features, and codes of a bottleneck."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire.bottleneck import Bottleneck, ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import pack
from trunkline_wire.specs import (
    FLOAT32,
    IMAGES,
    INT8,
    FeatureSpace,
    bottleneck_fingerprint,
    local_space,
)
from trunkline_worker.engine.api import Payload
from trunkline_worker.serving import spaces
from trunkline_worker.serving.backends import Backends

SPEC = fakes.fake_spec()
MID = SPEC.cut("mid")
EXACT, QUANTISED = SPEC.space(MID), SPEC.space(MID, INT8)
SHA256 = "b" * 64
CODES = replace(EXACT, bottleneck=SHA256, fingerprint=bottleneck_fingerprint(MID.fingerprint, SHA256))
LOCAL = local_space("sensor", "5" * 64)
OWN = replace(EXACT, local_model="stem", fingerprint="6" * 64)
LAYER = ChannelLinear(np.zeros((1, 3), np.float32), np.zeros(1, np.float32))
BACK = ChannelLinear(np.zeros((3, 1), np.float32), np.zeros(3, np.float32))
BOTTLENECK = Bottleneck(EXACT, (3, 2, 2), 0, LAYER, BACK, "int8", 0.01)


def features(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.fixture(autouse=True)
def bottlenecks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Bottleneck]:
    """What the tenant ``t`` has put here, by hash."""
    kept = {SHA256: BOTTLENECK}

    async def find(_backends: Backends, tenant: str, sha256: str) -> Bottleneck:
        if tenant != "t" or sha256 not in kept:
            raise WireError(ErrorCode.NOT_FOUND, "there is no such bottleneck")
        return kept[sha256]

    monkeypatch.setattr(spaces, "find_bottleneck", find)
    return kept


def check(space: FeatureSpace, rows: Payload, tenant: str = "t") -> str:
    backends = Backends({"fake": fakes.FakeEngine(None)}, None, None)  # type: ignore[arg-type]
    return asyncio.run(spaces.check_rows(backends, tenant, space, rows))


@pytest.mark.parametrize(
    ("space", "rows", "precision"),
    [
        (IMAGES, [b"file"], FLOAT32),
        (EXACT, features(2, 3, 2, 2), FLOAT32),
        (QUANTISED, features(2, 3, 2, 2), INT8),
        (CODES, features(2, 1, 2, 2), FLOAT32),
        (CODES, pack(features(2, 1, 2, 2), "int8", 0), FLOAT32),
        (CODES, pack(features(2, 1, 2, 2), "bfloat16", 0), FLOAT32),
        (OWN, features(2, 3, 2, 2), FLOAT32),
        (OWN, pack(features(2, 3, 2, 2), "int8", 0), FLOAT32),
        (LOCAL, features(2, 1), FLOAT32),
        (LOCAL, features(2, 65_536, dtype="f2"), FLOAT32),
        (LOCAL, pack(features(2, 7), "int4", 0), FLOAT32),
        (LOCAL, pack(features(2, 7), "bfloat16", 0), FLOAT32),
    ],
)
def test_rows_where_they_belong(space: FeatureSpace, rows: Payload, precision: str) -> None:
    assert check(space, rows) == precision


@pytest.mark.parametrize(
    ("space", "rows", "code", "what"),
    [
        (LOCAL, [b"file"], ErrorCode.DTYPE_MISMATCH, "'sensor'; vectors are needed"),
        (LOCAL, np.zeros((2, 3), np.uint8), ErrorCode.DTYPE_MISMATCH, "rows of uint8 .* 'sensor'"),
        (LOCAL, features(2), ErrorCode.SHAPE_MISMATCH, r"'sensor' have shape \(2,\)"),
        (LOCAL, features(2, 3, 1), ErrorCode.SHAPE_MISMATCH, r"have shape \(2, 3, 1\)"),
        (LOCAL, pack(features(2, 3, 4), "int8", 0), ErrorCode.SHAPE_MISMATCH, r"have shape \(2, 3, 4\)"),
        (LOCAL, features(1, 65_537), ErrorCode.SHAPE_MISMATCH, "at most 65536"),
        (replace(LOCAL, fingerprint=""), features(2, 3), ErrorCode.INVALID_ARGUMENT, "64 hexadecimal"),
        (replace(LOCAL, fingerprint="5" * 63 + "G"), features(2, 3), ErrorCode.INVALID_ARGUMENT, "64 hexadecimal"),
        (replace(LOCAL, local_model="../x"), features(2, 3), ErrorCode.INVALID_ARGUMENT, "not a local model name"),
        (replace(LOCAL, cut="mid"), features(2, 3), ErrorCode.INVALID_ARGUMENT, "leave these empty"),
        (replace(LOCAL, cut="input"), [b"file"], ErrorCode.INVALID_ARGUMENT, "leave these empty"),
        (replace(LOCAL, input_size=8), features(2, 3), ErrorCode.INVALID_ARGUMENT, "leave these empty"),
        (replace(LOCAL, bottleneck=SHA256), features(2, 3), ErrorCode.INVALID_ARGUMENT, "leave these empty"),
        (OWN, features(2, 3), ErrorCode.SHAPE_MISMATCH, r"needs \(3, 2, 2\)"),
        (OWN, [b"file"], ErrorCode.DTYPE_MISMATCH, "not encoded images"),
        (replace(OWN, fingerprint=""), features(2, 3, 2, 2), ErrorCode.INVALID_ARGUMENT, "64 hexadecimal"),
        (replace(OWN, local_model="a b"), features(2, 3, 2, 2), ErrorCode.INVALID_ARGUMENT, "not a local model name"),
        (replace(OWN, cut="input"), np.zeros((2, 8, 8, 3), np.uint8), ErrorCode.INVALID_ARGUMENT, "takes images"),
        (replace(OWN, cut=""), features(2, 3, 2, 2), ErrorCode.NOT_FOUND, "no cut ''"),
        (replace(CODES, local_model="stem"), features(2, 1, 2, 2), ErrorCode.INCOMPATIBLE, "train the bottleneck"),
        (FeatureSpace("", "", 0, "5" * 64), features(2, 3), ErrorCode.INVALID_ARGUMENT, "without a backbone"),
        (replace(IMAGES, fingerprint=LOCAL.fingerprint), [b"file"], ErrorCode.INVALID_ARGUMENT, "without a backbone"),
        (CODES, features(2, 3, 2, 2), ErrorCode.SHAPE_MISMATCH, r"the bottleneck bbbbbbbbbbbb .* needs \(1, 2, 2\)"),
        (CODES, pack(features(2, 1, 2, 2), "int8", 2), ErrorCode.SHAPE_MISMATCH, "along axis 0"),
        (CODES, np.zeros((2, 1, 2, 2), np.uint8), ErrorCode.DTYPE_MISMATCH, "rows of uint8"),
        (CODES, [b"file"], ErrorCode.DTYPE_MISMATCH, "not encoded images"),
        (replace(CODES, fingerprint=EXACT.fingerprint), features(2, 1, 2, 2), ErrorCode.INCOMPATIBLE, "train the bott"),
        (replace(CODES, bottleneck=""), features(2, 1, 2, 2), ErrorCode.INCOMPATIBLE, "fetch the stem again"),
        (replace(CODES, cut="nowhere"), features(2, 1, 2, 2), ErrorCode.NOT_FOUND, "no cut 'nowhere'"),
    ],
)
def test_rows_where_they_do_not_belong(space: FeatureSpace, rows: Payload, code: ErrorCode, what: str) -> None:
    with pytest.raises(WireError, match=what) as error:
        check(space, rows)
    assert error.value.code is code


def test_another_tenants_bottleneck_is_none() -> None:
    with pytest.raises(WireError) as error:
        check(CODES, features(2, 1, 2, 2), tenant="u")
    assert error.value.code is ErrorCode.NOT_FOUND


def test_a_bottleneck_of_another_cut_does_not_fit(bottlenecks: dict[str, Bottleneck]) -> None:
    bottlenecks[SHA256] = replace(BOTTLENECK, space=FeatureSpace("other", "end", 32, "e" * 64))
    with pytest.raises(WireError, match=r"is for the cut 'end' of other at input size 32; .* 'mid' of fake") as error:
        check(CODES, features(2, 1, 2, 2))
    assert error.value.code is ErrorCode.INCOMPATIBLE


def test_codes_of_a_quantised_stem_are_not_known() -> None:
    fingerprint = bottleneck_fingerprint(MID.int8_fingerprint, SHA256)
    with pytest.raises(WireError) as error:
        check(replace(CODES, fingerprint=fingerprint), features(2, 1, 2, 2))
    assert error.value.code is ErrorCode.INCOMPATIBLE
