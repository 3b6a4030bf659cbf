"""Checks that rows belong into the feature space that they come with."""

from __future__ import annotations

import numpy as np
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_LOCAL_WIDTH
from trunkline_wire.quantise import BFLOAT16, CODECS, PackedRows, codec_of
from trunkline_wire.specs import FLOAT32, IMAGES, FeatureSpace

from trunkline_worker.engine.api import Payload
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.bottlenecks import find_bottleneck
from trunkline_worker.store.inputs import check_local_model


async def check_rows(backends: Backends, tenant: str, space: FeatureSpace, rows: Payload) -> str:
    """Check that rows belong into a feature space, and return the precision of the stem that made them.

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH or DTYPE_MISMATCH; NOT_FOUND for a backbone, cut or bottleneck that
            is not there; INCOMPATIBLE for features of another network.
    """
    if space.is_local:
        _check_local(space, rows)
        return FLOAT32
    if not space.backbone:
        if space != IMAGES or isinstance(rows, np.ndarray | PackedRows):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                "rows without a backbone must be encoded images at the cut 'input', or features of a local model",
            )
        return FLOAT32
    described = await backends.engine(space.backbone).describe(space.input_size)
    cut = described.cut(space.cut)
    if cut is None:
        raise WireError(
            ErrorCode.NOT_FOUND,
            f"{space.backbone} has no cut {space.cut[:80]!r}. It has {len(described.cuts)} cuts; where its stages end: "
            + ", ".join(one.name for one in described.cuts if one.is_stage),
        )
    if space.local_model:
        check_local_model(space)
    precision = cut.precision_in(space)
    if precision is None:
        remedy = "train the bottleneck again" if space.bottleneck else "fetch the stem again"
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"these features were made with other weights or preprocessing than {space.backbone} has now; {remedy}",
        )
    row_shape, channel_axis = cut.feature_shape, cut.channel_axis
    if space.bottleneck:
        bottleneck = await find_bottleneck(backends, tenant, space.bottleneck)
        if bottleneck.space.fingerprint != cut.fingerprint:
            raise WireError(
                ErrorCode.INCOMPATIBLE,
                f"the bottleneck {space.bottleneck[:12]} is for the cut {bottleneck.space.cut!r} of "
                f"{bottleneck.space.backbone} at input size {bottleneck.space.input_size}; these rows are of the cut "
                f"{space.cut!r} of {space.backbone} at {space.input_size}",
            )
        row_shape, channel_axis = bottleneck.code_shape, bottleneck.channel_axis
    _check_layout(space, row_shape, channel_axis, rows)
    return precision


def _check_local(space: FeatureSpace, rows: Payload) -> None:
    """Check type and shape of local features."""
    check_local_model(space)
    name = space.local_model
    if not isinstance(rows, np.ndarray | PackedRows):
        raise WireError(
            ErrorCode.DTYPE_MISMATCH, f"encoded images as features of the local model {name!r}; vectors are needed"
        )
    if codec_of(rows) not in CODECS:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"rows of {codec_of(rows)} as features of the local model {name!r}; one of {', '.join(CODECS)} is needed",
        )
    if len(rows.shape) != 2 or rows.shape[1] > MAX_LOCAL_WIDTH:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"features of the local model {name!r} have shape {rows.shape}; (rows, width) with a width of at most "
            f"{MAX_LOCAL_WIDTH} is needed",
        )


def _check_layout(space: FeatureSpace, row_shape: tuple[int, ...], channel_axis: int, rows: Payload) -> None:
    """Check type and shape of rows at a cut."""
    if not isinstance(rows, np.ndarray | PackedRows):
        if not space.is_input:
            raise WireError(ErrorCode.DTYPE_MISMATCH, f"the cut {space.cut!r} takes features, not encoded images")
        return
    where = f"the cut {space.cut!r} at input size {space.input_size}"
    if space.bottleneck:
        where = f"the bottleneck {space.bottleneck[:12]} at {where}"
    if rows.shape[1:] != row_shape:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"rows of shape {rows.shape[1:]}; {where} needs {row_shape}")
    codec = codec_of(rows)
    if (codec == "uint8") != space.is_input:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"rows of {codec} at the cut {space.cut!r}; images are uint8, features one of {', '.join(CODECS)}",
        )
    # Values of bfloat16 have no scales, so it does not matter what they count along.
    if isinstance(rows, PackedRows) and codec != BFLOAT16 and rows.channel_axis != channel_axis:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"rows quantised along axis {rows.channel_axis}; a row at {where}, of shape {row_shape}, counts channels "
            f"along axis {channel_axis}",
        )
