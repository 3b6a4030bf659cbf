"""Trackers that record jobs as they go: ``client.train(..., track=trunkline.track.TensorBoard("runs"))``.

They run here, beside the waiting for a job: the cluster knows nothing of them.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from trunkline.errors import MissingExtraError, TrackingError

if TYPE_CHECKING:
    from trunkline._track.sink import Sink

__all__ = ["MLflow", "TensorBoard", "Tracker"]


class Tracker(ABC):
    """What records a job: its settings, the metrics of its events, the scores of its model, how it ended."""

    @abstractmethod
    def load(self) -> None:
        """Check that the library that it needs is installed.

        Raises:
            MissingExtraError: It is not.
        """

    @abstractmethod
    def open(self) -> Sink:
        """Return where one job is recorded.

        Raises:
            TrackingError: That cannot be reached, or refuses.
        """


class TensorBoard(Tracker):
    """Records jobs as event files, one folder each, that ``tensorboard --logdir DIR`` shows.

    Metrics of events are scalars; settings and scores are in the hyperparameters' view, with each configuration of a
    sweep; warnings, what was chosen and the card are texts.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs") -> None:
        """Keep where.

        Args:
            folder: Where each job gets a folder ``MODEL-JOB``. It is made if it is not there.
        """
        self.folder = Path(folder).expanduser()

    def load(self) -> None:
        """Check that tensorboardX is installed: it writes event files without TensorFlow or torch.

        Raises:
            MissingExtraError: It is not.
        """
        _require("tensorboardX", str(self), "tensorboard")

    def open(self) -> Sink:
        """Return where one job is recorded.

        Raises:
            TrackingError: The folder cannot be written.
        """
        from trunkline._track.tensorboard_sink import TensorBoardSink

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(f"{self.folder} cannot be made: {error.strerror or error}") from None
        if not os.access(self.folder, os.W_OK):
            raise TrackingError(f"{self.folder} cannot be written", hint="Name another folder")
        return TensorBoardSink(self.folder.resolve())

    def __str__(self) -> str:
        """Return what people call it."""
        return f"TensorBoard in {self.folder}"

    def __repr__(self) -> str:
        """Return how it was made."""
        return f"TensorBoard({str(self.folder)!r})"


class MLflow(Tracker):
    """Records jobs as runs of an MLflow experiment.

    A job that failed is a run that FAILED, with the reason; a cancelled one was KILLED. Each configuration of a sweep
    is a nested run. The report, the card, warnings and what was tried are artifacts. Waiting again for a job whose
    waiting was interrupted goes on with its run.

    MLflow's own variables hold: ``MLFLOW_TRACKING_TOKEN`` and the like.
    """

    def __init__(self, tracking_uri: str | None = None, *, experiment: str = "trunkline") -> None:
        """Keep where.

        Args:
            tracking_uri: Address of the tracking server. None: what ``MLFLOW_TRACKING_URI`` says, or MLflow's default.
            experiment: Its name. It is made if it is not there.
        """
        self.tracking_uri = tracking_uri
        self.experiment = experiment

    def load(self) -> None:
        """Check that MLflow is installed, and load it, which takes seconds.

        Raises:
            MissingExtraError: It is not.
        """
        _require("mlflow", str(self), "mlflow")
        import mlflow  # noqa: F401

    def open(self) -> Sink:
        """Return where one job is recorded.

        Raises:
            TrackingError: The server cannot be reached, or refuses.
        """
        from trunkline._track.mlflow_sink import open_sink

        return open_sink(self.tracking_uri, self.experiment, str(self))

    def __str__(self) -> str:
        """Return what people call it, without a password in the address."""
        if self.tracking_uri is None:
            return "MLflow"
        parts = urlsplit(self.tracking_uri)
        return f"MLflow at {parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()}"

    def __repr__(self) -> str:
        """Return where it records."""
        return f"<{self}, experiment {self.experiment!r}>"


def _require(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(
            f"{what} needs the library {module}, which is not installed", hint=f"Run: pip install 'trunkline[{extra}]'"
        )
