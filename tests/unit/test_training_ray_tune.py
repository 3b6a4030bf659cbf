"""What watches a Ray Tune run: results, deaths, a wish to stop, no room. The run itself: test_cluster_sweep."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from trunkline_worker.training import ray_tune
from trunkline_worker.training.progress import TrainingCancelled
from trunkline_worker.training.sweep.alone import TrialDone


def trial(number: int, status: str = "RUNNING") -> Any:
    return SimpleNamespace(config={"number": number}, status=status)


def nothing() -> None:
    """Let it go on."""


def test_results_and_deaths_are_handed_over_once() -> None:
    done: list[TrialDone] = []
    watch = ray_tune._watch(done.append, nothing, 60.0)
    watch.on_trial_result(1, [], trial(1), {"outcome": [0.5, 0.25], "error": "", "seconds": 2.0})
    watch.on_trial_result(2, [], trial(2), {"outcome": [], "error": "the loss was not finite", "seconds": 1.0})
    watch.on_trial_error(3, [], trial(0))
    watch.on_trial_error(3, [], trial(1))  # it had reported before it died
    assert done[:2] == [TrialDone(1, (0.5, 0.25), 2.0), TrialDone(2, "the loss was not finite", 1.0)]
    assert done[2].number == 0
    assert "died" in done[2].outcome
    assert len(done) == 3
    assert watch.ended == {0, 1, 2}


def test_a_wish_to_stop_ends_the_run_and_is_remembered() -> None:
    def check() -> None:
        raise TrainingCancelled

    watch = ray_tune._watch(lambda done: None, check, 60.0)
    with pytest.raises(TrainingCancelled):
        watch.on_step_begin(1, [trial(0)])
    assert isinstance(watch.stopped, TrainingCancelled)


def test_where_nothing_can_be_started_the_run_ends() -> None:
    watch = ray_tune._watch(lambda done: None, nothing, -1.0)
    watch.on_step_begin(1, [trial(0)])
    with pytest.raises(TimeoutError):
        watch.on_step_begin(2, [trial(0, "PENDING")])
    assert watch.starved
    assert watch.stopped is None


def test_what_tune_writes_down_is_nothing_of_the_job() -> None:
    lock = threading.RLock()
    watch = ray_tune._watch(lambda done: lock.release(), nothing, 60.0)
    cloudpickle.loads(cloudpickle.dumps(watch))


@pytest.mark.parametrize("error", [TrainingCancelled(), None], ids=["stopped", "gave up"])
def test_a_run_that_ends_early_is_stopped_or_finished_here(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    trials: Any = SimpleNamespace(work=(0, 1), x_ND=SimpleNamespace(device=SimpleNamespace(type="cpu")))

    def fit(self: Any, name: str, trials: Any, watch: Any) -> None:
        watch.on_trial_error(1, [], trial(1))
        watch.stopped = error
        raise RuntimeError("the run ended")

    monkeypatch.setattr(ray_tune.TuneTrials, "_fit", fit)
    monkeypatch.setattr(
        "trunkline_worker.training.sweep.alone.run_trial",
        lambda trials, number, check: TrialDone(number, (1.0,), 0.1),
    )
    done: list[TrialDone] = []
    run = ray_tune.TuneTrials(str(tmp_path))
    if error is not None:
        with pytest.raises(TrainingCancelled):
            run(trials, done.append, nothing)
        assert [one.number for one in done] == [1]
    else:
        run(trials, done.append, nothing)
        assert [one.number for one in done] == [1, 0]
