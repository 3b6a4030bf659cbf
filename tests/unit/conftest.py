"""What unit tests share."""

import os
from collections.abc import Iterator

import pytest
from trunkline_worker.store import schema
from trunkline_worker.store.database import Database

POSTGRES = os.environ.get("TRUNKLINE_TEST_POSTGRES", "")


@pytest.fixture(params=["sqlite", *(["postgres"] if POSTGRES else [])])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A fresh store in memory, and the server that the environment names."""
    database = Database("sqlite://" if request.param == "sqlite" else POSTGRES)
    if request.param == "postgres":
        with database.write() as connection:
            schema.metadata.drop_all(connection)
            schema.create(connection)
    yield database
    database.close()
