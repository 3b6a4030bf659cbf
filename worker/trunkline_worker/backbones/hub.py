"""The hub's cache: where torchvision's weights lie, and how they get there."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import urllib.request
from pathlib import Path

import torch
from trunkline_wire.errors import ErrorCode, WireError

CONNECT_TIMEOUT_S = 10.0
"""How long a silent server is waited for. Torch's own download waits for ever."""

_HASH = re.compile(r"-([a-f0-9]{8,64})\.pth$")
_BLOCK_BYTES = 2**20


def cached_file(url: str) -> Path:
    """Return where the hub's cache keeps a file, whether or not it is there."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def fetch(name: str, url: str, path: Path, *, allowed: bool) -> None:
    """Fetch a file into the hub's cache, whole or not at all, checked against the hash in its name.

    Raises:
        WireError: NOT_FOUND where it may not or cannot be fetched, saying where it was looked for and what to do;
            CORRUPT_DATA where what came is something else.
    """
    advice = (
        f"put the file {url} there, name a local file with --weights FILE, or accept random weights with "
        "--allow-untrained"
    )
    if not allowed:
        raise WireError(ErrorCode.NOT_FOUND, f"no weights of {name} at {path}: {advice}")
    try:
        digest = _download(url, path)
    except OSError as error:  # urllib's errors and timeouts are OSErrors
        raise WireError(
            ErrorCode.NOT_FOUND, f"no weights of {name} at {path}, and they cannot be fetched ({error}): {advice}"
        ) from error
    expected = _HASH.search(url)
    if expected is not None and not digest.startswith(expected[1]):
        path.unlink()
        raise WireError(ErrorCode.CORRUPT_DATA, f"what {url} sent has another hash than its name says; removed")


def _download(url: str, path: Path) -> str:
    """Write to a temporary file beside the target, rename, and return the hex SHA-256."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S) as response:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with open(descriptor, "wb") as file:
                while block := response.read(_BLOCK_BYTES):
                    digest.update(block)
                    file.write(block)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return digest.hexdigest()
