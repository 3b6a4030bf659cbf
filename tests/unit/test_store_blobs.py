"""Blobs: whole or not at all, under ids and hashes only."""

import errno
import hashlib
import os
import pickle  # noqa: TID251 - whether a BlobStore survives the trip to a worker
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.store import blobs as blobs_module
from trunkline_worker.store.blobs import BlobStore, check_path
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill

PATH = f"chunks/ab/{'a' * 64}"


@pytest.fixture(params=["file", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "file":
        return BlobStore(f"file://{tmp_path}/blobs")
    return BlobStore(f"memory://{tmp_path.name}")


def files_under(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file())


def test_put_get_exists_delete(blobs: BlobStore) -> None:
    assert not blobs.exists(PATH)
    blobs.put(PATH, b"one")
    assert blobs.exists(PATH)
    assert blobs.get(PATH) == b"one"
    blobs.put(PATH, b"one")
    blobs.put(PATH, b"two")
    assert blobs.get(PATH) == b"two"
    blobs.delete(PATH)
    blobs.delete(PATH)
    assert not blobs.exists(PATH)
    with pytest.raises(WireError) as error:
        blobs.get(PATH)
    assert error.value.code is ErrorCode.NOT_FOUND


def test_empty_blob(blobs: BlobStore) -> None:
    blobs.put(PATH, b"")
    assert blobs.get(PATH) == b""


def test_a_flipped_bit_is_found(blobs: BlobStore) -> None:
    data = bytes(range(256))
    blobs.put(PATH, data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert blobs.get_checked(PATH, sha256) == data
    damaged = bytearray(data)
    damaged[100] ^= 1
    blobs.put(PATH, bytes(damaged))
    with pytest.raises(WireError, match="damaged") as error:
        blobs.get_checked(PATH, sha256)
    assert error.value.code is ErrorCode.CORRUPT_DATA


def test_a_truncated_blob_is_found(blobs: BlobStore) -> None:
    blobs.put(PATH, b"whole"[:-1])
    with pytest.raises(WireError) as error:
        blobs.get_checked(PATH, hashlib.sha256(b"whole").hexdigest())
    assert error.value.code is ErrorCode.CORRUPT_DATA


@pytest.mark.parametrize("path", ["chunks/ab", PATH, "stems/0abc/x.onnx", "heads/a1.safetensors", "a/b.tar.gz"])
def test_paths_of_ids_and_hashes_pass(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "chunks",
        "/etc/passwd",
        "../secret",
        "chunks/../../secret",
        "chunks/..",
        "chunks/./a",
        "chunks//a",
        "chunks/a/",
        "chunks/.hidden",
        "chunks/a..b",
        "chunks/A",
        "chunks/a b",
        "chunks/a\0b",
        "chunks/a\n",
        "chunks/a\\b",
        "chunks/ä",
        "file:///etc/passwd",
        "s3://bucket/key",
        "~/a",
        "tmp/a",
        "chunks/" + "a" * 500,
    ],
)
def test_no_other_path_passes(blobs: BlobStore, path: str) -> None:
    for call in (
        lambda: blobs.put(path, b""),
        lambda: blobs.get(path),
        lambda: blobs.get_checked(path, "0" * 64),
        lambda: blobs.exists(path),
        lambda: blobs.delete(path),
    ):
        with pytest.raises(WireError) as error:
            call()
        assert error.value.code is ErrorCode.INVALID_ARGUMENT


@given(st.text(alphabet="ab./~A0_- \0", max_size=20))
def test_what_passes_stays_under_the_root(path: str) -> None:
    try:
        check_path(path)
    except WireError:
        return
    joined = os.path.normpath(os.path.join("/srv/store", path))
    assert joined == f"/srv/store/{path}"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("/tmp/x", "not a URL"),
        ("file://relative", "absolute"),
        ("http://host/x", "atomically"),
        ("sftp://host/x", "atomically"),
        ("simplecache::file:///x", "atomically"),
    ],
)
def test_storage_without_an_atomic_put_is_refused(url: str, reason: str) -> None:
    with pytest.raises(WireError, match=reason) as error:
        BlobStore(url)
    assert error.value.code is ErrorCode.UNSUPPORTED


def test_a_copy_in_another_process_sees_the_same(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    blobs.put(PATH, b"data")
    copy = pickle.loads(pickle.dumps(blobs))
    assert copy.url == blobs.url
    assert copy.get(PATH) == b"data"


@pytest.mark.parametrize("point", ["before_write", "written", "synced"])
def test_death_before_the_rename_leaves_what_was_there(tmp_path: Path, point: str) -> None:
    failpoints = Failpoints()
    blobs = BlobStore(f"file://{tmp_path}", failpoints=failpoints)
    blobs.put(PATH, b"old")
    failpoints.arm(f"store.blob.{point}")
    with pytest.raises(SimulatedKill):
        blobs.put(PATH, b"new, and longer")
    again = BlobStore(f"file://{tmp_path}")
    assert again.get(PATH) == b"old"
    again.put(PATH, b"new, and longer")
    assert again.get(PATH) == b"new, and longer"


@pytest.mark.parametrize("point", ["renamed", "durable"])
def test_death_after_the_rename_leaves_the_whole(tmp_path: Path, point: str) -> None:
    failpoints = Failpoints()
    blobs = BlobStore(f"file://{tmp_path}", failpoints=failpoints)
    failpoints.arm(f"store.blob.{point}")
    with pytest.raises(SimulatedKill):
        blobs.put(PATH, b"new")
    assert BlobStore(f"file://{tmp_path}").get(PATH) == b"new"


def test_the_file_is_synced_before_its_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        calls.append(f"sync {os.path.relpath(os.readlink(f'/proc/self/fd/{descriptor}'), tmp_path)}")
        real_sync(descriptor)

    def replace(source: str, target: str) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    blobs.put("kind/part/x", b"data")
    assert set(calls[:-3]) == {"sync .", "sync kind"}, "the parents of new directories"
    assert calls[-3].startswith("sync tmp/")
    assert calls[-2:] == ["rename", "sync kind/part"]
    calls.clear()
    blobs.put("kind/part/y", b"data")
    assert len(calls) == 3, "known directories are not synced again"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_is_said_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, function: str
) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    blobs.put(PATH, b"old")

    def full(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(WireError) as error:
            blobs.put(PATH, b"new")
    assert error.value.code is ErrorCode.STORAGE_FULL
    assert files_under(tmp_path) == [PATH]
    assert blobs.get(PATH) == b"old"
    blobs.put(PATH, b"new")


def test_a_full_object_store_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = BlobStore("memory://full")

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", full)
    with pytest.raises(WireError) as error:
        blobs.put(PATH, b"new")
    assert error.value.code is ErrorCode.STORAGE_FULL


def test_other_errors_of_the_disk_are_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = BlobStore(f"file://{tmp_path}")

    def broken(*_args: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(blobs_module.os, "fsync", broken)
    with pytest.raises(OSError, match="input/output"):
        blobs.put(PATH, b"new")


def test_sweep_removes_old_leftovers_only(tmp_path: Path) -> None:
    failpoints = Failpoints()
    blobs = BlobStore(f"file://{tmp_path}", failpoints=failpoints)
    blobs.put(PATH, b"kept")
    failpoints.arm("store.blob.synced")
    with pytest.raises(SimulatedKill):
        blobs.put(PATH, b"left behind")
    (leftover,) = (tmp_path / "tmp").iterdir()
    written = leftover.stat().st_mtime
    assert blobs.sweep(now=written + 10, older_than_s=60) == 0
    assert blobs.sweep(now=written + 61, older_than_s=60) == 1
    assert files_under(tmp_path) == [PATH]
    assert BlobStore("memory://sweep").sweep(now=written) == 0


def test_a_cache_reads_each_checked_blob_once_and_forgets_the_oldest(tmp_path):
    from trunkline_worker.store.blobs import CachedBlobs

    class Counting(CachedBlobs):
        reads = 0

        def get(self, path):
            self.reads += 1
            return super().get(path)

    blobs = Counting(f"file://{tmp_path}", capacity_bytes=25)
    contents = [bytes([index]) * 10 for index in range(3)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    for content, name in zip(contents, names, strict=True):
        blobs.put(f"chunks/{name}", content)
    for index in (0, 1, 0, 1):
        assert blobs.get_checked(f"chunks/{names[index]}", names[index]) == contents[index]
    assert blobs.reads == 2
    blobs.get_checked(f"chunks/{names[2]}", names[2])  # 30 bytes: the oldest goes
    blobs.get_checked(f"chunks/{names[1]}", names[1])
    assert blobs.reads == 3
    blobs.get_checked(f"chunks/{names[0]}", names[0])
    assert blobs.reads == 4
    with pytest.raises(WireError):
        blobs.get_checked(f"chunks/{names[0]}", "0" * 64)
