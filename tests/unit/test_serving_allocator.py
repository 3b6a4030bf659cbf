"""Memory that is freed is used again without asking the system for it; what stays is not looked through for cycles."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from trunkline_worker.serving.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    bytes(bytearray(4_800_000))
before = faults()
for _ in range(20):
    bytes(bytearray(4_800_000))
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_large_messages_do_not_ask_for_fresh_pages() -> None:
    def page_faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert page_faults("leave") > 10_000  # two copies of 1,172 pages each, 20 times over
    assert page_faults("keep") < 1_000


COLLECTOR_PROGRAM = """
import gc, weakref
from trunkline_worker.serving.allocator import spare_long_lived
class Node:
    pass
def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)
gc.disable()
before = cycle()
stays = [Node() for _ in range(1000)]
spare_long_lived()
assert before() is None
assert gc.get_freeze_count() > 1000
assert not any(isinstance(one, Node) for one in gc.get_objects())
after = cycle()
gc.collect()
assert after() is None
assert gc.get_threshold()[0] == 10_000
print("done")
"""


def test_what_stays_is_spared_and_later_cycles_are_found() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECTOR_PROGRAM], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
