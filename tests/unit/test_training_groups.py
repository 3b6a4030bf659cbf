"""Groups are never split, and views are trained on but not measured with: in every split, and in the whole of a job."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedGroupKFold
from training_rows import NAMES, SPEC, rows_and_labels, train
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.choose import choose_l2
from trunkline_worker.training.fit import Rows
from trunkline_worker.training.grouped import apart
from trunkline_worker.training.loop import Labels, TrainingResult
from trunkline_worker.training.pictures import Pictures
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.ridge import left_out_predictions
from trunkline_worker.training.scoring import score_sets
from trunkline_worker.training.split import folds, hold_out, keep_both, subsample
from trunkline_worker.training.sweep.rows import Folds
from trunkline_worker.training.trust.doubts import Evidence, warnings
from trunkline_worker.training.trust.suspects import cross_validated_probabilities, find_suspects


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def drawn(num_rows: int, num_groups: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and groups of unequal size, every class in several of them."""
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(num_groups, 2.0))
    return random.integers(num_classes, size=num_rows), random.choice(num_groups, size=num_rows, p=shares)


def split_groups(first: Sequence[int], second: Sequence[int], groups: np.ndarray) -> set[int]:
    return set(groups[first].tolist()) & set(groups[second].tolist())


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("has_classes", [True, False])
def test_whole_groups_are_held_out_about_as_many_rows_of_each_class_as_asked(
    fraction: float, has_classes: bool
) -> None:
    errors = []
    for seed in range(8):
        classes, groups = drawn(600, 60, 3, seed)
        given = classes if has_classes else None
        training, held = hold_out(given, 600, fraction, np.random.default_rng(seed), groups)
        assert not split_groups(training, held, groups)
        assert sorted([*training.tolist(), *held.tolist()]) == list(range(600))
        again = hold_out(given, 600, fraction, np.random.default_rng(seed), groups)
        assert np.array_equal(held, again[1])
        errors.append(len(held) / 600 - fraction)
        if has_classes:
            shares = np.bincount(classes[held]) / np.bincount(classes)
            assert np.abs(shares - fraction).max() < 0.08
    assert np.abs(errors).max() < 0.06
    others = hold_out(classes, 600, fraction, np.random.default_rng(99), groups)[1]
    assert not np.array_equal(others, hold_out(classes, 600, fraction, np.random.default_rng(7), groups)[1])


def test_the_last_group_of_a_class_stays_to_be_trained_on() -> None:
    # Two large groups with both classes, and a small one: half of the rows cannot be held out evenly.
    classes = np.array([0, 1] * 10 + [0, 0] * 5 + [1])
    groups = np.array([0] * 20 + [1] * 10 + [2])
    for seed in range(20):
        training, held = hold_out(classes, 31, 0.5, np.random.default_rng(seed), groups)
        assert set(classes[training].tolist()) == {0, 1}
        assert len(held)


def test_a_group_larger_than_what_is_asked_for_is_held_out_where_there_is_no_other() -> None:
    training, held = hold_out(None, 10, 0.1, np.random.default_rng(0), np.array([0] * 4 + [1] * 6))
    assert held.tolist() == [0, 1, 2, 3]
    assert len(training) == 6


def test_folds_keep_groups_and_are_no_less_even_than_those_of_scikit_learn() -> None:
    ours, theirs = [], []
    for seed in range(6):
        classes, groups = drawn(400, 40, 3, seed)
        fold = folds(classes, 400, 5, np.random.default_rng(seed), groups)
        assert all(len(np.unique(fold[groups == one])) == 1 for one in np.unique(groups))
        assert set(fold.tolist()) == set(range(5))

        def unevenness(fold: np.ndarray, classes: np.ndarray = classes) -> float:
            shares = np.array([np.bincount(classes[fold == one], minlength=3) for one in range(5)]) / np.bincount(
                classes
            )
            return float(np.abs(shares - 0.2).max())

        other = np.empty(400, dtype=int)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for number, (_, held) in enumerate(splitter.split(classes, classes, groups)):
            other[held] = number
        ours.append(unevenness(fold))
        theirs.append(unevenness(other))
    assert np.mean(ours) <= np.mean(theirs) + 0.02


def test_as_many_folds_as_groups_are_never_empty() -> None:
    groups = np.array([0] * 50 + [1] * 2 + [2])
    assert sorted(np.bincount(folds(None, 53, 3, np.random.default_rng(0), groups)).tolist()) == [1, 2, 50]


def test_a_subsample_has_two_groups_of_each_class_that_has_them() -> None:
    classes = np.repeat([0, 1], 100)
    groups = np.array(([0] * 99 + [1]) * 2)
    for seed in range(10):
        picked = subsample(classes, 200, 8, 2, np.random.default_rng(seed), groups)
        assert len(picked) == 8
        for one in (0, 1):
            assert set(groups[picked[classes[picked] == one]].tolist()) == {0, 1}
        assert set(groups[subsample(None, 200, 4, 2, np.random.default_rng(seed), groups)].tolist()) == {0, 1}


def test_labels_are_kept_on_both_sides_by_whole_groups() -> None:
    targets = np.zeros((12, 1), np.float32)
    targets[8:10] = 1
    groups = np.repeat(np.arange(6), 2)
    training, held = keep_both(targets, np.arange(8), np.arange(8, 12), groups)
    assert training.tolist() == list(range(10))
    assert held.tolist() == [10, 11]


@pytest.mark.parametrize("sizes", [(1, 2, 3, 4, 2), (3, 3, 3, 3), (1,) * 12])
def test_groups_left_out_of_kernel_ridge_are_predicted_as_by_a_fit_without_them(sizes: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(len(sizes)), sizes)[random.permutation(12)]
    x, y = random.normal(size=(12, 5)), random.normal(size=(12, 2))
    kernel = x @ x.T / 5
    strengths = (0.3, 0.01)
    got = left_out_predictions(torch.from_numpy(kernel)[None], torch.from_numpy(y), strengths, torch.from_numpy(groups))
    for place, strength in enumerate(strengths):
        for one in np.unique(groups):
            out = groups == one
            known = ~out
            # The saddle point of ridge with a free intercept, solved outright.
            size = int(known.sum())
            system = np.ones((size + 1, size + 1))
            system[:-1, :-1] = kernel[np.ix_(known, known)] + strength * 12 * np.eye(size)
            system[-1, -1] = 0.0
            solved = np.linalg.solve(system, np.vstack([y[known], np.zeros((1, 2))]))
            expected = kernel[np.ix_(out, known)] @ solved[:-1] + solved[-1]
            np.testing.assert_allclose(got[0, place][torch.from_numpy(out)], expected, atol=1e-9)
    if sizes == (1,) * 12:
        alone = left_out_predictions(torch.from_numpy(kernel)[None], torch.from_numpy(y), strengths)
        np.testing.assert_allclose(got, alone, atol=1e-9)


def copies(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of noise, ten nearly alike of each, their classes, which are drawn, and which are alike."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(24, 30)).astype(np.float32).repeat(10, axis=0)
    noise += random.normal(size=noise.shape).astype(np.float32) * 1e-3
    return noise, random.permutation(np.arange(24) % 2).repeat(10), np.arange(24).repeat(10)


def test_a_score_by_rows_is_fooled_by_copies_and_one_by_groups_is_not() -> None:
    x, classes, groups = copies()
    kernels = {"all": torch.from_numpy(x @ x.T).double() / 30}
    arguments = ([("all",)], kernels, {"all": 30}, "classification", torch.from_numpy(classes))
    (fooled,) = score_sets(*arguments, check=lambda done: None)
    counted = torch.from_numpy(apart(classes, groups, len(x)))
    (honest,) = score_sets(*arguments, groups_N=torch.from_numpy(groups), counted_N=counted, check=lambda done: None)
    assert fooled.accuracy == 1.0
    assert honest.accuracy is not None and honest.accuracy < 0.75


def test_probabilities_are_by_fits_without_the_group() -> None:
    x, classes, groups = copies()
    rows = torch.from_numpy((x - x.mean(axis=0)) / x.std(axis=0))
    random = np.random.default_rng(0)
    said = cross_validated_probabilities(rows, classes, 2, 1.0, random)
    assert (said.argmax(dim=1).numpy() == classes).all()
    said = cross_validated_probabilities(rows, classes, 2, 1.0, random, groups_N=groups)
    assert (said.argmax(dim=1).numpy() == classes).mean() < 0.75


def test_a_class_in_a_single_group_is_neither_doubted_nor_suggested() -> None:
    random = np.random.default_rng(1)
    x = torch.from_numpy(random.normal(size=(60, 4)).astype(np.float32))
    classes, groups = np.arange(60) % 3, np.arange(60) % 10
    groups[classes == 2] = 77
    said = cross_validated_probabilities(x, classes, 3, 1.0, random, groups_N=groups)
    assert torch.allclose(said[torch.from_numpy(classes == 2)], torch.tensor(1 / 3, dtype=torch.float64))
    found = find_suspects(said, classes, groups)
    assert found
    assert all(2 not in (one.given, one.suggested) for one in found)


def measured(result: TrainingResult) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if not name.endswith("_s")}


def viewed(x: np.ndarray, labels: Labels, views: int) -> tuple[np.ndarray, Labels]:
    """Return each row and behind it slightly changed ones."""
    rows = x.repeat(views, axis=0)
    changed = np.arange(len(rows)) % views > 0
    rows[changed] += np.random.default_rng(8).normal(size=(int(changed.sum()), x.shape[1])).astype(np.float32)
    indices = None if labels.class_indices is None else labels.class_indices.repeat(views)
    targets = None if labels.targets is None else labels.targets.repeat(views, axis=0)
    return rows, replace(labels, class_indices=indices, targets=targets)


SWEEP = SweepConfig(l2=(1.0, 10.0), folds=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sweep": SWEEP},
        {"select_by": "balanced_accuracy"},
        {"solver": "adamw", "epochs": 10},
        {"head": HeadConfig("mlp", (8,)), "solver": "adamw", "epochs": 20, "learning_rate": 0.01},
    ],
)
def test_a_job_holds_out_whole_groups_and_says_how_many_there_are(changes: dict) -> None:
    x, labels = rows_and_labels(120)
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 4))
    result = train(replace(SPEC, **changes), x, labels, groups)
    assert result.evaluation is not None
    held = result.evaluation.rows
    assert not split_groups(held, np.setdiff1d(np.arange(120), held), groups)
    assert result.metrics["num_groups"] == 30
    assert result.metrics["accuracy"] > 0.8
    again = train(replace(SPEC, **changes), x, labels, groups + 5)
    assert measured(again) == measured(result)


def test_copies_flatter_a_job_without_groups_and_not_one_with_them() -> None:
    x, classes, groups = copies(3)
    labels = Labels(("a", "b"), classes)
    flattered = train(SPEC, x, labels)
    assert flattered.metrics["accuracy"] == 1.0
    assert train(SPEC, x, labels, groups).metrics["accuracy"] < 0.85


@pytest.mark.parametrize("task", ["classes", "labels", "numbers"])
@pytest.mark.parametrize(
    "changes", [{}, {"sweep": SWEEP}, {"head": HeadConfig("mlp", (8,)), "solver": "adamw", "epochs": 3}]
)
def test_views_are_trained_on_and_only_pictures_are_counted_and_measured_with(task: str, changes: dict) -> None:
    x, labels = rows_and_labels(60)
    assert labels.class_indices is not None
    if task == "labels":
        labels = Labels(NAMES, None, np.eye(3, dtype=np.float32)[labels.class_indices])
    elif task == "numbers":
        labels = Labels((), None, x[:, 5:6] * 2)
    ids = [bytes([number]) for number in range(60)]
    rows, row_labels = viewed(x, labels, 4)
    view_ids = [one + bytes([view]) for one in ids for view in range(4)]
    result = train(replace(SPEC, **changes), rows, row_labels, views=4, row_ids=view_ids)
    plain = train(replace(SPEC, **changes), x, labels, row_ids=ids)
    assert result.evaluation is not None and plain.evaluation is not None
    assert result.evaluation.rows.tolist() == plain.evaluation.rows.tolist()
    for name in ("num_rows", "num_train_rows", "num_validation_rows"):
        assert result.metrics[name] == plain.metrics[name]
    assert result.metrics["num_views"] == 4
    assert "num_views" not in plain.metrics
    assert not any("same content" in one or "exactly the embedding" in one for one in result.warnings)
    # What is said of held-out pictures is said of the pictures themselves: changed views of theirs change nothing.
    held = np.isin(np.arange(60), result.evaluation.rows).repeat(4) & (np.arange(240) % 4 > 0)
    elsewhere = rows.copy()
    elsewhere[held] += 1e4
    other = train(replace(SPEC, refit=False, **changes), elsewhere, row_labels, views=4)
    same = train(replace(SPEC, refit=False, **changes), rows, row_labels, views=4)
    assert measured(other) == measured(same)
    # Those of pictures that are trained on change the head.
    elsewhere = rows.copy()
    elsewhere[~held & (np.arange(240) % 4 > 0)] += 3.0
    assert measured(train(replace(SPEC, refit=False, **changes), elsewhere, row_labels, views=4)) != measured(same)


def test_suspects_are_pictures_by_their_place_among_pictures() -> None:
    x, labels = rows_and_labels(90)
    assert labels.class_indices is not None
    wrong = labels.class_indices.copy()
    wrong[[4, 40]] = (wrong[[4, 40]] + 1) % 3
    rows, row_labels = viewed(x, replace(labels, class_indices=wrong), 3)
    result = train(SPEC, rows, row_labels, views=3)
    assert result.evaluation is not None
    suspects = result.evaluation.suspects
    assert suspects[0].row == 40
    assert all(one.row < 90 for one in suspects)


def test_views_and_groups_go_together() -> None:
    x, labels = rows_and_labels(60)
    groups = np.arange(60) % 12
    rows, row_labels = viewed(x, labels, 2)
    result = train(SPEC, rows, row_labels, groups.repeat(2), views=2)
    plain = train(SPEC, x, labels, groups)
    assert result.evaluation is not None and plain.evaluation is not None
    assert result.evaluation.rows.tolist() == plain.evaluation.rows.tolist()
    assert result.metrics["num_groups"] == 12


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("task", ["classification", "ordinal", "multi_label", "regression"])
def test_a_strength_is_chosen_by_pictures_that_no_fit_has_seen_a_view_of(task: str, views: int) -> None:
    """The same pictures, each so many times: with all of them as views the choice is that of the pictures, rescaled."""
    x, labels = rows_and_labels(60)
    assert labels.class_indices is not None
    classes = labels.class_indices.astype(np.int64)
    truth = torch.from_numpy(classes)
    if task == "multi_label":
        truth = torch.eye(3)[truth]
    elif task == "regression":
        truth = torch.from_numpy(x[:, 5:7] + np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32))
    given = classes if task in ("classification", "ordinal") else None
    progress = Progress(lambda event: None, lambda: False)
    rows = Rows(torch.from_numpy(x.repeat(views, axis=0)), truth.repeat_interleave(views, dim=0))
    got = choose_l2(SPEC, task, rows, given, [30], progress, Pictures(60, views))
    alone = choose_l2(SPEC, task, Rows(torch.from_numpy(x), truth), given, [30], progress)
    # The penalty is on the sum of the rows' losses, of which there are so many times as many: the grid has steps of 3.
    assert 0.3 <= got / (alone * views) <= 3.4


def test_folds_hold_out_pictures_and_train_on_views() -> None:
    fold = torch.tensor([0, 1]).repeat_interleave(3)
    found = Folds.of(fold, 2, torch.arange(6) % 3 == 0)
    assert [one.tolist() for one in found.held] == [[0], [3]]
    assert [one.tolist() for one in found.training] == [[3, 4, 5], [0, 1, 2]]


def bad(match: str, spec: JobSpec, labels: Labels, groups: np.ndarray | None, views: int = 1) -> ErrorCode:
    x, _ = rows_and_labels(60)
    with pytest.raises(WireError, match=match) as caught:
        train(spec, x, labels, groups, views)
    return caught.value.code


def test_splits_that_cannot_be_are_refused_with_a_way_out() -> None:
    _, labels = rows_and_labels(60)
    assert labels.class_indices is not None
    assert bad("all rows are in one group", SPEC, labels, np.zeros(60, int)) is ErrorCode.BAD_LABELS
    groups = np.arange(60) % 9
    groups[labels.class_indices == 1] = 100
    said = "all rows of class 'dog' are in one group.*another group.*validation fraction to 0"
    assert bad(said, SPEC, labels, groups) is ErrorCode.BAD_LABELS
    assert bad("groups of shape", SPEC, labels, np.arange(59)) is ErrorCode.INVALID_ARGUMENT
    assert bad("no whole number of pictures", SPEC, labels, None, 7) is ErrorCode.INVALID_ARGUMENT
    two = np.arange(60) // 30
    assert bad("comparing slices needs rows of some class in two groups", SPEC, labels, two) is ErrorCode.BAD_LABELS
    pooled = replace(SPEC, embedding="pooled")
    assert bad("choosing the L2 strength.*name the strength", pooled, labels, two) is ErrorCode.BAD_LABELS
    swept = replace(pooled, sweep=SWEEP)
    assert bad("1 groups to train on cannot make 3 folds", swept, labels, two) is ErrorCode.BAD_LABELS
    single = labels.class_indices.copy()
    single[:] = np.arange(60) // 4 % 3
    single[4:8] = 2
    single[single == 1] = 0
    single[4:8] = 1  # four views of one picture are all that there is of it
    assert bad("'dog' has a single row", SPEC, Labels(NAMES, single), None, 4) is ErrorCode.BAD_LABELS
    one_sided = np.zeros((60, 2), np.float32)
    one_sided[:30, 0] = 1
    one_sided[::2, 1] = 1
    of_labels = Labels(("x", "y"), None, one_sided)
    assert bad("no group can be held out", pooled, of_labels, two) is ErrorCode.BAD_LABELS


def test_a_class_in_one_group_can_be_learnt_without_holding_out() -> None:
    x, labels = rows_and_labels(60)
    assert labels.class_indices is not None
    groups = np.arange(60) % 9
    groups[labels.class_indices == 1] = 100
    result = train(replace(SPEC, validation_fraction=0.0), x, labels, groups)
    assert result.metrics["num_rows"] == 60
    assert result.metrics["train_accuracy"] > 0.9


def test_warnings_know_of_groups() -> None:
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.normal(size=(40, 3)).astype(np.float32))
    ids = [bytes([number // 2]) for number in range(40)]
    classes = np.arange(40) % 4 // 2
    training, held = np.arange(0, 40, 2), np.arange(1, 40, 2)

    def said(groups: np.ndarray | None) -> str:
        return " ".join(warnings(Evidence(x, training, held, row_ids=ids, classes_N=classes, groups_N=groups)))

    assert "upload each row once" in said(None)
    assert "20 of 20 held-out rows have the same content as a training row, in another group" in said(np.arange(40))
    assert "give copies one group" in said(np.arange(40))
    assert "held out are of 4 groups only" in said(np.arange(40) % 8)
    assert "groups only" not in said(np.arange(40))
