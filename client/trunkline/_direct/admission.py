"""Which endpoints may be used at all: what a user protected on the way to the gateway stays protected."""

from __future__ import annotations

from trunkline_wire.specs import Endpoint, Endpoints

from trunkline.config import Settings, check_address, is_loopback
from trunkline.errors import ConfigError


def refusal(endpoint: Endpoint, endpoints: Endpoints, settings: Settings) -> str:
    """Return why an endpoint must not be used; empty if it may.

    Rows cross a network unencrypted only where they did so on the way to the gateway: behind a gateway that speaks TLS
    never, and behind one on this machine, which may be the near end of a tunnel, only on this machine.

    Args:
        endpoint: The one.
        endpoints: What the gateway said of all of them.
        settings: Of the connection to the gateway.
    """
    try:
        whole = check_address(endpoint.address, "the cluster") == endpoint.address
    except ConfigError:
        whole = False
    if not whole or not endpoint.replica:
        return f"{endpoint.address!r} is not an address with a port"
    here, gateway_here = is_loopback(endpoint.address), is_loopback(settings.address)
    if here and not gateway_here:
        return f"{endpoint.address} is on the cluster's own machine"
    if endpoints.tls:
        return ""
    if settings.tls:
        return f"{endpoint.address} is not encrypted, and the connection to the gateway is"
    if gateway_here and not here:
        return f"{endpoint.address} is another machine, and the connection to it would not be encrypted"
    return ""
