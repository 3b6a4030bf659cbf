"""Make an environment for each peer: the peer from PyPI, and the heavy packages of the Python that runs this.

A peer gets what it asks for itself; torch, ONNX Runtime and the like are taken from here, behind the peer's own
packages, so that five gigabytes are not installed once more for each. Nothing is pinned that works unpinned: what was
installed is in the report. ``TRUNKLINE_BENCH_DIR`` says where; the default is ``.venv-peers`` at the repository's root.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from contestants import PEERS

FOLDER_VARIABLE = "TRUNKLINE_BENCH_DIR"

_SHARED = "trunkline-bench-shared.pth"


def folder() -> Path:
    """Return where the environments are."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).absolute().parents[2] / ".venv-peers").absolute()


def python(package: str) -> Path:
    """Return the interpreter of a peer's environment, whether or not it is there."""
    return folder() / package / "bin" / "python" if package else Path(sys.executable)


def version(package: str) -> str:
    """Return the version of a peer that is installed, or an empty text."""
    if not python(package).exists():
        return ""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python(package), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def make(package: str, also: Sequence[str]) -> None:
    """Make one environment, or bring it up to date.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    place = folder() / package
    if not python(package).exists():
        venv.create(place, with_pip=True)
    shared = next((place / "lib").glob("python*/site-packages")) / _SHARED
    # Installed before the shared packages are seen: pip must not take them for the environment's own.
    shared.unlink(missing_ok=True)
    pip = [str(python(package)), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--upgrade"]
    subprocess.run([*pip, package, *also], check=True)
    # addsitedir and not a bare path: packages installed for development are .pth files themselves.
    shared.write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")


def main() -> None:
    for package, also in ((peer.package, peer.also) for peer in PEERS if peer.package):
        print(f"installing {package}", flush=True)
        try:
            make(package, also)
        except subprocess.CalledProcessError as error:
            print(f"{package} cannot be installed: {error}", file=sys.stderr)
            continue
        code = f"import torch, {package}; print(torch.__version__)"
        done = subprocess.run([python(package), "-c", code], capture_output=True, text=True, check=False)
        state = "usable" if done.returncode == 0 else f"not usable: {done.stderr.strip().splitlines()[-1]}"
        print(f"{package} {version(package)}: {state}", flush=True)


if __name__ == "__main__":
    main()
