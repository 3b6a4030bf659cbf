"""The loop that trains a tail: what it learns, that it can be interrupted, and that workers share it fairly."""

import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch
from small_backbones import SIZE, small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import BATCH_NORM_ADAPT, BFLOAT16, FineTuneConfig, LossConfig, OptimiserConfig
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION
from trunkline_wire.specs import map_slice
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.mixup import Mixer
from trunkline_worker.training.progress import TrainingCancelled
from trunkline_worker.training.tuning.checkpoint import NoCheckpoints, progress_from_bytes
from trunkline_worker.training.tuning.learn import learn
from trunkline_worker.training.tuning.team import Alone, TorchTeam
from trunkline_worker.training.tuning.tune import TailSource
from trunkline_worker.training.tuning.work import StartHead, TuningWork, filled_in

NUM_ROWS = 37
CUT = "patch"
SLICES = ("blocks.1.mean", "pooled")


def maps_of(kind="places", cut=CUT):
    """Return maps of pictures that differ in where they are bright, and which half that is."""
    generator = torch.Generator().manual_seed(1)
    classes_N = torch.arange(NUM_ROWS) % 2
    images = torch.randint(0, 120, (NUM_ROWS, SIZE, SIZE, 3), generator=generator)
    for row, one in enumerate(classes_N):
        images[row, :, : SIZE // 2 if one else SIZE, 0] += 100
    with torch.no_grad():
        return small_backbone(kind).trunk("input", map_slice(cut))(images.to(torch.uint8)), classes_N


def work_for(task=CLASSIFICATION, *, kind="places", cut=CUT, slices=SLICES, num_outputs=2, truth=None, **changes):
    backbone = small_backbone(kind)
    spec = backbone.describe()
    width = sum(spec.slice_width(one) for one in slices)
    config = {name: changes.pop(name) for name in list(changes) if name in FineTuneConfig.__dataclass_fields__}
    job = JobSpec("m", "d", kind, SIZE, fine_tune=FineTuneConfig(cut=cut), **changes)
    if truth is None:
        truth = (np.arange(NUM_ROWS) % 2).astype(np.int64)
    index = np.arange(NUM_ROWS - 7, dtype=np.int64)
    return TuningWork(
        name="measure",
        config=filled_in(
            FineTuneConfig(**{"cut": cut, "epochs": 6, "batch_size": 8, "learning_rate": 0.01, **config}), 30
        ),
        spec=job,
        task=task,
        slices=slices,
        head_input=TailSource(spec.cut(cut), trainer=None).input,
        start=StartHead(
            np.zeros(width, np.float32),
            np.full(width, 0.2, np.float32),
            np.zeros((num_outputs, width), np.float32),
            np.zeros(num_outputs, np.float32),
        ),
        truth=truth,
        training_index=index,
        wanted_index=np.arange(NUM_ROWS, dtype=np.int64),
    )


class Kept(NoCheckpoints):
    """Checkpoints in memory."""

    def __init__(self, saved=None):
        self.saved = saved
        self.steps = []

    def latest(self):
        return self.saved

    def save(self, make, step):
        self.saved = make()
        self.steps.append(step)


def run(work, *, kind="places", team=None, checkpoints=None, stop_at=0, on_resumed=None):
    steps = []
    backbone = small_backbone(kind)
    maps_ND, _ = maps_of(kind, work.config.cut)
    learnt = learn(
        work,
        backbone.tail_for(work.head_config),
        maps_ND,
        team or Alone(),
        checkpoints or NoCheckpoints(),
        should_stop=lambda: bool(stop_at) and len(steps) >= stop_at,
        on_step=lambda step, told: steps.append(told),
        on_resumed=on_resumed,
    )
    return learnt, steps


def test_it_learns_what_the_frozen_blocks_do_not_say():
    work = work_for(epochs=30)
    learnt, steps = run(work)
    assert len(steps) == work.num_steps == 30 * 4
    loss = learnt.curves["tune_loss"]
    assert len(loss) == 30
    assert loss[0] > 0.5
    assert loss[-1] < 0.1
    assert (learnt.outputs_WK.argmax(axis=1) == work.truth).mean() > 0.9
    assert learnt.num_trained > 0


def test_equal_work_gives_equal_bytes():
    first, _ = run(work_for())
    second, _ = run(work_for())
    other, _ = run(work_for(seed=1))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert not all(torch.equal(first.tensors[name], other.tensors[name]) for name in first.tensors)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_is_resumed_ends_where_it_would_have(lora_rank, ema):
    work = work_for(lora_rank=lora_rank, optimiser=OptimiserConfig(ema=ema), epochs=8)
    whole, _ = run(work)
    kept = Kept()
    with pytest.raises(TrainingCancelled):
        run(work, checkpoints=kept, stop_at=17)
    assert kept.steps == [10]
    resumed_at = []
    rest, steps = run(work, checkpoints=kept, on_resumed=resumed_at.append)
    assert resumed_at == [10]
    assert len(steps) == work.num_steps - 10
    assert rest.num_resumed == 1
    assert rest.curves["tune_loss"] == pytest.approx(whole.curves["tune_loss"])
    for name, one in whole.tensors.items():
        torch.testing.assert_close(rest.tensors[name], one, rtol=0, atol=0)


def test_a_mixed_run_that_is_resumed_ends_where_it_would_have():
    work = work_for(optimiser=OptimiserConfig(mixup=0.5), epochs=8)
    whole, _ = run(work)
    kept = Kept()
    with pytest.raises(TrainingCancelled):
        run(work, checkpoints=kept, stop_at=17)
    rest, _ = run(work, checkpoints=kept)
    assert rest.num_resumed == 1
    for name, one in whole.tensors.items():
        torch.testing.assert_close(rest.tensors[name], one, rtol=0, atol=0)


def mixed_loss(work, step):
    """Return the loss of a step from where the run starts, by maps and labels mixed by hand."""
    maps_ND, _ = maps_of()
    generator = torch.Generator().manual_seed((work.spec.seed * 1_000_003) % 2**63)
    size = work.config.batch_size
    order_N = torch.from_numpy(work.training_index)[torch.randperm(len(work.training_index), generator=generator)]
    rows = order_N[step * size : (step + 1) * size]
    mix = Mixer(work.spec.optimiser.mixup, work.spec.seed, step).draw(len(rows), torch.device("cpu"))
    share, partners = mix.share, rows[mix.partner_B]
    assert 0.01 < share < 0.99 and not torch.equal(partners, rows)
    tail = small_backbone().tail_for(work.head_config)
    tail.draw(torch.Generator().manual_seed(work.spec.seed))
    head = work.make_head(tail).train()
    tail.adapt_norms(adapt=False)
    outputs = head(share * maps_ND[rows].float() + (1 - share) * maps_ND[partners].float())
    truth = torch.from_numpy(work.truth)
    weights = torch.tensor(work.spec.loss.class_weights or (1.0, 1.0))
    soft = share * torch.eye(2)[truth[rows]] * weights + (1 - share) * torch.eye(2)[truth[partners]] * weights
    return float(-(soft * outputs.detach().log_softmax(dim=1)).sum() / weights[truth[rows]].sum())


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_maps_and_labels_are_mixed_in_the_shares_drawn(weights):
    work = work_for(optimiser=OptimiserConfig(mixup=1.0), loss=LossConfig(class_weights=weights))
    draw = np.random.default_rng(0)
    width = work.start.weight_KE.shape
    # A head that says something: otherwise every row costs the same, mixed or not.
    work = dataclasses.replace(
        work, start=dataclasses.replace(work.start, weight_KE=draw.normal(size=width).astype(np.float32))
    )
    _, steps = run(work)
    assert steps[0]["loss"] == pytest.approx(mixed_loss(work, 0), rel=1e-4)
    _, plain = run(dataclasses.replace(work, spec=dataclasses.replace(work.spec, optimiser=OptimiserConfig())))
    assert plain[0]["loss"] != pytest.approx(steps[0]["loss"], rel=1e-2)


def test_mixed_runs_learn_and_follow_from_the_seed():
    optimiser = OptimiserConfig(mixup=0.2)
    first, _ = run(work_for(optimiser=optimiser, epochs=30))
    second, _ = run(work_for(optimiser=optimiser, epochs=30))
    plain, _ = run(work_for(epochs=30))
    assert (first.outputs_WK.argmax(axis=1) == work_for().truth).mean() > 0.9
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert not all(torch.equal(first.tensors[name], plain.tensors[name]) for name in first.tensors)
    # Between two labels lies a probability: what learns from it is less sure of itself.
    margins = [np.abs(one.outputs_WK[:, 0] - one.outputs_WK[:, 1]).mean() for one in (first, plain)]
    assert margins[0] < margins[1]


def test_mixed_labels_and_numbers_are_learnt_too():
    _, classes_N = maps_of()
    targets = np.stack([classes_N.numpy(), 1 - classes_N.numpy()], axis=1).astype(np.float32)
    optimiser = OptimiserConfig(mixup=0.2)
    learnt, _ = run(work_for(MULTI_LABEL, truth=targets, epochs=30, optimiser=optimiser))
    assert ((learnt.outputs_WK > 0) == targets).mean() > 0.85
    values = (10.0 * classes_N.numpy()[:, None]).astype(np.float32)
    learnt, _ = run(work_for(REGRESSION, truth=values, num_outputs=1, epochs=40, optimiser=optimiser))
    assert float(np.abs(learnt.outputs_WK - values).mean()) < 3.0


def test_discriminative_rates_move_deeper_stages_less():
    work = work_for(layer_decay=0.1)
    backbone = small_backbone()
    start = backbone.tail_for(work.head_config).state_dict()
    learnt, _ = run(work)
    moved = {
        name: float((one - start[name.removeprefix("tail.")]).abs().mean())
        for name, one in learnt.tensors.items()
        if name.endswith("blocks.0.0.weight") or name.endswith("blocks.3.0.weight")
    }
    shallow, deep = (next(value for name, value in moved.items() if key in name) for key in ("blocks.3", "blocks.0"))
    assert deep < 0.3 * shallow


def test_frozen_statistics_stay_and_adapted_ones_move():
    for batch_norm, moves in ((None, False), (BATCH_NORM_ADAPT, True)):
        config = {} if batch_norm is None else {"batch_norm": batch_norm}
        work = work_for(kind="large", cut="first", slices=("pooled",), learning_rate=1e-4, **config)
        start = small_backbone("large").tail_for(work.head_config).state_dict()
        learnt, _ = run(work, kind="large")
        name = next(one for one in learnt.tensors if one.endswith("running_mean"))
        assert torch.equal(learnt.tensors[name], start[name.removeprefix("tail.")]) is not moves


def test_regression_comes_back_in_the_targets_own_unit():
    _, classes_N = maps_of()
    truth = (1000.0 + 50.0 * classes_N.numpy()[:, None]).astype(np.float32)
    work = work_for(REGRESSION, truth=truth, num_outputs=1, epochs=40)
    work = dataclasses.replace(work, start=dataclasses.replace(work.start, bias_K=np.array([1020.0], np.float32)))
    learnt, _ = run(work)
    assert float(np.abs(learnt.outputs_WK - truth).mean()) < 12.0


def test_labels_weights_and_low_precision_run():
    _, classes_N = maps_of()
    targets = np.stack([classes_N.numpy(), 1 - classes_N.numpy(), classes_N.numpy()], axis=1).astype(np.float32)
    learnt, _ = run(work_for(MULTI_LABEL, truth=targets, num_outputs=3, epochs=20, loss=LossConfig(balanced=True)))
    assert ((learnt.outputs_WK > 0) == targets).mean() > 0.8
    learnt, _ = run(work_for(loss=LossConfig(class_weights=(1.0, 3.0)), optimiser=OptimiserConfig(precision=BFLOAT16)))
    assert np.isfinite(learnt.outputs_WK).all()


def test_a_loss_that_is_no_longer_finite_ends_the_run():
    work = work_for(learning_rate=1.0, optimiser=OptimiserConfig(clip_norm=0.0), epochs=60)
    work = dataclasses.replace(
        work, start=dataclasses.replace(work.start, weight_KE=np.full_like(work.start.weight_KE, 1e38))
    )
    with pytest.raises(WireError) as caught:
        run(work)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "learning rate below" in caught.value.message


def test_a_checkpoint_of_something_else_is_refused():
    kept = Kept()
    run(work_for(), checkpoints=kept)
    with pytest.raises(WireError) as caught:
        run(work_for(lora_rank=2), checkpoints=kept)
    assert caught.value.code is ErrorCode.CORRUPT_DATA
    with pytest.raises(WireError) as caught:
        progress_from_bytes(kept.saved[:-100])
    assert caught.value.code is ErrorCode.CORRUPT_DATA


def _join(rank, size, folder, work, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        learnt, _ = run(work, team=TorchTeam("cpu"))
        if rank == 0:
            results.put({name: one.numpy() for name, one in learnt.tensors.items()} | {"": learnt.outputs_WK})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("weights", "mixup"), [((), 0.0), ((1.0, 5.0), 0.0), ((), 0.5), ((1.0, 5.0), 0.5)])
def test_two_workers_take_the_steps_of_one(tmp_path, weights, mixup, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    # Batches of 7 of 29 rows, which two cannot share evenly; the last has a single row.
    loss, optimiser = LossConfig(class_weights=weights), OptimiserConfig(mixup=mixup)
    work = work_for(loss=loss, optimiser=optimiser, batch_size=7, epochs=4)
    work = dataclasses.replace(work, training_index=work.training_index[:29])
    alone, _ = run(work)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_join, args=(rank, 2, tmp_path, work, results)) for rank in range(2)]
    for one in workers:
        one.start()
    together = results.get(timeout=120)
    for one in workers:
        one.join(timeout=60)
        assert one.exitcode == 0
    np.testing.assert_allclose(together.pop(""), alone.outputs_WK, rtol=1e-3, atol=1e-3)
    for name, one in together.items():
        np.testing.assert_allclose(one, alone.tensors[name].numpy(), rtol=1e-3, atol=1e-3)
