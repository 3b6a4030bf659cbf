"""What a user sees of the package: names, weight, versions."""

import inspect
import json
import subprocess
import sys

import pytest
import trunkline

NAMES = [
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
    "FineTune",
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
HEAVY = {"ray", "torch", "torchvision", "onnxruntime", "rich", "typer", "PIL", "trunkline_worker", "timm", "IPython"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_names_are_pinned():
    assert sorted(trunkline.__all__) == sorted(NAMES)
    assert set(NAMES) < set(dir(trunkline))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name):
    value = getattr(trunkline, name)
    assert name == "Report" or inspect.getdoc(value)


def test_every_public_error_is_exported():
    from trunkline import errors

    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert found - {"WireError"} <= set(NAMES)


def test_unknown_name():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = trunkline.nonsense
    assert trunkline.errors.TrunklineError is trunkline.TrunklineError


def test_import_weight():
    loaded = json.loads(run("import json, sys, trunkline; print(json.dumps(sorted(sys.modules)))"))
    assert not HEAVY & {one.partition(".")[0] for one in loaded}


def test_weight_of_connecting():
    """Whoever connects loads gRPC and NumPy, and still nothing that draws, decodes pictures or runs networks."""
    code = """
import json, sys, trunkline
try:
    trunkline.connect("127.0.0.1:1", token="x")
except trunkline.ServiceUnavailableError:
    print(json.dumps(sorted(sys.modules)))
"""
    loaded = {one.partition(".")[0] for one in json.loads(run(code))}
    assert not HEAVY & loaded and {"grpc", "numpy"} <= loaded


def test_import_time():
    """The processor's time, and the shortest of several: the machine has other work."""
    code = "import time; start = time.process_time(); import trunkline; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(5)) <= 0.3


def test_version():
    from importlib.metadata import version

    assert trunkline.__version__ == version("trunkline")


def test_public_methods_are_documented():
    for kind in (
        trunkline.Client,
        trunkline.Job,
        trunkline.Model,
        trunkline.Dataset,
        trunkline.Stem,
        trunkline.LocalModel,
        trunkline.OwnStem,
    ):
        for name, member in inspect.getmembers(kind):
            if not name.startswith("_") and callable(member):
                assert inspect.getdoc(member), f"{kind.__name__}.{name}"


def test_only_the_calls_know_grpc():
    """gRPC and generated messages stay in ``_calls``, ``_channel`` and ``_direct``."""
    from pathlib import Path

    root = Path(trunkline.__file__).parent
    found = {
        path.relative_to(root).parts[0]
        for path in root.rglob("*.py")
        if any(
            line.strip().startswith(("import grpc", "from grpc", "from trunkline_wire.v1", "import trunkline_wire.v1"))
            for line in path.read_text().splitlines()
        )
    }
    assert found == {"_calls", "_channel.py", "_direct"}


def test_trackers_are_there_without_an_import_and_load_nothing():
    code = (
        "import sys, trunkline; print(trunkline.track.TensorBoard('r'), trunkline.track.MLflow('http://x'));"
        "print(sorted({'mlflow', 'tensorboardX'} & set(sys.modules)))"
    )
    assert run(code).splitlines() == ["TensorBoard in r MLflow at http://x", "[]"]
