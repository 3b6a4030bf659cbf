"""Several inputs, heads of every kind, every task."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.heads.artefact import head_from_bytes, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training import minibatch
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head
from trunkline_worker.training.metrics import measure
from trunkline_worker.training.prototype import fit_prototypes
from trunkline_worker.training.standardise import input_statistics

SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=0, embedding="pooled", seed=3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def backbone(x: np.ndarray, name: str = "b") -> Source:
    return Source(name, x.astype(np.float32), (SliceSpec("pooled", 0, x.shape[1]),))


def local(x: np.ndarray, name: str = "edge") -> Source:
    return Source(name, x.astype(np.float32), (SliceSpec(name, 0, x.shape[1]),), is_local=True)


def train(sources: list[Source], labels: Labels, spec: JobSpec) -> TrainingResult:
    return train_head(sources, labels, spec, on_event=lambda event: None, should_stop=lambda: False)


def codes(num_rows: int, num_codes: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of some codes each row has, and the code itself with noise."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(num_codes, width))
    which = draw.integers(num_codes, size=num_rows)
    return which, centres[which] + 0.1 * draw.normal(size=(num_rows, width))


ADDED = HeadConfig("mlp", (1024,), fuse="add")


def test_a_hundred_classes_that_neither_input_knows_alone() -> None:
    """The class is made of one of ten codes in the local features and one of ten in the remote ones."""
    left, local_x = codes(3000, 10, 16, seed=0)
    right, remote_x = codes(3000, 10, 24, seed=1)
    labels = Labels(tuple(map(str, range(100))), (10 * left + right).astype(np.int64))
    spec = replace(SPEC, head=ADDED, solver="adamw", epochs=8, refit=False)
    fused = train([backbone(remote_x), local(local_x)], labels, spec).metrics["accuracy"]
    alone = [train([one], labels, spec).metrics["accuracy"] for one in (backbone(remote_x), local(local_x))]
    assert fused > 0.95
    assert max(alone) < 0.2


def test_inputs_that_tell_nothing_alone_tell_all_together() -> None:
    """The class is the sum of two codes, modulo ten: whatever one of them is, all classes are as likely."""
    left, local_x = codes(2500, 10, 16, seed=2)
    right, remote_x = codes(2500, 10, 24, seed=3)
    labels = Labels(tuple("0123456789"), ((left + right) % 10).astype(np.int64))
    spec = replace(SPEC, head=ADDED, solver="adamw", epochs=12, refit=False)
    fused = train([backbone(remote_x), local(local_x)], labels, spec).metrics["accuracy"]
    alone = [train([one], labels, spec).metrics["accuracy"] for one in (backbone(remote_x), local(local_x))]
    assert fused > 0.95
    assert max(alone) < 0.2


def test_one_dense_output_adds_what_each_input_knows() -> None:
    draw = np.random.default_rng(0)
    local_x, remote_x = draw.normal(size=(600, 8)), draw.normal(size=(600, 12))
    targets = 30 + local_x @ draw.normal(size=(8, 1)) + remote_x @ draw.normal(size=(12, 1))
    labels = Labels((), None, targets.astype(np.float32))
    spec = replace(SPEC, head=HeadConfig("linear", fuse="add"), solver="adamw", l2=0.0, epochs=60, refit=False)
    fused = train([backbone(remote_x), local(local_x)], labels, spec).metrics["r2"]
    alone = [train([one], labels, spec).metrics["r2"] for one in (backbone(remote_x), local(local_x))]
    assert fused > 0.99
    assert max(alone) < 0.6


def rows(num_rows: int = 240) -> tuple[list[Source], np.ndarray]:
    """Return a backbone, a local model and the class that both tell half of."""
    draw = np.random.default_rng(5)
    classes = np.arange(num_rows) % 4
    remote_x, local_x = draw.normal(size=(num_rows, 20)), draw.normal(size=(num_rows, 6))
    remote_x[:, :3] += 4 * (classes % 2)[:, None]
    local_x[:, :3] += 4 * (classes // 2)[:, None]
    return [backbone(remote_x), local(local_x)], classes


def map_rows(num_rows: int = 240) -> tuple[list[Source], np.ndarray]:
    """Return maps in which half of the class is a pattern of three by three, and local features with the other half."""
    sources, classes = rows(num_rows)
    maps = np.random.default_rng(6).normal(size=(num_rows, 3, 6, 6)).astype(np.float32)
    pattern = np.random.default_rng(7).normal(size=(3, 3, 3)) * 2
    for row, place in enumerate(np.random.default_rng(8).integers(4, size=(num_rows, 2))):
        if classes[row] % 2:
            maps[row, :, place[0] : place[0] + 3, place[1] : place[1] + 3] += pattern
    flat = Source("b", maps.reshape(num_rows, -1), (SliceSpec("t.map", 0, 108),), map_shape=(3, 6, 6))
    return [flat, sources[1]], classes


def labels_of(task: str, classes: np.ndarray) -> Labels:
    if task == "classification":
        return Labels(("a", "b", "c", "d"), classes)
    if task == "multi_label":
        return Labels(("odd", "high"), None, np.stack([classes % 2, classes // 2], axis=1).astype(np.float32))
    return Labels((), None, np.stack([5.0 * (classes % 2) + 100, classes // 2], axis=1).astype(np.float32))


KINDS = {
    "linear": HeadConfig(),
    "linear add": HeadConfig(fuse="add"),
    "mlp": HeadConfig("mlp", (32,)),
    "mlp gate": HeadConfig("mlp", (32, 16), "gelu", True, 0.1, fuse="gate"),
    "conv": HeadConfig("conv", channels=(8,), tap="t", batch_norm=True),
    "conv add": HeadConfig("conv", (16,), channels=(8, 8), tap="t", dropout=0.1, fuse="add"),
    "prototype": HeadConfig("prototype"),
}


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_head_learns_every_task(kind: str, task: str) -> None:
    config = KINDS[kind]
    sources, classes = map_rows() if config.kind == "conv" else rows()
    closed = config.kind == "prototype" or kind == "linear"
    repeated = kind in ("mlp gate", "conv add") and task == "multi_label"
    solver, epochs = ("lbfgs", 0) if closed else ("adamw", 40)
    spec = replace(SPEC, head=config, solver=solver, epochs=epochs, refit=closed or repeated)
    if config.kind == "conv":
        spec = replace(spec, embedding="slices", slices=("t.map",))
    result = train(sources, labels_of(task, classes), spec)
    assert result.head.task == task
    score = {"classification": "accuracy", "multi_label": "f1_macro", "regression": "r2"}[task]
    assert result.metrics[score] > (0.55 if config.kind in ("prototype", "conv") else 0.85), result.metrics
    assert all(np.isfinite(one) for one in result.metrics.values())
    data = head_to_bytes(result.head)
    assert head_to_bytes(head_from_bytes(data)) == data
    if repeated:
        again = train(sources, labels_of(task, classes), spec)
        assert hashlib.sha256(head_to_bytes(again.head)).digest() == hashlib.sha256(data).digest()


def test_slices_are_chosen_for_each_backbone_and_named_by_it() -> None:
    sources, classes = rows()
    remote = sources[0].tensor
    slices = (SliceSpec("noise", 0, 10), SliceSpec("pooled", 10, 30))
    first = Source("b", torch.cat([torch.randn(len(classes), 10), remote], dim=1), slices)
    second = Source("c", torch.cat([torch.randn(len(classes), 10), -remote], dim=1), slices)
    labels = labels_of("classification", classes)
    auto = train([first, second, sources[1]], labels, replace(SPEC, embedding="auto"))
    assert [one.slices for one in auto.head.inputs][2] == ("edge",)
    assert all("pooled" in one.slices for one in auto.head.inputs[:2])
    assert auto.candidates[0].slices == auto.head.inputs[0].slices
    behind = [one for one in auto.candidates if one.slices[0].startswith("c:")]
    assert behind == auto.candidates[-len(behind) :]
    assert behind[0].slices == tuple(f"c:{name}" for name in auto.head.inputs[1].slices)
    named = train(
        [first, second, sources[1]], labels, replace(SPEC, embedding="slices", slices=("pooled", "c:noise", "c:pooled"))
    )
    assert [one.slices for one in named.head.inputs] == [("pooled",), ("noise", "pooled"), ("edge",)]
    with pytest.raises(WireError, match="none of them of 'c'") as caught:
        train([first, second], labels, replace(SPEC, embedding="slices", slices=("pooled",)))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(WireError, match="'grid' is not part") as caught:
        train([first, second], labels, replace(SPEC, embedding="slices", slices=("pooled", "c:grid")))
    assert caught.value.code is ErrorCode.NOT_FOUND
    with pytest.raises(WireError, match=r"'grid' is not part.*edge") as caught:
        train([sources[1]], labels, replace(SPEC, embedding="slices", slices=("grid",)))
    assert caught.value.code is ErrorCode.NOT_FOUND


def test_a_map_is_standardised_by_channel_and_what_is_beside_it_by_column() -> None:
    draw = np.random.default_rng(0)
    maps = (
        draw.normal(size=(50, 2, 3, 4)) * np.array([5.0, 0.5])[:, None, None] + np.array([100.0, -2.0])[:, None, None]
    )
    beside = draw.normal(size=(50, 8)) * 7
    x = torch.from_numpy(np.concatenate([maps.reshape(50, -1), beside], axis=1).astype(np.float32))
    inputs = [HeadInput(("t.map",), (24,), (2, 3, 4)), HeadInput(("edge",), (2,)), HeadInput(("pooled",), (6,))]
    head = Head(HeadConfig("conv", channels=(4,), tap="t"), inputs, 2)
    head.mean, head.scale = input_statistics(x, inputs)
    np.testing.assert_allclose(head.mean[:2].numpy(), maps.mean(axis=(0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(head.scale[:2].numpy(), maps.std(axis=(0, 2, 3)), rtol=1e-4)
    scaled = head.standardise(x)
    for channel in scaled[:, :24].view(50, 2, 12).unbind(1):
        assert float(channel.mean()) == pytest.approx(0.0, abs=1e-3)
        assert float(channel.std()) == pytest.approx(1.0, rel=1e-2)
    variance = scaled[:, 24:].var(dim=0, correction=0)
    assert float(variance[:2].sum()) == pytest.approx(4.0, rel=1e-3)  # a narrow input counts like a wide one
    assert float(variance[2:].sum()) == pytest.approx(4.0, rel=1e-3)


def test_wide_maps_go_through_a_head_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, classes = map_rows(40)
    config = HeadConfig("conv", channels=(64,), tap="t")
    spec = replace(SPEC, head=config, solver="adamw", epochs=1, embedding="slices", slices=("t.map",))
    seen: list[int] = []
    forward = Head.forward_standardised

    def watch(head: Head, x_BD: torch.Tensor, *rest: torch.Generator) -> torch.Tensor:
        seen.append(len(x_BD))
        return forward(head, x_BD, *rest)

    monkeypatch.setattr(Head, "forward_standardised", watch)
    whole = train(sources[:1], labels_of("classification", classes), spec).metrics
    assert max(seen) == whole["num_train_rows"]
    monkeypatch.setattr(minibatch, "_PORTION_CELLS", 3 * 64 * 36)
    monkeypatch.setattr(minibatch, "_MIN_BATCH", 2)
    seen.clear()
    train(sources[:1], labels_of("classification", classes), spec)
    assert max(seen) == 4  # three, and a last one joined to them
    seen.clear()
    train(sources[:1], labels_of("classification", classes), replace(spec, batch_size=10))
    assert max(seen) == 10  # what the job says holds


def test_inputs_of_different_numbers_of_rows_are_refused() -> None:
    sources, classes = rows()
    short = Source("edge", sources[1].tensor[:-1], sources[1].slices, is_local=True)
    with pytest.raises(WireError, match="239 rows"):
        train([sources[0], short], labels_of("classification", classes), SPEC)


def test_a_row_that_one_input_lacks_is_named() -> None:
    sources, classes = rows()
    sources[1].tensor[17, 2] = float("inf")
    with pytest.raises(WireError, match="row 17") as caught:
        train(sources, labels_of("classification", classes), SPEC)
    assert caught.value.code is ErrorCode.NOT_FINITE


def test_several_labels_a_row_are_what_scikit_learn_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    x = draw.normal(size=(150, 6)).astype(np.float32)
    truth = (x @ draw.normal(size=(6, 3)) + draw.normal(size=(150, 3)) > 0.3).astype(np.float32)
    result = train([backbone(x)], Labels(("a", "b", "c"), None, truth), replace(SPEC, l2=2.0, validation_fraction=0.0))
    head = result.head.head
    standardised = head.standardise(torch.from_numpy(x)).numpy()
    for label in range(3):
        own = linear_model.LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(standardised, truth[:, label])
        np.testing.assert_allclose(head.output.weight[label].numpy(), own.coef_[0], atol=1e-3)
        assert float(head.output.bias[label]) == pytest.approx(own.intercept_[0], abs=1e-3)
    assert result.metrics["converged"] == 1.0


@pytest.mark.parametrize("solver", ["lbfgs", "adamw"])
def test_a_few_wild_targets_do_not_impress_hubers_loss(solver: str) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 5)).astype(np.float32)
    clean = x @ draw.normal(size=(5, 2)) + 7
    wild = clean.copy()
    wild[::20] += 200
    labels = Labels((), None, wild.astype(np.float32))
    off = {}
    for loss in ("mse", "huber"):
        spec = replace(
            SPEC,
            solver=solver,
            loss=LossConfig(loss, huber_delta=0.05),
            l2=0.1,
            epochs=150,
            validation_fraction=0.0,
            seed=1,
        )
        off[loss] = np.abs(train([backbone(x)], labels, spec).head.predict(torch.from_numpy(x)).numpy() - clean).mean()
    assert off["mse"] > 5
    assert off["huber"] < 0.3 * off["mse"]


@pytest.mark.parametrize("solver", ["lbfgs", "adamw"])
def test_nor_do_they_decide_how_strong_the_penalty_is(solver: str) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 5)).astype(np.float32)
    clean = x @ draw.normal(size=(5, 2)) + 7
    wild = clean.copy()
    wild[::20] += 200
    spec = replace(SPEC, solver=solver, loss=LossConfig("huber", huber_delta=0.05), epochs=150, validation_fraction=0.0)
    head = train([backbone(x)], Labels((), None, wild.astype(np.float32)), spec).head
    assert np.abs(head.predict(torch.from_numpy(x)).numpy() - clean).mean() < 0.15 * clean.std()


def test_the_penalty_of_several_labels_is_near_the_best_there_is() -> None:
    own = best = 0.0
    for seed in range(3):
        draw = np.random.default_rng(seed)
        x = draw.normal(size=(1150, 60)).astype(np.float32)
        logits = x @ draw.normal(size=(60, 3)) / 4 + 0.5 * draw.normal(size=(1150, 3))
        truth = (logits > 1).astype(np.float32)
        labels = Labels(("a", "b", "c"), None, truth[:150])
        losses = []
        for l2 in (-1.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
            head = train([backbone(x[:150])], labels, replace(SPEC, l2=l2, validation_fraction=0.0)).head.head
            outputs = head(torch.from_numpy(x[150:]))
            losses.append(measure("multi_label", outputs, torch.from_numpy(truth[150:]))["binary_cross_entropy"])
        own, best = own + losses[0], best + min(losses)
    assert own < 1.05 * best


def test_the_metrics_of_several_labels_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    logits, truth = draw.normal(size=(40, 4)), draw.integers(2, size=(40, 4))
    got = measure("multi_label", torch.from_numpy(logits), torch.from_numpy(truth).float())
    said = logits > 0
    assert got["subset_accuracy"] == pytest.approx(metrics.accuracy_score(truth, said))
    assert got["f1_micro"] == pytest.approx(metrics.f1_score(truth, said, average="micro"))
    assert got["f1_macro"] == pytest.approx(metrics.f1_score(truth, said, average="macro"))
    probability = 1 / (1 + np.exp(-logits))
    losses = [metrics.log_loss(truth[:, one], probability[:, one]) for one in range(4)]
    assert got["binary_cross_entropy"] == pytest.approx(np.mean(losses))
    assert measure("multi_label", torch.from_numpy(logits[:0]), torch.from_numpy(truth[:0]).float()) == {}
    silent = measure("multi_label", torch.full((3, 2), -1.0), torch.zeros(3, 2))
    assert (silent["f1_micro"], silent["f1_macro"], silent["subset_accuracy"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1, 0], [0, 0], [1, 0], [0, 0]], "no row is with 'b'"),
        ([[1, 0], [1, 1], [1, 0], [1, 1]], "no row is without 'a'"),
        ([[1, 0], [0, 2], [1, 0], [0, 1]], "row 1 has a label"),
        ([[1], [0], [1], [0]], "one column per class"),
    ],
)
def test_labels_that_tell_nothing_apart_are_refused(targets: list, message: str) -> None:
    labels = Labels(("a", "b"), None, np.array(targets, dtype=np.float32))
    with pytest.raises(WireError, match=message) as caught:
        train([backbone(np.zeros((4, 3)))], labels, SPEC)
    assert caught.value.code is ErrorCode.BAD_LABELS


def test_a_rare_label_stays_on_the_training_side() -> None:
    truth = np.zeros((60, 2), dtype=np.float32)
    truth[::2, 0] = 1
    truth[7, 1] = 1
    x = np.random.default_rng(0).normal(size=(60, 4))
    for seed in range(8):
        spec = replace(SPEC, seed=seed, validation_fraction=0.5, l2=1.0, refit=False, calibrate=False)
        result = train([backbone(x)], Labels(("a", "rare"), None, truth), spec)
        assert result.metrics["num_train_rows"] in (30, 31)
        # Without its row the intercept would say that it is ten times rarer.
        assert float(result.head.predict(torch.zeros(1, 4))[0, 1]) > 0.01


def test_a_prototype_is_right_after_one_row_a_class() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(5, 40)) * 3
    x = (centres[np.arange(5)] + draw.normal(size=(5, 40))).astype(np.float32)
    spec = replace(SPEC, head=HeadConfig("prototype"), validation_fraction=0.0)
    head = train([backbone(x)], Labels(tuple("abcde"), np.arange(5)), spec).head
    others = (centres[np.arange(50) % 5] + draw.normal(size=(50, 40))).astype(np.float32)
    assert (head.predict(torch.from_numpy(others)).argmax(1).numpy() == np.arange(50) % 5).mean() > 0.9


def test_a_label_of_a_single_row_does_not_make_a_prototype_of_rounding() -> None:
    """Left out, nothing of its row remains: the answers must not hang on the digits that happen to be left."""
    for seed in range(6):
        x = torch.from_numpy(np.random.default_rng(seed).normal(size=(60, 8)))
        truth = torch.zeros(60, 1)
        truth[11] = 1
        single, double = (
            fit_prototypes(one, "multi_label", truth, 1, 0.0, check=lambda: None) for one in (x.float(), x)
        )
        for one, other in zip(single, double, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_batch_normalisation_on_a_single_row_is_refused() -> None:
    spec = replace(
        SPEC, head=HeadConfig("mlp", (8,), batch_norm=True), solver="adamw", epochs=2, validation_fraction=0.9
    )
    labels = Labels((), None, np.arange(3, dtype=np.float32)[:, None])
    with pytest.raises(WireError, match="single row") as caught:
        train([backbone(np.random.default_rng(0).normal(size=(3, 4)))], labels, spec)
    assert caught.value.code is ErrorCode.BAD_LABELS


def test_a_last_batch_of_one_row_is_joined_to_the_one_before() -> None:
    sources, classes = rows(65)
    spec = replace(
        SPEC, head=HeadConfig("mlp", (8,), batch_norm=True), solver="adamw", batch_size=16, epochs=3, refit=False
    )
    result = train(sources, labels_of("classification", classes), replace(spec, validation_fraction=0.0))
    assert np.isfinite(result.metrics["train_cross_entropy"])
