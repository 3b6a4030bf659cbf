"""Members of an ensemble against the same ones trained alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from threadpoolctl import threadpool_limits
from trunkline_wire.fits import LossConfig
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION, HeadConfig
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.training.fit import target_scale
from trunkline_worker.training.minibatch import Split, fit_minibatches, run_head, schedule
from trunkline_worker.training.objective import Objective
from trunkline_worker.training.split import WEIGHTS, random_stream
from trunkline_worker.training.sweep import ensemble, plan
from trunkline_worker.training.sweep.plan import Configuration
from trunkline_worker.training.sweep.rows import FoldedRows, Folds, Result
from trunkline_worker.training.weighing import class_weights, label_weights

NUM_COLUMNS, NUM_OUTPUTS = 12, 3
SEED = 5

PLAIN = (
    Configuration(("a",), 0.1, (8,)),
    Configuration(("a",), 30.0, (8,), learning_rate=1e-2),
    Configuration(("a",), 0.0, (8,), learning_rate=3e-3),
)
DROPPED = (Configuration(("a",), 0.1, (8, 6), dropout=0.5), Configuration(("a",), 1.0, (8, 6), 1e-2, dropout=0.1))


def nothing(*ignored: object) -> None:
    """Take anything."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that share small work mostly wait for each other, and for ever where neighbours need the processor."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True)
def _few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for some epochs only: rounding grows with the steps, and so does the time."""
    monkeypatch.setattr("trunkline_worker.training.minibatch._MIN_EPOCHS", 6)
    monkeypatch.setattr("trunkline_worker.training.minibatch._DEFAULT_STEPS", 60)


def folded(task: str, num_rows: int = 60) -> FoldedRows:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, NUM_COLUMNS, generator=draw)
    signal = x[:, :NUM_OUTPUTS] + 0.5 * torch.randn(num_rows, NUM_OUTPUTS, generator=draw)
    truth = {
        CLASSIFICATION: signal.argmax(dim=1),
        MULTI_LABEL: (signal > 0).float(),
        REGRESSION: signal * 70 + 1000,
    }[task]
    return FoldedRows(x, task, truth, NUM_OUTPUTS, Folds.of(torch.arange(num_rows) % 3, 3))


def outputs_of(rows: FoldedRows, configurations: Sequence[Configuration]) -> list[list[torch.Tensor] | str]:
    found: dict[int, list[torch.Tensor] | str] = {}
    results: list[Result] = list(ensemble.ensemble_outputs(rows, configurations, SEED, check=nothing, tell=nothing))
    found.update(results)
    assert len(found) == len(results) == len(configurations)
    return [found[number] for number in range(len(configurations))]


def objective_of(rows: FoldedRows, truth: torch.Tensor) -> Objective:
    loss = rows.around.loss
    if rows.task == CLASSIFICATION:
        return Objective(rows.task, loss, class_weights(loss, truth, NUM_OUTPUTS))
    weights = label_weights(loss, truth) if rows.task == MULTI_LABEL else None
    return Objective(rows.task, loss, *(weights or ()))


def trained_alone(rows: FoldedRows, configuration: Configuration) -> list[torch.Tensor]:
    """Return what ``fit_minibatches`` makes of a configuration, fold by fold."""
    seeds = random_stream(SEED, WEIGHTS).integers(2**63, size=len(rows.folds))
    spec = configuration.spec(rows.around)
    truth, mean, scale = rows.truth, torch.zeros(1), torch.ones(1)
    if rows.task == REGRESSION:
        mean, scale = target_scale(truth)
        truth = ((truth.double() - mean) / scale).float()
    outputs = []
    for seed, training, held in zip(seeds, rows.folds.training, rows.folds.held, strict=True):
        head = Head(spec.head, [HeadInput(("columns",), (NUM_COLUMNS,))], NUM_OUTPUTS)
        fit_minibatches(
            head,
            objective_of(rows, truth[training]),
            Split(rows.x_ND[training], truth[training]),
            None,
            schedule(spec, head, len(training), configuration.l2),
            seed=int(seed),
            check=nothing,
            on_epoch=nothing,
        )
        outputs.append((run_head(head, rows.x_ND[held]) * scale + mean).float())
    return outputs


def assert_same(ours: list[torch.Tensor] | str, theirs: list[torch.Tensor] | str, scale: float = 1.0) -> None:
    assert not isinstance(ours, str), ours
    assert not isinstance(theirs, str), theirs
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL, REGRESSION])
@pytest.mark.parametrize("configurations", [PLAIN, DROPPED], ids=["plain", "dropout and two layers"])
def test_a_member_is_what_minibatch_training_makes_of_it_alone(
    task: str, configurations: Sequence[Configuration]
) -> None:
    rows = folded(task)
    for configuration, ours in zip(configurations, outputs_of(rows, configurations), strict=True):
        assert_same(ours, trained_alone(rows, configuration), 100.0 if task == REGRESSION else 1.0)


LOSSES = [
    (CLASSIFICATION, LossConfig("focal", focal_gamma=1.5, label_smoothing=0.1)),
    (CLASSIFICATION, LossConfig(label_smoothing=0.2, balanced=True)),
    (CLASSIFICATION, LossConfig("focal", class_weights=(1.0, 0.0, 5.0))),
    (MULTI_LABEL, LossConfig("focal", balanced=True)),
    (MULTI_LABEL, LossConfig(label_smoothing=0.2, class_weights=(1.0, 2.0, 5.0))),
    (REGRESSION, LossConfig("huber", huber_delta=0.3)),
    (REGRESSION, LossConfig("quantile", quantile=0.8)),
]


@pytest.mark.parametrize(("task", "loss"), LOSSES, ids=str)
@pytest.mark.parametrize("hidden", [(8,), ()], ids=["hidden", "linear"])
def test_every_loss_and_weight_is_that_of_minibatch_training(
    task: str, loss: LossConfig, hidden: tuple[int, ...]
) -> None:
    around = replace(plan.PLAIN, loss=loss, solver="adamw", head=HeadConfig(activation="gelu"), batch_size=16)
    rows = replace(folded(task), around=around)
    configurations = [Configuration(("a",), l2, hidden, learning_rate=rate) for l2, rate in ((0.3, 0.01), (3.0, 0.03))]
    scale = 100.0 if task == REGRESSION else 1.0
    for configuration, ours in zip(configurations, outputs_of(rows, configurations), strict=True):
        theirs = trained_alone(rows, configuration)
        assert_same(ours, theirs, scale)
    # And it is not that of the plain loss.
    plain = outputs_of(replace(rows, around=replace(around, loss=LossConfig())), configurations[1:])
    assert not torch.allclose(plain[0][0], theirs[0], atol=1e-2 * scale, rtol=1e-2)  # type: ignore[arg-type]


def test_a_share_of_the_epochs_ends_at_a_learning_rate_of_nothing() -> None:
    rows = folded(CLASSIFICATION)
    planned = schedule(PLAIN[0].spec(), Head(PLAIN[0].spec().head, [HeadInput(("a",), (12,))], 3), 40, 0.1).epochs
    share = replace(rows, around=replace(rows.around, epochs=round(planned / 3)))
    got = dict(ensemble.ensemble_outputs(rows, PLAIN, SEED, share=1 / 3, check=nothing, tell=nothing))
    for number, expected in enumerate(outputs_of(share, PLAIN)):
        assert_same(got[number], expected)


@pytest.mark.parametrize("configurations", [PLAIN, DROPPED], ids=["plain", "dropout and two layers"])
def test_a_member_is_what_an_ensemble_of_one_makes_of_it(configurations: Sequence[Configuration]) -> None:
    rows = folded(CLASSIFICATION, 61)
    together = outputs_of(rows, configurations)
    for configuration, ours in zip(configurations, together, strict=True):
        assert_same(ours, outputs_of(rows, [configuration])[0])


@pytest.mark.parametrize("members", [1, 2, 3])
def test_how_many_learn_side_by_side_makes_no_difference(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = folded(CLASSIFICATION)
    expected = outputs_of(rows, PLAIN)
    size = ensemble._member_bytes(rows, PLAIN[0])
    monkeypatch.setattr(ensemble, "_BUDGET_BYTES", {"": members * size})
    for ours, theirs in zip(outputs_of(rows, PLAIN), expected, strict=True):
        assert_same(ours, theirs)


def test_a_member_that_diverges_disturbs_no_other() -> None:
    rows = folded(CLASSIFICATION)
    wild = replace(PLAIN[0], learning_rate=1e30)
    expected = outputs_of(rows, PLAIN)
    got = outputs_of(rows, [PLAIN[0], wild, *PLAIN[1:]])
    failed = got.pop(1)
    assert isinstance(failed, str)
    assert "no longer finite in epoch" in failed
    assert "below 1e+30" in failed
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs)


def test_a_group_whose_members_all_diverge_stops_early() -> None:
    rows = folded(CLASSIFICATION)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    wild = [replace(PLAIN[0], learning_rate=1e30), replace(PLAIN[0], learning_rate=1e31)]
    results = dict(ensemble.ensemble_outputs(rows, wild, SEED, check=count, tell=nothing))
    assert all(isinstance(one, str) for one in results.values())
    assert steps <= 10


def test_progress_never_falls_and_ends_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = folded(CLASSIFICATION)
    monkeypatch.setattr(ensemble, "_BUDGET_BYTES", {"": 2 * ensemble._member_bytes(rows, PLAIN[0])})
    told: list[float] = []
    list(ensemble.ensemble_outputs(rows, PLAIN, SEED, check=nothing, tell=told.append))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    assert len(told) > 10
