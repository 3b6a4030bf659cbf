"""The whole way on one machine: bring a cluster up, train on few labelled digits, compare, report, take it down.

Nothing of the user's is touched: the cluster has a state folder and a port of its own and is gone at the end.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import trunkline
from digits_report import DigitsReport, Method, write
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trunkline_wire.local import STATE_DIR_VARIABLE, LocalCluster, read_local_cluster

# Shape suffix legend: N = rows, H = height, W = width

BACKBONE = "efficientnet_lite0"
CUT = "blocks.2"
INPUT_SIZE = 96  # digits of 8 x 8 pixels do best near this size
END_PATIENCE_S = 20.0

T = TypeVar("T")


@dataclass(frozen=True)
class Digits:
    """The pictures (uint8, (N, 8, 8)), what they show, and which rows are labelled and which held out."""

    images_NHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]


def draw_digits(per_class: int, seed: int) -> Digits:
    """Draw the labelled rows, the same number of every class; all others are held out."""
    digits = load_digits()
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(np.flatnonzero(digits.target == one), per_class, replace=False) for one in range(10)]
    labelled = generator.permutation(np.concatenate(drawn))
    held_out = np.setdiff1d(np.arange(len(digits.target)), labelled)
    return Digits((digits.images * (255 / 16)).astype(np.uint8), digits.target, labelled, held_out)


def main() -> int:
    """Run the demo and return the exit status."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down all the same
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trunkline-demo-") as folder:
        state = Path(folder) / "state"
        _use_state_of_its_own(state)
        with _cluster(state) as up_s:
            report = _run(arguments.per_class, arguments.seed, up_s)
    write(report, arguments.report)
    _print_table(report, arguments.per_class)
    print(f"Report: {arguments.report}")
    print(f"The cluster has ended and left no process behind. {time.monotonic() - started:.0f} s in all.")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-class", type=int, default=20, help="labelled pictures per class")
    parser.add_argument("--seed", type=int, default=0, help="decides which pictures are labelled")
    parser.add_argument("--report", type=Path, default=Path("demo-report.html"), help="where the report goes")
    return parser.parse_args()


def _run(per_class: int, seed: int, up_s: float) -> DigitsReport:
    digits = draw_digits(per_class, seed)
    images, labels = digits.images_NHW[digits.labelled], digits.labels_N[digits.labelled]
    test_images, truth = digits.images_NHW[digits.held_out], digits.labels_N[digits.held_out]

    raw_pixels = _raw_pixels(images, labels, test_images)

    with trunkline.connect() as client:
        stem = client.stem(BACKBONE, cut=CUT, input_size=INPUT_SIZE)
        upload_s, data = _timed(lambda: client.upload(images, labels, name="digits", stem=stem))
        auto_s, model = _timed(lambda: client.train(data, name="digits", embedding="auto", seed=seed).result())
        last_s, last = _timed(lambda: client.train(data, name="digits-last", embedding="pooled", seed=seed).result())
        again = client.upload(images, labels, name="digits", stem=stem)
        predict_s, prediction = _timed(lambda: model.predict(test_images, stem=stem))
        last_prediction = last.predict(test_images, stem=stem)
        (backbone,) = (one for one in client.backbones() if one.name == BACKBONE)

    class_names = model.class_names
    predicted_N = prediction.indices
    return DigitsReport(
        methods=[
            Method("Raw pixels", float((raw_pixels == truth).mean()), "logistic regression on the 64 pixels"),
            Method("Last layer", _accuracy(last_prediction.labels, truth), "the usual linear probe"),
            Method("Trunkline", _accuracy(prediction.labels, truth), "slices from every depth, chosen", is_ours=True),
        ],
        class_names=class_names,
        true_N=np.array([class_names.index(str(one)) for one in truth]),
        predicted_N=predicted_N,
        confidence_N=prediction.probabilities[np.arange(len(predicted_N)), predicted_N],
        images_NHW=test_images,
        facts={
            "Backbone": f"{BACKBONE}: {backbone.weights}, {backbone.num_parameters / 1e6:.1f} million parameters",
            "Runtime on the cluster": f"{backbone.runtime} on {backbone.device}",
            "Cut": f"{CUT} at {INPUT_SIZE} px: features {stem.feature_shape}, {stem.row_bytes / 1024:.1f} KiB a row",
            "Labelled pictures": f"{len(images)}, {per_class} per class, drawn with seed {seed}",
            "Slices chosen": ", ".join(model.slices),
            "Cluster up": f"{up_s:.1f} s",
            "Stem and upload": f"{upload_s:.2f} s for {len(images)} rows; {_bytes_sent(data)} sent",
            "The same upload again": f"{_bytes_sent(again)} sent",
            "Training, slices chosen": f"{auto_s:.2f} s from submit to model, the start of the lane included",
            "Training, last layer": f"{last_s:.2f} s; its features were on the cluster already",
            "Prediction": f"{predict_s:.2f} s for {len(test_images)} rows, {len(test_images) / predict_s:.0f} a second",
            "Versions": f"trunkline {trunkline.__version__}, model {model.reference}",
        },
    )


def _raw_pixels(
    images_NHW: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int64], test_images_NHW: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Return what a logistic regression on the pixels says, its penalty chosen by cross-validation as well."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model = GridSearchCV(pipeline, {"logisticregression__C": list(np.logspace(-3, 1, 5))}, cv=5)
    model.fit(images_NHW.reshape(len(images_NHW), -1).astype(float), labels_N)
    predicted: npt.NDArray[np.int64] = model.predict(test_images_NHW.reshape(len(test_images_NHW), -1).astype(float))
    return predicted


def _accuracy(labels: Sequence[object], truth_N: npt.NDArray[np.int64]) -> float:
    return float(np.mean([label == str(one) for label, one in zip(labels, truth_N, strict=True)]))


def _bytes_sent(data: trunkline.Dataset) -> str:
    return f"{data.report.feature_bytes_sent / 1024:.0f} KiB" if data.report else "nothing"


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    started = time.monotonic()
    result = call()
    return time.monotonic() - started, result


# --- the cluster ------------------------------------------------------------------------------------------------------


def _use_state_of_its_own(state: Path) -> None:
    """Keep the demo apart from the settings and the cluster that the user may have."""
    for name in [name for name in os.environ if name.startswith("TRUNKLINE_") and name != "TRUNKLINE_CACHE_DIR"]:
        del os.environ[name]
    os.environ[STATE_DIR_VARIABLE] = str(state)


@contextmanager
def _cluster(state: Path) -> Iterator[float]:
    """Bring a cluster up, yield how many seconds that took, and end it whatever happens."""
    command = str(Path(sys.executable).parent / "trunkline")
    started = time.monotonic()
    cluster = None
    try:
        _bring_up([command, "up", "--port", "0", "--backbone", BACKBONE, "--json"])
        cluster = read_local_cluster()
        yield time.monotonic() - started
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not leave half a cluster behind
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run([command, "down", "--json"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if left := _wait_for_end(str(state), cluster):
            raise RuntimeError(f"processes of the cluster are left: {left}")


def _bring_up(command: list[str]) -> None:
    """Run ``trunkline up``. Where this is interrupted, it is told so, and takes back what it has started."""
    # In a session of its own, so that Ctrl-C reaches it once, through us.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            status = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            raise  # leaving the block waits for the process
    if status != 0:
        raise SystemExit("the cluster could not be brought up; see above")


def _wait_for_end(state: str, cluster: LocalCluster | None) -> list[int]:
    """Wait until every process of the cluster has ended, and return those that have not."""
    deadline = time.monotonic() + END_PATIENCE_S
    while (left := _processes_of(state, cluster)) and time.monotonic() < deadline:
        for pid in left:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            finally:
                os.close(descriptor)
    return left


def _processes_of(state: str, cluster: LocalCluster | None) -> list[int]:
    """Return the processes of a cluster.

    They carry its state folder and its id in their environment, and belong to the session of the process that holds
    it. Either can be missing: some give themselves a title, which overwrites what they had in their environment.
    """
    marks = [state.encode()] + ([cluster.id.encode()] if cluster else [])
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        is_marked = any(mark in environment for mark in marks)
        if status not in "ZX" and (is_marked or (cluster is not None and int(session) == cluster.pid)):
            found.append(int(folder.name))
    return found


def _print_table(report: DigitsReport, per_class: int) -> None:
    table = Table(title=f"Digits, {per_class} labelled per class, {len(report.true_N)} held out")
    table.add_column("method")
    table.add_column("accuracy", justify="right")
    table.add_column("", style="dim")
    for method in report.methods:
        style = "bold" if method.is_ours else ""
        table.add_row(method.name, f"{method.accuracy:.3f}", method.note, style=style)
    Console().print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The cluster has ended and left no process behind.")
