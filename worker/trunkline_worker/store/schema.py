"""The tables. The tenant is part of every key, so that another tenant's id is simply not found.

Rows and cached embeddings are two indices of the same form: from an id to a chunk and a place in it.
"""

from __future__ import annotations

import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store import migrations

VERSION = 4
"""Raised with every change to the tables, together with a step in ``migrations`` that makes it where there is data."""

metadata = sa.MetaData()


def _tenant() -> sa.Column[str]:
    return sa.Column("tenant", sa.String, primary_key=True)


store_info = sa.Table(
    "store_info",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
)

chunks = sa.Table(
    "chunks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    # Fingerprint of the feature space the rows live in; of cached embeddings, their key. With the codec, what decides
    # whether rows are comparable.
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("codec", sa.String, nullable=False),
    sa.Column("create_time", sa.Float, nullable=False),
    sa.UniqueConstraint("tenant", "sha256", "fingerprint", "codec"),
)

rows = sa.Table(
    "rows",
    metadata,
    _tenant(),
    sa.Column("row_id", sa.LargeBinary(32), primary_key=True),
    sa.Column("chunk_id", sa.ForeignKey("chunks.id"), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)

embeddings = sa.Table(
    "embeddings",
    metadata,
    _tenant(),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("row_id", sa.LargeBinary(32), primary_key=True),
    sa.Column("chunk_id", sa.ForeignKey("chunks.id"), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)

dataset_contents = sa.Table(
    "dataset_contents",
    metadata,
    _tenant(),
    sa.Column("digest", sa.String(64), primary_key=True),
    # Packed, in the dataset's order: ids of 32 bytes, class indices as <u4, targets as <f4.
    sa.Column("row_ids", sa.LargeBinary, nullable=False),
    sa.Column("class_indices", sa.LargeBinary, nullable=False),
    sa.Column("targets", sa.LargeBinary, nullable=False),
    # Ids of the other inputs' rows, packed likewise, input after input; NULL where there are none.
    sa.Column("more_row_ids", sa.LargeBinary),
    # Group of each row as <u4; NULL where they are not grouped. Not "groups", which some databases keep to themselves.
    sa.Column("row_groups", sa.LargeBinary),
)

datasets = sa.Table(
    "datasets",
    metadata,
    _tenant(),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("num_rows", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("space", sa.Text, nullable=False),
    sa.Column("class_names", sa.Text, nullable=False),
    sa.Column("num_targets", sa.Integer, nullable=False),
    sa.Column("create_time", sa.Float, nullable=False),
    # How the rows were made and sent; empty where that is not known.
    sa.Column("codec", sa.String, nullable=False, server_default=""),
    # Space and codec of each input beside the first.
    sa.Column("more_inputs", sa.Text, nullable=False, server_default="[]"),
    # 0: rows are not grouped.
    sa.Column("num_groups", sa.Integer, nullable=False, server_default=sa.text("0")),
    # So many rows, one after another, are views of one picture.
    sa.Column("views", sa.Integer, nullable=False, server_default=sa.text("1")),
    sa.ForeignKeyConstraint(["tenant", "digest"], ["dataset_contents.tenant", "dataset_contents.digest"]),
)

jobs = sa.Table(
    "jobs",
    metadata,
    _tenant(),
    sa.Column("id", sa.String, primary_key=True),
    # The place in the queue, which a job that is taken back keeps.
    sa.Column("number", sa.Integer, nullable=False, unique=True),
    sa.Column("state", sa.Integer, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("create_time", sa.Float, nullable=False),
    sa.Column("start_time", sa.Float, nullable=False),
    sa.Column("end_time", sa.Float, nullable=False),
    sa.Column("num_restarts", sa.Integer, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("error_code", sa.String, nullable=False),
    sa.Column("error_message", sa.Text, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("lane", sa.String, nullable=False),
    sa.Column("lease_deadline", sa.Float, nullable=False),
    sa.Column("event_batch", sa.Integer, nullable=False),
    sa.Column("last_seq", sa.Integer, nullable=False),
    # Who may do it, see ``records.JOB_KINDS``.
    sa.Column("kind", sa.String, nullable=False, server_default="head"),
    # Lanes know a job by its id alone.
    sa.UniqueConstraint("id"),
    sa.Index("jobs_by_state", "state", "number"),
)

job_events = sa.Table(
    "job_events",
    metadata,
    _tenant(),
    sa.Column("job_id", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("phase", sa.String, nullable=False),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["tenant", "job_id"], ["jobs.tenant", "jobs.id"]),
)

models = sa.Table(
    "models",
    metadata,
    _tenant(),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("job_id", sa.String, nullable=False),
    sa.Column("create_time", sa.Float, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
    # Beside the manifest, so that a list of models need not read them.
    sa.Column("candidates", sa.Text, nullable=False, server_default="[]"),
    # At most one model per job, whatever the code above does.
    sa.UniqueConstraint("tenant", "job_id"),
    sa.ForeignKeyConstraint(["tenant", "job_id"], ["jobs.tenant", "jobs.id"]),
)

bottlenecks = sa.Table(
    "bottlenecks",
    metadata,
    _tenant(),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("create_time", sa.Float, nullable=False),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    _tenant(),
    sa.Column("method", sa.String, primary_key=True),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("content_sha256", sa.String(64), nullable=False),
    sa.Column("result", sa.String, nullable=False),
    sa.Column("create_time", sa.Float, nullable=False),
)


def create(connection: sa.Connection) -> None:
    """Make the tables in an empty database, or bring those of an earlier version to this one. Data stays.

    Args:
        connection: A write transaction: either all of it happens or nothing.

    Raises:
        WireError: INCOMPATIBLE, for tables that a later program made.
    """
    if not sa.inspect(connection).has_table(store_info.name):
        metadata.create_all(connection, checkfirst=False)
        connection.execute(store_info.insert().values(id=1, schema_version=VERSION))
        return
    found: int = connection.execute(sa.select(store_info.c.schema_version)).scalar_one()
    version = found
    while version in migrations.STEPS and version < VERSION:
        migrations.STEPS[version](connection)
        version += 1
    if version != VERSION:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the metadata database has schema version {found}, this program needs {VERSION}; "
            "use the Trunkline version that made it, or another database",
        )
    if version != found:
        connection.execute(store_info.update().values(schema_version=version))
