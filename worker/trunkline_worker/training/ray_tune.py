"""Trials of a sweep as a Ray Tune run, started by a lane: one process each, as many at once as there is room for.

Only what learns in steps and cannot be stacked comes here: see ``sweep.run``. The rows are put into Ray's object store
once. A trial that fails says so in what it reports; one whose process dies has failed, and the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from trunkline_worker.store.ids import random_id

if TYPE_CHECKING:
    from trunkline_worker.training.sweep.alone import TrialDone, TrialSet

logger = logging.getLogger(__name__)

START_WAIT_S = 120.0
"""How long no trial may be running, in seconds, before the lane runs those that are left itself."""

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

_BESIDE: dict[str, int | float] = {"memory": 1}
"""What a trial asks for where no core is free: next to nothing, but Tune wants something. The lane's own core is idle
while it waits, so one trial at a time has room beside it."""


class TuneTrials:
    """A ``RunTrials`` by Ray Tune.

    Args:
        storage_path: Folder in which Tune keeps its state while it runs.
        start_wait_s: See ``START_WAIT_S``.
    """

    def __init__(self, storage_path: str, start_wait_s: float = START_WAIT_S) -> None:
        """Keep where to work."""
        self._storage_path = storage_path
        self._start_wait_s = start_wait_s

    def __call__(self, trials: TrialSet, on_done: Callable[[TrialDone], None], check: Callable[[], None]) -> None:
        """Run all trials; see ``RunTrials``. Rows on a GPU stay there: the lane has it, and runs the trials itself."""
        from trunkline_worker.training.sweep.alone import run_in_process, run_trial

        if trials.x_ND.device.type != "cpu":
            run_in_process(trials, on_done, check)
            return
        watch = _watch(on_done, check, self._start_wait_s)
        name = f"sweep-{random_id()}"
        try:
            self._fit(name, trials, watch)
        except Exception:
            # What ends the run from within: a wish to stop, or no room. Anything else is Tune's own.
            if watch.stopped is not None:
                raise watch.stopped from None
            if watch.starved:
                logger.warning("there was no room for trials beside the lane")
            else:
                logger.warning("Ray Tune gave up", exc_info=True)
        finally:
            remove_run(f"{self._storage_path}/{name}")
        left = [number for number in range(len(trials.work)) if number not in watch.ended]
        if left:
            logger.warning("the lane runs the %d trials that are left itself", len(left))
        for number in left:
            on_done(run_trial(trials, number, check))

    def _fit(self, name: str, trials: TrialSet, watch: Any) -> None:
        os.environ.update(_QUIET)  # read when a run starts
        from ray import tune

        free = int(ray.available_resources().get("CPU", 0.0))
        trainable = tune.with_resources(
            tune.with_parameters(_trial, trials=trials), tune.PlacementGroupFactory([{"CPU": 1} if free else _BESIDE])
        )
        tuner = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(range(len(trials.work))))},
            # Processes are used again: torch is loaded once in each.
            tune_config=tune.TuneConfig(max_concurrent_trials=max(1, free), reuse_actors=True),
            run_config=tune.RunConfig(
                name=name,
                storage_path=self._storage_path,
                callbacks=[watch],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()


def remove_run(folder: str) -> None:
    """Remove what a run of Ray's has left, where it has."""
    from pyarrow import fs

    with contextlib.suppress(OSError):
        files, path = fs.FileSystem.from_uri(folder)
        files.delete_dir(path)


def _trial(config: Mapping[str, Any], trials: TrialSet) -> None:
    """Run one trial in a process of its own, and report it."""
    import torch
    from ray import tune

    from trunkline_worker.training.sweep.alone import run_trial

    torch.set_num_threads(1)
    done = run_trial(trials, config["number"], lambda: None)
    error = done.outcome if isinstance(done.outcome, str) else ""
    tune.report({"outcome": [] if error else list(done.outcome), "error": error, "seconds": done.seconds})


def _watch(on_done: Callable[[TrialDone], None], check: Callable[[], None], start_wait_s: float) -> Any:
    """Return a callback of Tune that hands trials over as they end, and ends the run where it should."""
    from ray import tune

    from trunkline_worker.training.sweep.alone import TrialDone

    class Watch(tune.Callback):
        """See ``_watch``. ``ended`` holds the trials that were handed over."""

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune writes down what it would need to go on after a restart. A lane starts the job again instead.
            return tune.Callback, ()

        def __init__(self) -> None:
            self.ended: set[int] = set()
            self.stopped: BaseException | None = None
            self.starved = False
            self._active = time.monotonic()

        def on_step_begin(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
            try:
                check()
            except BaseException as error:
                self.stopped = error
                raise
            if any(one.status == "RUNNING" for one in trials):
                self._active = time.monotonic()
            elif time.monotonic() - self._active > start_wait_s:
                self.starved = True
                raise TimeoutError("no trial could be started")

        def on_trial_result(
            self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
        ) -> None:
            outcome = result["error"] or tuple(result["outcome"])
            self._hand_over(TrialDone(trial.config["number"], outcome, result["seconds"]))

        def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
            reason = "its process died: out of memory, or killed; the lane's log says more"
            self._hand_over(TrialDone(trial.config["number"], reason, 0.0))

        def _hand_over(self, done: TrialDone) -> None:
            if done.number in self.ended:
                return
            self.ended.add(done.number)
            try:
                on_done(done)
            except BaseException as error:
                self.stopped = error
                raise

    return Watch()
