"""Bottlenecks that clients put here: checked against their backbone, kept by hash, found for their tenant only."""

from __future__ import annotations

import asyncio
import hashlib

from trunkline_wire import bottleneck_file
from trunkline_wire.bottleneck import Bottleneck
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import current_call
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.bottlenecks import bottleneck_path

CAPACITY_BYTES = 64 * 2**20
"""Most memory that the bottlenecks take which are remembered."""


async def put_bottleneck(backends: Backends, tenant: str, file: bytes) -> str:
    """Keep a bottleneck for a tenant, and return the SHA-256 of its file in hex. Repeating it changes nothing.

    Raises:
        WireError: As ``bottleneck_file.from_bytes``; NOT_FOUND for a backbone that is not served here; INCOMPATIBLE for
            features that it does not have.
    """
    bottleneck = await asyncio.to_thread(bottleneck_file.from_bytes, file)
    await _check_features(backends, bottleneck)
    sha256 = hashlib.sha256(file).hexdigest()
    # The name comes last: what it names is durable.
    await asyncio.to_thread(backends.blobs.put, bottleneck_path(sha256), file)
    await backends.metadata.call("bottlenecks.add", tenant, sha256, timeout_s=current_call().remaining_s())
    return sha256


async def get_bottleneck(backends: Backends, tenant: str, sha256: str) -> bytes:
    """Return the file of a bottleneck of a tenant's.

    Raises:
        WireError: INVALID_ARGUMENT for a hash that is none; NOT_FOUND, another tenant's included.
    """
    await _check_tenant(backends, tenant, sha256)
    return await asyncio.to_thread(backends.blobs.get_checked, bottleneck_path(sha256), sha256)


async def find_bottleneck(backends: Backends, tenant: str, sha256: str) -> Bottleneck:
    """Return a bottleneck of a tenant's. A file never changes, so what was found is remembered.

    Raises:
        WireError: As ``get_bottleneck``.
    """
    known, key = backends.bottlenecks, (tenant, sha256)
    found = known.get(key)
    if found is None:
        await _check_tenant(backends, tenant, sha256)
        known[key] = found = await asyncio.to_thread(load_bottleneck, backends.blobs, sha256)
        while sum(one.num_bytes for one in known.values()) > CAPACITY_BYTES:
            known.popitem(last=False)
    return found


def load_bottleneck(blobs: BlobStore, sha256: str) -> Bottleneck:
    """Return a bottleneck, whosever it is. Blocks.

    Raises:
        WireError: NOT_FOUND or CORRUPT_DATA.
    """
    return bottleneck_file.from_bytes(blobs.get_checked(bottleneck_path(sha256), sha256))


async def _check_features(backends: Backends, bottleneck: Bottleneck) -> None:
    """Check that a backbone here has the features that a bottleneck was trained on."""
    space = bottleneck.space
    described = await backends.engine(space.backbone).describe(space.input_size)
    cut = described.cut(space.cut)
    if cut is None or described.space(cut) != space:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the bottleneck is for other features than {space.backbone} has now at cut {space.cut[:80]!r} and "
            f"{space.input_size} px; train it again",
        )
    if (cut.feature_shape, cut.channel_axis) != (bottleneck.feature_shape, bottleneck.channel_axis):
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the bottleneck is for features of shape {bottleneck.feature_shape} with channels on axis "
            f"{bottleneck.channel_axis}; cut {cut.name!r} has {cut.feature_shape} and {cut.channel_axis}",
        )


async def _check_tenant(backends: Backends, tenant: str, sha256: str) -> None:
    await backends.metadata.call("bottlenecks.check", tenant, sha256, timeout_s=current_call().remaining_s())
