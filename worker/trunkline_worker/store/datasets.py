"""Versions of datasets: ordered lists of rows with their labels, named only once every row is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.names import check_name, parse_reference
from trunkline_wire.rows import ROW_ID_BYTES, dataset_digest
from trunkline_wire.sizes import check_answers
from trunkline_wire.specs import FeatureSpace

from trunkline_worker.store import idempotency, schema, serial
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.groups import check_held_groups, checked_groups, checked_views
from trunkline_worker.store.inputs import check_inputs
from trunkline_worker.store.labels import bad_labels, checked_classes, checked_targets
from trunkline_worker.store.records import DatasetContent, DatasetRecord, DatasetSource
from trunkline_worker.store.rows import Rows

_METHOD = "datasets.commit"
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
        more_inputs: Sequence[tuple[FeatureSpace, Sequence[bytes]]] = (),
        groups: Sequence[int] | npt.NDArray[np.integer] | None = None,
        views: int = 1,
    ) -> DatasetRecord:
        """Name a list of uploaded rows with their labels: the next version of ``name``.

        Content equal to the newest version's gives that version again.

        Args:
            tenant: Whose dataset it is.
            name: What the user calls it.
            space: Where the rows of the first input live.
            row_ids: In the dataset's order. A row may stand in it more than once.
            class_names: Empty where the labels are numbers.
            class_indices: One per row, into ``class_names``; empty unless every row is of one class.
            targets: Labels that are numbers, or for each class whether the row is of it; None where every row is of
                one class.
            idempotency_key: Made by the client, once per commit that it means.
            more_inputs: What stands beside the first input: where the rows live, and their ids in the same order.
            groups: One per row, whatever the numbers; rows of one group are never split. None or empty: not grouped.
            views: So many rows, one after another, are views of one picture.

        Shape:
            targets: (N, M), float32, finite; with class names 0 or 1 throughout, a column for each.

        Raises:
            WireError: INVALID_ARGUMENT (name, ids, key, which inputs, groups, views), EMPTY_BATCH, PAYLOAD_TOO_LARGE,
                SHAPE_MISMATCH, BAD_LABELS, NOT_FINITE; NOT_FOUND where rows are not there; INCOMPATIBLE where rows of
                one input are from another space or of two codecs; ALREADY_EXISTS where the key was used for something
                else.
        """
        check_name(name, "dataset")
        check_inputs(space, row_ids, more_inputs)
        indices = checked_classes(len(row_ids), class_names, class_indices, has_targets=targets is not None)
        values = checked_targets(len(row_ids), class_names, targets)
        views = checked_views(len(row_ids), views, indices, values)
        grouped = checked_groups(len(row_ids), groups, views)
        more_ids = [ids for _, ids in more_inputs]
        digest = dataset_digest(row_ids, class_names, indices, values, more_ids, groups=grouped, views=views)
        space_texts = [serial.space_to_text(one) for one in (space, *(one for one, _ in more_inputs))]
        content = idempotency.content_sha256(name, space_texts[0], digest, *space_texts[1:])
        context = self._context
        now = context.clock.now()
        with context.mutation("datasets.commit") as connection:
            earlier = idempotency.recall(connection, tenant, _METHOD, idempotency_key, content)
            if earlier is not None:
                return self.find(connection, tenant, earlier)
            # In this transaction, so that no row can have gone by the time its dataset is named.
            codec = self._stored_codec(connection, tenant, space, row_ids)
            sources = tuple(
                DatasetSource(one, self._stored_codec(connection, tenant, one, ids)) for one, ids in more_inputs
            )
            sources_text = serial.sources_to_text(sources)
            identity = (digest, space_texts[0], sources_text)
            newest = _newest(connection, tenant, name)
            if newest is not None and (newest.digest, newest.space, newest.more_inputs) == identity:
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
                    more_inputs=sources,
                    num_groups=0 if grouped is None else int(grouped.max()) + 1,
                    views=views,
                )
                connection.execute(
                    context.database.insert_or_ignore(_contents).values(
                        tenant=tenant,
                        digest=digest,
                        row_ids=b"".join(row_ids),
                        class_indices=indices.tobytes(),
                        targets=b"" if values is None else values.tobytes(),
                        more_row_ids=b"".join(one for ids in more_ids for one in ids) or None,
                        row_groups=None if grouped is None else grouped.tobytes(),
                    )
                )
                connection.execute(
                    _table.insert().values(
                        tenant=tenant,
                        name=name,
                        version=record.version,
                        num_rows=record.num_rows,
                        digest=digest,
                        space=space_texts[0],
                        class_names=serial.dumps(list(class_names)),
                        num_targets=record.num_targets,
                        create_time=now,
                        codec=record.codec,
                        more_inputs=sources_text,
                        num_groups=record.num_groups,
                        views=views,
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
        more_ids = _unpacked(content.more_row_ids or b"")
        targets = None
        if record.num_targets:
            targets = np.frombuffer(bytearray(content.targets), dtype="<f4").reshape(-1, record.num_targets)
        return DatasetContent(
            record=record,
            row_ids=_unpacked(content.row_ids),
            class_indices=np.frombuffer(bytearray(content.class_indices), dtype="<u4"),
            targets=targets,
            more_row_ids=tuple(
                more_ids[start : start + record.num_rows] for start in range(0, len(more_ids), record.num_rows)
            ),
            groups=_groups(content.row_groups),
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

    def check_trainable(self, connection: sa.Connection, record: DatasetRecord, *, hold_out: bool) -> None:
        """Check that the labels have something to tell apart, on both sides where groups are held out.

        And that there are not more than a training can hold.

        Raises:
            WireError: BAD_LABELS.
        """
        if not record.class_names:
            return
        check_answers(record.num_rows, len(record.class_names))
        packed = connection.execute(
            sa.select(_contents.c.class_indices, _contents.c.targets, _contents.c.row_groups).where(
                _contents.c.tenant == record.tenant, _contents.c.digest == record.digest
            )
        ).one()
        if record.num_targets:
            if not np.frombuffer(packed.targets, dtype="<f4").any():
                raise bad_labels(f"no row of {record.reference} is of any class; training needs one or more")
            return
        classes_N = np.frombuffer(packed.class_indices, dtype="<u4")
        if len(np.unique(classes_N)) < 2:
            raise bad_labels(f"every row of {record.reference} is of one class; training needs two or more")
        groups_N = _groups(packed.row_groups)
        if groups_N is not None:
            check_held_groups(record.class_names, classes_N, groups_N, hold_out=hold_out)

    def _stored_codec(
        self, connection: sa.Connection, tenant: str, space: FeatureSpace, row_ids: Sequence[bytes]
    ) -> str:
        """Check that all rows of an input are there, of one space and one codec, and return the codec."""
        of_what = f"{space.source or 'images'}{f', cut {space.cut}' if space.backbone else ''}"
        num_missing, spaces = self._rows.spaces(connection, tenant, row_ids)
        if num_missing:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"{num_missing} of {len(row_ids)} rows are not stored ({of_what}); upload them, then commit again",
            )
        num_other = sum(count for (fingerprint, _), count in spaces.items() if fingerprint != space.fingerprint)
        if num_other:
            raise WireError(
                ErrorCode.INCOMPATIBLE,
                f"{num_other} of {len(row_ids)} rows are from another feature space than the dataset's "
                f"({of_what}); upload them again with one stem or local model",
            )
        if len(spaces) > 1:
            codecs = ", ".join(sorted(codec for _, codec in spaces))
            raise WireError(ErrorCode.INCOMPATIBLE, f"rows of one input have one codec; got {codecs} ({of_what})")
        ((_, codec),) = spaces
        return codec


def _unpacked(row_ids: bytes) -> list[bytes]:
    return [bytes(row_ids[start : start + ROW_ID_BYTES]) for start in range(0, len(row_ids), ROW_ID_BYTES)]


def _groups(packed: bytes | None) -> npt.NDArray[np.uint32] | None:
    return None if packed is None else np.frombuffer(bytearray(packed), dtype="<u4")


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
        more_inputs=serial.sources_from_text(row.more_inputs),
        num_groups=row.num_groups,
        views=row.views,
    )
