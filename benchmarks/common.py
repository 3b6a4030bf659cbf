"""What the benchmarks share: a cluster of their own, real digits, and where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import trunkline

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Cluster:
    """A running embedded cluster."""

    state_dir: Path
    id: str

    def connect(self) -> trunkline.Client:
        """Return a client of it."""
        record = json.loads((self.state_dir / "cluster.json").read_text())
        return trunkline.connect(record["address"], token_file=record["token_file"])


@contextmanager
def embedded_cluster(**settings: str) -> Iterator[Cluster]:
    """Bring a cluster up by the command users type, and take it down at the end."""
    with tempfile.TemporaryDirectory(prefix="trunkline-bench-") as folder:
        environment = {
            **os.environ,
            "TRUNKLINE_STATE_DIR": f"{folder}/state",
            "TRUNKLINE_CACHE_DIR": f"{folder}/cache",
            **{f"TRUNKLINE_CLUSTER_{name.upper()}": value for name, value in settings.items()},
        }
        command = [sys.executable, "-c", "from trunkline.cli import main; main()"]
        subprocess.run([*command, "up", "--port", "0"], env=environment, check=True)
        try:
            record = json.loads(Path(folder, "state", "cluster.json").read_text())
            os.environ["TRUNKLINE_CACHE_DIR"] = environment["TRUNKLINE_CACHE_DIR"]
            yield Cluster(Path(folder, "state"), record["id"])
        finally:
            subprocess.run([*command, "down"], env=environment, check=True)


def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return scikit-learn's 1,797 digits as 8x8 uint8 pictures, and their labels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return (loaded.images * (255 / 16)).round().astype(np.uint8), loaded.target


def summary(values: Sequence[float]) -> str:
    """Return median, least and most of some measurements."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def machine() -> str:
    """Return the machine in words."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} cores, {name}, Python {platform.python_version()}"


def report(name: str, title: str, rows: Sequence[tuple[str, ...]], notes: Sequence[str] = ()) -> None:
    """Print a table, and keep it as Markdown under ``benchmarks/results``. The first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    text = [f"# {title}", "", f"Machine: {machine()}.", "", line(rows[0])]
    text += ["|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    text += [line(row) for row in rows[1:]]
    if notes:
        text += ["", *notes]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
