"""Refuse changes to the protos that break older clients. Usage: buf_breaking.py BUF.

Compares the working tree with the last tag and with `main` (or, on `main` itself, with the commit before), in buf's
category FILE. What is not in this clone, or has no protos, is skipped with a word: a shallow clone or the first commit
has nothing to compare with. A break is allowed where WIRE_VERSION was raised, since then the two sides refuse each
other by name.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_WIRE_VERSION = re.compile(r"^WIRE_VERSION = (\d+)$", re.MULTILINE)


def _git(*arguments: str, root: Path) -> bytes | None:
    """Return what git printed, None where it failed."""
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    return result.stdout if result.returncode == 0 else None


def _commit(name: str, root: Path) -> str | None:
    found = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", root=root)
    return found.decode().strip() if found else None


def bases(root: Path) -> list[tuple[str, str]]:
    """Return what to compare with: (name, commit), each commit once."""
    head = _commit("HEAD", root)
    # On a tagged commit the tag before it is meant.
    describe = ("describe", "--tags", "--abbrev=0")
    tag = _git(*describe, "HEAD^", root=root) or _git(*describe, root=root)
    found: list[tuple[str, str]] = []
    if tag and (commit := _commit(tag.decode().strip(), root)):
        found.append((f"tag {tag.decode().strip()}", commit))
    for name in ("origin/main", "main"):
        commit = _commit(name, root)
        if commit is not None and commit != head:
            found.append((name, commit))
            break
    else:
        if before := _commit("HEAD^", root):
            found.append(("the commit before", before))
    unique = {commit: name for name, commit in reversed(found)}
    return [(name, commit) for commit, name in unique.items()]


def wire_version(text: str) -> int:
    """Return WIRE_VERSION from the source of ``trunkline_wire/__init__.py``, 0 where there is none."""
    match = _WIRE_VERSION.search(text)
    return int(match[1]) if match else 0


def compare(buf: str, name: str, commit: str, root: Path) -> bool:
    """Compare the working tree with one commit and return whether nothing forbidden was found."""
    archive = _git("archive", "--format=tar", commit, "proto", root=root)
    if archive is None:
        print(f"buf breaking: {name} has no protos: skipped")
        return True
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(temporary, filter="data")
        shutil.copy(root / "buf.yaml", temporary)
        result = subprocess.run(
            [buf, "breaking", ".", "--against", temporary], cwd=root, capture_output=True, text=True, check=False
        )
        before = wire_version((Path(temporary) / "proto/trunkline_wire/__init__.py").read_text(encoding="utf-8"))
    if result.returncode == 0:
        print(f"buf breaking: nothing that breaks {name} ({commit[:9]})")
        return True
    print(result.stdout + result.stderr, end="")
    now = wire_version((root / "proto/trunkline_wire/__init__.py").read_text(encoding="utf-8"))
    if now > before:
        print(f"buf breaking: allowed, since WIRE_VERSION went from {before} to {now}")
        return True
    print(f"buf breaking: clients of {name} ({commit[:9]}) would break. Keep the old fields, or raise WIRE_VERSION.")
    return False


def main(arguments: list[str]) -> int:
    """Compare with every base and return the exit status."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    found = bases(ROOT)
    if not found:
        print("buf breaking: no tag, no main and no earlier commit in this clone: skipped")
    buf = str(Path(arguments[0]).absolute())
    return 0 if all([compare(buf, name, commit, ROOT) for name, commit in found]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
