"""Steps from one version of the tables to the next, each run once on a database that has data in it.

A step knows the tables as they were in its day and is never changed afterwards: it says everything in SQL of its own
and uses nothing of ``schema``, which goes on. SQLite and PostgreSQL read it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sqlalchemy as sa

_CODECS_OF_DATASETS = """
UPDATE datasets SET codec = COALESCE((
    SELECT chunks.codec
    FROM dataset_contents AS contents
    JOIN rows AS first ON first.tenant = contents.tenant AND first.row_id = substr(contents.row_ids, 1, 32)
    JOIN chunks ON chunks.id = first.chunk_id
    WHERE contents.tenant = datasets.tenant AND contents.digest = datasets.digest
), '')
"""
"""All rows of a dataset have one codec, which the chunk of its first row knows. Quantised stems came later."""


def _from_1(connection: sa.Connection) -> None:
    """Datasets say how their rows were made and sent, and models which sets of slices were tried."""
    connection.execute(sa.text("ALTER TABLE datasets ADD COLUMN codec VARCHAR DEFAULT '' NOT NULL"))
    connection.execute(sa.text("ALTER TABLE models ADD COLUMN candidates TEXT DEFAULT '[]' NOT NULL"))
    connection.execute(sa.text(_CODECS_OF_DATASETS))


_BYTES = {"sqlite": "BLOB", "postgresql": "BYTEA"}
_BOTTLENECKS = """
CREATE TABLE bottlenecks (
    tenant VARCHAR NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    create_time FLOAT NOT NULL,
    PRIMARY KEY (tenant, sha256)
)
"""


def _from_2(connection: sa.Connection) -> None:
    """A dataset has several inputs, and tenants have bottlenecks."""
    connection.execute(sa.text("ALTER TABLE datasets ADD COLUMN more_inputs TEXT DEFAULT '[]' NOT NULL"))
    packed = _BYTES[connection.dialect.name]
    connection.execute(sa.text(f"ALTER TABLE dataset_contents ADD COLUMN more_row_ids {packed}"))
    connection.execute(sa.text(_BOTTLENECKS))


def _from_3(connection: sa.Connection) -> None:
    """Rows of a dataset stand in groups, some are views of one picture, and jobs are of several kinds."""
    connection.execute(sa.text(f"ALTER TABLE dataset_contents ADD COLUMN row_groups {_BYTES[connection.dialect.name]}"))
    connection.execute(sa.text("ALTER TABLE datasets ADD COLUMN num_groups INTEGER DEFAULT 0 NOT NULL"))
    connection.execute(sa.text("ALTER TABLE datasets ADD COLUMN views INTEGER DEFAULT 1 NOT NULL"))
    connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN kind VARCHAR DEFAULT 'head' NOT NULL"))


STEPS: Mapping[int, Callable[[sa.Connection], None]] = {1: _from_1, 2: _from_2, 3: _from_3}
"""By the version that a step starts from; it ends at the one after it."""
