"""What every test shares."""

import pytest
from hypothesis import settings

# The machine is shared with clusters under test: how long one example takes says nothing.
settings.register_profile("trunkline", deadline=None)
settings.load_profile("trunkline")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The embedded cluster that all tests of a run share."""
    from clusters import EmbeddedCluster

    running = EmbeddedCluster(tmp_path_factory.mktemp("cluster"), lease_s="5", tuning_workers="2")
    try:
        yield running.up()
    finally:
        left = running.down()
    assert left == []
