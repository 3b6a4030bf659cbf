"""The hubs' caches: where the weights of torchvision and timm lie, and how they get there."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from trunkline_wire.errors import ErrorCode, WireError

CONNECT_TIMEOUT_S = 10.0
"""How long a silent server is waited for. Torch's own download waits for ever."""

REPO_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the file with the weights in a repository of the Hugging Face hub, the first that is there."""

_ADVICE = "name a local file with --weights FILE, or accept random weights with --allow-untrained"
_HASH = re.compile(r"-([a-f0-9]{8,64})\.pth$")
_SHA256 = re.compile(r"[a-f0-9]{64}")
_BLOCK_BYTES = 2**20


def cached_file(url: str) -> Path:
    """Return where torch's cache keeps a file, whether or not it is there."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def fetch(name: str, url: str, path: Path, *, allowed: bool) -> None:
    """Fetch a file into torch's cache, whole or not at all, checked against the hash in its name.

    Raises:
        WireError: NOT_FOUND where it may not or cannot be fetched, saying where it was looked for and what to do;
            CORRUPT_DATA where what came is something else.
    """
    advice = f"put the file {url} there, {_ADVICE}"
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


@dataclass(frozen=True)
class Repo:
    """A repository of the Hugging Face hub.

    Attributes:
        id: ``owner/name``.
        revision: A branch, a tag or a commit. None: the main branch.
    """

    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Repo:
        """Take ``owner/name`` or ``owner/name@revision`` apart."""
        repo_id, _, revision = text.partition("@")
        return cls(repo_id, revision or None)


def cached_repo_file(repo: Repo) -> Path | None:
    """Return the file with the weights from the Hugging Face cache, or None. Nothing is asked of the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for filename in REPO_FILES:
        try:
            return Path(hf_hub_download(repo.id, filename, revision=repo.revision, local_files_only=True))
        except EntryNotFoundError:
            continue
    return None


def fetch_repo_file(name: str, repo: Repo, *, allowed: bool) -> Path:
    """Fetch the file with the weights into the Hugging Face cache, and return where it lies.

    Raises:
        WireError: NOT_FOUND where it may not or cannot be fetched, saying where it was looked for and what to do;
            CORRUPT_DATA where what came is something else.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    where = f"in the Hugging Face cache {constants.HF_HUB_CACHE}"
    advice = f"put it there (hf download {repo.id}), {_ADVICE}"
    if not allowed:
        raise WireError(ErrorCode.NOT_FOUND, f"no weights of {name} {where}: {advice}")
    reason: Exception | None = None
    for filename in REPO_FILES:
        try:
            # Asked for first: a download that cannot reach the hub tries again and again before it says so.
            get_hf_file_metadata(hf_hub_url(repo.id, filename, revision=repo.revision), timeout=CONNECT_TIMEOUT_S)
            path = Path(hf_hub_download(repo.id, filename, revision=repo.revision))
        except EntryNotFoundError as error:  # the repository has no file of that name
            reason = error
        except Exception as error:  # the hub's client raises many kinds, and those of the library under it
            reason = error
            break
        else:
            _check_blob(path)
            return path
    assert reason is not None
    raise WireError(
        ErrorCode.NOT_FOUND,
        f"no weights of {name} {where}, and they cannot be fetched ({_first_line(reason)}): {advice}",
    ) from reason


def _check_blob(path: Path) -> None:
    """Check a file of the cache against the SHA-256 that the cache names it by; small files have another name."""
    blob = path.resolve()
    if not _SHA256.fullmatch(blob.name):
        return
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        blob.unlink()
        raise WireError(ErrorCode.CORRUPT_DATA, f"what came for {path.name} has another hash than it should; removed")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
