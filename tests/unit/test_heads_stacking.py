"""Heads packed into one piece of memory, and many of one structure in one pass: the same answers as each alone."""

import dataclasses
import gc
import weakref

import pytest
import torch
from drawn_heads import POOLED, drawn_head
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import TASKS, HeadConfig
from trunkline_worker.heads import stacking
from trunkline_worker.heads.artefact import head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import TrainedHead
from trunkline_worker.heads.stacking import PackedHead, pack, packed_from_bytes, predict_stacked, structure_of

LOCAL = HeadInput(("edge",), (5,))
TWO_SLICES = HeadInput(("layer3.mean", "pooled"), (8, 29))
CONFIGS = [
    (HeadConfig(), (POOLED,)),
    (HeadConfig(), (TWO_SLICES, LOCAL)),
    (HeadConfig("prototype"), (POOLED,)),
    (HeadConfig("prototype"), (POOLED, LOCAL)),
    (HeadConfig("mlp", (11,)), (POOLED,)),
    (HeadConfig("mlp", (11, 6), activation="gelu", dropout=0.5), (TWO_SLICES,)),
    (HeadConfig("mlp", (11, 6), batch_norm=True), (POOLED, LOCAL)),
    (HeadConfig(fuse="add"), (POOLED, LOCAL)),
    (HeadConfig(fuse="gate", fuse_width=7), (POOLED, LOCAL)),
    (HeadConfig("mlp", (9,), batch_norm=True, fuse="gate"), (POOLED, LOCAL, HeadInput(("more",), (3,)))),
]


def rows(num_heads, num_rows, num_columns, seed=0):
    return torch.randn(num_heads, num_rows, num_columns, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def assert_close(output_NK, alone_NK):
    """Check against the stated bound: probabilities lie below 1, values are of the size of what was summed up."""
    assert float((output_NK - alone_NK).abs().max()) <= 1e-6 * max(1.0, float(alone_NK.abs().max()))


def assert_as_alone(heads, x_GND):
    """Check every head's outputs against the module, run alone on the same rows."""
    outputs_GNK = predict_stacked([pack(one) for one in heads], x_GND)
    for head, x_ND, output_NK in zip(heads, x_GND, outputs_GNK, strict=True):
        assert_close(output_NK, head.predict(x_ND))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("config", "inputs"), CONFIGS)
@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_heads_answer_together_as_alone(config, inputs, task, num_rows):
    heads = [drawn_head(config, inputs, task=task, seed=seed) for seed in range(6)]
    assert_as_alone(heads, rows(6, num_rows, heads[0].num_features))


@pytest.mark.parametrize(("name", "value"), [("MAX_GATHERED", 50), ("_CHUNK_BYTES", 4000), ("_CHUNK_BYTES", 1)])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_neither_large_matrices_nor_chunks_change_the_answers(monkeypatch, name, value, num_rows):
    monkeypatch.setattr(stacking, name, value)
    config = HeadConfig("mlp", (13, 5), batch_norm=True, fuse="gate", fuse_width=6)
    heads = [drawn_head(config, (POOLED, LOCAL), seed=seed) for seed in range(5)]
    structure = structure_of(heads[0])
    total = sum(place.stop - place.start for place in structure.places.values())
    assert (structure.num_gathered < total) == (name == "MAX_GATHERED")
    assert_as_alone(heads, rows(5, num_rows, heads[0].num_features))


def test_as_wide_as_in_practice_the_bound_holds():
    heads = [drawn_head(HeadConfig(), (HeadInput(("pooled",), (1280,)),), 10, "regression", seed) for seed in range(8)]
    for num_rows in (1, 4, 32):
        assert_as_alone(heads, rows(8, num_rows, 1280))
    heads = [drawn_head(HeadConfig("mlp", (256,)), (HeadInput(("pooled",), (1280,)),), 10, "regression") for _ in "ab"]
    assert structure_of(heads[0]).num_gathered < heads[0].size_bytes / 4  # the first layer is multiplied where it lies
    for num_rows in (1, 4, 32):
        assert_as_alone(heads, rows(2, num_rows, 1280))


def test_a_heads_answers_do_not_depend_on_the_others_in_the_pass():
    draw = torch.Generator().manual_seed(7)
    inputs = (HeadInput(("pooled",), (320,)),)
    for config in (HeadConfig(), HeadConfig("mlp", (33,), batch_norm=True)):
        heads = [pack(drawn_head(config, inputs, 10, seed=seed)) for seed in range(24)]
        x_GND = rows(24, 3, 320)
        expected = [one.predict(x_ND) for one, x_ND in zip(heads, x_GND, strict=True)]
        for _ in range(30):
            mix = torch.randperm(24, generator=draw)[: int(torch.randint(1, 25, (1,), generator=draw))].tolist()
            outputs = predict_stacked([heads[index] for index in mix], x_GND[mix])
            for index, output in zip(mix, outputs, strict=True):
                assert_close(output, expected[index])


@pytest.mark.parametrize("config", [HeadConfig(), HeadConfig("mlp", (6,), batch_norm=True)])
def test_a_head_that_yields_nan_does_so_alone(config):
    heads = [pack(drawn_head(config, seed=seed)) for seed in range(4)]
    x_GND = rows(4, 2, 37)
    before = predict_stacked(heads, x_GND)
    heads[1].flat_P.fill_(float("nan"))
    after = predict_stacked(heads, x_GND)
    assert after[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(after[others], before[others])


def test_half_precision_rows_give_float32_answers():
    heads = [drawn_head(seed=seed) for seed in range(3)]
    x_GND = rows(3, 2, 37).to(torch.bfloat16)
    assert predict_stacked([pack(one) for one in heads], x_GND).dtype == torch.float32
    assert_as_alone(heads, x_GND)


def test_one_head_alone_is_its_module():
    head = drawn_head(HeadConfig("mlp", (6,)), (TWO_SLICES, LOCAL), task="multi_label")
    packed = pack(head)
    assert isinstance(packed, PackedHead)
    x_BD = rows(1, 9, 42)[0]
    torch.testing.assert_close(packed.predict(x_BD), head.predict(x_BD), rtol=0, atol=1e-6)
    for name in ("slices", "num_features", "more_width", "num_outputs", "size_bytes"):
        assert getattr(packed, name) == getattr(head, name), name
    with pytest.raises(WireError, match=r"takes \(rows, 42\).*edge.*got \(2, 41\)") as caught:
        packed.predict(torch.zeros(2, 41))
    assert caught.value.code is ErrorCode.SHAPE_MISMATCH


def test_structures_are_shared_by_what_decides_the_computation():
    first = structure_of(drawn_head(HeadConfig("mlp", (6,), dropout=0.1)))
    assert structure_of(drawn_head(HeadConfig("mlp", (6,), dropout=0.7), seed=1)) is first
    for other in (
        drawn_head(HeadConfig("mlp", (7,))),
        drawn_head(HeadConfig("mlp", (6,), activation="gelu")),
        drawn_head(HeadConfig("mlp", (6,)), task="multi_label"),
        drawn_head(HeadConfig("mlp", (6,)), num_outputs=5),
        drawn_head(HeadConfig("mlp", (6,)), (HeadInput(("other",), (37,)),)),
    ):
        assert structure_of(other) is not first


def test_a_structure_goes_with_its_last_head():
    heads = [pack(drawn_head(num_outputs=17, seed=seed)) for seed in range(3)]
    assert len({id(one.structure) for one in heads}) == 1
    structure = weakref.ref(heads[0].structure)
    assert structure() in stacking._known.values()
    del heads
    gc.collect()
    assert structure() is None


def test_heads_that_do_not_belong_together_are_refused():
    one, other = pack(drawn_head()), pack(drawn_head(num_outputs=5))
    with pytest.raises(ValueError, match="several structures"):
        predict_stacked([one, other], rows(2, 1, 37))
    with pytest.raises(ValueError, match="1 heads for 2 groups"):
        predict_stacked([one], rows(2, 1, 37))
    with pytest.raises(WireError) as caught:
        predict_stacked([one, one], rows(2, 1, 36))
    assert caught.value.code is ErrorCode.SHAPE_MISMATCH


def test_convolutional_heads_stay_as_they_are():
    head = drawn_head(HeadConfig("conv", channels=(3,)), (HeadInput(("blocks.4.map",), (18,), (2, 3, 3)),))
    assert pack(head) is head


def test_a_packed_head_holds_its_numbers_once_and_no_module():
    head = drawn_head(HeadConfig(), (HeadInput(("pooled",), (1280,)),), 10)
    packed = packed_from_bytes(head_to_bytes(head))
    assert isinstance(packed, PackedHead)
    assert packed.flat_P.untyped_storage().nbytes() == packed.size_bytes == (2 * 1280 + 10 * 1280 + 10) * 4
    assert not any(isinstance(one, torch.nn.Module | TrainedHead) for one in gc.get_referents(packed))


@pytest.mark.parametrize("kind", ["linear", "mlp", "prototype"])
def test_what_is_read_back_answers_as_what_was_written(kind):
    config = HeadConfig(kind, (6,) if kind == "mlp" else ())
    head = drawn_head(config)
    x_BD = rows(1, 3, 37)[0]
    torch.testing.assert_close(packed_from_bytes(head_to_bytes(head)).predict(x_BD), head.predict(x_BD))


def test_damaged_bytes_are_named():
    data = head_to_bytes(drawn_head())
    for damaged in (b"", data[:-1], data.replace(b'\\"kind\\":\\"linear\\"', b'\\"kind\\":\\"quanta\\"')):
        assert damaged != data
        with pytest.raises(WireError) as caught:
            packed_from_bytes(damaged)
        assert caught.value.code is ErrorCode.CORRUPT_DATA


def test_every_field_of_the_config_decides_or_is_known_not_to():
    """A new field of ``HeadConfig`` must find its way into the stacked pass."""
    assert {one.name for one in dataclasses.fields(HeadConfig)} == {
        *("kind", "hidden", "activation", "batch_norm", "dropout", "channels", "tap", "fuse", "fuse_width"),
        *("slices", "lora_rank"),  # of tails, which are not stacked
    }
