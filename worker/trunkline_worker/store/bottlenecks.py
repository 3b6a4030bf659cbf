"""Bottlenecks that tenants have put here: by the hash of their file, which lies in blob storage."""

from __future__ import annotations

import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store import locations, schema
from trunkline_worker.store.context import StoreContext

_table = schema.bottlenecks


def bottleneck_path(sha256_hex: str) -> str:
    """Return where a bottleneck's file lies in a ``BlobStore``."""
    return f"bottlenecks/{sha256_hex[:2]}/{sha256_hex}"


class Bottlenecks:
    """Which bottlenecks each tenant may use. Two tenants with equal files share one."""

    def __init__(self, context: StoreContext) -> None:
        """Use the context of the whole store."""
        self._context = context

    def add(self, tenant: str, sha256: str) -> None:
        """Name a bottleneck whose file is already durable in blob storage. Repeating it changes nothing.

        Raises:
            WireError: INVALID_ARGUMENT for a hash that is none.
        """
        locations.check_sha256(sha256)
        context = self._context
        with context.mutation("bottlenecks.add") as connection:
            connection.execute(
                context.database.insert_or_ignore(_table).values(
                    tenant=tenant, sha256=sha256, create_time=context.clock.now()
                )
            )

    def check(self, tenant: str, sha256: str) -> None:
        """Check that the tenant has put a bottleneck here.

        Raises:
            WireError: INVALID_ARGUMENT for a hash that is none; NOT_FOUND, another tenant's bottleneck included.
        """
        locations.check_sha256(sha256)
        query = sa.select(_table.c.sha256).where(_table.c.tenant == tenant, _table.c.sha256 == sha256)
        with self._context.database.read() as connection:
            found = connection.execute(query).one_or_none()
        if found is None:
            raise WireError(ErrorCode.NOT_FOUND, f"there is no bottleneck {sha256[:12]}; put it there first")
