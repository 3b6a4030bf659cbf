"""Refuse files above 512 KiB: data and weights belong in packages, not in the repository."""

from __future__ import annotations

import sys
from pathlib import Path

MAX_BYTES = 512 * 1024


def main(names: list[str]) -> int:
    """Print every file that is too large and return 1 if there was one."""
    large = [(path, path.stat().st_size) for path in map(Path, names) if path.is_file()]
    large = [(path, size) for path, size in large if size > MAX_BYTES]
    for path, size in large:
        print(f"{path}: {size} bytes; at most {MAX_BYTES}")
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
