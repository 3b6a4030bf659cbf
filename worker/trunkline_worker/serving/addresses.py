"""Addresses: how they are written, and where a replica listens itself."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from trunkline_wire.hosts import is_loopback

_UNSPECIFIED = ("", "0.0.0.0", "::", "[::]")


def host_port(host: str, port: int | str) -> str:
    """Return ``host:port``, with brackets around an address of IPv6."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


@dataclass(frozen=True)
class Place:
    """Where a replica listens, and by which address callers find it."""

    host: str
    announced: str


def find_place(direct_host: str, gateway_host: str, node_host: str, outward: Callable[[], str]) -> Place:
    """Return where a replica listens.

    Where nothing else is said, on loopback if the gateway does, else at the address of its own machine.

    Args:
        direct_host: What the operator says; may be empty.
        gateway_host: Where the gateway listens.
        node_host: The machine's address, as Ray knows it. Loopback if Ray lives on this machine alone.
        outward: Finds the machine's address towards others.

    Raises:
        OSError: The machine has no address towards others.
    """

    def own_host() -> str:
        if not is_loopback(node_host) or is_loopback(gateway_host):
            return node_host
        return outward() if gateway_host in _UNSPECIFIED else gateway_host  # one machine, whose gateway others reach

    host = direct_host or (gateway_host if is_loopback(gateway_host) else own_host())
    return Place(host, own_host() if host in _UNSPECIFIED else host)


def outward_host() -> str:
    """Return this machine's address towards others. Nothing is sent.

    Raises:
        OSError: It has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address of nobody's, for documentation
        return str(probe.getsockname()[0])


def parse_ports(text: str) -> tuple[int, ...]:
    """Return the ports of ``low-high`` or of a single one; none for an empty text.

    Raises:
        ValueError: It is neither.
    """
    if not text:
        return ()
    low, dash, high = text.partition("-")
    try:
        first, last = int(low), int(high if dash else low)
    except ValueError:
        first, last = 0, 0
    if not 0 < first <= last < 65536:
        raise ValueError(f"{text!r} is not a range of ports, such as 50100-50163")
    return tuple(range(first, last + 1))
