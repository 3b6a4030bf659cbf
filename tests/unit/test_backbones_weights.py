"""Weights: found, read without running code, fitted with every difference named, hashed whatever the format."""

from __future__ import annotations

import hashlib
import io
import os
import pickle  # noqa: TID251 - to write the very file that must not be read
import urllib.error
import urllib.request
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.backbones import hub
from trunkline_worker.backbones.catalogue import available_backbones, load_backbone
from trunkline_worker.backbones.weights import fit_by_name, fit_by_position, read_state_dict, state_sha256

NAME = "squeezenet1_1"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def hub_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def state() -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(3)
    return torchvision.models.squeezenet1_1().state_dict()


def test_the_catalogue_holds_the_default_and_every_torchvision_classifier() -> None:
    names = available_backbones()
    assert names[0] == "efficientnet_lite0"
    assert {"vgg16", "resnet50", "vit_b_16", "swin_t", "convnext_tiny"} <= set(names)


def test_an_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(WireError, match=r"no backbone 'resnet19'.*resnet18") as caught:
        load_backbone("resnet19")
    assert caught.value.code is ErrorCode.NOT_FOUND


def test_one_set_of_weights_has_one_hash_whatever_the_file(tmp_path: Path, state: OrderedDict) -> None:
    torch.save(state, tmp_path / "a.pth")
    torch.save({"model": {f"module.{name}": one for name, one in reversed(state.items())}}, tmp_path / "b.pt")
    safetensors.torch.save_file(dict(state), tmp_path / "c.safetensors")
    loaded = [load_backbone(NAME, weights=str(tmp_path / one)) for one in ("a.pth", "b.pt", "c.safetensors")]
    assert len({one.weights_sha256 for one in loaded}) == 1
    assert [one.describe().weights for one in loaded] == ["file a.pth", "file b.pt", "file c.safetensors"]
    assert all(one.describe().pretrained for one in loaded)


def test_half_precision_files_hash_like_what_they_are_widened_to(tmp_path: Path, state: OrderedDict) -> None:
    half = {name: one.half() for name, one in state.items()}
    torch.save(half, tmp_path / "half.pth")
    torch.save({name: one.float() for name, one in half.items()}, tmp_path / "full.pth")
    hashes = {load_backbone(NAME, weights=str(tmp_path / one)).weights_sha256 for one in ("half.pth", "full.pth")}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["features.0.weight"].view(-1)[0].add_(1e-3),
        lambda state: state.__setitem__("renamed", state.pop("features.0.weight")),
        lambda state: state.__setitem__("features.0.weight", state["features.0.weight"].reshape(3, 64, 3, 3)),
        lambda state: state.__setitem__("features.0.weight", state["features.0.weight"].view(torch.int32)),
    ],
    ids=["value", "name", "shape", "dtype"],
)
def test_the_hash_sees(change: object, state: OrderedDict) -> None:
    before = state_sha256(state)
    change(state)  # type: ignore[operator]
    assert state_sha256(state) != before


def test_the_hash_does_not_see_counters_or_order() -> None:
    state = nn.BatchNorm2d(4).state_dict()
    before = state_sha256(state)
    state["num_batches_tracked"] += 5
    assert state_sha256(dict(reversed(state.items()))) == before


def test_a_file_of_another_network_names_what_differs(tmp_path: Path, state: OrderedDict) -> None:
    del state["features.0.bias"]
    state["features.3.squeeze.weight"] = torch.zeros(2, 2)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WireError) as caught:
        load_backbone(NAME, weights=str(tmp_path / "other.pth"))
    assert caught.value.code is ErrorCode.INCOMPATIBLE
    text = caught.value.message
    assert "1 missing: features.0.bias" in text
    assert "1 unexpected: extra" in text
    assert "features.3.squeeze.weight (2x2, expected 16x64x1x1)" in text


def test_the_names_of_what_differs_are_bounded() -> None:
    with pytest.raises(WireError) as caught:
        fit_by_name(nn.Linear(1, 1), {f"{index}{'x' * 500}": torch.zeros(1) for index in range(5000)}, "file")
    assert len(caught.value.message) < 20_000
    assert "and 4900 more" in caught.value.message


def test_by_position_every_shape_and_the_number_must_agree() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    tensors = [torch.rand_like(one) if one.is_floating_point() else one for one in module.state_dict().values()]
    fit_by_position(module, {f"other.{index}": one for index, one in enumerate(tensors)}, "file")
    assert torch.equal(module[0].weight, tensors[0])
    with pytest.raises(WireError, match="holds 6 tensors; 7 are expected"):
        fit_by_position(module, {str(index): one for index, one in enumerate(tensors[:-1])}, "file")
    tensors[0] = tensors[0].T
    with pytest.raises(WireError, match=r"0\.weight \(2x3, expected 3x2\)"):
        fit_by_position(module, {str(index): one for index, one in enumerate(tensors)}, "file")


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(marker),))

    buffer = io.BytesIO()
    torch.save({"weight": Evil()}, buffer)
    for name, data in {"zip.pth": buffer.getvalue(), "raw.pth": pickle.dumps(Evil())}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WireError) as caught:
            read_state_dict(tmp_path / name)
        assert caught.value.code is ErrorCode.CORRUPT_DATA
    assert not marker.exists()


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
def test_a_damaged_file_is_corrupt(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00" * 100)
    with pytest.raises(WireError) as caught:
        read_state_dict(tmp_path / name)
    assert caught.value.code is ErrorCode.CORRUPT_DATA


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(WireError) as caught:
        load_backbone(NAME, weights=str(tmp_path / "none.pth"))
    assert caught.value.code is ErrorCode.NOT_FOUND


def test_the_number_of_classes_comes_from_the_file(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "mine.pth")
    backbone = load_backbone("resnet18", weights=str(tmp_path / "mine.pth"))
    with torch.inference_mode():
        assert backbone.whole()(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 7)


def test_old_densenet_names_and_missing_counters_are_understood() -> None:
    network = torchvision.models.densenet121()
    old = {
        name.replace("norm1.", "norm.1.")
        .replace("conv1.", "conv.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv2.", "conv.2."): one
        for name, one in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert any(".norm.1." in name for name in old)
    fit_by_name(torchvision.models.densenet121(), old, "file")


def test_a_mnasnet_file_without_layout_version_is_read_as_todays(tmp_path: Path) -> None:
    safetensors.torch.save_file(torchvision.models.mnasnet0_5().state_dict(), tmp_path / "mnasnet.safetensors")
    assert load_backbone("mnasnet0_5", weights=str(tmp_path / "mnasnet.safetensors")).describe().pretrained


def test_heads_for_training_only_may_be_left_over(tmp_path: Path) -> None:
    torch.save(torchvision.models.googlenet(init_weights=False).state_dict(), tmp_path / "googlenet.pth")
    assert load_backbone("googlenet", weights=str(tmp_path / "googlenet.pth")).describe().pretrained


def test_weights_in_the_hubs_cache_are_used_and_nothing_is_fetched(
    hub_dir: Path, state: OrderedDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_options: pytest.fail("fetched"))
    hub_dir.mkdir(parents=True)
    torch.save(state, hub_dir / "squeezenet1_1-b8a52dc0.pth")
    spec = load_backbone(NAME).describe()
    assert spec.pretrained
    assert "SqueezeNet1_1_Weights.IMAGENET1K_V1" in spec.weights


def test_offline_the_error_says_where_and_what_to_do(hub_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_options: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(WireError) as caught:
        load_backbone(NAME)
    assert caught.value.code is ErrorCode.NOT_FOUND
    text = caught.value.message
    for part in (
        str(hub_dir / "squeezenet1_1-b8a52dc0.pth"),
        "https://",
        "--weights FILE",
        "--allow-untrained",
        "no route",
    ):
        assert part in text


def test_with_downloads_forbidden_nothing_is_fetched(hub_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_options: pytest.fail("fetched"))
    with pytest.raises(WireError, match="--weights FILE"):
        load_backbone(NAME, allow_download=False)
    assert not load_backbone(NAME, allow_untrained=True).describe().pretrained


def test_a_fetched_file_must_hash_to_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_options: io.BytesIO(b"weights"))
    target = tmp_path / "cache" / "file.pth"
    digest = hashlib.sha256(b"weights").hexdigest()
    hub.fetch("x", f"https://example.org/x-{digest[:8]}.pth", target, allowed=True)
    assert target.read_bytes() == b"weights"
    target.unlink()
    with pytest.raises(WireError) as caught:
        hub.fetch("x", "https://example.org/x-00000000.pth", target, allowed=True)
    assert caught.value.code is ErrorCode.CORRUPT_DATA
    assert list(target.parent.iterdir()) == []


def test_a_member_of_the_enumeration_decides_the_preprocessing(hub_dir: Path) -> None:
    newer = load_backbone("resnet50", allow_untrained=True).preprocessing
    older = load_backbone("resnet50", weights="IMAGENET1K_V1", allow_untrained=True).preprocessing
    assert (round(224 / newer.crop_fraction), round(224 / older.crop_fraction)) == (232, 256)
    assert older.interpolation == "bilinear"
    assert older.mean == (0.485, 0.456, 0.406)
