"""Jobs as runs of MLflow. Its client is used, not its global state: what else a script logs stays where it was."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from trunkline._report.card import render_card
from trunkline._report.markdown import block, plain
from trunkline._report.material import Material
from trunkline._report.pictures import Gallery
from trunkline._report.report import render
from trunkline._track import facts
from trunkline._track.sink import Sink
from trunkline.errors import TrackingError
from trunkline.records import JobEvent, JobState, JobStatus, Trial

MAX_NESTED = 100
"""Most configurations of a sweep that get a run of their own, the best ones. All are in ``trials.json``."""

_MAX_METRICS, _MAX_PARAMS = 900, 100
_MAX_PARAM, _MAX_TAG = 500, 4000
"""Characters of a value: what servers of every age take."""

_JOB, _LAST_EVENT, _STATE, _NOTE = "trunkline.job", "trunkline.last_event", "trunkline.state", "mlflow.note.content"
_STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.FAILED: "FAILED", JobState.CANCELLED: "KILLED"}


def open_sink(tracking_uri: str | None, experiment: str, name: str) -> MLflowSink:
    """Reach a server, and find or make the experiment.

    Raises:
        TrackingError: It cannot be reached, or refuses.
    """
    # MLflow prints the address of each run that ends where the output of a command goes. Whoever wants that sets it.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return MLflowSink(client, _make(client, experiment))
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"{name} needs {error.name}, which is not installed",
            hint="Name a tracking server with tracking_uri=, or: pip install mlflow, which has stores of its own",
        ) from None
    except Exception as error:  # MLflow's, and those of what is under it
        raise TrackingError(f"{name} does not take it: {_without_password(str(error), tracking_uri)}") from None
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {experiment!r} of {name} was deleted", hint="Restore it, or name another: experiment="
        )
    return MLflowSink(client, found.experiment_id)


class MLflowSink(Sink):
    """A run. What could not be written is kept, and written with what comes next."""

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        """Keep where runs are made."""
        self._client, self._experiment_id = client, experiment_id
        self._job: JobStatus | None = None
        self._facts: Mapping[str, str] = {}
        self._run_id = ""
        self._last_seq = 0
        self._is_whole = False
        self._events: list[JobEvent] = []

    def begin(self, job: JobStatus, facts: Mapping[str, str]) -> None:
        """Start a run, or go on with the one of this job."""
        self._job, self._facts = job, facts
        self._start()

    def event(self, event: JobEvent) -> None:
        """Write metrics at the moment when they happened."""
        self._events.append(event)
        self._write_events()

    def model(self, material: Material) -> None:
        """Write scores, what was chosen, and warnings."""
        self._write_events()
        if self._is_whole:
            return
        now = _milliseconds(None)
        scores = facts.model_scalars(material)
        self._metrics([Metric(name, value, now, self._last_seq) for name, value in scores.items()])
        self._params(facts.model_facts(material))
        tags = facts.model_tags(material)
        warnings = material.record.warnings
        if warnings:
            tags[_NOTE] = "**Warnings**\n\n" + "\n".join(f"- {plain(one)}" for one in warnings)
        self._tags(tags)
        if warnings:
            self._client.log_text(self._run_id, "\n".join(warnings) + "\n", "warnings.txt")

    def course(self, material: Material) -> None:
        """Write learning curves, tables of what was tried, and the best configurations as nested runs."""
        if self._is_whole:
            return
        now, record = _milliseconds(None), material.record
        for name, values in facts.curves(material).items():
            self._metrics([Metric(name, value, now, step) for step, value in enumerate(values, 1)])
        if record.candidates:
            text = facts.candidates_table(record.candidates).to_json()
            self._client.log_text(self._run_id, text, "candidates.json")
        if record.trials:
            self._client.log_text(self._run_id, facts.trials_table(record.trials).to_json(), "trials.json")
        # The winner, then the rest from the best on; those that failed have no score.
        ranked = sorted(enumerate(record.trials), key=lambda one: (not one[1].won, not one[1].scores, -one[1].score))
        for number, trial in ranked[:MAX_NESTED]:
            self._trial(number, trial)

    def papers(self, material: Material) -> None:
        """Keep the report and the card."""
        if self._is_whole:
            return
        self._client.log_text(self._run_id, render_card(material), "card.md")
        self._client.log_text(self._run_id, render(material, Gallery(None)), "report.html")

    def end(self, state: JobState, reason: str) -> None:
        """End the run."""
        self._write_events()
        if self._is_whole:
            return
        tags = {_STATE: state.name}
        if reason:
            tags |= {"trunkline.error": reason, _NOTE: block([reason], "")}
        self._tags(tags)
        self._client.set_terminated(self._run_id, status=_STATUS[state])

    def close(self) -> None:
        """Do nothing: there is nothing to let go of."""

    def _start(self) -> None:
        """Start the run, if it is not: it may not have worked at first."""
        if self._run_id:
            return
        job = self._job
        assert job is not None
        # An id is the cluster's, so that nothing but a plain one is put into a query.
        query = f"tags.`{_JOB}` = '{job.id}'" if re.fullmatch(r"[\w-]+", job.id) else ""
        found = self._client.search_runs([self._experiment_id], query, max_results=1) if query else []
        if found:
            tags = found[0].data.tags
            self._last_seq = int(tags.get(_LAST_EVENT, "0"))
            self._is_whole = _STATE in tags
            if not self._is_whole:
                self._client.update_run(found[0].info.run_id, status="RUNNING")
            self._run_id = found[0].info.run_id
            return
        tags = {_JOB: job.id, "trunkline.dataset": job.spec.dataset}
        name = f"{job.spec.model}-{job.id[:8]}"
        run = self._client.create_run(
            self._experiment_id, start_time=_milliseconds(job.create_time), tags=tags, run_name=name
        )
        self._run_id = run.info.run_id
        self._params(self._facts)

    def _write_events(self) -> None:
        """Write the events that are not yet there, and which was the last."""
        self._start()
        while self._events:
            event = self._events[0]
            if event.seq > self._last_seq:
                found, step = facts.event_scalars(event)
                moment = _milliseconds(event.time)
                metrics = [Metric(name, value, moment, step) for name, value in found.items()]
                metrics.append(Metric(f"progress/{facts.key(event.phase)}", event.progress, moment, event.seq))
                last = [RunTag(_LAST_EVENT, str(event.seq))]
                self._client.log_batch(self._run_id, metrics=metrics[:_MAX_METRICS], tags=last)
                self._last_seq = event.seq
            del self._events[0]

    def _metrics(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _MAX_METRICS])

    def _params(self, values: Mapping[str, str]) -> None:
        params = [Param(facts.key(name), _cut(value, _MAX_PARAM)) for name, value in values.items() if value]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])

    def _tags(self, values: Mapping[str, str]) -> None:
        tags = [RunTag(name, _cut(value, _MAX_TAG)) for name, value in values.items() if value]
        self._client.log_batch(self._run_id, tags=tags)

    def _trial(self, number: int, trial: Trial) -> None:
        tags = {"mlflow.parentRunId": self._run_id, "trunkline.won": str(trial.won).lower()}
        if trial.error:
            tags["trunkline.error"] = _cut(trial.error, _MAX_TAG)
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=f"trial-{number:04d}")
        now = _milliseconds(None)
        scores = [Metric("trial/fold_score", score, now, fold) for fold, score in enumerate(trial.scores, 1)]
        if trial.scores:
            scores += [Metric("trial/score", trial.score, now, 0), Metric("trial/seconds", trial.seconds, now, 0)]
        params = [Param(name, _cut(str(value), _MAX_PARAM)) for name, value in facts.trial_facts(trial).items()]
        self._client.log_batch(run.info.run_id, metrics=scores, params=params)
        self._client.set_terminated(run.info.run_id, status="FAILED" if trial.error else "FINISHED")


def _make(client: MlflowClient, experiment: str) -> str:
    """Make an experiment, or find the one that somebody else has made meanwhile."""
    try:
        return str(client.create_experiment(experiment))
    except MlflowException:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise
        return str(found.experiment_id)


def _without_password(text: str, tracking_uri: str | None) -> str:
    secret = urlsplit(tracking_uri or "").netloc.rpartition("@")[0]
    return text.replace(f"{secret}@", "") if secret else text


def _milliseconds(moment: datetime | None) -> int:
    return round(1000 * (moment.timestamp() if moment else time.time()))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
