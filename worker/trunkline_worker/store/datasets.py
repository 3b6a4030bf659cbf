"""Versions of datasets: ordered lists of rows with their labels, named only once every row is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_CLASSES, MAX_DATASET_ROWS
from trunkline_wire.names import check_name, parse_reference
from trunkline_wire.rows import ROW_ID_BYTES, dataset_digest
from trunkline_wire.specs import FeatureSpace

from trunkline_worker.store import idempotency, locations, schema, serial
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.records import DatasetContent, DatasetRecord
from trunkline_worker.store.rows import Rows

_METHOD = "datasets.commit"
_MAX_CLASS_NAME_LENGTH = 512
_table = schema.datasets
_contents = schema.dataset_contents


class Datasets:
    """Datasets by tenant, name and version. Immutable once committed."""

    def __init__(self, context: StoreContext, rows: Rows) -> None:
        """Use the context of the whole store, and its rows."""
        self._context = context
        self._rows = rows

    def commit(
        self,
        tenant: str,
        name: str,
        space: FeatureSpace,
        row_ids: Sequence[bytes],
        class_names: Sequence[str],
        class_indices: Sequence[int] | npt.NDArray[np.integer],
        targets: npt.NDArray[np.float32] | None,
        idempotency_key: str,
    ) -> DatasetRecord:
        """Name a list of uploaded rows with their labels: the next version of ``name``.

        Content equal to the newest version's gives that version again.

        Args:
            tenant: Whose dataset it is.
            name: What the user calls it.
            space: Where the rows live.
            row_ids: In the dataset's order. A row may stand in it more than once.
            class_names: Empty where the labels are numbers.
            class_indices: One per row, into ``class_names``; empty where the labels are numbers.
            targets: Labels that are numbers; None where they are classes.
            idempotency_key: Made by the client, once per commit that it means.

        Shape:
            targets: (N, M), float32, finite.

        Raises:
            WireError: INVALID_ARGUMENT (name, ids, key), EMPTY_BATCH, PAYLOAD_TOO_LARGE, BAD_LABELS, NOT_FINITE;
                NOT_FOUND where rows are not there; INCOMPATIBLE where rows are from another space or of two codecs;
                ALREADY_EXISTS where the key was used for something else.
        """
        check_name(name, "dataset")
        _check_rows(row_ids)
        indices = _checked_classes(len(row_ids), class_names, class_indices)
        values = _checked_targets(len(row_ids), class_names, targets)
        digest = dataset_digest(row_ids, class_names, indices, values)
        space_text = serial.space_to_text(space)
        content = idempotency.content_sha256(name, space_text, digest)
        context = self._context
        now = context.clock.now()
        with context.mutation("datasets.commit") as connection:
            earlier = idempotency.recall(connection, tenant, _METHOD, idempotency_key, content)
            if earlier is not None:
                return self.find(connection, tenant, earlier)
            # In this transaction, so that no row can have gone by the time its dataset is named.
            codec = self._stored_codec(connection, tenant, space, row_ids)
            newest = _newest(connection, tenant, name)
            if newest is not None and newest.digest == digest and newest.space == space_text:
                record = _record(newest)
            else:
                record = DatasetRecord(
                    tenant=tenant,
                    name=name,
                    version=1 if newest is None else newest.version + 1,
                    num_rows=len(row_ids),
                    digest=digest,
                    space=space,
                    class_names=tuple(class_names),
                    num_targets=0 if values is None else values.shape[1],
                    create_time=now,
                    codec=codec,
                )
                connection.execute(
                    context.database.insert_or_ignore(_contents).values(
                        tenant=tenant,
                        digest=digest,
                        row_ids=b"".join(row_ids),
                        class_indices=indices.tobytes(),
                        targets=b"" if values is None else values.tobytes(),
                    )
                )
                connection.execute(
                    _table.insert().values(
                        tenant=tenant,
                        name=name,
                        version=record.version,
                        num_rows=record.num_rows,
                        digest=digest,
                        space=space_text,
                        class_names=serial.dumps(list(class_names)),
                        num_targets=record.num_targets,
                        create_time=now,
                        codec=record.codec,
                    )
                )
            idempotency.remember(
                connection, tenant, _METHOD, idempotency_key, content, result=record.reference, now=now
            )
        return record

    def get(self, tenant: str, reference: str) -> DatasetRecord:
        """Return a version of a dataset; of a bare name, the newest.

        Raises:
            WireError: INVALID_ARGUMENT for the reference, NOT_FOUND.
        """
        with self._context.database.read() as connection:
            return self.find(connection, tenant, reference)

    def list(self, tenant: str) -> list[DatasetRecord]:
        """Return every version of every dataset, by name and version."""
        query = sa.select(_table).where(_table.c.tenant == tenant).order_by(_table.c.name, _table.c.version)
        with self._context.database.read() as connection:
            return [_record(row) for row in connection.execute(query)]

    def rows(self, tenant: str, reference: str) -> DatasetContent:
        """Return what a version of a dataset is made of.

        Raises:
            WireError: INVALID_ARGUMENT for the reference, NOT_FOUND.
        """
        with self._context.database.read() as connection:
            record = self.find(connection, tenant, reference)
            content = connection.execute(
                sa.select(_contents).where(_contents.c.tenant == tenant, _contents.c.digest == record.digest)
            ).one()
        joined = bytes(content.row_ids)
        targets = None
        if record.num_targets:
            targets = np.frombuffer(bytearray(content.targets), dtype="<f4").reshape(-1, record.num_targets)
        return DatasetContent(
            record=record,
            row_ids=[joined[start : start + ROW_ID_BYTES] for start in range(0, len(joined), ROW_ID_BYTES)],
            class_indices=np.frombuffer(bytearray(content.class_indices), dtype="<u4"),
            targets=targets,
        )

    def find(self, connection: sa.Connection, tenant: str, reference: str) -> DatasetRecord:
        """As ``get``, inside a transaction of the caller's."""
        parsed = parse_reference(reference, "dataset")
        if parsed.version is None:
            row = _newest(connection, tenant, parsed.name)
        else:
            row = connection.execute(
                sa.select(_table).where(
                    _table.c.tenant == tenant, _table.c.name == parsed.name, _table.c.version == parsed.version
                )
            ).one_or_none()
        if row is None:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"there is no dataset {reference}; `trunkline.connect().datasets()` lists those there",
            )
        return _record(row)

    def num_classes_used(self, connection: sa.Connection, record: DatasetRecord) -> int:
        """Return how many classes occur among the labels; 0 where they are numbers."""
        packed = connection.execute(
            sa.select(_contents.c.class_indices).where(
                _contents.c.tenant == record.tenant, _contents.c.digest == record.digest
            )
        ).scalar_one()
        return len(np.unique(np.frombuffer(packed, dtype="<u4")))

    def _stored_codec(
        self, connection: sa.Connection, tenant: str, space: FeatureSpace, row_ids: Sequence[bytes]
    ) -> str:
        """Check that all rows are there, of one space and one codec, and return the codec."""
        num_missing, spaces = self._rows.spaces(connection, tenant, row_ids)
        if num_missing:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"{num_missing} of {len(row_ids)} rows are not stored; upload them, then commit again",
            )
        num_other = sum(count for (fingerprint, _), count in spaces.items() if fingerprint != space.fingerprint)
        if num_other:
            raise WireError(
                ErrorCode.INCOMPATIBLE,
                f"{num_other} of {len(row_ids)} rows are from another feature space than the dataset's "
                f"({space.backbone or 'images'}, cut {space.cut}); upload them again with one stem",
            )
        if len(spaces) > 1:
            codecs = ", ".join(sorted(codec for _, codec in spaces))
            raise WireError(ErrorCode.INCOMPATIBLE, f"rows of one dataset have one codec; got {codecs}")
        ((_, codec),) = spaces
        return codec


def _check_rows(row_ids: Sequence[bytes]) -> None:
    if not row_ids:
        raise WireError(ErrorCode.EMPTY_BATCH, "a dataset without rows")
    if len(row_ids) > MAX_DATASET_ROWS:
        raise WireError(
            ErrorCode.PAYLOAD_TOO_LARGE, f"a dataset of {len(row_ids)} rows; at most {MAX_DATASET_ROWS}: split it"
        )
    locations.check_row_ids(row_ids)


def _checked_classes(
    num_rows: int, class_names: Sequence[str], class_indices: Sequence[int] | npt.NDArray[np.integer]
) -> npt.NDArray[np.uint32]:
    indices = np.asarray(class_indices, dtype=np.int64)
    if indices.shape != (num_rows if class_names else 0,):
        raise _bad_labels(f"{len(class_names)} classes, {num_rows} rows and {indices.size} class indices do not fit")
    if not class_names:
        return indices.astype("<u4")
    if len(class_names) > MAX_CLASSES:
        raise _bad_labels(f"{len(class_names)} classes; at most {MAX_CLASSES}")
    if len(set(class_names)) != len(class_names):
        raise _bad_labels("two classes have the same name")
    for name in class_names:
        if not name or len(name) > _MAX_CLASS_NAME_LENGTH:
            raise _bad_labels(f"class name {name[:40]!r}: 1 to {_MAX_CLASS_NAME_LENGTH} characters are needed")
    if indices.min() < 0 or indices.max() >= len(class_names):
        wrong = int(np.flatnonzero((indices < 0) | (indices >= len(class_names)))[0])
        raise _bad_labels(f"row {wrong} is of class {int(indices[wrong])}; there are {len(class_names)}")
    return indices.astype("<u4")


def _checked_targets(
    num_rows: int, class_names: Sequence[str], targets: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32] | None:
    if targets is None:
        if not class_names:
            raise _bad_labels("no labels: classes or targets are needed")
        return None
    if class_names:
        raise _bad_labels("both classes and targets were given; one kind of label is needed")
    if targets.ndim != 2 or targets.shape[0] != num_rows or targets.shape[1] == 0:
        raise _bad_labels(f"targets of shape {targets.shape} for {num_rows} rows; (rows, outputs) is needed")
    values = np.ascontiguousarray(targets, dtype="<f4")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise WireError(ErrorCode.NOT_FINITE, f"the target of row {row} is NaN or infinite")
    return values


def _bad_labels(message: str) -> WireError:
    return WireError(ErrorCode.BAD_LABELS, message)


def _newest(connection: sa.Connection, tenant: str, name: str) -> sa.Row[tuple[object, ...]] | None:
    query = sa.select(_table).where(_table.c.tenant == tenant, _table.c.name == name)
    return connection.execute(query.order_by(_table.c.version.desc()).limit(1)).one_or_none()


def _record(row: sa.Row[tuple[object, ...]]) -> DatasetRecord:
    return DatasetRecord(
        tenant=row.tenant,
        name=row.name,
        version=row.version,
        num_rows=row.num_rows,
        digest=row.digest,
        space=serial.space_from_text(row.space),
        class_names=tuple(serial.loads(row.class_names)),
        num_targets=row.num_targets,
        create_time=row.create_time,
        codec=row.codec,
    )
