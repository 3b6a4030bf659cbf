"""What a request must be before it costs anything. Every refusal says what came, what was expected, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import check_finite
from trunkline_wire.heads import CONV, TAIL
from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_wire.quantise import INT4, INT8, PackedRows, check_packed, codec_of
from trunkline_wire.specs import (
    FLOAT32,
    BackboneSpec,
    CodecUse,
    CutSpec,
    FeatureSpace,
    SliceSpec,
    map_slice,
    map_tap,
)

from trunkline_worker.engine.api import Payload
from trunkline_worker.store.records import ModelInput, ModelRecord

_FEATURE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


def check_space(space: FeatureSpace, spec: BackboneSpec, check_cut: Callable[[str], None]) -> tuple[CutSpec, str]:
    """Return the cut at which rows of a feature space enter, and the precision of the stem that made them.

    Images for which no backbone was chosen enter at ``input``.

    Args:
        space: Of the rows.
        spec: The backbone at the rows' input size.
        check_cut: ``Backbone.check_cut``: refuses a name that is no cut.

    Raises:
        WireError: INCOMPATIBLE, or what ``check_cut`` raises.
    """
    if space.backbone and space.backbone != spec.name:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the rows belong to backbone {space.backbone[:80]!r}; this is {spec.name!r}. Send them to their own "
            "backbone, or compute them with a stem of this one",
        )
    cut = spec.cut(space.cut)
    if cut is None:
        check_cut(space.cut)
        raise WireError(ErrorCode.NOT_FOUND, f"{spec.name} has no cut {space.cut[:80]!r}")
    if not space.backbone:
        if not space.is_input:
            raise WireError(ErrorCode.INCOMPATIBLE, f"features at cut {cut.name!r} must name their backbone")
        return cut, FLOAT32
    precision = cut.precision_in(space)
    if precision is None:
        if space.is_input:
            advice = "Ask the cluster to describe the backbone again"
        elif space.bottleneck:
            advice = "Train the bottleneck again"
        else:
            advice = (
                f"Fetch the stem again, client.stem({spec.name!r}, cut={cut.name!r}), and compute the features with it"
            )
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the rows have fingerprint {_short(space.fingerprint)}, this backbone has {_short(cut.fingerprint)} at "
            f"cut {cut.name!r} and {spec.preprocessing.input_size} px: other weights, preprocessing or "
            f"calibration. {advice}",
        )
    return cut, precision


def check_rows(rows: Payload, cut: CutSpec, *, is_input: bool) -> None:
    """Check type, shape and finiteness of rows that enter at a cut; codes, at a cut of the code's shape.

    Raises:
        WireError: EMPTY_BATCH, DTYPE_MISMATCH, SHAPE_MISMATCH, NOT_FINITE; for packed rows as ``check_packed``.
    """
    if len(rows) == 0:
        raise WireError(ErrorCode.EMPTY_BATCH, "a batch of no rows; send at least one")
    if isinstance(rows, PackedRows):
        _check_packed(rows, cut, is_input=is_input)
        return
    if not isinstance(rows, np.ndarray):
        if not is_input:
            raise WireError(
                ErrorCode.DTYPE_MISMATCH,
                f"encoded images at cut {cut.name!r}: features of shape {_text(cut.feature_shape)} are expected there. "
                "Images enter at cut 'input'",
            )
        return
    _check_dtype(rows, cut, is_input=is_input)
    _check_shape(rows.shape[1:], cut, is_input=is_input)
    if rows.dtype.kind == "f":
        check_finite(rows)


def _check_packed(rows: PackedRows, cut: CutSpec, *, is_input: bool) -> None:
    if is_input:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"images at cut 'input' are uint8 or encoded; got {rows.codec[:40]}. Codecs are for features",
        )
    _check_shape(rows.row_shape, cut, is_input=False)
    if rows.codec in (INT8, INT4) and rows.channel_axis != cut.channel_axis:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"the rows are quantised along axis {rows.channel_axis}; at cut {cut.name!r}, where a row has shape "
            f"{_text(cut.feature_shape)}, channels are counted along axis {cut.channel_axis}",
        )
    check_packed(rows)


def _check_dtype(rows: npt.NDArray[np.generic], cut: CutSpec, *, is_input: bool) -> None:
    if is_input and rows.dtype != np.uint8:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"images at cut 'input' are uint8, 0 to 255; got {rows.dtype}. Do not normalise them",
        )
    if not is_input and rows.dtype not in _FEATURE_DTYPES:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"features at cut {cut.name!r} are float32, float16 or quantised; got an array of {rows.dtype}",
        )


def _check_shape(got: tuple[int, ...], cut: CutSpec, *, is_input: bool) -> None:
    expected, axis = cut.feature_shape, cut.channel_axis
    if got == expected:
        return
    hint = ""
    if len(got) == len(expected) and got[axis] != expected[axis]:
        hint = f": {got[axis]} channels instead of {expected[axis]}"
    elif is_input:
        hint = ": resize and crop them as `describe` says, or send encoded images"
    raise WireError(
        ErrorCode.SHAPE_MISMATCH,
        f"a row at cut {cut.name!r} has shape {_text(expected)}; got {_text(got)}{hint}",
    )


def first_input(model: ModelRecord) -> ModelInput:
    """Return what a model's first input must be, in the form of the others. Its width is not known: 0."""
    return ModelInput(
        model.space, model.embedding_fingerprint, model.slices, 0, codec=model.codec, codec_error=model.codec_error
    )


def check_model(reference: str, needed: ModelInput, spec: BackboneSpec, cut: CutSpec) -> None:
    """Check that an input of a model can be computed from rows that enter at a cut.

    Args:
        reference: Of the model.
        needed: The input.
        spec: The backbone at the rows' input size.
        cut: Where they enter.

    Raises:
        WireError: INCOMPATIBLE.
    """
    if needed.embedding_fingerprint != spec.embedding_fingerprint:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"model {reference} was trained on embeddings {_short(needed.embedding_fingerprint)} "
            f"({needed.space.backbone or 'a backbone'} at {needed.space.input_size} px); {spec.name} at "
            f"{spec.preprocessing.input_size} px gives {_short(spec.embedding_fingerprint)}. Send rows of the model's "
            "own input size to the backbone it was trained with, or train it again",
        )
    if map_tap(needed.slices[0]) is None:
        _check_behind(needed.slices, spec, cut, f"model {reference} uses")


def check_own(reference: str, needed: ModelInput, space: FeatureSpace, codec: str) -> None:
    """Check that rows which a client's own model or a bottleneck made are those that a model was trained on.

    Nobody can say how near others come to them, so space and codec must be the very same. Does nothing where neither
    the rows nor those of the training are of this kind.

    Args:
        reference: Of the model.
        needed: What the input must be.
        space: Of the rows.
        codec: Of the rows, as ``codec_of`` says.

    Raises:
        WireError: INCOMPATIBLE.
    """
    if not space.is_own and not needed.space.is_own:
        return
    if space != needed.space:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"model {reference} was trained on {_described(needed.space)}; these rows are {_described(space)}. Send "
            "rows made in the same way, or train a model on these",
        )
    if codec != needed.codec:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"model {reference} was trained on {_described(needed.space)} sent as {needed.codec!r}; these are "
            f"{codec!r}. Send them as {needed.codec!r}",
        )


def check_local(reference: str, needed: ModelInput, space: FeatureSpace, rows: Payload) -> None:
    """Check rows of local features against what a model was trained on.

    Args:
        reference: Of the model.
        needed: What the input must be. A width of 0 is not compared.
        space: Of the rows.
        rows: (B, width), or the same in fewer bytes.

    Raises:
        WireError: EMPTY_BATCH, DTYPE_MISMATCH, SHAPE_MISMATCH, NOT_FINITE; INCOMPATIBLE for another model or codec.
    """
    if len(rows) == 0:
        raise WireError(ErrorCode.EMPTY_BATCH, "a batch of no rows; send at least one")
    name = needed.space.local_model or space.local_model
    if not isinstance(rows, PackedRows) and (not isinstance(rows, np.ndarray) or rows.dtype not in _FEATURE_DTYPES):
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"features of local model {name!r} are float32, float16 or quantised; got {codec_of(rows)}",
        )
    check_own(reference, needed, space, codec_of(rows))
    if len(rows.shape) != 2 or (needed.width and rows.shape[1] != needed.width):
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"features of local model {name!r} are (rows, {needed.width or 'width'}); got {_text(rows.shape)}",
        )
    if isinstance(rows, PackedRows):
        check_packed(rows)
    else:
        check_finite(rows)


def check_more(model: ModelRecord, more_BE: npt.NDArray[np.float32] | None, num_rows: int) -> None:
    """Check the columns of the inputs behind a model's first.

    Raises:
        WireError: INVALID_ARGUMENT if they are missing or not asked for; SHAPE_MISMATCH, DTYPE_MISMATCH, NOT_FINITE.
    """
    width = sum(one.width for one in model.more_inputs)
    if (more_BE is None) != (width == 0):
        names = ", ".join(one.space.source for one in model.more_inputs)
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"model {model.reference} needs another input: {names}"
            if more_BE is None
            else f"model {model.reference} has one input; others were sent",
        )
    if more_BE is None:
        return
    if more_BE.shape != (num_rows, width):
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"the other inputs of model {model.reference} have {width} columns for {num_rows} rows; got "
            f"{_text(more_BE.shape)}",
        )
    if more_BE.dtype != np.float32:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH,
            f"the other inputs of model {model.reference} are columns of float32; got {more_BE.dtype}",
        )
    check_finite(more_BE)


def check_outliers(model: ModelRecord) -> None:
    """Check that a model can say how unlike its training rows a row is.

    Raises:
        WireError: UNSUPPORTED.
    """
    if model.outliers_sha256:
        return
    if model.head.kind in (CONV, TAIL):
        why = "its head reads a map, and there are none for these. Train one that reads slices"
    else:
        why = "it was trained before there were any. Train it again"
    raise WireError(ErrorCode.UNSUPPORTED, f"model {model.reference} has no outlier scores: {why}, or leave them out")


def check_codec(reference: str, use: CodecUse) -> None:
    """Check that a model may be used on rows that were made and sent in this way.

    It may where it was trained on the same, and where both errors together stay within ``MAX_CODEC_ERROR``.

    Raises:
        WireError: INCOMPATIBLE.
    """
    together = use.trained_error + use.embedding_error
    if use.codec == use.trained_codec or together <= MAX_CODEC_ERROR:
        return
    trained = use.trained_codec or FLOAT32
    if use.trained_error <= MAX_CODEC_ERROR:
        advice = f"Send rows as {trained!r} or in a codec with a smaller error, or train on rows sent as {use.codec!r}"
    else:
        advice = f"Send rows as {trained!r}, or train on rows in a codec with a smaller error"
    raise WireError(
        ErrorCode.INCOMPATIBLE,
        f"model {reference} was trained on rows sent as {trained!r}, with an embedding error of "
        f"{use.trained_error:.3g}; these are {use.codec!r}, with {use.embedding_error:.3g}: {together:.3g} together, "
        f"and at most {MAX_CODEC_ERROR:g} is allowed. {advice}",
    )


def select_slices(names: Sequence[str], spec: BackboneSpec, cut: CutSpec) -> tuple[SliceSpec, ...]:
    """Return slices in the order wanted, side by side from column 0; none named means all behind the cut.

    Raises:
        WireError: NOT_FOUND for an unknown slice, INCOMPATIBLE for one before the cut, INVALID_ARGUMENT for one named
            twice, for a map together with others, and for one that is none or is before the cut.
    """
    wanted = tuple(names) or cut.slices
    if any(map_tap(name) is not None for name in wanted):
        return _select_map(wanted, spec, cut)
    widths = {one.name: one.width for one in spec.slices}
    for name in wanted:
        if name not in widths:
            near = difflib.get_close_matches(name[:80], cut.slices, n=3, cutoff=0.3)
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"{spec.name} has no slice {name[:80]!r}. Nearest: {', '.join(near) or 'none'}. Behind cut "
                f"{cut.name!r}: {', '.join(cut.slices)}",
            )
    if len(set(wanted)) != len(wanted):
        raise WireError(ErrorCode.INVALID_ARGUMENT, "a slice is named twice")
    _check_behind(wanted, spec, cut, "asked for are")
    slices, start = [], 0
    for name in wanted:
        slices.append(SliceSpec(name, start, start + widths[name]))
        start += widths[name]
    return tuple(slices)


def _select_map(names: Sequence[str], spec: BackboneSpec, cut: CutSpec) -> tuple[SliceSpec, ...]:
    if len(names) > 1:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"a map is asked for alone, not together with other slices: {', '.join(names)[:200]}",
        )
    (name,) = names
    behind = spec.cuts[spec.cuts.index(cut) :]
    tap = spec.cut(map_tap(name) or "")
    shape = spec.map_shape(name)
    if tap in behind and shape:
        return (SliceSpec(name, 0, math.prod(shape)),)
    maps = ", ".join(map_slice(one.name) for one in behind if one.is_stage and one.map_shape) or "none"
    advice = f"Ends of stages that are maps behind cut {cut.name!r}: {maps}"
    if tap is None:
        raise WireError(ErrorCode.NOT_FOUND, f"{spec.name} has no map {name[:80]!r}. {advice}")
    why = "the features there are no map" if tap in behind else f"it is before the cut {cut.name!r}"
    raise WireError(ErrorCode.INVALID_ARGUMENT, f"{name!r} cannot be read: {why}. {advice}")


def _described(space: FeatureSpace) -> str:
    if space.is_local:
        return f"features of local model {space.local_model!r} with fingerprint {_short(space.fingerprint)}"
    if space.local_model:
        made = f"made by the stem of one's own {space.local_model!r} with fingerprint {_short(space.fingerprint)}"
    elif space.bottleneck:
        made = f"of bottleneck {_short(space.bottleneck)}"
    else:
        made = f"with fingerprint {_short(space.fingerprint)}"
    return f"features of {space.backbone or 'images'} at cut {space.cut!r} {made}"


def _check_behind(names: Sequence[str], spec: BackboneSpec, cut: CutSpec, who: str) -> None:
    missing = [name for name in names if name not in cut.slices]
    if not missing:
        return
    cuts = [one.name for one in spec.cuts if set(names) <= set(one.slices)]
    advice = f"The last cut that still has all of them is {cuts[-1]!r}" if cuts else "No cut of this backbone has them"
    raise WireError(
        ErrorCode.INCOMPATIBLE,
        f"{who} slices that cannot be computed behind cut {cut.name!r}: {', '.join(missing)[:200]}. {advice}",
    )


def _short(fingerprint: str) -> str:
    return f"{fingerprint[:12]}..." if fingerprint else "none"


def _text(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"
