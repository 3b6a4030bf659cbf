"""What every test shares, and how tests are divided among processes where there are several (`make test`)."""

import contextlib
import os

import pytest
from hypothesis import settings

SEVERAL_PROCESSES = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this is one of several processes that share the tests."""

if SEVERAL_PROCESSES:
    # Each of them with threads for every core would fight for the cores. It must be said before torch or numpy load.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The machine is shared with clusters under test: how long one example takes says nothing.
settings.register_profile("trunkline", deadline=None)
settings.load_profile("trunkline")

_END_OF_CLUSTER = pytest.StashKey[contextlib.ExitStack]()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, pytestconfig):
    """The embedded cluster that all tests of a run share."""
    from clusters import EmbeddedCluster

    running = EmbeddedCluster(tmp_path_factory.mktemp("cluster"), lease_s="5")
    with contextlib.ExitStack() as end:
        end.callback(_take_down, running)
        pytestconfig.stash[_END_OF_CLUSTER] = end
        yield running.up()


def _take_down(running):
    left = running.down()
    assert left == []


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Keep the tests of a file in one process, for they share fixtures, and in one all those that need a cluster.

    The latter start first: they take longest, and while they wait for the cluster the others have its core.
    """
    if not SEVERAL_PROCESSES:
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group("cluster" if _needs_cluster(item) else item.path.stem))
    items.sort(key=lambda item: not _needs_cluster(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Take the shared cluster down behind the last test of its group: beside the tests to come it only costs time."""
    result = yield
    if SEVERAL_PROCESSES and _needs_cluster(item) and not (nextitem and _needs_cluster(nextitem)):
        item.config.stash.get(_END_OF_CLUSTER, contextlib.ExitStack()).close()
    return result


def _needs_cluster(item):
    return item.get_closest_marker("ray") is not None
