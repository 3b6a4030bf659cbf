"""The trunk as a function with a gradient, in this process."""

import asyncio
import functools

import engines
import numpy as np
import pytest
import torch
from small_backbones import small_backbone
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import pack
from trunkline_wire.specs import FeatureSpace, local_space
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine import graphs
from trunkline_worker.engine.graphs import Function, Graphs
from trunkline_worker.store.blobs import BlobStore

with_engine = functools.partial(engines.with_engine, patience_s=120)
SIZE = 64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def resnet():
    return load_backbone("resnet18", allow_untrained=True)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(f"file://{tmp_path}/store")


def features_at(backbone, cut, rows, size):
    with torch.inference_mode():
        return backbone.stem(cut)(sample_images(rows, size, 0)).contiguous().numpy()


def relative(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def reference(module, features, gradient, decoder=None):
    """Differentiate with torch alone."""
    leaf = torch.from_numpy(features.copy()).requires_grad_()
    layer = [] if decoder is None else [torch.from_numpy(one.copy()).requires_grad_() for one in decoder]
    x = leaf * 1
    if layer:
        x = torch.nn.functional.conv2d(x, layer[0][:, :, None, None], layer[1])
    outputs = module(x)
    return outputs.detach().numpy(), [one.numpy() for one in torch.autograd.grad(outputs, [leaf, *layer], gradient)]


@pytest.mark.parametrize("outputs", [(), ("logits",), ("layer3.std", "pooled"), ("layer2.grid",)])
def test_outputs_and_gradients_are_torchs_own(resnet, blobs, outputs):
    spec = resnet.describe(SIZE)
    cut = spec.cut("layer2")
    features = features_at(resnet, "layer2", 5, SIZE)
    module = resnet.rest("layer2") if outputs == ("logits",) else resnet.reader("layer2", outputs or ("pooled",))

    async def test(engine):
        answer = (await engine.forward(spec.space(cut), features, outputs)).outputs_BD
        gradient = np.random.default_rng(0).normal(size=answer.shape).astype(np.float32)
        expected, (wanted,) = reference(module, features, torch.from_numpy(gradient))
        assert relative(answer, expected) < 1e-5
        got = await engine.backward(spec.space(cut), features, gradient, outputs)
        assert relative(got.features, wanted) < 1e-5
        assert got.decoder is None
        again = await engine.backward(spec.space(cut), features, gradient, outputs)
        assert np.array_equal(got.features, again.features)

    # Two rows at a time: five make three slices.
    with_engine(resnet, blobs, test, max_rows=2 * SIZE**2 // 224**2 or 1)


def test_a_decoder_by_value_gets_its_gradient_over_all_rows(resnet, blobs):
    spec = resnet.describe(SIZE)
    cut = spec.cut("layer2")
    draw = np.random.default_rng(1)
    decoder = ChannelLinear(draw.normal(size=(128, 5)).astype(np.float32), draw.normal(size=128).astype(np.float32))
    codes = draw.normal(size=(5, 5, 8, 8)).astype(np.float32)
    gradient = draw.normal(size=(5, 512)).astype(np.float32)
    expected, wanted = reference(
        resnet.reader("layer2", ("pooled",)), codes, torch.from_numpy(gradient), (decoder.weight, decoder.bias)
    )

    async def test(engine):
        answer = await engine.forward(spec.space(cut), codes, decoder=decoder)
        assert relative(answer.outputs_BD, expected) < 1e-5
        got = await engine.backward(spec.space(cut), codes, gradient, decoder=decoder)
        assert relative(got.features, wanted[0]) < 1e-5
        assert relative(got.decoder.weight, wanted[1]) < 1e-5
        assert relative(got.decoder.bias, wanted[2]) < 1e-5

    with_engine(resnet, blobs, test)


@pytest.mark.parametrize("cut", ["patch", "norm", "blocks.3", "flatten", "mean"])
def test_features_of_every_rank_have_a_gradient(blobs, cut):
    backbone = small_backbone()
    spec = backbone.describe()
    features = features_at(backbone, cut, 3, 32)

    async def test(engine):
        space = spec.space(spec.cut(cut))
        answer = (await engine.forward(space, features, ("logits",))).outputs_BD
        gradient = np.ones_like(answer)
        expected, (wanted,) = reference(backbone.rest(cut), features, torch.from_numpy(gradient))
        assert relative(answer, expected) < 1e-5
        assert relative((await engine.backward(space, features, gradient, ("logits",))).features, wanted) < 1e-5
        packed = pack(features, "bfloat16", 0)
        assert (await engine.forward(space, packed)).outputs_BD.shape[0] == 3

    with_engine(backbone, blobs, test)


def test_what_has_no_gradient_is_refused_before_anything_runs(resnet, blobs):
    spec = resnet.describe(SIZE)
    space = spec.space(spec.cut("layer2"))
    features = features_at(resnet, "layer2", 3, SIZE)
    gradient = np.ones((3, 512), np.float32)
    bad = features.copy()
    bad[1, 0, 0, 0] = np.nan
    wrong = gradient.copy()
    wrong[2, 7] = np.inf
    narrow = ChannelLinear(np.ones((64, 5), np.float32), np.ones(64, np.float32))

    async def test(engine):
        async def refused(call, code, *parts):
            with pytest.raises(WireError) as caught:
                await call
            assert caught.value.code is code, caught.value
            for part in parts:
                assert part in caught.value.message

        await refused(engine.forward(space, bad), ErrorCode.NOT_FINITE, "1")
        await refused(engine.backward(space, bad, gradient), ErrorCode.NOT_FINITE, "1")
        await refused(engine.backward(space, features, wrong), ErrorCode.NOT_FINITE, "gradient of row 2")
        await refused(engine.backward(space, features, gradient[:2]), ErrorCode.SHAPE_MISMATCH, "(3, 512)")
        await refused(engine.backward(space, features, gradient.astype(np.int32)), ErrorCode.DTYPE_MISMATCH)
        await refused(engine.forward(space, features[:, :5]), ErrorCode.SHAPE_MISMATCH)
        await refused(engine.forward(space, features, ("pooed",)), ErrorCode.NOT_FOUND, "pooled")
        await refused(engine.forward(space, features, ("logits", "pooled")), ErrorCode.INVALID_ARGUMENT, "alone")
        await refused(engine.forward(space, features, ("layer3.map",)), ErrorCode.INVALID_ARGUMENT)
        await refused(engine.forward(space, features, ("layer1.mean",)), ErrorCode.INCOMPATIBLE)
        await refused(engine.forward(space, features, decoder=narrow), ErrorCode.SHAPE_MISMATCH, "decoder", "(128")
        await refused(engine.forward(local_space("x", "a" * 64), gradient), ErrorCode.INVALID_ARGUMENT)
        pixels = np.zeros((1, SIZE, SIZE, 3), np.uint8)
        await refused(engine.forward(spec.space(spec.cut("input")), pixels), ErrorCode.INVALID_ARGUMENT, "images")
        other = FeatureSpace(spec.name, "layer2", SIZE, "0" * 64)
        await refused(engine.forward(other, features), ErrorCode.INCOMPATIBLE, "000000")
        await refused(engine.forward(space, features, timeout_s=0.0), ErrorCode.DEADLINE_EXCEEDED)
        assert (await engine.stats()).queued_rows == 0

    with_engine(resnet, blobs, test)


def test_rows_wait_in_line_with_everybody_elses(resnet, blobs):
    spec = resnet.describe(SIZE)
    space = spec.space(spec.cut("layer2"))
    features = features_at(resnet, "layer2", 4, SIZE)

    async def test(engine):
        await engine.extract(space, features[:1])  # the runtime is chosen
        calls = [engine.forward(space, features) for _ in range(3)]
        calls += [engine.extract(space, features), engine.backward(space, features, np.ones((4, 512), np.float32))]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [one for one in answers if isinstance(one, WireError)]
        assert {one.code for one in refused} == {ErrorCode.OVERLOADED}
        assert all(one.retry_delay_s > 0 for one in refused)
        assert 0 < len(refused) < len(answers)

    with_engine(resnet, blobs, test, max_queued_rows=9)


@pytest.mark.parametrize(("outputs", "with_decoder"), [(("pooled",), False), (("logits",), True)])
def test_a_pass_that_is_still_at_hand_changes_no_bit(resnet, blobs, outputs, with_decoder):
    spec = resnet.describe(SIZE)
    space = spec.space(spec.cut("layer2"))
    draw = np.random.default_rng(2)
    decoder = None
    rows = features_at(resnet, "layer2", 3, SIZE)
    if with_decoder:
        decoder = ChannelLinear(draw.normal(size=(128, 5)).astype(np.float32), draw.normal(size=128).astype(np.float32))
        rows = draw.normal(size=(3, 5, 8, 8)).astype(np.float32)
    gradient = draw.normal(size=(3, 1000 if outputs == ("logits",) else 512)).astype(np.float32)

    async def test(engine):
        def answers(got):
            return [got.features] + ([] if got.decoder is None else [got.decoder.weight, got.decoder.bias])

        async def backward():
            return answers(await engine.backward(space, rows, gradient, outputs, decoder=decoder))

        kept = engine._differentiator._graphs
        alone = await backward()
        first = await engine.forward(space, rows, outputs, decoder=decoder)
        assert len(kept) == 1
        together = await backward()
        assert len(kept) == 0, "it was used"
        # Other rows, other outputs and another decoder have passes of their own.
        await engine.forward(space, rows[:2], outputs, decoder=decoder)
        await engine.forward(space, -rows, outputs, decoder=decoder)
        await engine.forward(space, rows, ("layer4.mean",), decoder=decoder)
        if decoder is not None:
            other = ChannelLinear(decoder.weight, decoder.bias + 1)
            await engine.forward(space, rows, outputs, decoder=other)
        await engine.forward(space, rows, outputs, decoder=decoder)
        beside = await backward()
        assert len(kept) == (4 if decoder is not None else 3)
        kept.clear()
        evicted = await backward()
        for one in (together, beside, evicted):
            assert all(np.array_equal(got, wanted) for got, wanted in zip(one, alone, strict=True))
        engine._differentiator._graphs = Graphs(0)
        unkept = await engine.forward(space, rows, outputs, decoder=decoder)
        assert np.array_equal(unkept.outputs_BD, first.outputs_BD)

    with_engine(resnet, blobs, test)


def test_a_callers_array_may_change_behind_a_pass(resnet, blobs):
    spec = resnet.describe(SIZE)
    space = spec.space(spec.cut("layer2"))
    rows = features_at(resnet, "layer2", 2, SIZE)
    gradient = np.ones((2, 512), np.float32)

    async def test(engine):
        await engine.forward(space, rows)
        np.negative(rows, out=rows)
        got = await engine.backward(space, rows, gradient)
        engine._differentiator._graphs.clear()
        wanted = await engine.backward(space, rows, gradient)
        assert np.array_equal(got.features, wanted.features)

    with_engine(resnet, blobs, test)


class Squares(torch.nn.Module):
    """Keeps its input for the backward pass, and its output."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1000), requires_grad=False)

    def forward(self, x):
        return (x * self.weight).square().tanh()


def rows_of(value, count=2):
    return (torch.full((count, 1000), float(value), requires_grad=True),)


def test_passes_are_kept_within_bounds(monkeypatch):
    function = Function(Squares(), 0)
    row_bytes = function.graph_bytes(rows_of(1)) // 2
    # Leaf, product and output; not the weight.
    assert row_bytes == 3 * 4000
    kept = Graphs(max_bytes=5 * row_bytes)
    for value in range(4):
        kept.forward(function, rows_of(value))
        assert len(kept) == min(value + 1, 2)
    for value, left in ((0, 2), (3, 1), (3, 1), (2, 0)):
        graph = kept.take(function, rows_of(value))
        assert len(kept) == left
        graph.gradients(torch.ones(2, 1000))
    outputs = kept.forward(function, rows_of(1, count=6))
    assert (outputs.requires_grad, len(kept)) == (False, 0), "there can be no room for it"
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    kept = Graphs(max_bytes=2**30)
    for value in range(5):
        kept.forward(function, rows_of(value))
    assert len(kept) == 3


def test_zeros_of_either_sign_are_told_apart():
    function = Function(Squares(), 0)
    kept = Graphs(max_bytes=2**30)
    kept.forward(function, rows_of(0.0))
    kept.take(function, rows_of(-0.0))
    assert len(kept) == 1


def test_memory_that_runs_out_is_first_taken_from_kept_passes(resnet, blobs, monkeypatch):
    spec = resnet.describe(SIZE)
    space = spec.space(spec.cut("layer2"))
    rows = features_at(resnet, "layer2", 2, SIZE)
    gradient = np.ones((2, 512), np.float32)

    async def test(engine):
        kept = engine._differentiator._graphs
        wanted = await engine.backward(space, rows, gradient)
        await engine.forward(space, rows)
        real = Function.forward

        def needs_room(self, *inputs):
            if len(kept):
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return real(self, *inputs)

        monkeypatch.setattr(Function, "forward", needs_room)
        got = await engine.backward(space, -rows, gradient)
        assert got.features.shape == wanted.features.shape
        assert len(kept) == 0

        def never(self, *inputs):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(Function, "forward", never)
        for call in (engine.forward(space, rows), engine.backward(space, rows, gradient)):
            with pytest.raises(WireError, match="fewer rows") as caught:
                await call
            assert caught.value.code is ErrorCode.WORKER_OOM

    with_engine(resnet, blobs, test)


def test_rows_beyond_float32_are_named(resnet, blobs):
    spec = resnet.describe(SIZE)
    space = spec.space(spec.cut("layer2"))
    rows = features_at(resnet, "layer2", 5, SIZE)
    large = rows.copy()
    large[3] = 3e38
    steep = np.ones((5, 512), np.float32)
    steep[4] = 3e38

    async def test(engine):
        for call, what in (
            (engine.forward(space, large), r"outputs.*row 3"),
            (engine.backward(space, rows, steep), r"gradients.*row 4"),
        ):
            with pytest.raises(WireError, match=what) as caught:
                await call
            assert caught.value.code is ErrorCode.NOT_FINITE

    # Four rows at a time: the number is that of the whole message.
    with_engine(resnet, blobs, test, max_rows=1)
