"""What addresses mean, for client and worker alike."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only the machine itself reaches a host: a name or an address, which may stand in brackets."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
