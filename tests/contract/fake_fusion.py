"""Several inputs beside each other, as the fakes have them: columns side by side, whatever the head."""

import dataclasses
from dataclasses import dataclass

import fake_backbone
import numpy as np
from trunkline_wire import quantise
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FeatureSpace, map_slice


@dataclass(frozen=True)
class Reader:
    """One input of a model: where its rows live, and which slices of them the head reads."""

    space: FeatureSpace
    slices: tuple[str, ...]

    def columns(self, rows):
        """Return the columns of rows and the rows that failed."""
        if self.space.is_local:
            return local_floats(rows), {}
        columns_BD, _, errors = fake_backbone.embed(self.space, rows, self.slices)
        return columns_BD, errors

    @property
    def embedding_fingerprint(self):
        """The backbone's."""
        if self.space.is_local:
            return ""
        return fake_backbone.spec(self.space.input_size, self.space.backbone).embedding_fingerprint

    def codec_error(self, label):
        """Return what a way to send rows does to the embedding."""
        return 0.0 if self.space.is_local else fake_backbone.use(self.space, label).embedding_error


def local_floats(rows):
    """Return local features as float32."""
    return quantise.unpack(rows) if isinstance(rows, quantise.PackedRows) else np.asarray(rows, np.float32)


def check_local(space, rows):
    """Check rows of local features."""
    if isinstance(rows, list) or quantise.codec_of(rows) not in quantise.CODECS:
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"local features of {space.local_model!r} must be floats")
    if len(rows.shape) != 2:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"local features of shape {rows.shape}; (rows, width) is needed")


def readers(spaces, backbone, input_size, more_backbones, mode, slices, tap=""):
    """Return the inputs of a model, the first one first.

    Args:
        spaces: Of the dataset's inputs.
        backbone: Who reads images; empty for the first backbone.
        input_size: Of it.
        more_backbones: Names and input sizes of others.
        mode: ``pooled``, ``auto`` or ``slices``.
        slices: Named ones, ``SLICE`` or ``BACKBONE:SLICE``.
        tap: Where a convolutional head reads a map; empty for none.
    """
    first, *more = spaces
    entries = [first, *more]
    if not first.source:
        choices = [(backbone or fake_backbone.NAME, input_size), *more_backbones]
        described = [fake_backbone.spec(size, name) for name, size in choices]
        entries = [*(one.space(one.cut("input")) for one in described), *more]
    found = []
    for number, space in enumerate(entries):
        if space.is_local:
            found.append(Reader(space, (space.local_model,)))
            continue
        prefixed = [one.partition(":") for one in slices if ":" in one]
        own = [rest for name, _, rest in prefixed if name == space.backbone]
        if number == 0:
            own += [one for one in slices if ":" not in one]
        chosen = own or (["pooled"] if mode == "pooled" else ["grid"])
        found.append(Reader(space, tuple([map_slice(tap)] if tap and number == 0 else chosen)))
    return found


def check_job(space, backbone, input_size, has_more_backbones, is_convolutional):
    """Check that a job asks nothing of a dataset that its first input, which lives there, does not have."""
    if space.is_local and (backbone or input_size or has_more_backbones or is_convolutional):
        raise WireError(ErrorCode.INVALID_ARGUMENT, "local features alone: no backbone reads them, nor is there a map")
    if space.backbone and has_more_backbones:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"features of {space.backbone} are read by no other backbone")
    if space.backbone and backbone not in ("", space.backbone):
        raise WireError(ErrorCode.INCOMPATIBLE, f"features of {space.backbone}; {backbone} cannot read them")


def side_by_side(inputs, rows_by_source):
    """Return the columns of all inputs, and the rows that failed in any.

    Args:
        inputs: The model's.
        rows_by_source: The rows of each, by what tells inputs apart.
    """
    parts, errors = [], {}
    for one in inputs:
        columns_BD, failed = one.columns(rows_by_source[one.space.source])
        parts.append(columns_BD)
        errors.update(failed)
    if len({len(one) for one in parts}) > 1:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"inputs of {[len(one) for one in parts]} rows")
    return np.concatenate(parts, axis=1), errors


def matched(needed, given):
    """Return what stands beside a model's first input, in its order.

    Args:
        needed: (space, codec, width) of each.
        given: (space, rows) of each.
    """
    by_source = {space.source: (space, rows) for space, rows in given}
    strange = [one for one in by_source if one not in [space.source for space, _, _ in needed]]
    if strange or len(by_source) < len(given):
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"the model has no input {strange}, or one is there twice")
    found = []
    for space, codec, width in needed:
        if space.source not in by_source:
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"the model needs its input {space.source!r}")
        own, rows = by_source[space.source]
        if space.is_local:
            check_local_use(space, codec, own, rows)
            if rows.shape[1] != width:
                raise WireError(ErrorCode.SHAPE_MISMATCH, f"local features {rows.shape[1]} wide; {width} is needed")
        found.append((own, rows))
    return found


def check_local_use(space, codec, own, rows):
    """Check that local features are those that a model was trained on."""
    check_local(own, rows)
    check_own_use(space, codec, own, rows)


def check_own_use(space, codec, own, rows):
    """Check that rows which a client's own model makes are those that a model was trained on."""
    if not space.is_own and not own.is_own:
        return
    if own != space:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"trained on the local model {space.local_model!r} of {space.fingerprint[:12]}; got {own.fingerprint[:12]}",
        )
    if quantise.codec_of(rows) != codec:
        raise WireError(ErrorCode.INCOMPATIBLE, f"trained on {codec}; these travel in {quantise.codec_of(rows)}")


def at(reader, space):
    """Return a model's input, entered at the cut where these rows live."""
    return dataclasses.replace(reader, space=space)
