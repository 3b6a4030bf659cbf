"""What a run leaves behind: the report, the raw results, the pictures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model as peer_model
import setup_venvs
import tables
from common import RESULTS, machine
from contestants import Contestant
from figures import draw
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE

IMAGES = Path(__file__).absolute().parent.parent.parent / "docs" / "images"


@dataclass(frozen=True)
class Results:
    """A finished run.

    Attributes:
        backbone: That was served.
        rounds: Visits to each contestant.
        seconds: That it took.
        runtime: That Trunkline chose.
        open_s: Seconds of an open loop.
        field: Who took part.
        status: Why a contestant was not measured, or not to the end.
        closed: What was seen, closed loops.
        open: And open ones.
    """

    backbone: str
    rounds: int
    seconds: float
    runtime: str
    open_s: float
    field: Sequence[Contestant]
    status: Mapping[str, str]
    closed: Sequence[tables.Closed]
    open: Sequence[tables.Open]


def publish(results: Results) -> None:
    """Write everything, and print the report."""
    installed = versions(results.field)
    name = "peers" if results.backbone == DEFAULT_BACKBONE else f"peers_{results.backbone}"
    text = report(results, machine(), installed)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    folder = RESULTS / "raw"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text(raw(results, machine(), installed))
    draw(IMAGES, name, results.field, results.closed, results.open)
    print(text)


def versions(field: Sequence[Contestant]) -> dict[str, str]:
    """Return the versions of the peers that take part, and of what all of them use."""
    found = {one: importlib.metadata.version(one) for one in ("trunkline", "torch", "onnxruntime", "ray", "grpcio")}
    packages = {one.peer.package for one in field if one.peer and one.peer.package}
    return {**found, **{package: setup_venvs.version(package) or "not installed" for package in sorted(packages)}}


def report(results: Results, where: str, installed: Mapping[str, str]) -> str:
    """Return the report as Markdown.

    Args:
        results: The run.
        where: The machine, in words.
        installed: Versions.
    """
    listed = ", ".join(f"{key} {value}" for key, value in installed.items())
    advice = {one.peer.label: one.peer.advice for one in results.field if one.peer}
    missing = [
        f"- {one.label}, {one.variant}: {results.status[one.id]}" for one in results.field if results.status.get(one.id)
    ]
    text = [
        "# Trunkline and other servers, side by side",
        "",
        f"Machine: {where}. Network: {results.backbone}. Rounds: {results.rounds}, in {results.seconds / 60:.0f} "
        f"minutes. Versions: {listed}. Runtime that Trunkline chose: {results.runtime}.",
        "",
        "Everybody serves the same network with the same trained head, ten probabilities for a picture, which is sent "
        "as raw bytes; answers were compared with eager torch in float32 before anybody was timed. *As documented* is "
        "a peer as its own documents advise, with the network in eager torch, as its tutorials have it. *Our runtime* "
        "is the same peer with the ONNX file that Trunkline exported, in ONNX Runtime: what is left between that and "
        "Trunkline is the server, and the runtime where Trunkline chose another one. Server and load generator share "
        "the machine's cores; whoever is not measured is frozen or stopped. In-process has no server: full batches, "
        "one after another.",
        "",
        f"Quote ratios: the rows a second are those of this machine. {tables.disturbance(results.closed)}",
        "",
        "## Rows a second, closed loop",
        "",
        "Median of the rounds (least to most).",
        "",
        tables.rate_table(results.field, results.closed, results.status),
        "",
        "## Trunkline's rows a second over theirs",
        "",
        tables.ratio_table(results.field, results.closed),
        "",
        "## Latency, closed loop",
        "",
        "Medians of the rounds; calls of one row.",
        "",
        tables.latency_table(results.field, results.closed),
        "",
        "## Latency at equal offered load, open loop",
        "",
        "Poisson arrivals of calls of one row, at shares of a peer's own best rate with such calls; Trunkline at the "
        "same rates and the same moments. A call's time counts from when it was due, and one that failed counts as "
        f"endless. Windows of {results.open_s:.0f} s.",
        "",
        tables.open_table(results.field, results.open) if results.open else "Not measured in this run.",
        "",
        "## CPU milliseconds for a row",
        "",
        "All processes of a server together, and the load generator.",
        "",
        tables.cpu_table(results.field, results.closed),
        "",
        "## How each was run",
        "",
        *(f"- {label}: {words}." for label, words in advice.items()),
        "- All: one instance of the model with all cores' threads; batches of 32 at most where a server takes a limit; "
        f"a call fails after {peer_model.CALL_TIMEOUT_S:.0f} s.",
        *(["", "## Not measured", "", *missing] if missing else []),
    ]
    return "\n".join(text) + "\n"


def raw(results: Results, where: str, installed: Mapping[str, str]) -> str:
    """Return every measurement as a line of JSON; the first line says of what run."""
    header = {"kind": "run", "machine": where, "versions": installed, "backbone": results.backbone}
    lines: list[dict[str, Any]] = [{**header, "runtime": results.runtime, "status": results.status}]
    lines += [{"kind": "closed", **dataclasses.asdict(one)} for one in results.closed]
    lines += [{"kind": "open", **dataclasses.asdict(one)} for one in results.open]
    return "".join(json.dumps({key: _short(value) for key, value in line.items()}) + "\n" for line in lines)


def _short(value: Any) -> Any:
    """Return a value as JSON knows it: what is endless is null, numbers are short."""
    if not isinstance(value, float):
        return value
    return round(value, 5) if math.isfinite(value) else None
