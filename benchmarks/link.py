"""A slow link between two network namespaces of its own: a rate, a delay and a queue, all in one process.

Linux has ``netem`` for this, but not every kernel does; TUN is nearly everywhere. Each namespace gets a TUN interface,
and this process carries packets from one to the other at the rate of the link, each a delay later. What it has not
taken yet waits in the interface's own queue, and what does not fit there is lost, as in a router. So TCP meets what it
meets outside: loss, delay and a queue.

The namespaces have no names. They, the interfaces and the addresses are gone when the last process in them ends,
however it ends; and this process ends with the one that started it.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NEAR, FAR = "198.18.0.1", "198.18.0.2"
"""Addresses of the two ends, out of the block that is kept for benchmarks (RFC 2544)."""

INTERFACE = "slow0"
BURST_S = 0.002
"""How far the link may fall behind and still catch up, in seconds: no timer is exact."""

TICK_S = 0.001
"""Shortest sleep, in seconds: on a shared machine a link that wakes for every packet takes a core of its own."""

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class LinkSpec:
    """What the link is like.

    Attributes:
        rtt_s: Seconds there and back, without any queue.
        bits_per_s: Rate of each direction, IP headers included.
        queue_s: Seconds that a full queue takes to drain; what comes on top is lost.
        mtu: Bytes of the largest packet.
    """

    rtt_s: float = 0.040
    bits_per_s: float = 50e6
    queue_s: float = 0.080
    mtu: int = 1500

    @property
    def queue_packets(self) -> int:
        """Packets of full size that fit the queue."""
        return max(2, round(self.bits_per_s / 8 * self.queue_s / self.mtu))


class Shaper:
    """One direction of a link: when the next packet may be taken, and when it comes out. Times are of one clock."""

    def __init__(self, spec: LinkSpec) -> None:
        """Start idle."""
        self._seconds_per_byte = 8 / spec.bits_per_s
        self._delay_s = spec.rtt_s / 2
        self.free_at = 0.0

    def is_free(self, now: float) -> bool:
        """Whether the last packet is out of the way."""
        return self.free_at <= now

    def take(self, now: float, num_bytes: int) -> float:
        """Put a packet onto the link, and return when it arrives."""
        self.free_at = max(self.free_at, now - BURST_S) + num_bytes * self._seconds_per_byte
        return max(self.free_at, now) + self._delay_s


@dataclass(frozen=True)
class Link:
    """A link that is up. The paths stand for the namespaces of its ends."""

    spec: LinkSpec
    near: str
    far: str


def enter(namespace: str) -> None:
    """Move the calling thread, and what it starts from now on, to a namespace. There is no way back.

    Raises:
        OSError: Not allowed, or the link has ended.
    """
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        _libc("setns", descriptor, _CLONE_NEWNET)
    finally:
        os.close(descriptor)


def passed_bytes() -> tuple[int, int]:
    """Return the bytes that the link took from this end, and that came out here, since it is up."""
    return _counters(Path("/proc/thread-self/net/dev").read_text(), INTERFACE)


def missing() -> str:
    """Return what a link would need and this machine does not have, in words; empty if it has everything."""
    if os.geteuid() != 0:
        return "a link between network namespaces needs root"
    if shutil.which("ip") is None:
        return "the command `ip` is not there; it comes with iproute2"
    if not os.path.exists(_TUN):
        return f"{_TUN} is not there; the kernel module is called tun"
    return ""


@contextmanager
def slow_link(spec: LinkSpec) -> Iterator[Link]:
    """Bring a link up; it is gone at the end.

    Raises:
        RuntimeError: It did not come up. What went wrong is on standard error.
    """
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(asdict(spec))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the link did not come up")
        yield Link(spec, **json.loads(line))
    finally:
        process.stdin.close()  # its signal to end
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _libc(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _counters(text: str, interface: str) -> tuple[int, int]:
    """Return sent and received bytes of an interface out of the kernel's table."""
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    raise OSError(f"there is no interface {interface} here")


def _make_end(spec: LinkSpec, address: str, peer: str) -> tuple[int, int]:
    """Go to a new namespace and make one end there. Returns the packets' descriptor and the namespace's."""
    _libc("unshare", _CLONE_NEWNET)
    packets = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(packets, _TUNSETIFF, struct.pack("16sH", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip addr add {address} peer {peer} dev {INTERFACE}",
        f"ip link set {INTERFACE} mtu {spec.mtu} txqueuelen {spec.queue_packets} up",
    ):
        subprocess.run(command.split(), check=True)
    return packets, os.open("/proc/thread-self/ns/net", os.O_RDONLY)


class _Direction:
    """Packets on their way from one end to the other."""

    def __init__(self, spec: LinkSpec, source: int, sink: int) -> None:
        self._shaper = Shaper(spec)
        self.source = source
        self._sink = sink
        self._on_the_way: collections.deque[tuple[float, bytes]] = collections.deque()

    def is_free(self, now: float) -> bool:
        return self._shaper.is_free(now)

    def next_event(self, now: float) -> float:
        """Return when something is to be done that no packet announces."""
        due = self._on_the_way[0][0] if self._on_the_way else float("inf")
        return due if self.is_free(now) else min(due, self._shaper.free_at)

    def take(self, now: float) -> None:
        """Take packets for as long as the link is free."""
        while self._shaper.is_free(now):
            try:
                packet = os.read(self.source, 65536)
            except BlockingIOError:
                return
            self._on_the_way.append((self._shaper.take(now, len(packet)), packet))

    def deliver(self, now: float) -> None:
        """Put down what has arrived."""
        while self._on_the_way and self._on_the_way[0][0] <= now:
            os.write(self._sink, self._on_the_way.popleft()[1])


def _carry(spec: LinkSpec, near: int, far: int) -> None:
    """Carry packets until standard input ends."""
    directions = [_Direction(spec, near, far), _Direction(spec, far, near)]
    while True:
        now = time.monotonic()
        for one in directions:
            one.deliver(now)
        wake_at = min(one.next_event(now) for one in directions)
        waiting = [one.source for one in directions if one.is_free(now)]
        timeout_s = None if wake_at == float("inf") else max(wake_at - now, TICK_S)
        ready, _, _ = select.select([0, *waiting], [], [], timeout_s)
        if 0 in ready:
            return
        now = time.monotonic()
        for one in directions:
            one.take(now)


def main() -> None:
    spec = LinkSpec(**json.loads(sys.argv[1]))
    # A link does not get slower when the machines at its ends are busy. It needs little, and sleeps at least a tick.
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    far, far_namespace = _make_end(spec, FAR, NEAR)
    near, near_namespace = _make_end(spec, NEAR, FAR)
    own = f"/proc/{os.getpid()}/fd"
    print(json.dumps({"near": f"{own}/{near_namespace}", "far": f"{own}/{far_namespace}"}), flush=True)
    _carry(spec, near, far)


if __name__ == "__main__":
    main()
