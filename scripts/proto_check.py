"""Check that the committed protobuf code is what the pinned generator writes. Usage: proto_check.py PYTHON.

The code is generated in a temporary copy, so the check changes nothing, and every generated file must be tracked.
"""

from __future__ import annotations

import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generated_files(proto: Path) -> dict[str, str]:
    """Return the generated files below a directory: relative path to text."""
    paths = sorted(path for pattern in PATTERNS for path in proto.rglob(pattern))
    return {str(path.relative_to(proto)): path.read_text(encoding="utf-8") for path in paths}


def differences(committed: dict[str, str], fresh: dict[str, str]) -> list[str]:
    """Return what differs, one finding per file, with the start of its diff."""
    findings = [f"{name}: not what the generator writes, or no longer written" for name in committed.keys() - fresh]
    findings += [f"{name}: missing" for name in fresh.keys() - committed]
    for name in sorted(committed.keys() & fresh):
        if committed[name] != fresh[name]:
            lines = committed[name].splitlines(), fresh[name].splitlines()
            diff = difflib.unified_diff(*lines, "here", "fresh", n=1, lineterm="")
            findings.append("\n    ".join([f"{name}: differs", *list(diff)[:12]]))
    return sorted(findings)


def untracked(root: Path) -> list[str]:
    """Return the generated files that git does not track; none outside a repository."""
    command = ["git", "ls-files", "--others", "--", *(f"proto/**/{pattern}" for pattern in PATTERNS)]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return result.stdout.split() if result.returncode == 0 else []


def main(arguments: list[str]) -> int:
    """Regenerate in a copy, compare, print and return the exit status."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "proto"
        shutil.copytree(ROOT / "proto", copy, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([str(copy / "generate.sh"), arguments[0]], check=True)
        findings = differences(generated_files(ROOT / "proto"), generated_files(copy))
    findings += [f"{name}: generated but not tracked" for name in untracked(ROOT)]
    for finding in findings:
        print(finding)
    print("Run `make proto` and commit what it writes." if findings else "The generated code is up to date.")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
