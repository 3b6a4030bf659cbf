"""How tests are divided among processes: the tests of a file stay together, and so do all those that need a cluster."""

from xdist.scheduler import LoadScopeScheduling

_ALWAYS = ("tests/integration/", "tests/fault/test_cluster_")
_REAL = "real"


def needs_cluster(nodeid):
    """Whether a test needs a cluster, by its name alone: whoever divides the tests has only read their names.

    They lie in ``tests/integration`` or in ``tests/fault/test_cluster_*.py``, or have the parameter ``real``.
    """
    test, _, parameters = nodeid.partition("[")
    return test.startswith(_ALWAYS) or _REAL in parameters.rstrip("]").split("-")


class FilesAndCluster(LoadScopeScheduling):
    """One process gets all that need a cluster, so that one is brought up; whoever is free gets the next file.

    xdist's own groups are of no use here: they are written into the tests' names, where pytest 9.2 ignores them.
    """

    def _split_scope(self, nodeid):
        return "cluster" if needs_cluster(nodeid) else nodeid.partition("::")[0]
