"""Backbones of one's own: the manifest is read strictly, and what could be wrong is found before anything is served."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import preprocess_image
from trunkline_worker.backbones import own
from trunkline_worker.backbones.catalogue import load_backbone, register_own
from trunkline_worker.backbones.manifest import load_manifest
from trunkline_worker.backbones.own import load_own, register
from trunkline_worker.cluster import cli
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
LABELS = ["red", "green", "blue"]
_numbers = itertools.count()

NETWORK = """
import torch
from torch import nn

class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
                            nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()) for _ in range(2))
        )
        self.twice = Twice()
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.twice(self.blocks(self.stem(x))).mean((2, 3)))

def build(width=8, num_classes=3):
    return Net(width, num_classes)
"""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir("/")


class Folder:
    """A folder with a backbone in it; every one has a module of another name, for modules are imported once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.module = f"own_net_{next(_numbers)}"
        self.manifest: dict[str, Any] = {
            "name": "mine",
            "factory": f"{self.module}:build",
            "weights": "mine.safetensors",
            "labels": LABELS,
            "resizable": True,
            "preprocessing": {
                "input_size": 32,
                "crop_fraction": 1.0,
                "interpolation": "bilinear",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
            },
        }
        self.write(NETWORK)
        torch.manual_seed(11)
        self.save(self.build())

    def write(self, code: str) -> None:
        """Write the module, and forget the one that was imported."""
        sys.modules.pop(self.module, None)
        (self.path / f"{self.module}.py").write_text(textwrap.dedent(code))
        shutil.rmtree(self.path / "__pycache__", ignore_errors=True)

    def change(self, old: str, new: str, *, save: bool = False) -> None:
        """Write the module with a change."""
        assert old in NETWORK
        self.write(NETWORK.replace(old, new))
        if save:
            self.save(self.build())

    def build(self, **arguments: Any) -> nn.Module:
        """Build the network as the factory does, in a namespace of its own."""
        namespace: dict[str, Any] = {"__name__": "elsewhere"}
        exec((self.path / f"{self.module}.py").read_text(), namespace)
        return namespace["build"](**arguments)

    def save(self, network: nn.Module | dict[str, torch.Tensor]) -> None:
        """Write the weights."""
        state = network if isinstance(network, dict) else network.state_dict()
        safetensors.torch.save_file(dict(state), self.path / "mine.safetensors")

    def written(self, **changes: Any) -> Path:
        """Write the manifest, with keys changed; None removes one. Return its path."""
        table = {name: value for name, value in {**self.manifest, **changes}.items() if value is not None}
        plain = [f"{name} = {json.dumps(value)}" for name, value in table.items() if not isinstance(value, dict)]
        for name, value in table.items():
            if isinstance(value, dict):
                plain += [f"[{name}]", *(f"{key} = {json.dumps(one)}" for key, one in value.items())]
        path = self.path / "backbone.toml"
        path.write_text("\n".join(plain))
        return path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def refused(path: Path, code: ErrorCode) -> str:
    """Check that a backbone is refused, on one line of bounded length, and return why."""
    with pytest.raises(WireError) as caught:
        load_own(load_manifest(path))
    assert caught.value.code is code, caught.value
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1500
    return caught.value.message


# --- a sound one ------------------------------------------------------------------------------------------------------


def test_a_sound_backbone_is_what_its_manifest_says(folder: Folder) -> None:
    registration = register(load_manifest(folder.written(arguments={"width": 8, "num_classes": 3})))
    backbone = registration.backbone
    spec = backbone.describe()
    assert (spec.name, spec.weights, spec.pretrained) == ("mine", "file mine.safetensors", True)
    assert (spec.class_names, spec.resizable) == (tuple(LABELS), True)
    assert spec.preprocessing.input_size == 32
    assert spec.slices[-1].width == 8
    assert [cut.name for cut in spec.cuts if cut.is_stage] == ["stem", "blocks.0", "blocks.1"]
    names = [check.name for check in registration.checks]
    assert names == ["factory", "weights", "outputs", "labels", "trace", "parity", "embedding", "resizable"]
    assert registration.parity_error <= own.PARITY_TOLERANCE
    network = folder.build().eval()
    network.load_state_dict(safetensors.torch.load_file(folder.path / "mine.safetensors"))
    pictures = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network((pictures.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        torch.testing.assert_close(backbone.whole()(pictures), expected, rtol=1e-5, atol=1e-5)


def test_a_folder_means_the_manifest_in_it_and_the_catalogue_knows_it(folder: Folder) -> None:
    folder.written()
    assert load_backbone("mine", manifest=str(folder.path)).name == "mine"
    with pytest.raises(WireError, match=r"describes the backbone 'mine'; 'other' was expected"):
        load_backbone("other", manifest=str(folder.path))
    with pytest.raises(WireError, match="they cannot be given apart"):
        load_backbone("mine", manifest=str(folder.path), weights="file.safetensors")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_the_name_of_another_backbone_is_taken(folder: Folder, name: str) -> None:
    with pytest.raises(WireError, match="choose another name") as caught:
        register_own(str(folder.written(name=name)))
    assert caught.value.code is ErrorCode.ALREADY_EXISTS


def test_labels_may_lie_in_a_file_and_code_in_another_folder(folder: Folder) -> None:
    (folder.path / "names.txt").write_text("eins\nzwei\ndrei\n", encoding="utf-8")
    (folder.path / "code").mkdir()
    (folder.path / f"{folder.module}.py").rename(folder.path / "code" / f"{folder.module}.py")
    backbone = load_own(load_manifest(folder.written(labels="names.txt", path="code")))
    assert backbone.class_names == ("eins", "zwei", "drei")
    assert load_own(load_manifest(folder.written(labels=None, path="code"))).class_names == ()


def test_half_precision_weights_are_widened(folder: Folder) -> None:
    whole = load_own(load_manifest(folder.written())).weights_sha256
    state = {name: one.half() if one.is_floating_point() else one for name, one in folder.build().state_dict().items()}
    folder.save(state)
    halved = load_own(load_manifest(folder.written()))
    folder.save({name: one.float() if one.is_floating_point() else one for name, one in state.items()})
    assert halved.weights_sha256 == load_own(load_manifest(folder.written())).weights_sha256 != whole


def test_the_fingerprint_follows_what_is_computed_and_not_how_it_is_written(folder: Folder) -> None:
    first = load_own(load_manifest(folder.written())).weights_sha256
    folder.change("return 2 * x", "# a comment\n        return 2 * x")
    assert load_own(load_manifest(folder.written())).weights_sha256 == first
    folder.change("return 2 * x", "return 3 * x")
    assert load_own(load_manifest(folder.written())).weights_sha256 != first
    folder.change("nn.ReLU())\n", "nn.GELU())\n")  # no other weights, and no other graph: another module
    assert load_own(load_manifest(folder.written())).weights_sha256 != first


# --- the manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weight": "x"}, r"unknown key 'weight' \(did you mean 'weights'\?\)"),
        ({"zzz": 1}, r"unknown key 'zzz' \(known are name, factory, "),
        (
            {"preprocessing": {"input_size": 32, "inputsize": 3}},
            r"unknown key 'preprocessing.inputsize' \(did you mean",
        ),
        ({"preprocessing": {"input_size": 32}}, "'preprocessing.crop_fraction' is missing; 'preprocessing.interpol"),
        ({"weights": None}, "'weights' is missing"),
        ({"name": "timm/mine"}, "not a backbone name"),
        ({"name": "../mine"}, "not a backbone name"),
        ({"factory": "module.build"}, "'factory' must be package.module:name, got 'module.build'"),
        ({"factory": "os:system('true')"}, "must be package.module:name"),
        ({"resizable": "yes"}, "'resizable': input should be a valid bool"),
        ({"leaves": ["Net"]}, "'leaves.0' must be package.module:name"),
        ({"labels": ["a", " ", "c"]}, "label 2 is empty"),
        ({"arguments": 3}, "'arguments': input should be a valid dict"),
    ],
)
def test_a_manifest_is_read_strictly(folder: Folder, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(WireError, match=what) as caught:
        load_manifest(folder.written(**changes))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert str(folder.path / "backbone.toml") in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_size", 1),
        ("input_size", "32"),
        ("input_size", 1e6),
        ("crop_fraction", 0),
        ("crop_fraction", 1.5),
        ("interpolation", "lanczos"),
        ("mean", [0.5, 0.5]),
        ("mean", ["a", 0, 0]),
        ("std", [0.5, 0, 0.5]),
    ],
)
def test_preprocessing_out_of_range_is_refused_by_name(folder: Folder, key: str, value: object) -> None:
    with pytest.raises(WireError, match=f"'preprocessing.{key}") as caught:
        load_manifest(folder.written(preprocessing={**folder.manifest["preprocessing"], key: value}))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_what_is_no_manifest_is_told_apart_from_none(folder: Folder) -> None:
    with pytest.raises(WireError, match=r"expected a folder with a backbone\.toml") as caught:
        load_manifest(folder.path / "nothing")
    assert caught.value.code is ErrorCode.NOT_FOUND
    (folder.path / "backbone.toml").write_text("name = ")
    with pytest.raises(WireError, match="is not TOML: Invalid value"):
        load_manifest(folder.path)
    with pytest.raises(WireError, match=r"the labels .*names\.txt cannot be read") as caught:
        load_manifest(folder.written(labels="names.txt"))
    assert caught.value.code is ErrorCode.NOT_FOUND


# --- the factory ------------------------------------------------------------------------------------------------------


def test_a_factory_that_cannot_be_imported(folder: Folder) -> None:
    message = refused(folder.written(factory="no_such_package.inner:build"), ErrorCode.INVALID_ARGUMENT)
    assert "no_such_package.inner:build cannot be imported" in message
    assert "No module named 'no_such_package'" in message
    message = refused(folder.written(factory=f"{folder.module}:bild"), ErrorCode.INVALID_ARGUMENT)
    assert "has no 'bild'" in message
    assert "is not a folder" in refused(folder.written(path="nowhere"), ErrorCode.NOT_FOUND)
    folder.write("import a_package_that_is_not_there")
    assert "No module named 'a_package_that" in refused(folder.written(), ErrorCode.INVALID_ARGUMENT)
    folder.write("raise SystemExit(3)")
    assert "SystemExit: 3" in refused(folder.written(), ErrorCode.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        ("build = 3", "is an int, which cannot be called"),
        ("def build(): raise RuntimeError('first\\nsecond ' + 'x' * 5000)", "raised RuntimeError: first second xxx"),
        ("def build(): return 'a network'", "returned a str; a torch.nn.Module is expected"),
        ("def build(): return None", "returned a NoneType; a torch.nn.Module"),
        ("def build(width): return None", "raised TypeError: build() missing 1 required"),
    ],
)
def test_a_factory_that_gives_no_network(folder: Folder, build: str, what: str) -> None:
    folder.write(build)
    assert what in refused(folder.written(), ErrorCode.INVALID_ARGUMENT)


def test_an_argument_that_the_factory_does_not_take(folder: Folder) -> None:
    message = refused(folder.written(arguments={"depth": 3}), ErrorCode.INVALID_ARGUMENT)
    assert "unexpected keyword argument 'depth'" in message


@pytest.mark.parametrize(
    "reach",
    [
        "import urllib.request; urllib.request.urlopen('http://weights.example/x')",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket\nwith socket.socket() as one: one.connect(('127.0.0.1', 9))",
        "import socket; socket.gethostbyname('weights.example')",
        "import socket\nwith socket.socket(type=socket.SOCK_DGRAM) as one: one.sendto(b'x', ('127.0.0.1', 9))",
        "import torch; torch.hub.load_state_dict_from_url('http://weights.example/x.pth', model_dir='{folder}')",
    ],
)
@pytest.mark.parametrize("handled", ["no", "Exception", "BaseException"])
def test_a_factory_that_goes_online_is_refused_however_it_takes_that(folder: Folder, reach: str, handled: str) -> None:
    reach = reach.replace("{folder}", str(folder.path))
    lines = reach.splitlines()
    if handled != "no":
        lines = ["try:", *(f"    {line}" for line in lines), f"except {handled}: pass"]
    body = "\n".join(f"    {line}" for line in lines)
    folder.write(f"{NETWORK}\ndef online():\n{body}\n    return build()\n")
    message = refused(folder.written(factory=f"{folder.module}:online"), ErrorCode.INVALID_ARGUMENT)
    assert re.search(r"tried to reach .*(weights\.example|127\.0\.0\.1).* over the network", message)
    assert "weights come from the file mine.safetensors" in message


def test_only_the_factory_is_kept_offline() -> None:
    import socket

    from trunkline_worker.backbones.offline import NetworkUsedError, offline

    with socket.socket() as server, offline() as tried:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = server.getsockname()
        with pytest.raises(NetworkUsedError), socket.socket() as client:
            client.connect(address)
        assert tried == [str(address)]
        with socket.socket(socket.AF_UNIX) as local, pytest.raises(FileNotFoundError):
            local.connect("/nothing/there")
        assert len(tried) == 1
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_a_module_that_hides_the_one_beside_the_manifest_is_named(folder: Folder) -> None:
    (folder.path / "json.py").write_text(NETWORK)
    message = refused(folder.written(factory="json:build"), ErrorCode.INVALID_ARGUMENT)
    assert "the module 'json'" in message
    assert json.__file__ in message
    assert "rename it" in message


# --- weights ----------------------------------------------------------------------------------------------------------


def test_every_tensor_that_does_not_fit_is_named(folder: Folder) -> None:
    state = folder.build().state_dict()
    del state["head.bias"]
    state["head.weight"] = torch.zeros(4, 8)
    state["surplus"] = torch.zeros(1)
    folder.save(state)
    message = refused(folder.written(), ErrorCode.INCOMPATIBLE)
    for part in ("1 missing: head.bias", "1 unexpected: surplus", "head.weight (4x8, expected 3x8)"):
        assert part in message


def test_files_that_could_run_code_are_not_read(folder: Folder) -> None:
    torch.save(folder.build().state_dict(), folder.path / "mine.pth")
    message = refused(folder.written(weights="mine.pth"), ErrorCode.UNSUPPORTED)
    assert "safetensors.torch.save_file" in message
    (folder.path / "mine.pth").rename(folder.path / "mine.safetensors")
    refused(folder.written(), ErrorCode.CORRUPT_DATA)
    assert "no weights file at" in refused(folder.written(weights="none.safetensors"), ErrorCode.NOT_FOUND)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "code", "what"),
    [
        ("(y, y)", ErrorCode.UNSUPPORTED, "returns a tuple; one float tensor of shape (rows, outputs) is expected"),
        ("y[:, :, None]", ErrorCode.UNSUPPORTED, "returns (4, 3, 1) of torch.float32 for 4 rows"),
        ("y[:1]", ErrorCode.UNSUPPORTED, "returns (1, 3) of torch.float32 for 4 rows"),
        ("y.argmax(1, keepdim=True)", ErrorCode.UNSUPPORTED, "of torch.int64 for 4 rows"),
        ("y / 0", ErrorCode.NOT_FINITE, "12 of 12 outputs of the network are not finite"),
        ("y - y.mean(0)", ErrorCode.UNSUPPORTED, "depend on the other pictures of its batch"),
        ("nn.functional.dropout(y)", ErrorCode.UNSUPPORTED, "when it is run again on the same pictures"),
        ("y.reshape(1)", ErrorCode.UNSUPPORTED, "does not take pictures of 32 pixels as (4, 3, 32, 32)"),
    ],
)
def test_outputs_must_be_numbers_for_each_row(folder: Folder, returned: str, code: ErrorCode, what: str) -> None:
    folder.change(
        "return self.head(self.twice(self.blocks(self.stem(x))).mean((2, 3)))",
        f"y = self.head(self.twice(self.blocks(self.stem(x))).mean((2, 3)))\n        return {returned}",
    )
    assert what in refused(folder.written(), code)


def test_labels_must_be_as_many_as_outputs(folder: Folder) -> None:
    message = refused(folder.written(labels=["red", "green"]), ErrorCode.INCOMPATIBLE)
    assert "returns 3 outputs a row; its manifest names 2 labels" in message


def test_an_input_size_that_the_network_cannot_take(folder: Folder) -> None:
    folder.change("self.blocks(self.stem(x))", "self.blocks(self.stem(x)).view(x.shape[0], 8, 4, 4)")
    preprocessing = {**folder.manifest["preprocessing"], "input_size": 48}
    message = refused(folder.written(preprocessing=preprocessing), ErrorCode.UNSUPPORTED)
    assert "does not take pictures of 48 pixels" in message
    assert "invalid for input of size" in message
    message = refused(folder.written(), ErrorCode.UNSUPPORTED)
    assert "64 pixels" in message
    assert "say false" in message
    assert not load_own(load_manifest(folder.written(resizable=False))).resizable


def test_an_embedding_that_overflows_is_refused(folder: Folder) -> None:
    # Finite outputs: only the embedding squares what is at a stage's end.
    folder.change("return 2 * x", "return x", save=True)
    state = folder.build().state_dict()
    state["stem.0.weight"] *= 1e25
    state["blocks.0.0.weight"] *= 1e-25
    folder.save(state)
    message = refused(folder.written(), ErrorCode.NOT_FINITE)
    assert "the embedding of mine is not finite on sample pictures, in stem.std" in message


# --- tracing ----------------------------------------------------------------------------------------------------------

ON_VALUES = "if float(x.sum()) > 0:\n            x = x + 1\n        return 2 * x"


def test_code_that_decides_on_values_is_named(folder: Folder) -> None:
    folder.change("return 2 * x", ON_VALUES)
    path = folder.written(resizable=False)
    message = refused(path, ErrorCode.UNSUPPORTED)
    assert "the network cannot be traced: its module 'twice' (Twice)" in message
    assert "its class may be named in the leaves" in message


def test_a_leaf_is_taken_whole(folder: Folder) -> None:
    folder.change("return 2 * x", "y = 2 * x\n        return y.relu() - (-y).relu()")
    looked_into = load_own(load_manifest(folder.written()))
    whole = load_own(load_manifest(folder.written(leaves=[f"{folder.module}:Twice"])))
    assert "twice" in whole.cut_names
    assert {name for name in looked_into.cut_names if name.startswith("twice.")}
    assert not {name for name in whole.cut_names if name.startswith("twice.")}
    assert whole.weights_sha256 != looked_into.weights_sha256


@pytest.mark.parametrize(
    ("leaf", "what"), [("build", "is a function, no class of modules"), ("None_", "has no 'None_'")]
)
def test_a_leaf_must_be_a_class_of_modules(folder: Folder, leaf: str, what: str) -> None:
    assert what in refused(folder.written(leaves=[f"{folder.module}:{leaf}"]), ErrorCode.INVALID_ARGUMENT)


def test_code_that_decides_on_sizes_keeps_its_own_size(folder: Folder) -> None:
    folder.change("return 2 * x", "return 2 * x if x.shape[2] < 6 else 3 * x")
    message = refused(folder.written(), ErrorCode.UNSUPPORTED)
    assert "resizable = false" in message
    backbone = load_own(load_manifest(folder.written(resizable=False)))
    assert not backbone.resizable
    assert backbone.describe().cuts[0].name == "input"


@pytest.mark.parametrize(
    "code", ["return 2 * x if x.shape[2] < 6 else 3 * x", "return torch.stack([2 * one for one in x])"]
)
def test_a_leaf_may_decide_on_sizes_and_the_network_stays_resizable(folder: Folder, code: str) -> None:
    folder.change("return 2 * x", code)
    refused(folder.written(), ErrorCode.UNSUPPORTED)
    assert load_own(load_manifest(folder.written(leaves=[f"{folder.module}:Twice"]))).resizable


def test_what_tracing_does_not_see_is_found(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for any fault of tracing: the graph computes something else than the network.
    def wrong(backbone: Any, pictures: torch.Tensor) -> torch.Tensor:
        return backbone.whole()(pictures) * 1.001

    monkeypatch.setattr(own, "_whole", wrong)
    message = refused(folder.written(), ErrorCode.UNSUPPORTED)
    assert "the graph that was traced of mine gives other outputs" in message
    assert "differ by 0.001" in message


def test_a_cut_that_changes_the_outputs_is_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = own.Backbone.stem

    def wrong(self: Any, cut: str) -> nn.Module:
        return nn.Sequential(stem(self, cut), nn.Hardtanh(-1e-3, 1e-3)) if cut == "blocks.0" else stem(self, cut)

    monkeypatch.setattr(own.Backbone, "stem", wrong)
    assert "mine cut at 'blocks.0' gives other outputs" in refused(folder.written(), ErrorCode.UNSUPPORTED)


def test_every_stage_is_tried_and_the_last_cut_and_some_between() -> None:
    cuts = [f"c{index}" for index in range(200)]
    tried = own._spread(cuts, ["c3", "c50", "c180"])
    assert len(tried) == own.MAX_PARITY_CUTS
    assert {"c3", "c50", "c180", "c199"} <= set(tried)
    assert tried == sorted(tried, key=cuts.index)
    gaps = np.diff([-1, *(cuts.index(one) for one in tried)])
    assert gaps.max() <= 12
    assert own._spread(["a", "b"], ["a"]) == ["a", "b"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_validate_says_what_was_checked(folder: Folder) -> None:
    folder.change("def build(", "print('noise on stdout')\n\ndef build(")
    folder.written()
    done = CliRunner().invoke(cli.app, ["validate", str(folder.path), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert "noise on stdout" in done.stderr
    assert answer["name"] == "mine"
    assert answer["parity_error"] <= own.PARITY_TOLERANCE
    assert answer["cuts"][0]["name"] == "input"
    shares = [cut["share_of_macs"] for cut in answer["cuts"]]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, pytest.approx(1.0, abs=1e-2))
    text = CliRunner().invoke(cli.app, ["validate", str(folder.path / "backbone.toml")]).stdout
    for check in answer["checks"]:
        assert f"ok  {check['name']}" in text
    for cut in answer["cuts"]:
        assert re.search(rf"^{re.escape(cut['name'])} +{'x'.join(map(str, cut['feature_shape']))} ", text, re.MULTILINE)


def test_validate_fails_with_1_for_a_fault_and_with_2_where_nothing_is_there(folder: Folder) -> None:
    folder.written(labels=["one"])
    done = CliRunner().invoke(cli.app, ["validate", str(folder.path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "3 outputs a row" in done.stderr
    done = CliRunner().invoke(cli.app, ["validate", str(folder.path), "--json"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert json.loads(done.stderr)["error"]["code"] == "INCOMPATIBLE"
    assert CliRunner().invoke(cli.app, ["validate", str(folder.path / "nothing")]).exit_code == 2


def test_the_operators_own_pictures_are_used_where_they_are_given(folder: Folder) -> None:
    folder.written()
    pictures = folder.path / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(pictures / "one.png")
    backbone = register_own(str(folder.path), samples=str(pictures)).backbone
    assert backbone.samples.description == "1 picture of the operator's"
    done = CliRunner().invoke(cli.app, ["validate", str(folder.path), "--samples", str(folder.path / "none")])
    assert done.exit_code == 1
    assert "no folder" in done.stderr


# --- the example ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder, outside the repository, its network trained."""
    folder = tmp_path_factory.mktemp("elsewhere") / "shapes"
    shutil.copytree(ROOT / "examples" / "own_backbone", folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "train.py"], cwd=folder, env=environment, check=True, timeout=300)
    return folder


def test_the_example_is_validated_where_it_lies(shapes: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answers = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", "from trunkline.cli import main; main()", "validate", "shapes", "--json"],
                cwd=shapes.parent,
                env={**environment, "PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
                text=True,
                timeout=300,
            ).stdout
        )
        for seed in ("1", "2")
    ]
    assert answers[0] == answers[1]
    assert (answers[0]["name"], answers[0]["num_classes"], answers[0]["resizable"]) == ("shapes", 3, True)
    assert answers[0]["parity_error"] <= own.PARITY_TOLERANCE


def test_the_example_tells_shapes_apart_by_its_labels(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(shapes), *sys.path])
    monkeypatch.delitem(sys.modules, "train", raising=False)
    import train  # type: ignore[import-not-found]

    backbone = load_own(load_manifest(shapes))
    random = np.random.default_rng(99)
    labels = np.arange(60) % 3
    drawings = [train.draw(label, 100, random) for label in labels]
    pictures = np.stack([preprocess_image(drawing, backbone.preprocessing) for drawing in drawings])
    with torch.inference_mode():
        found = backbone.whole()(torch.from_numpy(pictures)).argmax(1).numpy()
    assert (found == labels).mean() > 0.9
    assert backbone.class_names == ("circle", "square", "triangle")
    sys.modules.pop("train")


def test_the_guide_shows_the_example_and_every_key(shapes: Path) -> None:
    from trunkline_worker.backbones import manifest

    guide = (ROOT / "docs" / "own-backbone.md").read_text()
    (shown,) = re.findall(r"```toml\n(name = .*?)```", guide, re.DOTALL)
    import tomllib

    assert tomllib.loads(shown) == tomllib.loads((shapes / "backbone.toml").read_text())
    keys = set(manifest._ManifestTable.model_fields) - {"preprocessing"}
    keys |= {f"preprocessing.{name}" for name in manifest._PreprocessingTable.model_fields}
    documented = set(re.findall(r"`([\w.]+)`", "\n".join(re.findall(r"^\| (`[^|]*) \|", guide, re.MULTILINE))))
    assert documented == keys
