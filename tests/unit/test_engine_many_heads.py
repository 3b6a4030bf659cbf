"""Many models behind one pass of the trunk: a thousand in a batch, more than fit memory, and bad ones among them."""

import asyncio
import functools
import hashlib

import engines
import numpy as np
import pytest
import torch
from drawn_heads import drawn_head
from small_backbones import SIZE, small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import INPUT_CUT, SliceSpec
from trunkline_worker.engine.batcher import Part, Rows
from trunkline_worker.engine.choice import Prepared
from trunkline_worker.engine.compute import Compute, Work
from trunkline_worker.engine.multihead import Columns
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.stacking import pack
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.records import ModelRecord

POOLED = HeadInput(("pooled",), (16,))

with_engine = functools.partial(engines.with_engine, patience_s=120)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(f"file://{tmp_path}/store")


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, size=(1000, SIZE, SIZE, 3), dtype=np.uint8)


def space_of(backbone):
    spec = backbone.describe(SIZE)
    return spec.space(spec.cut(INPUT_CUT))


def registered(backbone, blobs, head, data=None):
    """Store a head, or other bytes in its place, and return its model."""
    data = head_to_bytes(head) if data is None else data
    sha256 = hashlib.sha256(data).hexdigest()
    blobs.put(head_path(sha256), data)
    return ModelRecord(
        tenant="me",
        name="m",
        version=1,
        task=head.task,
        class_names=head.class_names,
        num_outputs=head.num_outputs,
        space=space_of(backbone),
        embedding_fingerprint=backbone.describe(SIZE).embedding_fingerprint,
        slices=head.slices,
        metrics={},
        dataset="d@1",
        dataset_digest="",
        head_sha256=sha256,
        versions={},
        job_id="job",
        create_time=0.0,
        head=head.config,
    )


def registered_many(backbone, blobs, num_heads, config=None):
    heads = [drawn_head(config, (POOLED,), seed=seed) for seed in range(num_heads)]
    return heads, [registered(backbone, blobs, one) for one in heads]


def predicted_at_once(engine, space, pictures, models):
    """Ask every model about a row of its own, all at the same time."""
    calls = [engine.predict(space, pictures[row : row + 1], model) for row, model in enumerate(models)]
    return asyncio.gather(*calls, return_exceptions=True)


class Counted:
    """A trunk whose embedding is what went in, and which counts its passes."""

    name = "counted"

    def __init__(self):
        self.passes = []

    def run(self, features):
        self.passes.append(len(features))
        return torch.from_numpy(features)


def test_a_thousand_rows_of_as_many_models_are_one_pass_of_the_trunk_and_one_of_the_heads():
    runtime, compute = Counted(), Compute(ManualClock())
    heads = [drawn_head(inputs=(POOLED,), seed=seed) for seed in range(1000)]
    prepared, columns = Prepared(runtime, 0.0), Columns([SliceSpec("pooled", 0, 16)])
    features = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    parts = [
        Part(Rows(features[row : row + 1]), Work(prepared, columns, ("pooled",), f"head {row}", pack(head)))
        for row, head in enumerate(heads)
    ]
    results = compute.run(parts)
    assert runtime.passes == [1000]
    assert (compute.trunk_calls, compute.trunk_rows, compute.head_calls, compute.stacked_calls) == (1, 1000, 1000, 1)
    for row, (head, result) in enumerate(zip(heads, results, strict=True)):
        expected = head.predict(torch.from_numpy(features[row : row + 1])).numpy()
        np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-6)


def test_a_thousand_models_cost_no_more_passes_of_the_trunk_than_one(backbone, blobs, pictures):
    heads, models = registered_many(backbone, blobs, 1000)
    space = space_of(backbone)

    async def test(engine):
        embedding = torch.from_numpy((await engine.extract(space, pictures, ("pooled",))).embedding_BD)
        await predicted_at_once(engine, space, pictures, models)  # warm: all are in memory
        before = await engine.stats()
        assert before.head_loads == before.heads_kept == 1000
        assert before.head_bytes == sum(one.size_bytes for one in heads)
        await predicted_at_once(engine, space, pictures, models[:1] * 1000)
        between = await engine.stats()
        assert between.stacked_calls == before.stacked_calls
        results = await predicted_at_once(engine, space, pictures, models)
        after = await engine.stats()
        assert after.head_loads == 1000
        passes = after.trunk_calls - between.trunk_calls
        assert max(passes, between.trunk_calls - before.trunk_calls) <= 1000 / 16
        assert passes - 2 <= after.stacked_calls - between.stacked_calls <= passes  # a batch of one row stacks nothing
        assert after.trunk_rows - between.trunk_rows == after.head_calls - between.head_calls == 1000
        for row, (head, result) in enumerate(zip(heads, results, strict=True)):
            assert not result.row_errors
            expected = head.predict(embedding[row : row + 1]).numpy()
            np.testing.assert_allclose(result.outputs_BK, expected, rtol=0, atol=1e-5)  # the trunk's own rounding

    with_engine(backbone, blobs, test)


def test_more_heads_than_memory_are_all_answered_one_after_another(backbone, blobs, pictures):
    heads, models = registered_many(backbone, blobs, 12)
    space = space_of(backbone)

    async def test(engine):
        embedding = torch.from_numpy((await engine.extract(space, pictures[:1], ("pooled",))).embedding_BD)
        for _ in range(2):
            for head, model in zip(heads, models, strict=True):
                result = await engine.predict(space, pictures[:1], model)
                np.testing.assert_allclose(result.outputs_BK, head.predict(embedding).numpy(), rtol=0, atol=1e-5)
        stats = await engine.stats()
        assert (stats.heads_kept, stats.head_bytes) == (5, 5 * heads[0].size_bytes)
        assert stats.head_loads == 24

    with_engine(backbone, blobs, test, head_bytes=5 * drawn_head(inputs=(POOLED,)).size_bytes + 1)


def test_more_heads_in_use_than_memory_send_the_rest_away_for_a_moment(backbone, blobs, pictures):
    heads, models = registered_many(backbone, blobs, 12)
    space = space_of(backbone)

    async def test(engine):
        embedding = torch.from_numpy((await engine.extract(space, pictures[:12], ("pooled",))).embedding_BD)
        results = await predicted_at_once(engine, space, pictures, models)
        refused = [one for one in results if isinstance(one, WireError)]
        assert len(refused) == 7
        assert all(one.code is ErrorCode.OVERLOADED and one.retry_delay_s for one in refused)
        for row, (head, result) in enumerate(zip(heads, results, strict=True)):
            if not isinstance(result, WireError):
                expected = head.predict(embedding[row : row + 1]).numpy()
                np.testing.assert_allclose(result.outputs_BK, expected, rtol=0, atol=1e-5)
        for row in range(12):  # nothing is in use any more
            await engine.predict(space, pictures[:1], models[row])
        assert (await engine.stats()).heads_kept == 5

    with_engine(backbone, blobs, test, head_capacity=5)


def test_a_head_stays_while_rows_wait_for_it(backbone, blobs, pictures):
    """A long request of one model goes on with its head while other models come and go."""
    heads, models = registered_many(backbone, blobs, 9)
    space = space_of(backbone)

    async def test(engine):
        embedding = torch.from_numpy((await engine.extract(space, pictures[:200], ("pooled",))).embedding_BD)
        expected = heads[0].predict(embedding).numpy()
        requests = others = 0
        while others <= 8:  # how many fit beside one long request is the machine's affair
            long = asyncio.ensure_future(engine.predict(space, pictures[:200], models[0]))  # two hundred batches
            requests += 1
            while not long.done():
                await engine.predict(space, pictures[:1], models[1 + others % 8])
                others += 1
            np.testing.assert_allclose((await long).outputs_BK, expected, rtol=0, atol=1e-5)
        # It was there all along: a long request loads its head once, however many others come and go.
        assert (await engine.stats()).head_loads <= requests + others

    with_engine(backbone, blobs, test, head_capacity=2, max_rows=1)


def test_bad_heads_fail_their_own_rows_only(backbone, blobs, pictures):
    good, models = registered_many(backbone, blobs, 3)
    space = space_of(backbone)
    overflowing = drawn_head(inputs=(POOLED,), seed=50)
    with torch.no_grad():
        overflowing.head.output.weight.fill_(3e38)
    data = head_to_bytes(drawn_head(inputs=(POOLED,), seed=51))
    unknown_kind = data.replace(b'\\"kind\\":\\"linear\\"', b'\\"kind\\":\\"quanta\\"')
    newer = data.replace(b'\\"format\\":2', b'\\"format\\":9')
    tampered = registered(backbone, blobs, drawn_head(inputs=(POOLED,), seed=52))
    blobs.put(head_path(tampered.head_sha256), data)
    bad = [
        (registered(backbone, blobs, good[0], unknown_kind), ErrorCode.CORRUPT_DATA, "quanta"),
        (registered(backbone, blobs, good[0], newer), ErrorCode.UNSUPPORTED, "format 9"),
        (registered(backbone, blobs, good[0], data[:-4]), ErrorCode.CORRUPT_DATA, "damaged"),
        (registered(backbone, blobs, good[0], b"no head"), ErrorCode.CORRUPT_DATA, "damaged"),
        (tampered, ErrorCode.CORRUPT_DATA, "SHA-256"),
    ]

    async def test(engine):
        embedding = torch.from_numpy((await engine.extract(space, pictures[:3], ("pooled",))).embedding_BD)
        everyone = [*models, registered(backbone, blobs, overflowing), *(model for model, _, _ in bad)]
        for _ in range(2):
            results = await predicted_at_once(engine, space, pictures, everyone)
            for row, (head, result) in enumerate(zip(good, results[:3], strict=True)):
                expected = head.predict(embedding[row : row + 1]).numpy()
                np.testing.assert_allclose(result.outputs_BK, expected, rtol=0, atol=1e-5)
                assert not result.row_errors
            assert {row: error.code for row, error in results[3].row_errors.items()} == {0: ErrorCode.NOT_FINITE}
            assert np.isnan(results[3].outputs_BK).all()
            for (_, code, words), error in zip(bad, results[4:], strict=True):
                assert isinstance(error, WireError)
                assert error.code is code
                assert words in error.message
        assert (await engine.stats()).heads_kept == 4

    with_engine(backbone, blobs, test)


def test_a_head_larger_than_all_the_memory_is_refused_with_the_setting_to_raise(backbone, blobs, pictures):
    wide = registered(backbone, blobs, drawn_head(HeadConfig("mlp", (50_000,)), (POOLED,)))
    (small,), (model,) = registered_many(backbone, blobs, 1)
    space = space_of(backbone)

    async def test(engine):
        with pytest.raises(WireError, match="head_memory_mb") as caught:
            await engine.predict(space, pictures[:1], wide)
        assert caught.value.code is ErrorCode.WORKER_OOM
        await engine.predict(space, pictures[:1], model)
        assert (await engine.stats()).head_bytes == small.size_bytes == pack(small).size_bytes

    with_engine(backbone, blobs, test, head_bytes=2**20)
