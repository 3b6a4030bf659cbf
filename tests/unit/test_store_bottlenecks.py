"""Which bottlenecks a tenant has put into the store."""

import pytest
import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.store import schema
from trunkline_worker.store.bottlenecks import bottleneck_path
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.metadata import MetadataStore

SHA256, OTHER = "ab12" * 16, "cd34" * 16


def refused(store: MetadataStore, tenant: str, sha256: str) -> WireError:
    with pytest.raises(WireError) as error:
        store.bottlenecks.check(tenant, sha256)
    return error.value


def test_a_bottleneck_is_its_tenants_alone(database: Database) -> None:
    store = MetadataStore(database, clock=ManualClock(1000.0))
    assert refused(store, "t", SHA256).code is ErrorCode.NOT_FOUND
    store.bottlenecks.add("t", SHA256)
    store.bottlenecks.check("t", SHA256)
    others = refused(store, "u", SHA256)
    assert others.code is ErrorCode.NOT_FOUND
    assert others.message == "there is no bottleneck ab12ab12ab12; put it there first"
    assert refused(store, "t", OTHER).message == "there is no bottleneck cd34cd34cd34; put it there first"
    store.bottlenecks.add("u", SHA256)
    store.bottlenecks.check("u", SHA256)


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
def test_a_lost_reply_and_a_retry_are_one(database: Database, point: str) -> None:
    failpoints, clock = Failpoints(), ManualClock(1000.0)
    store = MetadataStore(database, clock=clock, failpoints=failpoints)
    failpoints.arm(f"store.bottlenecks.add.{point}")
    with pytest.raises(SimulatedKill):
        store.bottlenecks.add("t", SHA256)
    clock.advance(5.0)
    for _ in range(2):
        store.bottlenecks.add("t", SHA256)
    store.bottlenecks.check("t", SHA256)
    with database.read() as connection:
        [row] = connection.execute(sa.select(schema.bottlenecks))
    assert row.create_time == (1005.0 if point == "before_commit" else 1000.0), "the first that counted"


@pytest.mark.parametrize("sha256", ["", "ab12", "AB12" * 16, "../x" * 16, "g" * 64])
def test_what_is_no_hash_is_refused(database: Database, sha256: str) -> None:
    store = MetadataStore(database)
    assert refused(store, "t", sha256).code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(WireError, match="64 hexadecimal") as error:
        store.bottlenecks.add("t", sha256)
    assert error.value.code is ErrorCode.INVALID_ARGUMENT


def test_files_lie_by_their_hash() -> None:
    assert bottleneck_path(SHA256) == f"bottlenecks/ab/{SHA256}"
