"""Jobs as TensorBoard's event files.

tensorboardX's usual writer has a queue and a thread, and tells nobody when the disk is full. So its records are written
here one by one: whoever writes sees what fails.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from trunkline._report.card import render_card
from trunkline._report.markdown import block, plain, table
from trunkline._report.material import Material
from trunkline._track import facts
from trunkline._track.sink import Sink
from trunkline.records import JobEvent, JobState, JobStatus, Trial


class TensorBoardSink(Sink):
    """A folder of event files. Each call is on the disk when it returns."""

    def __init__(self, root: Path) -> None:
        """Keep where folders are made."""
        self._root = root
        self._writer: EventsWriter | None = None
        self._facts: dict[str, str] = {}
        self._last_seq = 0

    def begin(self, job: JobStatus, facts: Mapping[str, str]) -> None:
        """Start a folder; what an earlier waiting for this job wrote there is hidden, as all of it is written anew."""
        self._facts = dict(facts)
        # The name is the cluster's, so none that leads elsewhere is taken.
        name = re.sub(r"[^A-Za-z0-9._-]", "_", job.spec.model)[:100].lstrip(".") or "model"
        self._folder = self._root / f"{name}-{re.sub('[^A-Za-z0-9]', '', job.id)[:12]}"
        is_there = self._folder.is_dir() and any(self._folder.glob("events.out.tfevents.*"))
        self._writer = _open(self._folder)
        if is_there:
            log = Event(step=0, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
            self._writer.write_event(log)
        rows = [(plain(name), plain(value)) for name, value in self._facts.items()]
        self._add(summary.text("job", table(("setting", "value"), [("job", job.id), *rows])), 0, time.time())
        self._writer.flush()

    def event(self, event: JobEvent) -> None:
        """Write scalars at the moment when they happened."""
        moment = event.time.timestamp() if event.time else time.time()
        found, step = facts.event_scalars(event)
        self._last_seq = event.seq
        for name, value in found.items():
            self._add(summary.scalar(name, value), step, moment)
        self._add(summary.scalar(f"progress/{facts.key(event.phase)}", event.progress), event.seq, moment)
        self._opened.flush()

    def model(self, material: Material) -> None:
        """Write scores as scalars, and with the settings for the hyperparameters' view."""
        now, scores = time.time(), facts.model_scalars(material)
        for name, value in scores.items():
            self._add(summary.scalar(name, value), self._last_seq, now)
        chosen = facts.model_facts(material)
        for one in summary.hparams(_numbers({**self._facts, **chosen}), scores):
            self._add(one, None, now)
        about = {**facts.model_tags(material), **chosen}
        rows = [(plain(name), plain(value)) for name, value in about.items()]
        self._add(summary.text("model", table(("what", "value"), rows)), self._last_seq, now)
        warnings = "\n".join(f"- {plain(one)}" for one in material.record.warnings) or "None."
        self._add(summary.text("warnings", warnings), self._last_seq, now)
        self._opened.flush()

    def course(self, material: Material) -> None:
        """Write learning curves, and a folder for each configuration of a sweep."""
        now, record = time.time(), material.record
        for name, values in facts.curves(material).items():
            for step, value in enumerate(values, 1):
                self._add(summary.scalar(name, value), step, now)
        for name, rows in (
            ("candidates", facts.candidates_table(record.candidates)),
            ("trials", facts.trials_table(record.trials)),
        ):
            if rows.rows:
                shown = table(rows.columns, [[plain(_shown(cell)) for cell in row] for row in rows.rows])
                self._add(summary.text(name, shown), self._last_seq, now)
        self._opened.flush()
        for number, trial in enumerate(record.trials):
            self._trial(number, trial, now)

    def papers(self, material: Material) -> None:
        """Write the card as a text."""
        self._add(summary.text("card", render_card(material).partition("---\n\n")[2]), self._last_seq, time.time())
        self._opened.flush()

    def end(self, state: JobState, reason: str) -> None:
        """Write how it ended: event files have no such thing as a failed run."""
        words = state.name if not reason else f"{state.name}\n\n{block([reason], '')}"
        self._add(summary.text("state", words), self._last_seq, time.time())
        self._opened.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    @property
    def _opened(self) -> EventsWriter:
        if self._writer is None:
            raise OSError("the file could not be opened")
        return self._writer

    def _add(self, what: Any, step: int | None, moment: float) -> None:
        self._opened.write_event(Event(wall_time=moment, step=step or 0, summary=what))

    def _trial(self, number: int, trial: Trial, now: float) -> None:
        writer = _open(self._folder / f"trial-{number:04d}")
        scores = {"trial/score": trial.score, "trial/seconds": trial.seconds} if trial.scores else {}
        settings = facts.trial_facts(trial) | {"won": str(trial.won), "error": trial.error}
        try:
            for one in summary.hparams(settings, scores):
                writer.write_event(Event(wall_time=now, summary=one))
            for name, value in scores.items():
                writer.write_event(Event(wall_time=now, summary=summary.scalar(name, value)))
        finally:
            writer.close()


def _open(folder: Path) -> EventsWriter:
    folder.mkdir(parents=True, exist_ok=True)
    # Names are of whole seconds: without something of its own a second file would replace the first.
    return EventsWriter(str(folder / "events"), f".{secrets.token_hex(4)}")


def _numbers(texts: Mapping[str, str]) -> dict[str, float | str]:
    """Return texts as numbers where they are some, so that they have an axis of numbers."""
    found: dict[str, float | str] = {}
    for name, text in texts.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return found


def _shown(cell: Any) -> str:
    if cell is None or isinstance(cell, str):
        return cell or ""
    return f"{cell:.4g}" if isinstance(cell, float) else json.dumps(cell)
