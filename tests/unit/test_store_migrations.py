"""Databases of earlier versions: brought to this one in place, with all that is in them, or left as they were."""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.rows import dataset_digest
from trunkline_wire.specs import IMAGES, FeatureSpace, local_space
from trunkline_worker.store import migrations, schema
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import Candidate, JobSpec, JobState, ModelRecord

POSTGRES = os.environ.get("TRUNKLINE_TEST_POSTGRES", "")
SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)
ROWS = [hashlib.sha256(bytes([number])).digest() for number in range(6)]
LOCAL = local_space("sensor", "5" * 64)
LOCAL_ROWS = [hashlib.sha256(bytes([5, number])).digest() for number in range(2)]
CLASSES = ["zero", "eins"]
LABELS = [0, 1]

VERSION_1 = """
CREATE TABLE store_info (
    id INTEGER NOT NULL,
    schema_version INTEGER NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE chunks (
    id {serial} NOT NULL,
    tenant VARCHAR NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    fingerprint VARCHAR NOT NULL,
    codec VARCHAR NOT NULL,
    create_time FLOAT NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (tenant, sha256, fingerprint, codec)
);
CREATE TABLE dataset_contents (
    tenant VARCHAR NOT NULL,
    digest VARCHAR(64) NOT NULL,
    row_ids {blob} NOT NULL,
    class_indices {blob} NOT NULL,
    targets {blob} NOT NULL,
    PRIMARY KEY (tenant, digest)
);
CREATE TABLE jobs (
    tenant VARCHAR NOT NULL,
    id VARCHAR NOT NULL,
    number INTEGER NOT NULL,
    state INTEGER NOT NULL,
    spec TEXT NOT NULL,
    create_time FLOAT NOT NULL,
    start_time FLOAT NOT NULL,
    end_time FLOAT NOT NULL,
    num_restarts INTEGER NOT NULL,
    cancel_requested BOOLEAN NOT NULL,
    error_code VARCHAR NOT NULL,
    error_message TEXT NOT NULL,
    model VARCHAR NOT NULL,
    fence INTEGER NOT NULL,
    lane VARCHAR NOT NULL,
    lease_deadline FLOAT NOT NULL,
    event_batch INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    PRIMARY KEY (tenant, id),
    UNIQUE (id),
    UNIQUE (number)
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TABLE idempotency (
    tenant VARCHAR NOT NULL,
    method VARCHAR NOT NULL,
    "key" VARCHAR NOT NULL,
    content_sha256 VARCHAR(64) NOT NULL,
    result VARCHAR NOT NULL,
    create_time FLOAT NOT NULL,
    PRIMARY KEY (tenant, method, "key")
);
CREATE TABLE rows (
    tenant VARCHAR NOT NULL,
    row_id {blob} NOT NULL,
    chunk_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (tenant, row_id),
    FOREIGN KEY(chunk_id) REFERENCES chunks (id)
){without_rowid};
CREATE TABLE embeddings (
    tenant VARCHAR NOT NULL,
    "key" VARCHAR NOT NULL,
    row_id {blob} NOT NULL,
    chunk_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (tenant, "key", row_id),
    FOREIGN KEY(chunk_id) REFERENCES chunks (id)
){without_rowid};
CREATE TABLE datasets (
    tenant VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    digest VARCHAR(64) NOT NULL,
    space TEXT NOT NULL,
    class_names TEXT NOT NULL,
    num_targets INTEGER NOT NULL,
    create_time FLOAT NOT NULL,
    PRIMARY KEY (tenant, name, version),
    FOREIGN KEY(tenant, digest) REFERENCES dataset_contents (tenant, digest)
);
CREATE TABLE job_events (
    tenant VARCHAR NOT NULL,
    job_id VARCHAR NOT NULL,
    seq INTEGER NOT NULL,
    time FLOAT NOT NULL,
    phase VARCHAR NOT NULL,
    progress FLOAT NOT NULL,
    metrics TEXT NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (tenant, job_id, seq),
    FOREIGN KEY(tenant, job_id) REFERENCES jobs (tenant, id)
);
CREATE TABLE models (
    tenant VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    job_id VARCHAR NOT NULL,
    create_time FLOAT NOT NULL,
    manifest TEXT NOT NULL,
    PRIMARY KEY (tenant, name, version),
    UNIQUE (tenant, job_id),
    FOREIGN KEY(tenant, job_id) REFERENCES jobs (tenant, id)
);
"""
"""The tables as the first version of this program made them."""

TO_VERSION_2 = """
ALTER TABLE datasets ADD COLUMN codec VARCHAR DEFAULT '' NOT NULL;
ALTER TABLE models ADD COLUMN candidates TEXT DEFAULT '[]' NOT NULL;
UPDATE datasets SET codec = 'float16' WHERE tenant = 't' AND name = 'halves';
UPDATE datasets SET codec = 'float32' WHERE tenant = 'u' OR name = 'singles';
UPDATE datasets SET codec = 'images' WHERE name = 'pictures';
UPDATE store_info SET schema_version = 2;
"""
"""What the second version has beyond the first, and what it says of the rows below."""

TO_VERSION_3 = """
ALTER TABLE datasets ADD COLUMN more_inputs TEXT DEFAULT '[]' NOT NULL;
ALTER TABLE dataset_contents ADD COLUMN more_row_ids {blob};
CREATE TABLE bottlenecks (
    tenant VARCHAR NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    create_time FLOAT NOT NULL,
    PRIMARY KEY (tenant, sha256)
);
UPDATE store_info SET schema_version = 3;
"""
"""What the third version has beyond the second."""

SQLITE_WORDS = {"serial": "INTEGER", "blob": "BLOB", "without_rowid": "\n WITHOUT ROWID"}
POSTGRES_WORDS = {"serial": "SERIAL", "blob": "BYTEA", "without_rowid": ""}
COLUMNS_OF_1 = {
    "chunks": "id tenant sha256 fingerprint codec create_time",
    "rows": "tenant row_id chunk_id position",
    "embeddings": "tenant key row_id chunk_id position",
    "dataset_contents": "tenant digest row_ids class_indices targets",
    "datasets": "tenant name version num_rows digest space class_names num_targets create_time",
    "jobs": "tenant id number state spec create_time start_time end_time num_restarts cancel_requested error_code "
    "error_message model fence lane lease_deadline event_batch last_seq",
    "job_events": "tenant job_id seq time phase progress metrics message",
    "models": "tenant name version job_id create_time manifest",
    "idempotency": "tenant method key content_sha256 result create_time",
}
MANIFEST_1 = {
    "task": "classification",
    "class_names": CLASSES,
    "num_outputs": 2,
    "space": {"backbone": "net", "cut": "blocks.2", "input_size": 96, "fingerprint": "f" * 64},
    "embedding_fingerprint": "e" * 64,
    "slices": ["pooled"],
    "metrics": {"accuracy": 0.75},
    "dataset": "halves@1",
    "dataset_digest": "d" * 64,
    "head_sha256": "1" * 64,
    "versions": {"trunkline": "0.1.0"},
}


SPEC_1 = {
    "model": "head",
    "dataset": "halves@1",
    "backbone": "net",
    "input_size": 96,
    "embedding": "auto",
    "slices": ["pooled"],
    "head_kind": "linear",
    "hidden": [],
    "dropout": 0.0,
    "solver": "lbfgs",
    "epochs": 0,
    "batch_size": 0,
    "learning_rate": 0.0,
    "l2": -1.0,
    "validation_fraction": 0.2,
    "refit": True,
    "seed": 7,
}


MLP_1 = {**SPEC_1, "head_kind": "mlp", "hidden": [], "dropout": 0.25, "solver": "adam"}


def text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(row_ids: list[bytes]) -> str:
    return dataset_digest(row_ids, CLASSES, LABELS, None)


def rows_of_1() -> dict[str, list[tuple[object, ...]]]:
    """Return what stands in the tables: two tenants with the same ids, rows of three codecs, a job and its model."""
    images = text({"backbone": "", "cut": "input", "input_size": 0, "fingerprint": ""})
    features, classes, spec, mlp = text(MANIFEST_1["space"]), text(CLASSES), text(SPEC_1), text(MLP_1)
    labels = np.array(LABELS, "<u4").tobytes()
    datasets = {"halves": ROWS[:2], "singles": ROWS[2:4], "pictures": ROWS[4:6]}
    succeeded, queued = JobState.SUCCEEDED.value, JobState.QUEUED.value
    return {
        "chunks": [
            (1, "t", "a" * 64, "f" * 64, "float16", 1.0),
            (2, "t", "b" * 64, "f" * 64, "float32", 1.0),
            (3, "t", "c" * 64, "", "images", 1.0),
            (4, "u", "b" * 64, "f" * 64, "float32", 1.0),
            (5, "t", "9" * 64, "key", "embedding", 1.0),
        ],
        "rows": [
            *(("t", row_id, 1 + number // 2, number % 2) for number, row_id in enumerate(ROWS)),
            *(("u", row_id, 4, number) for number, row_id in enumerate(ROWS[:2])),
        ],
        "embeddings": [("t", "key", row_id, 5, number) for number, row_id in enumerate(ROWS[:2])],
        "dataset_contents": [
            *(("t", digest_of(ids), b"".join(ids), labels, b"") for ids in datasets.values()),
            ("u", digest_of(ROWS[:2]), b"".join(ROWS[:2]), labels, b""),
        ],
        "datasets": [
            *(
                ("t", name, 1, 2, digest_of(ids), images if name == "pictures" else features, classes, 0, 2.0)
                for name, ids in datasets.items()
            ),
            ("u", "halves", 1, 2, digest_of(ROWS[:2]), features, classes, 0, 2.0),
        ],
        "jobs": [
            ("t", "job1", 1, succeeded, spec, 3.0, 4.0, 5.0, 0, False, "", "", "head@1", 1, "", 0.0, 0, 2),
            ("t", "job2", 2, queued, spec, 3.0, 0.0, 0.0, 0, False, "", "", "", 0, "", 0.0, 0, 1),
            ("t", "job3", 3, queued, mlp, 3.0, 0.0, 0.0, 0, False, "", "", "", 0, "", 0.0, 0, 1),
        ],
        "job_events": [
            ("t", "job1", 1, 3.0, "queued", 0.0, "{}", ""),
            ("t", "job1", 2, 5.0, "end", 0.0, "{}", ""),
            ("t", "job2", 1, 3.0, "queued", 0.0, "{}", ""),
            ("t", "job3", 1, 3.0, "queued", 0.0, "{}", ""),
        ],
        "models": [("t", "head", 1, "job1", 5.0, text(MANIFEST_1))],
        "idempotency": [("t", "datasets.commit", "k", "0" * 64, "halves@1", 2.0)],
    }


def fill(connection: sa.Connection, words: dict[str, str], version: int) -> None:
    """Make the tables of a version and put rows into them."""
    for statement in VERSION_1.format(**words).split(";\n"):
        if statement.strip():
            connection.exec_driver_sql(statement)
    connection.execute(sa.text("INSERT INTO store_info (id, schema_version) VALUES (1, 1)"))
    for table, rows in rows_of_1().items():
        names = COLUMNS_OF_1[table].split()
        columns = ", ".join(f'"{name}"' for name in names)
        values = ", ".join(f":{name}" for name in names)
        insert = sa.text(f"INSERT INTO {table} ({columns}) VALUES ({values})")
        for row in rows:
            connection.execute(insert, dict(zip(names, row, strict=True)))
    for step in (TO_VERSION_2, TO_VERSION_3)[: version - 1]:
        for statement in step.replace("{blob}", words["blob"]).split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)


@pytest.fixture(params=[1, 2, 3])
def version(request: pytest.FixtureRequest) -> int:
    """Of the database that a test starts from."""
    return int(request.param)


@pytest.fixture(params=["sqlite", *(["postgres"] if POSTGRES else [])])
def url(request: pytest.FixtureRequest, tmp_path: Path, version: int) -> Iterator[str]:
    """A database of that version."""
    if request.param == "sqlite":
        name = f"sqlite:///{tmp_path}/meta.db"
        engine = sa.create_engine(name)
        with engine.begin() as connection:
            fill(connection, SQLITE_WORDS, version)
        engine.dispose()
        yield name
        return
    database = Database(POSTGRES)
    with database.write() as connection:
        schema.metadata.drop_all(connection)
        fill(connection, POSTGRES_WORDS, version)
        # The chunks above were numbered by hand.
        connection.exec_driver_sql("SELECT setval('chunks_id_seq', 5)")
    database.close()
    yield POSTGRES
    database = Database(POSTGRES)
    with database.write() as connection:
        schema.metadata.drop_all(connection)
        schema.create(connection)
    database.close()


def contents(url: str, columns: dict[str, list[str]]) -> dict[str, list[tuple[object, ...]]]:
    """Return all rows of all tables as the database has them, without the program under test."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        found = {}
        for table, names in columns.items():
            quoted = ", ".join(f'"{name}"' for name in names)
            rows = connection.execute(sa.text(f"SELECT {quoted} FROM {table}"))
            found[table] = sorted((tuple(row) for row in rows), key=repr)
    engine.dispose()
    return found


def columns_of(url: str) -> dict[str, list[str]]:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    inspector = sa.inspect(engine)
    found = {name: [column["name"] for column in inspector.get_columns(name)] for name in inspector.get_table_names()}
    engine.dispose()
    return found


OLD_COLUMNS = {"store_info": ["id"], **{table: names.split() for table, names in COLUMNS_OF_1.items()}}


def test_everything_in_an_earlier_database_is_there_afterwards(url: str) -> None:
    before = contents(url, OLD_COLUMNS)
    assert all(before.values()), "every table has rows"
    Database(url).close()
    assert contents(url, OLD_COLUMNS) == before
    assert contents(url, {"store_info": ["schema_version"]}) == {"store_info": [(schema.VERSION,)]}
    Database(url).close()  # the second time there is nothing to do
    assert contents(url, OLD_COLUMNS) == before


def test_a_migrated_database_has_the_tables_of_a_new_one(url: str, tmp_path: Path) -> None:
    Database(url).close()
    if not url.startswith("sqlite"):
        assert columns_of(url) == {table.name: table.columns.keys() for table in schema.metadata.tables.values()}
        return
    new = tmp_path / "new.db"
    Database(f"sqlite:///{new}").close()

    def shape(path: Path) -> dict[str, dict[str, tuple[object, ...]]]:
        with sqlite3.connect(path) as connection:
            names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            found = {}
            for name in names:
                # Name, type, whether it may be null, default and place in the key; not the order of columns.
                columns = connection.execute(f"PRAGMA table_info({name})").fetchall()
                found[name] = {column[1]: column[2:] for column in columns}
        connection.close()
        return found

    assert shape(tmp_path / "meta.db") == shape(new)


def test_what_was_there_is_read_back_and_old_models_count_as_exact(url: str) -> None:
    database = Database(url)
    store = MetadataStore(database, clock=ManualClock())
    assert {one.name: one.codec for one in store.datasets.list("t")} == {
        "halves": "float16",
        "singles": "float32",
        "pictures": "images",
    }
    assert store.datasets.get("u", "halves").codec == "float32", "the codec of this tenant's rows"
    content = store.datasets.rows("t", "halves@1")
    assert (content.row_ids, content.class_indices.tolist()) == (ROWS[:2], LABELS)
    assert content.record.digest == digest_of(ROWS[:2])
    assert (content.more_row_ids, content.record.more_inputs) == ((), ())
    assert (content.groups, content.record.num_groups, content.record.views) == (None, 0, 1)
    assert store.datasets.rows("t", "pictures").record.space == IMAGES
    assert store.rows.missing("t", ROWS) == []
    assert store.embeddings.missing("t", "key", ROWS) == [2, 3, 4, 5]
    model = store.models.get("t", "head")
    assert (model.codec, model.codec_error, model.candidates) == ("", 0.0, ())
    assert (model.more_inputs, model.head) == ((), HeadConfig())
    assert (model.space, model.slices, model.metrics) == (SPACE, ("pooled",), {"accuracy": 0.75})
    assert store.models.list("t") == [model]
    assert [event.phase for event in store.jobs.events("t", "job1")] == ["queued", "end"]
    linear = JobSpec("head", "halves@1", "net", 96, slices=("pooled",), seed=7)
    assert [store.jobs.get("t", job).spec for job in ("job1", "job2")] == [linear, linear]
    mlp = replace(linear, head=HeadConfig("mlp", (256,), dropout=0.25), solver="adamw")
    assert store.jobs.get("t", "job3").spec == mlp, "an MLP whose layers were not named had one of 256"
    with pytest.raises(WireError, match="no bottleneck"):
        store.bottlenecks.check("t", "b" * 64)
    database.close()


def test_work_goes_on_in_a_migrated_database(url: str) -> None:
    database = Database(url)
    store = MetadataStore(database, clock=ManualClock())
    assert store.datasets.commit("t", "halves", SPACE, ROWS[:2], CLASSES, LABELS, None, "k2").version == 1
    assert store.datasets.commit("t", "halves", SPACE, ROWS[:2], CLASSES, [1, 0], None, "k3").version == 2
    store.rows.add_chunk("t", "d" * 64, LOCAL, "float32", LOCAL_ROWS)
    more = [(LOCAL, LOCAL_ROWS)]
    assert store.datasets.commit("t", "halves", SPACE, ROWS[:2], CLASSES, [1, 0], None, "k4", more).version == 3
    assert store.datasets.rows("t", "halves").more_row_ids == (LOCAL_ROWS,)
    assert store.datasets.rows("t", "halves@1").more_row_ids == ()
    grouped = store.datasets.commit("t", "halves", SPACE, ROWS[:2], CLASSES, LABELS, None, "k5", groups=[8, 3])
    assert (grouped.version, grouped.num_groups) == (4, 2)
    store.bottlenecks.add("t", "b" * 64)
    store.bottlenecks.check("t", "b" * 64)
    lease = store.jobs.lease("lane", 10.0)
    assert lease is not None
    assert lease.job.id == "job2"
    assert lease.job.spec == JobSpec("head", "halves@1", "net", 96, slices=("pooled",), seed=7)
    candidates = (Candidate(("pooled",), 8, -0.5, 0.75),)
    model: ModelRecord = replace(store.models.get("t", "head"), codec="int8", codec_error=0.01, candidates=candidates)
    store.jobs.succeed("job2", lease.fence, model)
    read = store.models.get("t", "head")
    assert (read.version, read.codec, read.codec_error, read.candidates) == (2, "int8", 0.01, candidates)
    database.close()


def test_a_step_that_fails_leaves_the_database_as_it_was(
    url: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, columns = contents(url, OLD_COLUMNS), columns_of(url)

    def fail(connection: sa.Connection) -> None:
        step(connection)
        raise KeyError("power")

    last = schema.VERSION - 1
    step = migrations.STEPS[last]
    monkeypatch.setattr(migrations, "STEPS", {**migrations.STEPS, last: fail})
    with pytest.raises(KeyError):
        Database(url)
    assert columns_of(url) == columns
    assert contents(url, OLD_COLUMNS) == before
    assert contents(url, {"store_info": ["schema_version"]}) == {"store_info": [(version,)]}
    monkeypatch.undo()
    database = Database(url)
    assert MetadataStore(database, clock=ManualClock()).datasets.get("t", "halves").codec == "float16"
    database.close()


DIE = """
import os, sys
from trunkline_worker.store import migrations, schema
from trunkline_worker.store.database import Database

def die(connection):
    step(connection)
    os._exit(77)

last = schema.VERSION - 1
step = migrations.STEPS[last]
migrations.STEPS = {**migrations.STEPS, last: die}
Database(sys.argv[1])
"""


def test_a_process_killed_in_the_middle_of_a_step_leaves_the_database_as_it_was(url: str) -> None:
    before, columns = contents(url, OLD_COLUMNS), columns_of(url)
    assert subprocess.run([sys.executable, "-c", DIE, url], check=False, timeout=120).returncode == 77
    assert columns_of(url) == columns
    assert contents(url, OLD_COLUMNS) == before
    Database(url).close()
    assert contents(url, {"store_info": ["schema_version"]}) == {"store_info": [(schema.VERSION,)]}


@pytest.mark.parametrize("version", [0, schema.VERSION + 1])
def test_a_version_that_no_step_starts_from_is_refused_and_left_alone(tmp_path: Path, version: int) -> None:
    url = f"sqlite:///{tmp_path}/meta.db"
    Database(url).close()
    with sqlite3.connect(tmp_path / "meta.db") as connection:
        connection.execute("UPDATE store_info SET schema_version = ?", (version,))
    connection.close()
    before = (tmp_path / "meta.db").read_bytes()
    with pytest.raises(WireError, match=f"schema version {version}, this program needs {schema.VERSION}") as error:
        Database(url)
    assert error.value.code is ErrorCode.INCOMPATIBLE
    assert (tmp_path / "meta.db").read_bytes() == before


def test_there_is_a_step_from_every_version() -> None:
    assert sorted(migrations.STEPS) == list(range(1, schema.VERSION))
