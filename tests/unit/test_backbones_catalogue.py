"""Names, and what they stand for; timm's networks, and their weights from files, from both caches and from the hub."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import preprocess_image
from trunkline_worker.backbones import hub, timm_models
from trunkline_worker.backbones.catalogue import available_backbones, load_backbone
from trunkline_worker.backbones.samples import BUNDLED
from trunkline_worker.backbones.weights import state_sha256

RESNET, VIT = "timm/test_resnet", "timm/test_vit"
REPO = "timm/test_resnet.r160_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both caches in a folder of the test's own, and every way out of this machine closed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_options: pytest.fail("fetched"))
    return tmp_path


@pytest.fixture
def state() -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(5)
    return timm.create_model("test_resnet").state_dict()


def put_into_cache(folder: Path, name: str, content: bytes) -> Path:
    """Lay a file down as the Hugging Face cache does: a blob by its hash, a link to it, and the commit of main."""
    root = folder / f"models--{REPO.replace('/', '--')}"
    blob = root / "blobs" / hashlib.sha256(content).hexdigest()
    link = root / "snapshots" / COMMIT / name
    for path in (blob, link, root / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs" / "main").write_text(COMMIT)
    return link


def saved(state: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(dict(state))


def logits(backbone: object, pictures: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return backbone.whole()(torch.from_numpy(pictures))  # type: ignore[attr-defined]


# --- names ------------------------------------------------------------------------------------------------------------


def test_timms_names_are_many_and_are_not_listed_but_served() -> None:
    assert not any(name.startswith("timm/") for name in available_backbones())
    backbone = load_backbone(RESNET, allow_untrained=True)
    assert (backbone.name, backbone.weights.pretrained) == (RESNET, False)
    assert backbone.class_names == ()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("timm/resnet19", r"no model 'resnet19'\. Did you mean resnet18 or "),
        ("timm/resnet18.a7_in1k", r"no weights 'a7_in1k' of resnet18\. Did you mean a3_in1k or "),
        ("timm/resnet18.nothing-like-it", r"It has: a1_in1k, "),
        ("timm/hf-hub:someone/model", "no model"),
        ("timm/local-dir:/etc", "no model"),
        ("timm/", "no model ''"),
        ("timm/" + "x" * 5000, "no model 'xxx"),
        ("efficientnet_lite1", "Did you mean efficientnet_lite0"),
        ("other/resnet18", "timm's as timm/NAME"),
    ],
)
def test_an_unknown_name_is_refused_with_its_neighbours(name: str, what: str) -> None:
    with pytest.raises(WireError, match=what) as caught:
        load_backbone(name, allow_untrained=True)
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert len(caught.value.message) < 500


def test_a_network_that_takes_other_than_square_pictures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm_models._build

    def oblong(model: str, **options: object) -> torch.nn.Module:
        network = build(model, **options)
        network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 160, 128)}
        return network

    monkeypatch.setattr(timm_models, "_build", oblong)
    with pytest.raises(WireError, match="160 x 128 pixels of 3 channels; square") as caught:
        load_backbone(RESNET, allow_untrained=True)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_what_timm_cannot_build_is_said_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise ImportError("needs a package that is not installed")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(WireError, match="ImportError: needs a package") as caught:
        load_backbone(RESNET, allow_untrained=True)
    assert caught.value.code is ErrorCode.UNSUPPORTED


# --- the network ------------------------------------------------------------------------------------------------------


# With an even margin around the crop: of an odd one, timm leaves the larger half on the other side.
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "test_vit.r160_in1k",
        "test_resnet.r160_in1k",
        "efficientnet_b0.ra_in1k",
        "resnet18.tv_in1k",
    ],
)
def test_pictures_are_prepared_as_timm_does(name: str) -> None:
    config = timm.get_pretrained_cfg(name).to_dict()
    ours = timm_models._preprocessing(name, config)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    mean, std = (np.array(one)[:, None, None] for one in (ours.mean, ours.std))
    theirs = np.round((transform(image).numpy() * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(preprocess_image(image, ours), theirs)


@pytest.mark.parametrize(
    ("name", "resizable"),
    [(RESNET, True), ("timm/test_efficientnet", True), (VIT, False), ("timm/test_convnext", True)],
)
def test_the_network_is_timms_own(name: str, resizable: bool, tmp_path: Path) -> None:
    torch.manual_seed(7)
    reference = timm.create_model(name.removeprefix("timm/")).eval()
    file = tmp_path / "some.safetensors"
    file.write_bytes(saved(reference.state_dict()))
    backbone = load_backbone(name, weights=str(file))
    assert backbone.resizable is resizable
    assert len(backbone.stage_names) >= 4
    pictures = BUNDLED.pictures(backbone.preprocessing, 2)
    mean, std = (
        torch.tensor(one).reshape(3, 1, 1) for one in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    with torch.inference_mode():
        expected = reference((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(logits(backbone, pictures), expected, rtol=1e-4, atol=1e-4)


def test_an_untrained_network_has_the_same_numbers_every_time() -> None:
    first, second = (load_backbone(RESNET, allow_untrained=True).weights_sha256 for _ in range(2))
    assert first == second


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_number_of_classes_is_the_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), file)
    backbone = load_backbone(VIT, weights=str(file))
    assert logits(backbone, np.zeros((1, 160, 160, 3), np.uint8)).shape == (1, 7)
    assert backbone.class_names == ()


def test_names_of_another_implementation_are_converted_by_timm(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = timm.create_model("convnext_atto", num_classes=5).eval()
    theirs = {}
    for name, tensor in network.state_dict().items():
        # As the authors of ConvNeXt call them.
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        for ours, original in (("conv_dw", "dwconv"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2")):
            name = name.replace(ours, original)
        theirs[name.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = tensor
    assert set(theirs).isdisjoint(name for name in network.state_dict() if not name.startswith("stages"))
    torch.save({"model": theirs}, tmp_path / "convnext.pth")
    converted = load_backbone("timm/convnext_atto", weights=str(tmp_path / "convnext.pth"))
    (tmp_path / "ours.safetensors").write_bytes(saved(network.state_dict()))
    assert (
        converted.weights_sha256
        == load_backbone("timm/convnext_atto", weights=str(tmp_path / "ours.safetensors")).weights_sha256
    )


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path, state: OrderedDict[str, torch.Tensor]) -> None:
    del state["bn1.weight"]
    state["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 4)
    state["surplus"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WireError) as caught:
        load_backbone(RESNET, weights=str(tmp_path / "other.pth"))
    assert caught.value.code is ErrorCode.INCOMPATIBLE
    for part in ("1 missing: bn1.weight", "1 unexpected: surplus", "layer1.0.conv1.weight (1x2x3x4, expected "):
        assert part in caught.value.message


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", hub.REPO_FILES)
@pytest.mark.parametrize("name", [RESNET, f"{RESNET}.r160_in1k"])
def test_the_hugging_face_cache_is_used(
    name: str, file: str, caches: Path, state: OrderedDict[str, torch.Tensor], tmp_path: Path
) -> None:
    if file.endswith(".safetensors"):
        content = saved(state)
    else:
        torch.save(state, tmp_path / "file")
        content = (tmp_path / "file").read_bytes()
    put_into_cache(caches / "huggingface", file, content)
    backbone = load_backbone(name, allow_download=False)
    assert backbone.weights.text == f"timm test_resnet.r160_in1k, from the Hugging Face hub: {REPO} at {COMMIT[:8]}"
    assert backbone.weights.pretrained
    assert backbone.class_names[0] == "tench"
    assert len(backbone.class_names) == 1000
    assert backbone.weights_sha256 == state_sha256(state)


def test_safetensors_come_before_what_torch_would_unpickle(caches: Path, state: OrderedDict[str, torch.Tensor]) -> None:
    put_into_cache(caches / "huggingface", "pytorch_model.bin", b"not even a file of torch's")
    put_into_cache(caches / "huggingface", "model.safetensors", saved(state))
    assert load_backbone(RESNET).weights.pretrained


def test_the_cache_is_where_the_environment_says(tmp_path: Path, state: OrderedDict[str, torch.Tensor]) -> None:
    put_into_cache(tmp_path / "home" / "hub", "model.safetensors", saved(state))
    code = (
        "from trunkline_worker.backbones.catalogue import load_backbone;"
        f"print(load_backbone({RESNET!r}).describe().weights)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert f"{REPO} at {COMMIT[:8]}" in done.stdout


def test_weights_with_an_address_only_lie_in_torchs_cache(caches: Path) -> None:
    torch.manual_seed(1)
    network = timm.create_model("legacy_seresnet18")
    file = caches / "torch" / "checkpoints" / "seresnet18-4bb0ce65.pth"
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    backbone = load_backbone("timm/legacy_seresnet18")
    assert backbone.weights.text == "timm legacy_seresnet18.in1k, from seresnet18-4bb0ce65.pth"


@pytest.mark.parametrize("allow_download", [True, False])
def test_without_weights_the_error_says_where_and_what_to_do(caches: Path, allow_download: bool) -> None:
    with pytest.raises(WireError) as caught:
        load_backbone(RESNET, allow_download=allow_download)
    assert caught.value.code is ErrorCode.NOT_FOUND
    for part in (str(caches / "huggingface"), f"hf download {REPO}", "--weights FILE", "--allow-untrained"):
        assert part in caught.value.message
    assert ("offline" in caught.value.message) is allow_download


def test_an_address_without_a_file_says_the_same(caches: Path) -> None:
    with pytest.raises(WireError) as caught:
        load_backbone("timm/legacy_seresnet18", allow_download=False)
    for part in (str(caches / "torch"), "https://", "seresnet18-4bb0ce65.pth", "--weights FILE", "--allow-untrained"):
        assert part in caught.value.message


def test_a_network_that_timm_has_no_weights_of_says_so() -> None:
    with pytest.raises(WireError, match="timm has no weights of timm/test_coatnet: name a local file") as caught:
        load_backbone("timm/test_coatnet")
    assert caught.value.code is ErrorCode.NOT_FOUND


def test_a_damaged_file_in_the_cache_is_corrupt(caches: Path) -> None:
    put_into_cache(caches / "huggingface", "model.safetensors", b"\0" * 100)
    with pytest.raises(WireError) as caught:
        load_backbone(RESNET)
    assert caught.value.code is ErrorCode.CORRUPT_DATA


# --- the hub ----------------------------------------------------------------------------------------------------------


PROMISED = "0" * 64
"""A hash that no file here has."""


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Load networks in a process of its own, whose hub is a server here; return what it says, and what was asked."""
    home = tmp_path_factory.mktemp("home")
    files: dict[str, dict[str, bytes]] = {}
    for name in ("test_resnet", "test_vit", "test_convnext", "test_efficientnet"):
        state = timm.create_model(name).state_dict()
        torch.save(state, home / "file")
        repo = f"timm/{name}.r160_in1k"
        files[repo] = {"model.safetensors": saved(state), "pytorch_model.bin": (home / "file").read_bytes()}
    del files["timm/test_vit.r160_in1k"]["model.safetensors"]
    files["timm/test_convnext.r160_in1k"].clear()
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        """Answers as the Hugging Face hub does."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            asked.append(self.path)
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            found = re.fullmatch(rf"/(timm/[^/]+)/resolve/(?:main|{COMMIT})/([^?]+)(?:\?.*)?", self.path)
            content = files[found[1]].get(found[2]) if found is not None else None
            self.send_response(404 if content is None else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                wrong = "test_efficientnet" in self.path
                self.send_header("ETag", f'"{PROMISED if wrong else hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            return content or b""

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    code = (
        "import sys\n"
        "from trunkline_wire.errors import WireError\n"
        "from trunkline_worker.backbones.catalogue import load_backbone\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, load_backbone(name).describe().weights)\n"
        "    except WireError as error: print(name, error)\n"
    )
    names = ["test_resnet", "test_resnet", "test_vit", "test_convnext", "test_efficientnet"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
            environment.pop("HF_HUB_CACHE", None)
            environment |= {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(home / "huggingface"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
            }
            done = subprocess.run(
                [sys.executable, "-c", code, *(f"timm/{name}" for name in names)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
        finally:
            server.shutdown()
            thread.join()
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str]] = {name: [] for name in names}
    for line in done.stdout.splitlines():
        name, _, text = line.partition(" ")
        said[name.removeprefix("timm/")].append(text)
    said["asked"] = asked
    said["blobs"] = [one.name for one in home.rglob("blobs/*") if one.is_file()]
    return said


def test_what_the_cache_lacks_is_fetched_once(fetched: dict[str, list[str]]) -> None:
    expected = f"timm test_resnet.r160_in1k, from the Hugging Face hub: {REPO} at {COMMIT[:8]}"
    assert fetched["test_resnet"] == [expected] * 2
    assert sum(REPO in path for path in fetched["asked"]) == 1


def test_a_repository_without_safetensors_gives_its_other_file(fetched: dict[str, list[str]]) -> None:
    (said,) = fetched["test_vit"]
    assert said.endswith(f"timm/test_vit.r160_in1k at {COMMIT[:8]}")
    assert any("test_vit" in path and "pytorch_model.bin" in path for path in fetched["asked"])


def test_a_repository_without_weights_is_not_found(fetched: dict[str, list[str]]) -> None:
    (said,) = fetched["test_convnext"]
    assert said.startswith("[NOT_FOUND] no weights of timm/test_convnext in the Hugging Face cache")
    assert "--weights FILE" in said


def test_a_file_with_another_hash_than_the_hub_promised_is_removed(fetched: dict[str, list[str]]) -> None:
    (said,) = fetched["test_efficientnet"]
    assert said.startswith("[CORRUPT_DATA]")
    assert len(fetched["blobs"]) == 2
    assert PROMISED not in fetched["blobs"]
