"""The last blocks as a network of their own: the same numbers, weights of their own, slower the further ahead."""

import copy

import pytest
import torch
from small_backbones import SIZE, small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.lora import add_lora, merge_lora

IMAGES = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def maps(backbone, cut):
    """Return all of the features at a cut, as a tail reads them."""
    whole = backbone.describe().cut(cut).whole_slice
    with torch.no_grad():
        return backbone.trunk("input", whole)(IMAGES)


@pytest.mark.parametrize(
    ("kind", "cut", "rank"),
    [
        ("places", "patch", 0),
        ("places", "patch", 2),
        ("places", "blocks.1", 0),
        ("places", "blocks.1", 2),
        ("large", "shrink", 0),
        ("deep", "second", 0),
        ("tokens", "layers.0", 0),
        ("tokens", "layers.2", 2),
    ],
)
def test_it_starts_as_what_the_backbone_says(kind, cut, rank):
    backbone = small_backbone(kind)
    slices = backbone.describe().cut(cut).slices
    tail = backbone.tail(cut, slices, lora_rank=rank)
    tail.draw(torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = backbone.reader("input", slices)(IMAGES)
        made = tail(maps(backbone, cut))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert tail.num_columns == expected.shape[1]
    assert list(tail.widths) == [backbone.describe().slice_width(one) for one in slices]


def test_training_it_leaves_the_backbone_alone():
    backbone = small_backbone("places")
    before = copy.deepcopy(backbone.whole().state_dict())
    tail = backbone.tail("patch", ("pooled",))
    tail(maps(backbone, "patch")).sum().backward()
    with torch.no_grad():
        for one in tail.parameters():
            one += 1.0
    after = backbone.whole().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(one.grad is not None for name, one in tail.named_parameters() if name in tail.depths)


def test_only_what_the_slices_need_is_trained():
    backbone = small_backbone("places")
    everything = backbone.tail("patch", ("pooled",))
    some = backbone.tail("patch", ("blocks.0.mean",))
    assert any("blocks.0" in name for name in some.depths)
    assert not any("blocks.3" in name for name in some.depths)
    assert any("blocks.3" in name for name in everything.depths)
    assert not any(name.startswith("reader.0.head") for name in everything.depths)


def test_stages_further_ahead_are_deeper():
    tail = load_backbone("efficientnet_lite0").tail("blocks.4", ("pooled",))
    by_stage = {name.split(".")[3] if ".blocks." in name else "end": depth for name, depth in tail.depths.items()}
    assert by_stage["5"] == 2
    assert by_stage["6"] == 1
    assert by_stage["end"] == 0


def test_low_rank_keeps_little_and_is_merged_to_the_same_numbers():
    backbone = small_backbone("places")
    tail = backbone.tail("patch", ("pooled",), lora_rank=2)
    assert all(name.endswith((".up", ".down")) for name in tail.own_names)
    full = backbone.tail("patch", ("pooled",))
    state, full_state = tail.state_dict(), full.state_dict()
    kept = sum(state[one].numel() for one in tail.own_names)
    assert kept < sum(full_state[one].numel() for one in full.own_names) / 2
    tail.draw(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, one in tail.named_parameters():
            if name.endswith(".up"):
                one += 0.1
    x = maps(backbone, "patch")
    with torch.inference_mode():
        before, plain = tail(x), full(x)
        assert not torch.allclose(before, plain)
        merged = tail.merge()(x)
    torch.testing.assert_close(merged, before)
    assert not any("parametrizations" in name for name in tail.state_dict())


def test_layers_that_take_low_rank():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(8, 4, 1),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Conv2d(4, 4, 1, groups=2),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    )
    weights = network[0].weight.detach().clone()
    added = add_lora(network, 3)
    assert [tuple(one.down.shape) for one in added] == [(3, 8), (2, 4)]
    merge_lora(network)
    assert torch.equal(network[0].weight, weights)


def test_batch_norm_keeps_its_statistics_unless_told_to_adapt():
    backbone = small_backbone("large")
    x = maps(backbone, "first")
    tail = backbone.tail("first", ("pooled",))
    name = next(one for one in tail.state_dict() if one.endswith("running_mean"))
    start = tail.state_dict()[name].clone()
    tail.train()
    tail.adapt_norms(adapt=False)
    tail(x)
    assert torch.equal(tail.state_dict()[name], start)
    tail.adapt_norms(adapt=True)
    tail(x)
    assert not torch.equal(tail.state_dict()[name], start)


@pytest.mark.parametrize(
    ("cut", "slices", "code"),
    [
        ("nowhere", ("pooled",), ErrorCode.NOT_FOUND),
        ("blocks.1", ("blocks.0.mean",), ErrorCode.NOT_FOUND),
        ("blocks.1", (), ErrorCode.NOT_FOUND),
        ("mean", ("pooled",), ErrorCode.UNSUPPORTED),
    ],
)
def test_what_cannot_be_trained_is_refused(cut, slices, code):
    with pytest.raises(WireError) as caught:
        small_backbone("places").tail(cut, slices)
    assert caught.value.code is code


def test_low_rank_needs_a_layer_that_takes_it():
    with pytest.raises(WireError) as caught:
        small_backbone("deep").tail("second", ("pooled",), lora_rank=2)
    assert caught.value.code is ErrorCode.UNSUPPORTED
