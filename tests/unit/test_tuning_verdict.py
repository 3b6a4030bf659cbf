"""Fine-tuning as a step of a job: kept only where it helps, and then served with the numbers it was judged by."""

import asyncio
import dataclasses
import functools
import hashlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from small_backbones import SIZE, Tokens
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import FineTuneConfig, LossConfig
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION, TAIL, HeadConfig
from trunkline_wire.specs import Preprocessing
from trunkline_worker.backbones.backbone import Backbone, WeightsInfo, sha256_of
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.heads.artefact import head_from_bytes, head_path, head_to_bytes, own_state
from trunkline_worker.heads.stacking import packed_from_bytes
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.records import JobSpec, ModelRecord
from trunkline_worker.training.loop import Labels, Source, train_head
from trunkline_worker.training.progress import TrainingCancelled
from trunkline_worker.training.spec import check_spec
from trunkline_worker.training.tuning.compare import compare
from trunkline_worker.training.tuning.local import LocalTailTrainer
from trunkline_worker.training.tuning.tune import TailSource

CUT = "patch"
NUM_ROWS = 200


class _Blocks(nn.Sequential):
    """A few blocks of 1x1 convolutions, whose outputs are about as large as their inputs."""

    def __init__(self):
        layers = OrderedDict(patch=nn.Conv2d(3, 8, 4, 4))
        for number in range(3):
            block = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))
            layers[f"block{number}"] = block
        super().__init__(layers)
        for one in self.modules():
            if isinstance(one, nn.Conv2d):
                nn.init.orthogonal_(one.weight, 1.4)
                nn.init.zeros_(one.bias)
        self.mean, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)


_SmallTokens = functools.partial(Tokens, width=8, num_layers=3)


def make_backbone(kind=_Blocks):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind()
    preprocessing = Preprocessing(SIZE, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Backbone("blocks", network, preprocessing, WeightsInfo("random", pretrained=False), sha256_of(network))


class Bench:
    """Pictures of two classes, what a small backbone makes of them, and who trains its last blocks."""

    def __init__(self, kind=_Blocks):
        self.backbone = make_backbone(kind)
        self.spec = self.backbone.describe()
        generator = torch.Generator().manual_seed(3)
        bright_N3 = torch.rand((NUM_ROWS, 3), generator=generator)
        # Either red or green: nothing that a linear head says from what is nearly their means.
        self.classes = ((bright_N3[:, 0] > 0.5) ^ (bright_N3[:, 1] > 0.5)).long().numpy()
        images = torch.randint(0, 40, (NUM_ROWS, SIZE, SIZE, 3), generator=generator)
        images += (200 * bright_N3[:, None, None]).long()
        self.images = images.to(torch.uint8)
        with torch.no_grad():
            self.embedding = self.backbone.trunk("input")(self.images)
            self.maps = self.backbone.trunk("input", self.spec.cut(CUT).whole_slice)(self.images)
        self.cuts = []

    def tail(self):
        cut = self.spec.cut(CUT)
        return TailSource(cut, LocalTailTrainer(self.backbone, self._read))

    def _read(self, cut):
        self.cuts.append(cut)
        return self.maps

    def train(self, labels=None, *, should_stop=lambda: False, **changes):
        if labels is None:
            labels = Labels(("even", "odd"), self.classes, None)
        config = FineTuneConfig(
            **{"cut": CUT, "epochs": 40, "batch_size": 16, "learning_rate": 0.01, **changes.pop("config", {})}
        )
        spec = JobSpec("m", "d", "blocks", SIZE, **{"embedding": "pooled", "fine_tune": config, **changes})
        events = []
        result = train_head(
            [Source("blocks", self.embedding.numpy(), self.spec.slices)],
            labels,
            spec,
            tail=self.tail(),
            on_event=events.append,
            should_stop=should_stop,
        )
        return result, events


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(
    scope="module",
    params=[(_Blocks, 0), (_Blocks, 3), (_SmallTokens, 0), (_SmallTokens, 3)],
    ids=["all-weights", "low-rank", "tokens-all-weights", "tokens-low-rank"],
)
def kept(bench, request):
    kind, rank = request.param
    own = bench if kind is _Blocks else Bench(kind)
    result, events = own.train(config={"lora_rank": rank})
    return result, events, rank, own


def test_blocks_that_help_are_kept_and_say_why(kept):
    result, events, rank, bench = kept
    record = result.tuning
    assert record.kept
    assert record.cut == CUT
    assert record.low > 0
    assert "kept: better beyond chance" in record.reason
    assert record.after["accuracy"] > record.before["accuracy"]
    assert result.metrics["accuracy"] == record.after["accuracy"]
    assert result.head.config == HeadConfig(TAIL, tap=CUT, slices=("pooled",), lora_rank=rank)
    assert result.head.slices == (bench.spec.cut(CUT).whole_slice,)
    assert [one for one in events if one.phase == "tune"][-1].message.startswith(f"the blocks behind {CUT} are kept")
    assert "tune_loss" in result.evaluation.curves
    # Trained once more on every row, and right about them.
    said = result.head.predict(bench.maps).argmax(dim=1).numpy()
    assert (said == bench.classes).mean() > 0.95


def test_a_file_gives_the_same_answers_and_low_rank_a_small_one(kept):
    result, _, rank, bench = kept
    data = head_to_bytes(result.head)
    again = packed_from_bytes(data, make_tail=bench.backbone.tail_for)
    torch.testing.assert_close(again.predict(bench.maps), result.head.predict(bench.maps), rtol=1e-4, atol=1e-5)
    blocks = sum(one.numel() for one in bench.backbone.tail(CUT, ("pooled",)).parameters())
    kept_numbers = sum(one.numel() for name, one in own_state(result.head.head).items() if name.startswith("tail."))
    assert (kept_numbers < blocks) == bool(rank)
    with pytest.raises(WireError) as caught:
        head_from_bytes(data)
    assert caught.value.code is ErrorCode.UNSUPPORTED
    damaged = data[:-4] + np.float32(np.nan).tobytes()
    with pytest.raises(WireError) as caught:
        head_from_bytes(damaged, make_tail=bench.backbone.tail_for)
    assert caught.value.code is ErrorCode.CORRUPT_DATA


def test_an_engine_serves_it_beside_plain_heads_on_one_trunk(kept, tmp_path):
    result, _, _, bench = kept
    plain, _ = bench.train(fine_tune=None)
    blobs = BlobStore(f"file://{tmp_path}")
    space = bench.spec.space(bench.spec.cut("input"))
    models = []
    for name, one in (("tuned", result), ("plain", plain)):
        data = head_to_bytes(one.head)
        sha256 = hashlib.sha256(data).hexdigest()
        blobs.put(head_path(sha256), data)
        models.append(
            ModelRecord(
                *("t", name, 1, CLASSIFICATION, ("even", "odd"), 2, space, bench.spec.embedding_fingerprint),
                *(one.head.slices, {}, "d@1", "", sha256, {}, "j", 0.0),
                head=one.head.config,
            )
        )

    async def ask():
        engine = LocalEngine(
            bench.backbone, blobs, clock=ManualClock(), num_threads=1, use_onnx=False, runtime="torch-fp32"
        )
        await engine.start()
        try:
            images = bench.images.numpy()
            return await asyncio.gather(*(engine.predict(space, images, one) for one in models))
        finally:
            await engine.close()

    tuned, other = asyncio.run(ask())
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(tuned.outputs_BK), result.head.predict(bench.maps), rtol=1e-3, atol=1e-4
        )
    assert (tuned.outputs_BK.argmax(axis=1) == bench.classes).mean() > (
        other.outputs_BK.argmax(axis=1) == bench.classes
    ).mean()


def test_what_may_be_chance_is_not_kept(bench):
    generator = np.random.default_rng(0)
    result, events = bench.train(
        Labels(("a", "b"), generator.permutation(bench.classes), None), config={"lora_rank": 1}
    )
    assert not result.tuning.kept
    assert result.tuning.reason.startswith("not kept")
    assert result.head.config.kind == "linear"
    assert result.metrics["accuracy"] == result.tuning.before["accuracy"]
    assert any("not kept" in one.message for one in events)


def test_numbers_and_labels(bench):
    targets = (3.0 + 10.0 * bench.classes[:, None]).astype(np.float32)
    result, _ = bench.train(Labels((), None, targets))
    assert result.tuning.kept
    assert result.tuning.metric == "mse"
    assert result.metrics["r2"] == result.tuning.after["r2"] > result.tuning.before["r2"]
    both = np.stack([bench.classes, 1 - bench.classes], axis=1).astype(np.float32)
    result, _ = bench.train(Labels(("odd", "even"), None, both), refit=False)
    assert result.tuning.kept
    assert result.head.task == MULTI_LABEL


def test_it_stops_when_told(bench):
    asked = iter(range(10_000))
    with pytest.raises(TrainingCancelled):
        bench.train(should_stop=lambda: next(asked) > 60)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"head": HeadConfig("mlp", (8,)), "solver": "adamw"}, ErrorCode.INVALID_ARGUMENT),
        ({"head": HeadConfig(TAIL, tap=CUT, slices=("pooled",))}, ErrorCode.INVALID_ARGUMENT),
        ({"validation_fraction": 0.0}, ErrorCode.INVALID_ARGUMENT),
        ({"loss": LossConfig(class_order=("a", "b", "c"))}, ErrorCode.UNSUPPORTED),
    ],
)
def test_jobs_that_cannot_be_are_refused_before_anything_is_read(changes, code):
    spec = dataclasses.replace(JobSpec("m", "d", "blocks", SIZE, fine_tune=FineTuneConfig(cut=CUT)), **changes)
    with pytest.raises(WireError) as caught:
        check_spec(spec)
    assert caught.value.code is code


def test_slices_before_the_cut_are_refused(bench):
    tail = dataclasses.replace(bench.tail(), cut=dataclasses.replace(bench.spec.cut(CUT), slices=("pooled",)))
    spec = JobSpec(
        "m", "d", "blocks", SIZE, embedding="slices", slices=("block9.mean",), fine_tune=FineTuneConfig(cut=CUT)
    )
    source = Source("blocks", bench.embedding.numpy(), bench.spec.slices)
    labels = Labels(("even", "odd"), bench.classes, None)
    for given, code in ((tail, ErrorCode.INVALID_ARGUMENT), (None, ErrorCode.UNSUPPORTED)):
        with pytest.raises(WireError) as caught:
            train_head([source], labels, spec, tail=given, on_event=lambda _: None, should_stop=lambda: False)
        assert caught.value.code is code


def test_models_are_compared_at_the_temperature_that_suits_each():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (400,), generator=generator)
    outputs = torch.randn(400, 3, generator=generator)
    outputs[torch.arange(400), truth] += 1.5

    def judge(before, after, task=CLASSIFICATION, truth=truth, select_by=""):
        return compare(task, select_by, before, after, truth, np.random.default_rng(0))

    # The same model, only less sure of itself.
    same = judge(outputs, outputs * 3.0)
    assert not same.is_better
    assert abs(same.gain) < 1e-3
    better = outputs.clone()
    better[torch.arange(400), truth] += 1.0
    assert judge(outputs, better).is_better
    assert judge(outputs, better, select_by="accuracy").metric == "accuracy"
    assert judge(better, outputs).reason.startswith("not kept: worse")
    assert judge(outputs, better, select_by="roc_auc").metric == "cross_entropy"
    numbers = torch.randn(50, 2, generator=generator)
    assert judge(numbers + 1.0, numbers, REGRESSION, numbers).is_better
    one = judge(outputs[:1], better[:1], truth=truth[:1])
    assert not one.is_better
    assert "too few held-out rows" in one.reason and "inf" not in one.reason


def test_several_numbers_count_alike_whatever_they_are_measured_in():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(300, 2, generator=generator) * torch.tensor([1.0, 1000.0])
    noise = torch.randn(300, 2, generator=generator)
    before, after = truth + noise * torch.tensor([1.0, 10.0]), truth + noise * torch.tensor([0.1, 20.0])
    verdict = compare(REGRESSION, "", before, after, truth, np.random.default_rng(0))
    assert verdict.is_better and "standard deviations" in verdict.reason
    alone = compare(REGRESSION, "", before[:, 1:], after[:, 1:], truth[:, 1:], np.random.default_rng(0))
    assert not alone.is_better and "standard deviations" not in alone.reason
