"""What the light client costs: installed size, and the time its import takes.

Installs this checkout without extras into a new virtual environment, from the package registry that pip is set up for.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report, summary

ROOT = Path(__file__).parents[1]
IMPORTS = {
    "import trunkline": "import trunkline",
    "import trunkline, names used": "from trunkline import connect, MLP, Client, TrunklineError",
}


def size_mib(folder: Path) -> float:
    """Return the size of all files under a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def seconds(python: Path, code: str, times: int) -> list[float]:
    """Return how long the code takes inside a new interpreter, its own start not counted."""
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    found = []
    for _ in range(times + 1):
        found.append(float(subprocess.run([python, "-c", timed], capture_output=True, text=True, check=True).stdout))
    return found[1:]  # the first one compiles


def main() -> None:
    rows: list[tuple[str, ...]] = [("what", "figure")]
    for name, extra in (("base", ""), ("with a stem runner", "[stem]")):
        with tempfile.TemporaryDirectory() as folder:
            venv = Path(folder) / "venv"
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
            pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            before = size_mib(venv)
            started = time.perf_counter()
            subprocess.run([*pip, f"{ROOT}{extra}"], check=True)
            rows.append((f"{name}: installed, beside Python and pip", f"{size_mib(venv) - before:.0f} MiB"))
            rows.append((f"{name}: pip install", f"{time.perf_counter() - started:.0f} s"))
            if not extra:
                for label, code in IMPORTS.items():
                    rows.append((label, f"{summary(seconds(venv / 'bin' / 'python', code, 5))} s"))
    report("client_footprint", "What the light client costs", rows, ["Seconds: median (least to most) of five."])


if __name__ == "__main__":
    main()
