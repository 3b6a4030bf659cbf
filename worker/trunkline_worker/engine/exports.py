"""Exported ONNX files in storage: found by fingerprint, checked against their hash before anything parses them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store.blobs import BlobStore

STEMS = "stems"
TRUNKS = "trunks"

_ABSENT = (ErrorCode.NOT_FOUND, ErrorCode.CORRUPT_DATA)


@dataclass(frozen=True)
class StoredExport:
    """Where an exported file lies and what it must hash to.

    ``embedding_error`` is what a quantised stem does to the embedding, see ``StemCost``; 0 for what is exact.
    """

    path: str
    size_bytes: int
    sha256: str
    embedding_error: float = 0.0


class ExportStore:
    """Files under ``<kind>/<fingerprint>/<sha256>.onnx``, each named by ``<kind>/<fingerprint>.json``.

    The file is written before the note that names it, under a name made of its content: two replicas that export at
    the same time cannot make a note and a file that disagree.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def find(self, kind: str, fingerprint: str) -> tuple[StoredExport, bytes] | None:
        """Return the file of a fingerprint and its bytes, or None where it is missing or damaged."""
        try:
            note = json.loads(self._blobs.get(_note_path(kind, fingerprint)))
            stored = StoredExport(
                _file_path(kind, fingerprint, str(note["sha256"])),
                int(note["size_bytes"]),
                note["sha256"],
                float(note.get("embedding_error", 0.0)),
            )
            if not math.isfinite(stored.embedding_error):
                return None
            return stored, self._blobs.get_checked(stored.path, stored.sha256)
        except WireError as error:
            # INVALID_ARGUMENT: the note names something that is no hash.
            if error.code in (*_ABSENT, ErrorCode.INVALID_ARGUMENT):
                return None
            raise
        except (ValueError, KeyError, TypeError):
            return None

    def put(self, kind: str, fingerprint: str, data: bytes, embedding_error: float = 0.0) -> StoredExport:
        """Keep a file, and with it what is known of its error, a finite number.

        Raises:
            WireError: STORAGE_FULL.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        stored = StoredExport(_file_path(kind, fingerprint, sha256), len(data), sha256, embedding_error)
        self._blobs.put(stored.path, data)
        self._blobs.put(_note_path(kind, fingerprint), json.dumps(asdict(stored)).encode())
        return stored


def _note_path(kind: str, fingerprint: str) -> str:
    return f"{kind}/{fingerprint}.json"


def _file_path(kind: str, fingerprint: str, sha256: str) -> str:
    return f"{kind}/{fingerprint}/{sha256}.onnx"
