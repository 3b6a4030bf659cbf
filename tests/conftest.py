"""What every test shares, and how tests are divided among processes where there are several (`make test`)."""

import contextlib
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

SEVERAL_PROCESSES = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this is one of several processes that share the tests."""

if SEVERAL_PROCESSES:
    # Each of them with threads for every core would fight for the cores. It must be said before torch or numpy load.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The machine is shared with clusters under test: how long one example takes says nothing.
settings.register_profile("trunkline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trunkline")

_END_OF_CLUSTER = pytest.StashKey[contextlib.ExitStack]()


@pytest.fixture
def terminal():
    """Have SIGINT interrupt, as at a terminal: whatever a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, pytestconfig):
    """The embedded cluster that all tests of a run share."""
    from clusters import EmbeddedCluster

    running = EmbeddedCluster(tmp_path_factory.mktemp("cluster"), lease_s="5", tuning_workers="2")
    with contextlib.ExitStack() as end:
        end.callback(_take_down, running)
        pytestconfig.stash[_END_OF_CLUSTER] = end
        yield running.up()


def _take_down(running):
    left = running.down()
    assert left == []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Divide the tests among processes."""
    from sharing import FilesAndCluster

    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return FilesAndCluster(config, log)


def pytest_collection_modifyitems(items):
    """Put tests that need a cluster first where several processes share the tests.

    They take longest, and while they wait for the cluster the others have its core.
    """
    if not SEVERAL_PROCESSES:
        return
    from sharing import needs_cluster

    for item in items:
        if needs_cluster(item.nodeid) != _is_marked(item):
            raise pytest.UsageError(
                f"{item.nodeid}: the marker `ray` and the name disagree; see needs_cluster in tests/support/sharing.py"
            )
    items.sort(key=lambda item: not _is_marked(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Take the shared cluster down behind the last test of its group: beside the tests to come it only costs time."""
    result = yield
    if SEVERAL_PROCESSES and _is_marked(item) and not (nextitem and _is_marked(nextitem)):
        item.config.stash.get(_END_OF_CLUSTER, contextlib.ExitStack()).close()
    return result


def _is_marked(item):
    return item.get_closest_marker("ray") is not None
