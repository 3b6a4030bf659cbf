"""What a training job works with, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import Clock
from trunkline_worker.store.failpoints import Failpoints

if TYPE_CHECKING:
    from trunkline_worker.training.embed import RowMaps, Trunk
    from trunkline_worker.training.sweep.alone import RunTrials
    from trunkline_worker.training.tuning.work import TailTrainer


@dataclass(frozen=True)
class JobTools:
    """What a job works with.

    Attributes:
        metadata: Calls the metadata store by name, waiting while it restarts.
        blobs: Chunks and heads.
        trunk: The backbones.
        clock: For lease renewals and the model's time.
        versions: Library to version, for the manifest.
        lease_s: How long a renewed lease lasts, in seconds.
        failpoints: Switched on by tests.
        tails: For a job of that id and its rows, returns who trains the last blocks of their backbone. None: nobody.
        run_trials: Runs the configurations of a sweep that cannot be computed many at once. None: one after another,
            here.
    """

    metadata: Callable[..., Any]
    blobs: BlobStore
    trunk: Trunk
    clock: Clock
    versions: Mapping[str, str]
    lease_s: float
    failpoints: Failpoints
    tails: Callable[[str, RowMaps], TailTrainer] | None = None
    run_trials: RunTrials | None = None
