"""A disk that really is full: said with the right code, nothing acknowledged is lost, and it goes on afterwards."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FeatureSpace
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore

SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)


def fill_blobs(directory: Path) -> None:
    blobs = BlobStore(f"file://{directory}/blobs")
    stored: list[tuple[str, str]] = []
    while True:
        data = os.urandom(100_000)
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            blobs.put(f"chunks/{sha256}", data)
        except WireError as error:
            assert error.code is ErrorCode.STORAGE_FULL
            assert not blobs.exists(f"chunks/{sha256}")
            break
        stored.append((f"chunks/{sha256}", sha256))
    assert len(stored) > 5
    assert list((directory / "blobs" / "tmp").iterdir()) == [], "what could not be finished was left behind"
    for path, sha256 in stored:
        blobs.get_checked(path, sha256)
    blobs.delete(stored[0][0])
    blobs.put("chunks/small", b"there is room again")


def fill_database(directory: Path) -> None:
    database = Database(f"sqlite:///{directory}/meta.db")
    store = MetadataStore(database)
    ballast = directory / "ballast"
    ballast.write_bytes(bytes(500_000))
    added: list[bytes] = []
    for number in range(1000):
        ids = [hashlib.sha256(f"{number} {row}".encode()).digest() for row in range(200)]
        try:
            store.rows.add_chunk("t", hashlib.sha256(ids[0]).hexdigest(), SPACE, "float16", ids)
        except WireError as error:
            assert error.code is ErrorCode.STORAGE_FULL, error
            break
        added += ids
    else:
        raise AssertionError("the disk never became full")
    assert len(added) > 400
    assert store.rows.missing("t", added) == [], "acknowledged rows are gone"
    assert store.rows.missing("t", ids) == list(range(200)), "half a chunk was named"
    ballast.unlink()
    assert store.rows.add_chunk("t", hashlib.sha256(ids[0]).hexdigest(), SPACE, "float16", ids) == 200
    database.close()
    again = Database(f"sqlite:///{directory}/meta.db")
    assert MetadataStore(again).rows.missing("t", [*added, *ids]) == []
    again.close()


@pytest.mark.parametrize("what", ["fill_blobs", "fill_database"])
def test_a_small_disk_of_its_own(tmp_path: Path, what: str) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small disk needs root and unshare")
    # The mount lives in a namespace of its own and goes with the process, however that ends.
    mount = f"mount -t tmpfs -o size=2m tmpfs '{tmp_path}'"
    script = f'{mount} || exit 99; exec "{sys.executable}" "{__file__}" {what} "{tmp_path}"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    if (
        done.returncode in (1, 99)
        and ("mount" in done.stderr or "unshare" in done.stderr)
        and "Traceback" not in done.stderr
    ):
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
