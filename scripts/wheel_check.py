"""Build the wheel, check what is in it, and use it in an environment that has nothing else.

Proves that the base install is light: no ray, torch or ONNX Runtime, small, quick to import, and that its command line
works and says what to install for the rest.
"""

from __future__ import annotations

import email
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"trunkline", "trunkline_worker", "trunkline_wire"}
ABSENT = ("ray", "torch", "torchvision", "onnxruntime", "sqlalchemy", "timm", "sklearn")
MAX_INSTALLED_BYTES = 150 * 2**20
MAX_IMPORT_S = 0.3
MAX_READY_S = 0.6
IMPORT_TRIES = 7


def build(folder: Path) -> Path:
    """Build the wheel and return its path. Without a build environment of its own where hatchling is at hand."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-isolation")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> list[str]:
    """Return what is wrong with the wheel's contents."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top = {name.partition("/")[0] for name in names}
        (info,) = {name for name in top if name.endswith(".dist-info")}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    findings = [f"unexpected in the wheel: {name}" for name in sorted(top - PACKAGES - {info})]
    findings += [f"missing from the wheel: {name}" for name in sorted(PACKAGES - top)]
    findings += [f"licence missing: {name}" for name in ("LICENSE", "NOTICE") if f"{info}/licenses/{name}" not in names]
    findings += [f"no py.typed in {name}" for name in sorted(PACKAGES) if f"{name}/py.typed" not in names]
    strange = (".pyc", ".pt", ".pth", ".onnx", ".safetensors", ".so", ".db")
    findings += [f"should not be shipped: {name}" for name in names if name.endswith(strange) or "/tests/" in name]
    missing = [path for path in _sources() if path not in names]
    findings += [f"source missing from the wheel: {name}" for name in missing]
    if metadata["License-Expression"] != "Apache-2.0":
        findings.append(f"License-Expression is {metadata['License-Expression']!r}")
    return findings


def _sources() -> list[str]:
    roots = (ROOT / "client", ROOT / "worker", ROOT / "proto")
    return [str(path.relative_to(root)) for root in roots for path in sorted(root.rglob("*.py"))]


def installed_bytes(site_packages: Path) -> int:
    """Return the size of what is installed, pip and what came with the environment left out."""
    return sum(
        path.lstat().st_size
        for path in site_packages.rglob("*")
        if path.is_file() and path.relative_to(site_packages).parts[0].partition("-")[0] not in ("pip", "setuptools")
    )


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command outside the repository, with nothing of this process's environment that Python reads."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRUNKLINE_"))}
    return subprocess.run(
        command,
        env=environment | {"NO_COLOR": "1", "COLUMNS": "200"},
        cwd=tempfile.gettempdir(),
        text=True,
        capture_output=True,
        check=False,
    )


def check_use(wheel: Path, folder: Path) -> list[str]:
    """Install the wheel alone and return what is wrong with the result."""
    findings: list[str] = []
    environment = folder / "venv"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    command = str(environment / "bin" / "trunkline")
    installed = run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)])
    if installed.returncode:
        return [f"the wheel does not install: {installed.stderr}"]

    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    size = installed_bytes(site_packages)
    print(f"installed size of the base client: {size / 2**20:.1f} MiB (at most {MAX_INSTALLED_BYTES / 2**20:.0f})")
    if size > MAX_INSTALLED_BYTES:
        findings.append(f"the base client takes {size / 2**20:.1f} MiB")

    for name in ABSENT:
        # -P: a folder of that name where this is run is not what is meant.
        if run([python, "-P", "-c", f"import {name}"]).returncode == 0:
            findings.append(f"the base install brings {name}")
    imported = run([python, "-c", "import trunkline, sys; print(trunkline.__file__, *sys.modules)"])
    if imported.returncode:
        return [*findings, f"import trunkline failed: {imported.stderr}"]

    bare = _fastest(python, "pass")
    # Names are loaded when they are first used, so the second line tells what a program pays.
    for code, most in (("import trunkline", MAX_IMPORT_S), ("from trunkline import connect", MAX_READY_S)):
        seconds = _fastest(python, code) - bare
        print(f"{code}: {seconds:.3f} s above a bare interpreter (at most {most})")
        if seconds > most:
            findings.append(f"{code} takes {seconds:.3f} s")

    version = run([command, "--version"])
    if version.returncode or wheel.name.split("-")[1] not in version.stdout:
        findings.append(f"trunkline --version: {version.returncode} {version.stdout}{version.stderr}")
    up = run([command, "up"])
    if up.returncode == 0 or "trunkline[worker]" not in up.stdout + up.stderr or "Traceback" in up.stderr:
        findings.append(f"trunkline up does not say what to install: {up.returncode} {up.stdout}{up.stderr}")
    shown = run([command, "--help"])
    if shown.returncode or "Traceback" in shown.stderr:
        findings.append(f"trunkline --help: {shown.returncode} {shown.stderr}")
    return findings


def _fastest(python: str, code: str) -> float:
    times = []
    for _ in range(IMPORT_TRIES):
        start = time.perf_counter()
        run([python, "-c", code])
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> int:
    """Run every check, print what is wrong and return the exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build(folder / "dist")
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB")
        findings = check_contents(wheel) + check_use(wheel, folder)
    for finding in findings:
        print(f"wrong: {finding}")
    print("The wheel is as it should be." if not findings else f"{len(findings)} findings.")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
