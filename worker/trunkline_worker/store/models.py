"""The registry of trained models: immutable, versions counted from 1 per name without gaps."""

from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.names import parse_reference

from trunkline_worker.store import schema, serial
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.records import ModelRecord

_table = schema.models


class Models:
    """Models by tenant, name and version. Published only by ``Jobs.succeed``."""

    def __init__(self, context: StoreContext) -> None:
        """Use the context of the whole store."""
        self._context = context

    def get(self, tenant: str, reference: str) -> ModelRecord:
        """Return a version of a model; of a bare name, the newest.

        Raises:
            WireError: INVALID_ARGUMENT for the reference, NOT_FOUND.
        """
        parsed = parse_reference(reference, "model")
        query = sa.select(_table).where(_table.c.tenant == tenant, _table.c.name == parsed.name)
        if parsed.version is not None:
            query = query.where(_table.c.version == parsed.version)
        with self._context.database.read() as connection:
            row = connection.execute(query.order_by(_table.c.version.desc()).limit(1)).one_or_none()
        if row is None:
            raise WireError(ErrorCode.NOT_FOUND, f"there is no model {reference}; `trunkline models` lists those there")
        return _record(row)

    def list(self, tenant: str) -> list[ModelRecord]:
        """Return every version of every model, by name and version, without the candidates."""
        columns = [column for column in _table.c if column is not _table.c.candidates]
        query = sa.select(*columns).where(_table.c.tenant == tenant).order_by(_table.c.name, _table.c.version)
        with self._context.database.read() as connection:
            return [_record(row) for row in connection.execute(query)]

    def of_job(self, connection: sa.Connection, tenant: str, job_id: str) -> ModelRecord | None:
        """Return the model that a job published, inside a transaction of the caller's."""
        row = connection.execute(
            sa.select(_table).where(_table.c.tenant == tenant, _table.c.job_id == job_id)
        ).one_or_none()
        return None if row is None else _record(row)

    def publish(
        self, connection: sa.Connection, model: ModelRecord, *, tenant: str, name: str, job_id: str, now: float
    ) -> ModelRecord:
        """Add the next version of ``name``, inside the transaction that ends the job.

        Args:
            connection: That transaction.
            model: What was trained. Its tenant, name, version, job and time are replaced by what the store knows.
            tenant: Whose job it is.
            name: What the job was to publish.
            job_id: The job.
            now: Seconds since the epoch.
        """
        newest = connection.execute(
            sa.select(sa.func.max(_table.c.version)).where(_table.c.tenant == tenant, _table.c.name == name)
        ).scalar()
        published = replace(model, tenant=tenant, name=name, version=(newest or 0) + 1, job_id=job_id, create_time=now)
        connection.execute(
            _table.insert().values(
                tenant=tenant,
                name=name,
                version=published.version,
                job_id=job_id,
                create_time=now,
                manifest=serial.manifest_to_text(published),
                candidates=serial.tried_to_text(published),
            )
        )
        return published


def _record(row: sa.Row[tuple[object, ...]]) -> ModelRecord:
    return serial.model_from_text(row.manifest, row._mapping)
