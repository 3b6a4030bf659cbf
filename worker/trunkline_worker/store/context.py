"""What every part of the metadata store needs: the database, the clock, new ids and the failpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from trunkline_worker.store.clock import Clock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints
from trunkline_worker.store.ids import NewId


@dataclass(frozen=True)
class StoreContext:
    """Passed to each part of ``MetadataStore``."""

    database: Database
    clock: Clock
    new_id: NewId
    failpoints: Failpoints

    @contextmanager
    def mutation(self, name: str) -> Iterator[sa.Connection]:
        """Open a write transaction with failpoints ``store.NAME.before_commit`` and ``store.NAME.after_commit``.

        Death at the former leaves no trace. Death at the latter is a lost reply: the effect is there, and the caller
        was not told.
        """
        with self.database.write() as connection:
            yield connection
            self.failpoints.hit(f"store.{name}.before_commit")
        self.failpoints.hit(f"store.{name}.after_commit")
