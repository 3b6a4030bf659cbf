"""The checks themselves: each is shown a planted fault and must find it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- banned imports ---------------------------------------------------------------------------------------------------


def ruff(code: str, where: str) -> str:
    command = [str(BIN / "ruff"), "check", "--no-cache", "--output-format", "concise", "--stdin-filename", where, "-"]
    return subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("from client.trunkline import connect\n", "TID251"),
        ("import client.trunkline\n", "TID251"),
        ("from worker.trunkline_worker import store\n", "TID251"),
        ("from proto.trunkline_wire import codecs\n", "TID251"),
        ("import pickle\n", "TID251"),
        ("from pickle import loads\n", "TID251"),
        ("import cloudpickle\n", "TID251"),
        ("from torch.export import load\n", "TID251"),
        ("import torch\n\ntorch.export.load('x')\n", "TID251"),
        ("eval('1')\n", "S307"),
    ],
)
@pytest.mark.parametrize("where", ["client/trunkline/x.py", "worker/trunkline_worker/x.py", "examples/x.py"])
def test_ruff_finds_banned_imports(code: str, rule: str, where: str) -> None:
    assert f" {rule} " in ruff(f'"""Planted."""\n\n{code}', where)


# --- calls that can run what they load --------------------------------------------------------------------------------

PLANTED = [
    "import torch\ntorch.load('x')",
    "import torch\ntorch.load('x', weights_only=False)",
    "import torch\nflag = True\ntorch.load('x', weights_only=flag)",
    "import torch as t\nt.load('x')",
    "from torch import load\nload('x')",
    "from torch import load as fetch\nfetch('x')",
    "from torch.serialization import load\nload('x')",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import numpy\nnumpy.load('x', None, True)",
    "import torch\ntorch.export.load('x')",
    "from torch import export\nexport.load('x')",
    "import torch.export as e\ne.load('x')",
    "import torch\ntorch.jit.load('x')",
    "import torch\ntorch.hub.load('x', 'y')",
    "from backports import zstd\nzstd.decompress(b'')",
    "from compression import zstd\nzstd.decompress(b'')",
    "from trunkline_wire.codecs import zstd\nzstd.decompress(b'')",
    "import zstandard\nzstandard.ZstdDecompressor().decompress(b'', max_output_size=1)",
    "import pickle as p\np.loads(b'')",
    "def f():\n    import cloudpickle\n    cloudpickle.loads(b'')",
    "import joblib\njoblib.load('x')",
]
ALLOWED = [
    "import torch\ntorch.load('x', weights_only=True)",
    "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
    "import json\njson.load(open('x'))",
    "from backports import zstd\nzstd.compress(b'')\nzstd.ZstdFile('x')",
    "import tomllib\ntomllib.loads('')",
    "class Store:\n    def load(self): ...\nStore().load()",
]


@pytest.mark.parametrize("code", PLANTED)
def test_forbidden_calls_are_found(code: str, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert script("forbidden_calls").main([str(tmp_path)]) == 1


@pytest.mark.parametrize("code", ALLOWED)
def test_other_calls_are_not(code: str, tmp_path: Path) -> None:
    path = tmp_path / "fine.py"
    path.write_text(code)
    assert script("forbidden_calls").main([str(path)]) == 0


def test_a_finding_says_where_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "planted.py"
    path.write_text("import torch\n\n\ntorch.load('x')\n")
    script("forbidden_calls").main([str(path)])
    assert capsys.readouterr().out == f"{path}:4: torch.load: weights_only=True is needed\n"


def test_the_sources_are_free_of_forbidden_calls() -> None:
    folders = [str(ROOT / name) for name in ("client", "worker", "proto", "examples", "scripts")]
    assert script("forbidden_calls").main(folders) == 0


# --- who may import whom ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the three packages in which faults can be planted."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("client", "worker", "proto"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint_imports(tree: Path) -> tuple[int, str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(tree / name) for name in ("client", "worker", "proto")),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    result = subprocess.run(
        [str(BIN / "lint-imports")], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout + result.stderr


def test_the_import_rules_hold(tree: Path) -> None:
    code, output = lint_imports(tree)
    assert code == 0, output


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("proto/trunkline_wire/limits.py", "import trunkline_worker", "The wire knows"),
        ("proto/trunkline_wire/limits.py", "import torch", "The wire knows"),
        ("client/trunkline/errors.py", "import torch", "The client imports"),
        ("client/trunkline/errors.py", "def f():\n    import ray", "The client imports"),
        ("client/trunkline/errors.py", "import trunkline_worker.store", "The client imports"),
        ("worker/trunkline_worker/store/records.py", "import trunkline", "The worker does not"),
        ("worker/trunkline_worker/store/records.py", "import trunkline_worker.heads", "Worker layers"),
        ("worker/trunkline_worker/heads/__init__.py", "import trunkline_worker.backbones", "Worker layers"),
        ("worker/trunkline_worker/engine/api.py", "import trunkline_worker.serving", "Worker layers"),
        ("worker/trunkline_worker/engine/api.py", "import ray", "Numerics and storage"),
        ("worker/trunkline_worker/store/records.py", "import grpc", "Numerics and storage"),
        ("worker/trunkline_worker/heads/__init__.py", "from google.protobuf import message", "Numerics and storage"),
        ("worker/trunkline_worker/backbones/__init__.py", "import trunkline_wire.codecs", "Numerics and storage"),
    ],
)
def test_a_planted_import_breaks_its_contract(tree: Path, module: str, planted: str, contract: str) -> None:
    path = tree / module
    before = path.read_text()
    path.write_text(f"{before}\n{planted}\n")
    try:
        code, output = lint_imports(tree)
    finally:
        path.write_text(before)
    assert code == 1
    broken = [line for line in output.splitlines() if " BROKEN" in line]
    assert any(line.startswith(contract) for line in broken), output


# --- protos -----------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of one commit that holds the protos."""
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copytree(ROOT / "proto", folder / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "buf.yaml", folder)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "protos")
    return folder


def breaking(folder: Path) -> bool:
    """Return whether the check refuses the working tree."""
    module = script("buf_breaking")
    return not all([module.compare(str(BIN / "buf"), *base, folder) for base in module.bases(folder)])


def remove_a_field(folder: Path) -> None:
    path = folder / "proto/trunkline_wire/v1/registry.proto"
    text = path.read_text()
    assert "  string job_id = 14;\n" in text
    path.write_text(text.replace("  string job_id = 14;\n", ""))


def test_the_first_commit_has_nothing_to_break(repository: Path) -> None:
    assert script("buf_breaking").bases(repository) == []


def test_a_break_is_found_against_the_commit_before_and_the_tag(repository: Path) -> None:
    git(repository, "tag", "v0.1.0")
    (repository / "unrelated").write_text("x")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "unrelated")
    git(repository, "commit", "-q", "--allow-empty", "-m", "another")
    assert [name for name, _ in script("buf_breaking").bases(repository)] == ["the commit before", "tag v0.1.0"]
    assert not breaking(repository)
    remove_a_field(repository)
    assert breaking(repository)


def test_a_branch_is_compared_with_main_also_in_a_shallow_clone(repository: Path, tmp_path: Path) -> None:
    git(repository, "checkout", "-q", "-b", "topic")
    remove_a_field(repository)
    git(repository, "commit", "-q", "-a", "-m", "break")
    assert [name for name, _ in script("buf_breaking").bases(repository)] == ["main"]
    assert breaking(repository)
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", "--branch", "topic", f"file://{repository}", str(shallow))
    assert script("buf_breaking").bases(shallow) == []


def test_a_break_with_a_new_wire_version_is_allowed(repository: Path) -> None:
    git(repository, "commit", "-q", "--allow-empty", "-m", "another")
    remove_a_field(repository)
    path = repository / "proto/trunkline_wire/__init__.py"
    path.write_text(path.read_text().replace("WIRE_VERSION = ", "WIRE_VERSION = 1"))
    assert not breaking(repository)


def test_a_commit_without_protos_is_skipped(repository: Path) -> None:
    git(repository, "rm", "-q", "-r", "--cached", "proto")
    git(repository, "commit", "-q", "-m", "none")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "back")
    assert not breaking(repository)


def test_drift_of_generated_code_is_found(repository: Path) -> None:
    module = script("proto_check")
    committed = module.generated_files(repository / "proto")
    assert len(committed) == 3 * len(list((ROOT / "proto").rglob("*.proto")))
    assert module.differences(committed, committed) == []
    name = "trunkline_wire/v1/tensor_pb2.pyi"
    fresh = committed | {name: committed[name] + "# more\n"}
    assert [one.partition("\n")[0] for one in module.differences(committed, fresh)] == [f"{name}: differs"]
    assert module.differences(committed, fresh | {"new_pb2.py": ""})[0] == "new_pb2.py: missing"
    assert module.differences(committed | {"old_pb2.py": ""}, committed)[0].startswith("old_pb2.py: not what")
    assert module.untracked(repository) == []
    (repository / "proto/trunkline_wire/v1/stray_pb2_grpc.py").touch()
    assert module.untracked(repository) == ["proto/trunkline_wire/v1/stray_pb2_grpc.py"]


# --- the wheel, files, the Makefile -----------------------------------------------------------------------------------


def test_what_does_not_belong_into_the_wheel_is_found(tmp_path: Path) -> None:
    module = script("wheel_check")
    wheel = tmp_path / "trunkline-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("trunkline/__init__.py", "client/x.py", "trunkline_wire/weights.pt", "tests/test_x.py"):
            archive.writestr(name, "")
        archive.writestr("trunkline-0.1.0.dist-info/METADATA", "Metadata-Version: 2.4\nLicense-Expression: MIT\n")
    findings = "\n".join(module.check_contents(wheel))
    for expected in (
        "unexpected in the wheel: client",
        "unexpected in the wheel: tests",
        "missing from the wheel: trunkline_worker",
        "licence missing: NOTICE",
        "no py.typed in trunkline",
        "should not be shipped: trunkline_wire/weights.pt",
        "source missing from the wheel: trunkline_wire/codecs.py",
        "License-Expression is 'MIT'",
    ):
        assert expected in findings


def test_large_files_are_found(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(1000))
    large.write_bytes(bytes(600_000))
    module = script("large_files")
    assert module.main([str(small)]) == 0
    assert module.main([str(small), str(large), str(tmp_path / "gone")]) == 1


def test_no_source_root_is_a_package_and_no_test_folder_either() -> None:
    for name in ("client", "worker", "proto"):
        assert not (ROOT / name / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = {line.split()[1] for line in text.splitlines() if line.startswith(".PHONY:")}
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in output.splitlines()} == phony
    assert {"setup", "demo", "test", "test-slow", "test-gpu", "check", "clean"} <= phony


def test_every_check_is_part_of_the_whole_run() -> None:
    text = (ROOT / "Makefile").read_text()
    (checks,) = [
        line.partition(":")[2].partition("#")[0].split() for line in text.splitlines() if line.startswith("check:")
    ]
    whole = (ROOT / ".ci/run").read_text()
    (parts,) = [line.split(" in ")[1].rstrip("; do").split() for line in whole.splitlines() if "for check in" in line]
    assert set(checks) < set(parts)
    assert "test" in parts
    assert os.access(ROOT / ".ci/run", os.X_OK)
