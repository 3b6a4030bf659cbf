"""Blobs under ids and hashes in any fsspec storage: put whole and durably, or not at all.

On ``file://`` a put writes a temporary file, syncs it, renames it and syncs the directory. Object stores put
atomically by themselves. Everything else is refused: a put that can be seen half done would break the write order.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import fsspec
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store.failpoints import Failpoints
from trunkline_worker.store.ids import NewId, random_id

ATOMIC_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
"""Storage whose own put shows the whole object or nothing."""

_TEMPORARY = "tmp"
_PATH = re.compile(r"[a-z][a-z0-9_-]{0,31}(/[a-z0-9][a-z0-9_-]{0,127}(\.[a-z0-9]+)*){1,6}")
_MAX_PATH_LENGTH = 400
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_path(path: str) -> str:
    """Return ``path`` if blobs may lie there: ``kind/part/...``, parts of lower-case letters, digits, ``-`` and ``_``.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if len(path) > _MAX_PATH_LENGTH or not _PATH.fullmatch(path) or path.startswith(f"{_TEMPORARY}/"):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"{path[:80]!r} is not a storage path: expected 'kind/part', made of ids and hashes in lower case",
        )
    return path


class _Files(Protocol):
    def put(self, path: str, data: bytes) -> None: ...
    def get(self, path: str) -> bytes: ...
    def exists(self, path: str) -> bool: ...
    def delete(self, path: str) -> None: ...


class BlobStore:
    """Bytes under paths. Can be pickled and used from several threads and processes at once."""

    def __init__(self, url: str, *, failpoints: Failpoints | None = None, new_id: NewId = random_id) -> None:
        """Open the storage at ``url``; a local directory is made if it is not there.

        Args:
            url: ``file:///directory``, or an object store's (``s3://bucket/prefix``, ``gs://...``, ``memory://...``).
            failpoints: Where tests kill.
            new_id: Names temporary files.

        Raises:
            WireError: UNSUPPORTED for storage without an atomic put.
        """
        self.url = url
        self._failpoints = failpoints or Failpoints()
        self._new_id = new_id
        self._files = self._open()

    def _open(self) -> _Files:
        protocol, separator, rest = self.url.partition("://")
        if not separator:
            raise WireError(
                ErrorCode.UNSUPPORTED,
                f"storage {self.url[:80]!r} is not a URL; for a directory write file:///directory",
            )
        if protocol == "file":
            if not rest.startswith("/"):
                raise WireError(ErrorCode.UNSUPPORTED, f"storage {self.url[:80]!r}: a file URL needs an absolute path")
            return LocalFiles(rest, self._failpoints, self._new_id)
        if protocol in ATOMIC_PROTOCOLS:
            return _ObjectFiles(self.url, self._failpoints)
        known = ", ".join(sorted(ATOMIC_PROTOCOLS | {"file"}))
        raise WireError(ErrorCode.UNSUPPORTED, f"storage {protocol}:// cannot put atomically; one of {known} is needed")

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopen the same storage on the other side."""
        return _reopen, (self.url, self._failpoints, self._new_id)

    def put(self, path: str, data: bytes) -> None:
        """Store ``data`` under ``path``. When this returns it survives a crash; a reader never sees half of it.

        Raises:
            WireError: INVALID_ARGUMENT for the path, STORAGE_FULL.
        """
        check_path(path)
        with _full_is_public():
            self._files.put(path, data)

    def get(self, path: str) -> bytes:
        """Return what lies under ``path``.

        Raises:
            WireError: INVALID_ARGUMENT for the path, NOT_FOUND.
        """
        check_path(path)
        try:
            return self._files.get(path)
        except FileNotFoundError as error:
            raise WireError(ErrorCode.NOT_FOUND, f"storage holds nothing under {path}") from error

    def get_checked(self, path: str, sha256_hex: str) -> bytes:
        """Return what lies under ``path`` if it hashes to ``sha256_hex``.

        Raises:
            WireError: INVALID_ARGUMENT for the path, NOT_FOUND, CORRUPT_DATA.
        """
        data = self.get(path)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256_hex:
            raise WireError(
                ErrorCode.CORRUPT_DATA,
                f"stored data under {path} is damaged: its SHA-256 is {found[:12]}..., expected {sha256_hex[:12]}...",
            )
        return data

    def exists(self, path: str) -> bool:
        """Return whether something lies under ``path``."""
        return self._files.exists(check_path(path))

    def delete(self, path: str) -> None:
        """Remove what lies under ``path``. Nothing there is fine: a retry ends the same."""
        self._files.delete(check_path(path))

    def sweep(self, *, now: float, older_than_s: float = 3600.0) -> int:
        """Remove what killed writers left behind, and return how many files that was.

        Args:
            now: Seconds since the epoch, by the clock of whoever calls.
            older_than_s: Younger leftovers may belong to a writer that is still at work.
        """
        if not isinstance(self._files, LocalFiles):
            return 0
        return self._files.sweep(now - older_than_s)


class CachedBlobs(BlobStore):
    """A store that keeps what it read and checked in memory, up to a number of bytes; the oldest goes first.

    Right for content-addressed blobs only: what lies under a hash never changes. For one thread.
    """

    def __init__(self, url: str, *, capacity_bytes: int, failpoints: Failpoints | None = None) -> None:
        """Open the store at ``url``."""
        super().__init__(url, failpoints=failpoints)
        self._capacity_bytes = capacity_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0

    def get_checked(self, path: str, sha256_hex: str) -> bytes:
        """Read and check a blob, or return it from memory. See ``BlobStore.get_checked``."""
        data = self._kept.pop(sha256_hex, None)
        if data is None:
            data = super().get_checked(path, sha256_hex)
            self._kept_bytes += len(data)
        self._kept[sha256_hex] = data
        while self._kept_bytes > self._capacity_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)
        return data


def _reopen(url: str, failpoints: Failpoints, new_id: NewId) -> BlobStore:
    return BlobStore(url, failpoints=failpoints, new_id=new_id)


@contextmanager
def _full_is_public() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise WireError(
                ErrorCode.STORAGE_FULL,
                "the cluster's storage is full; free space there or ask its operator, then retry",
            ) from error
        raise


class LocalFiles:
    """A directory, its paths relative to it."""

    def __init__(self, root: str, failpoints: Failpoints, new_id: NewId) -> None:
        """Make the directory if need be."""
        self._root = os.path.abspath(root)
        self._failpoints = failpoints
        self._new_id = new_id
        # Directories whose whole chain of parents this object has synced. Another process may have made a directory
        # and died before syncing its parent, so that it exists is not enough.
        self._durable: set[str] = set()
        with _full_is_public():
            self._make_durable(os.path.join(self._root, _TEMPORARY))

    def put(self, path: str, data: bytes) -> None:
        """Write, sync, rename, sync the directory."""
        target = os.path.join(self._root, path)
        self._failpoints.hit("store.blob.before_write")
        self._make_durable(os.path.dirname(target))
        temporary = os.path.join(self._root, _TEMPORARY, self._new_id())
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                self._failpoints.hit("store.blob.written")
                os.fsync(file.fileno())
            self._failpoints.hit("store.blob.synced")
            os.replace(temporary, target)
        except OSError:
            # A full disk must not stay full of what could not be finished.
            _remove(temporary)
            raise
        self._failpoints.hit("store.blob.renamed")
        _sync_directory(os.path.dirname(target))
        self._failpoints.hit("store.blob.durable")

    def get(self, path: str) -> bytes:
        """Read the whole file."""
        with open(os.path.join(self._root, path), "rb") as file:
            return file.read()

    def exists(self, path: str) -> bool:
        """Return whether the file is there."""
        return os.path.isfile(os.path.join(self._root, path))

    def delete(self, path: str) -> None:
        """Remove the file and sync its directory."""
        target = os.path.join(self._root, path)
        if _remove(target):
            _sync_directory(os.path.dirname(target))

    def sweep(self, before: float) -> int:
        """Remove temporary files last written before ``before``, seconds since the epoch."""
        removed = 0
        with os.scandir(os.path.join(self._root, _TEMPORARY)) as entries:
            for entry in entries:
                try:
                    if entry.stat(follow_symlinks=False).st_mtime < before and _remove(entry.path):
                        removed += 1
                except FileNotFoundError:  # its writer has just finished
                    continue
        return removed

    def _make_durable(self, directory: str) -> None:
        if directory in self._durable:
            return
        missing: list[str] = []
        parent = directory
        while not os.path.isdir(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for one in reversed(missing):
            os.makedirs(one, mode=0o700, exist_ok=True)
        chain = {os.path.dirname(one) for one in missing}
        one = directory
        while one != self._root:
            one = os.path.dirname(one)
            chain.add(one)
        for one in chain:
            _sync_directory(one)
        self._durable.add(directory)


class _ObjectFiles:
    """An object store, or fsspec's memory."""

    def __init__(self, url: str, failpoints: Failpoints) -> None:
        self._failpoints = failpoints
        self._filesystem, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")

    def put(self, path: str, data: bytes) -> None:
        self._failpoints.hit("store.blob.before_write")
        self._filesystem.pipe_file(f"{self._root}/{path}", data)
        self._failpoints.hit("store.blob.durable")

    def get(self, path: str) -> bytes:
        return self._filesystem.cat_file(f"{self._root}/{path}")

    def exists(self, path: str) -> bool:
        # fsspec caches listings; another process may have written since.
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.isfile(f"{self._root}/{path}"))

    def delete(self, path: str) -> None:
        try:
            self._filesystem.rm_file(f"{self._root}/{path}")
        except FileNotFoundError:
            return


def _remove(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
