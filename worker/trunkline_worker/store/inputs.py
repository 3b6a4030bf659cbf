"""Checks of a dataset's inputs: how many there are, where their rows may live and how they stand to each other."""

from __future__ import annotations

from collections.abc import Sequence

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_DATASET_ROWS, MAX_INPUTS
from trunkline_wire.names import check_name
from trunkline_wire.specs import FeatureSpace, local_space

from trunkline_worker.store import locations


def check_inputs(
    space: FeatureSpace, row_ids: Sequence[bytes], more_inputs: Sequence[tuple[FeatureSpace, Sequence[bytes]]]
) -> None:
    """Check what a dataset is made of, before anything of it is looked up.

    Raises:
        WireError: EMPTY_BATCH, PAYLOAD_TOO_LARGE, SHAPE_MISMATCH or INVALID_ARGUMENT.
    """
    if not row_ids:
        raise WireError(ErrorCode.EMPTY_BATCH, "a dataset without rows")
    if len(row_ids) > MAX_DATASET_ROWS:
        raise WireError(
            ErrorCode.PAYLOAD_TOO_LARGE, f"a dataset of {len(row_ids)} rows; at most {MAX_DATASET_ROWS}: split it"
        )
    locations.check_row_ids(row_ids)
    _check_spaces([space, *(one for one, _ in more_inputs)])
    for one, ids in more_inputs:
        if len(ids) != len(row_ids):
            raise WireError(
                ErrorCode.SHAPE_MISMATCH,
                f"{len(ids)} rows of {one.source[:80]!r} beside {len(row_ids)} rows of the first input; as many are "
                "needed",
            )
        locations.check_row_ids(ids)


def _check_spaces(spaces: Sequence[FeatureSpace]) -> None:
    if len(spaces) > MAX_INPUTS:
        raise _invalid(f"{len(spaces)} inputs; a dataset has at most {MAX_INPUTS}")
    for space in spaces:
        if space.local_model:
            check_local_model(space)
    first, *more = spaces
    for space in more:
        if space.is_input or not space.source:
            raise _invalid("only the first input of a dataset can be images; send features of them beside it")
        if first.is_local and not space.is_local:
            raise _invalid(
                f"the first input is local features, and {space.source[:80]!r} is a backbone; put the backbone's "
                "input first"
            )
    sources = [space.source for space in spaces]
    twice = next((one for one in sources if sources.count(one) > 1), None)
    if twice is not None:
        raise _invalid(f"two inputs of {twice[:80]!r}; a dataset has one of each backbone and each local model")


def check_local_model(space: FeatureSpace) -> None:
    """Check what a space says of the client's own model that made the rows, for a backbone or for none.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    check_name(space.local_model, "local model")
    locations.check_sha256(space.fingerprint)
    if space.is_local and space != local_space(space.local_model, space.fingerprint):
        raise _invalid("local features that no backbone reads have no cut, input size or bottleneck; leave these empty")
    if space.is_input:
        raise _invalid(f"the local model {space.local_model!r} makes features, and the cut 'input' takes images")


def _invalid(message: str) -> WireError:
    return WireError(ErrorCode.INVALID_ARGUMENT, message)
