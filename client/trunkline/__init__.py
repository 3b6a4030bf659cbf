"""Trunkline: use a heavy pretrained model from a light client.

The whole of it::

    client = trunkline.connect()
    stem = client.stem("efficientnet_lite0", cut="blocks.2")
    data = client.upload(images, labels, name="digits", stem=stem)
    model = client.train(data, name="digits-head").result()
    model.predict(images).labels
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.augment import Augment
    from trunkline.client import Client
    from trunkline.connection import connect
    from trunkline.datasets import Dataset, UploadReport
    from trunkline.errors import (
        AlreadyExistsError,
        AuthenticationError,
        BadLabelsError,
        CallCancelledError,
        ConfigError,
        CorruptDataError,
        CorruptImageError,
        DeadlineExceededError,
        DtypeMismatchError,
        EmptyBatchError,
        IncompatibleModelError,
        InternalError,
        InvalidArgumentError,
        JobCancelledError,
        JobFailedError,
        JobStateError,
        MissingExtraError,
        NotFiniteError,
        NotFoundError,
        OverloadedError,
        PayloadTooLargeError,
        PermissionDeniedError,
        ServiceUnavailableError,
        ShapeMismatchError,
        StorageFullError,
        TlsError,
        TrackingError,
        TrunklineError,
        UnsupportedError,
        WorkerOutOfMemoryError,
    )
    from trunkline.estimates import UploadEstimate
    from trunkline.fine_tuning import FineTune
    from trunkline.heads import MLP, Conv, Linear, Prototype
    from trunkline.local_models import LocalModel, local_model
    from trunkline.local_vectors import LocalFeatures, local_features
    from trunkline.losses import Loss, Optimiser
    from trunkline.models import Model
    from trunkline.own_stems import OwnStem
    from trunkline.predictions import Prediction, RowPrediction
    from trunkline.records import JobEvent, JobState, JobStatus
    from trunkline.reports import ClassificationReport, MultiLabelReport, RegressionReport, Report
    from trunkline.stems import Stem
    from trunkline.training import Job

__all__ = [
    "AlreadyExistsError",
    "Augment",
    "AuthenticationError",
    "BadLabelsError",
    "CallCancelledError",
    "ClassificationReport",
    "Client",
    "ConfigError",
    "Conv",
    "CorruptDataError",
    "CorruptImageError",
    "Dataset",
    "DeadlineExceededError",
    "DtypeMismatchError",
    "EmptyBatchError",
    "FineTune",
    "IncompatibleModelError",
    "InternalError",
    "InvalidArgumentError",
    "Job",
    "JobCancelledError",
    "JobEvent",
    "JobFailedError",
    "JobState",
    "JobStateError",
    "JobStatus",
    "Linear",
    "LocalFeatures",
    "LocalModel",
    "Loss",
    "MLP",
    "MissingExtraError",
    "Model",
    "MultiLabelReport",
    "NotFiniteError",
    "NotFoundError",
    "Optimiser",
    "OverloadedError",
    "OwnStem",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Prediction",
    "Prototype",
    "RegressionReport",
    "Report",
    "RowPrediction",
    "ServiceUnavailableError",
    "ShapeMismatchError",
    "Stem",
    "StorageFullError",
    "TlsError",
    "TrackingError",
    "TrunklineError",
    "UnsupportedError",
    "UploadEstimate",
    "UploadReport",
    "WorkerOutOfMemoryError",
    "connect",
    "local_features",
    "local_model",
]

_MODULES = {
    "Augment": "trunkline.augment",
    "ClassificationReport": "trunkline.reports",
    "Client": "trunkline.client",
    "Conv": "trunkline.heads",
    "Dataset": "trunkline.datasets",
    "FineTune": "trunkline.fine_tuning",
    "Job": "trunkline.training",
    "JobEvent": "trunkline.records",
    "JobState": "trunkline.records",
    "JobStatus": "trunkline.records",
    "Linear": "trunkline.heads",
    "LocalFeatures": "trunkline.local_vectors",
    "LocalModel": "trunkline.local_models",
    "Loss": "trunkline.losses",
    "MLP": "trunkline.heads",
    "Model": "trunkline.models",
    "MultiLabelReport": "trunkline.reports",
    "Optimiser": "trunkline.losses",
    "OwnStem": "trunkline.own_stems",
    "Prediction": "trunkline.predictions",
    "Prototype": "trunkline.heads",
    "RegressionReport": "trunkline.reports",
    "Report": "trunkline.reports",
    "RowPrediction": "trunkline.predictions",
    "Stem": "trunkline.stems",
    "UploadEstimate": "trunkline.estimates",
    "UploadReport": "trunkline.datasets",
    "connect": "trunkline.connection",
    "local_features": "trunkline.local_vectors",
    "local_model": "trunkline.local_models",
}
"""Where a name comes from, if not from ``trunkline.errors``. Loaded when it is first used: gRPC and NumPy take time."""


def __getattr__(name: str) -> Any:
    """Load what a name stands for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("trunkline")
    if name in ("errors", "track"):
        return import_module(f"trunkline.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'trunkline' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "trunkline.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]
