"""Stem files: kept on disk by fingerprint, and checked before anything parses them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline_wire.errors import WireError
from trunkline_wire.limits import MAX_STEM_BYTES
from trunkline_wire.onnx_check import check_onnx_file

from trunkline.errors import CorruptDataError, from_wire

if TYPE_CHECKING:
    from trunkline._calls import FetchedStem


@dataclass(frozen=True)
class StemFile:
    """A stem's file whose checksum was right and whose content is allowed.

    Attributes:
        data: The ONNX file.
        embedding_error: Of features that this stem makes; None where that was never told.
    """

    data: bytes
    embedding_error: float | None


class StemCache:
    """Stem files on disk, by fingerprint. A file that is damaged counts as missing."""

    def __init__(self, directory: Path) -> None:
        """Keep the directory; it is made when it is needed."""
        self._directory = directory / "stems"

    def load(self, fingerprint: str) -> StemFile | None:
        """Return a file, its checksum and its content checked, or None."""
        try:
            facts = json.loads(self._facts_path(fingerprint).read_text(encoding="utf-8"))
            path = self._data_path(fingerprint)
            if path.stat().st_size > MAX_STEM_BYTES:
                return None
            data = path.read_bytes()
        except (OSError, ValueError):
            return None
        if not isinstance(facts, dict) or hashlib.sha256(data).hexdigest() != facts.get("sha256"):
            return None
        try:
            check_onnx_file(data, MAX_STEM_BYTES)
        except WireError:
            return None
        return StemFile(data, _error_of(facts))

    def store(self, fetched: FetchedStem) -> None:
        """Keep a file: first the bytes, then what makes them valid, each whole or not at all.

        A directory that cannot be written costs a transfer each time, not the work.
        """
        facts = {
            "sha256": fetched.sha256,
            "space": asdict(fetched.space),
            "preprocessing": asdict(fetched.preprocessing),
            "feature_shape": list(fetched.feature_shape),
            "precision": fetched.precision,
            "embedding_error": fetched.embedding_error,
        }
        with suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_whole(self._data_path(fetched.space.fingerprint), fetched.data)
            _write_whole(self._facts_path(fetched.space.fingerprint), json.dumps(facts).encode())

    def _data_path(self, fingerprint: str) -> Path:
        return self._directory / f"{_hex(fingerprint)}.onnx"

    def _facts_path(self, fingerprint: str) -> Path:
        return self._directory / f"{_hex(fingerprint)}.json"


def checked_file(fetched: FetchedStem) -> StemFile:
    """Return a fetched file, its content checked; its checksum was when it arrived.

    Raises:
        TrunklineError: It holds what no stem may hold: references to other files, foreign operators, or no graph.
    """
    try:
        check_onnx_file(fetched.data, MAX_STEM_BYTES)
    except WireError as error:
        raise from_wire(
            error,
            prefix=f"the stem of {fetched.space.backbone} at {fetched.space.cut} is refused: ",
            hint="Do not use this cluster before whoever runs it has looked into this",
        ) from None
    return StemFile(fetched.data, fetched.embedding_error)


def _error_of(facts: dict[str, Any]) -> float | None:
    value = facts.get("embedding_error")
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _hex(fingerprint: str) -> str:
    # It becomes a file name: nothing that a cluster sends may name a path.
    if not fingerprint or not all(one in "0123456789abcdef" for one in fingerprint):
        raise CorruptDataError(f"{fingerprint[:80]!r} is not a fingerprint", hint="Update the cluster or the client")
    return fingerprint


def _write_whole(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
