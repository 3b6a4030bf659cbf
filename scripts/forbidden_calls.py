"""Find calls that can run, or blow up into, what they load. Usage: forbidden_calls.py PATH ...

ruff bans imports; it cannot ask whether ``torch.load`` was given ``weights_only=True``. Names are followed through the
file's imports, so an alias does not hide a call.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BANNED = {
    "cloudpickle.load": "nothing is unpickled here",
    "cloudpickle.loads": "nothing is unpickled here",
    "dill.load": "nothing is unpickled here",
    "dill.loads": "nothing is unpickled here",
    "joblib.load": "nothing is unpickled here",
    "pandas.read_pickle": "nothing is unpickled here",
    "pickle.load": "nothing is unpickled here",
    "pickle.loads": "nothing is unpickled here",
    "pickle.Unpickler": "nothing is unpickled here",
    "torch.export.load": "a .pt2 file can run code when it is loaded",
    "torch.hub.load": "it runs code from the repository it is given",
    "torch.jit.load": "a TorchScript file is code",
    "torch.package.PackageImporter": "a torch package is code",
}
"""Qualified name to why it is banned."""

GENERATED = ("_pb2.py", "_pb2_grpc.py")


@dataclass(frozen=True)
class Finding:
    """One forbidden call."""

    path: Path
    line: int
    call: str
    reason: str

    def __str__(self) -> str:
        """Return ``path:line: call: reason``."""
        return f"{self.path}:{self.line}: {self.call}: {self.reason}"


def find_in(path: Path) -> Iterator[Finding]:
    """Yield the forbidden calls of one file."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    names = _imported_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = _qualified(node.func, names)
        reason = _reason(call, node)
        if reason:
            yield Finding(path, node.lineno, call, reason)


def _imported_names(tree: ast.AST) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds `a`; `import a.b as c` binds `c` to a.b.
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _qualified(node: ast.expr, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def _reason(call: str, node: ast.Call) -> str:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if call in BANNED:
        return BANNED[call]
    if call.endswith(("zstd.decompress", "zstandard.decompress")):
        return "its output is not bounded; use trunkline_wire.codecs"
    if call in ("torch.load", "torch.serialization.load") and not _is(keywords.get("weights_only"), True):
        return "weights_only=True is needed"
    if call == "numpy.load" and (
        len(node.args) > 2 or not _is(keywords.get("allow_pickle", ast.Constant(False)), False)
    ):
        return "allow_pickle is not allowed"
    if "max_output_size" in keywords:
        return "max_output_size is ignored where the frame's header carries a size; use trunkline_wire.codecs"
    return ""


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def python_files(paths: list[Path]) -> Iterator[Path]:
    """Yield the Python files among and below the paths, the generated ones left out."""
    for path in paths:
        candidates = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        yield from (one for one in candidates if not one.name.endswith(GENERATED))


def main(names: list[str]) -> int:
    """Print every forbidden call and return 1 if there was one."""
    findings = [finding for path in python_files([Path(name) for name in names]) for finding in find_in(path)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
