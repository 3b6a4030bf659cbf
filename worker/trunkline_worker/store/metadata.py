"""The metadata store: rows, cached embeddings, datasets, jobs, models and bottlenecks over one database."""

from __future__ import annotations

from trunkline_worker.store.bottlenecks import Bottlenecks
from trunkline_worker.store.clock import Clock, SystemClock
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.database import Database
from trunkline_worker.store.datasets import Datasets
from trunkline_worker.store.embeddings import Embeddings
from trunkline_worker.store.failpoints import Failpoints
from trunkline_worker.store.ids import NewId, random_id
from trunkline_worker.store.jobs import MAX_RESTARTS, Jobs
from trunkline_worker.store.models import Models
from trunkline_worker.store.rows import Rows


class MetadataStore:
    """Everything durable besides the blobs. What a method has returned survives a crash; calls block.

    Attributes:
        rows: Uploaded rows, by content.
        embeddings: Cached embeddings, by key and row.
        datasets: Versions of datasets.
        jobs: The queue and its leases.
        models: Published models.
        bottlenecks: Which bottlenecks a tenant has put here.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock | None = None,
        new_id: NewId = random_id,
        failpoints: Failpoints | None = None,
        max_restarts: int = MAX_RESTARTS,
    ) -> None:
        """Compose the store.

        Args:
            database: Open; closed by whoever opened it.
            clock: Where times come from.
            new_id: Where ids of jobs come from.
            failpoints: Where tests kill.
            max_restarts: How often a job is taken back from a dead worker before it fails.
        """
        context = StoreContext(database, clock or SystemClock(), new_id, failpoints or Failpoints())
        self.rows = Rows(context)
        self.embeddings = Embeddings(context)
        self.datasets = Datasets(context, self.rows)
        self.models = Models(context)
        self.bottlenecks = Bottlenecks(context)
        self.jobs = Jobs(context, self.datasets, self.models, max_restarts=max_restarts)
