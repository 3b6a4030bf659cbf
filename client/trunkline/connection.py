"""From settings to a client: reach the cluster, and check that it can be talked to."""

from __future__ import annotations

from pathlib import Path

from trunkline_wire import WIRE_VERSION

from trunkline._calls import Calls
from trunkline._deadline import Deadline
from trunkline.client import Client
from trunkline.config import resolve
from trunkline.errors import IncompatibleModelError
from trunkline.records import ServerInfo

CONNECT_TIMEOUT_S = 5.0
"""Longest time in which a cluster must say that it is there."""


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    token_file: str | Path | None = None,
    ca_file: str | Path | None = None,
    insecure: bool | None = None,
    profile: str | None = None,
    timeout_s: float | None = None,
    direct: bool | None = None,
) -> Client:
    """Connect to a cluster and check that it is there.

    Each setting comes from the argument, else from its ``TRUNKLINE_*`` variable, else from a profile in
    ``config.toml``, else from the cluster that runs on this machine.

    Args:
        address: ``host:port``.
        token: Bearer token.
        token_file: File that holds it.
        ca_file: PEM file with the certificate to trust. Default: the system's, on other machines.
        insecure: Send token and data to another machine unencrypted. On this machine that is the default.
        profile: Name of a profile in ``config.toml``.
        timeout_s: Deadline of one call that states none. Default: 60.
        direct: Whether rows go to the replicas of a backbone themselves where these listen and can be reached, past the
            gateway. Default: yes.

    Raises:
        ServiceUnavailableError: There is no cluster. Found out within a few seconds.
        AuthenticationError: The cluster does not accept the token.
        IncompatibleModelError: Client and cluster are of versions that do not understand each other.
        ConfigError: A setting cannot be read or would be unsafe.
    """
    settings = resolve(
        address,
        token=token,
        token_file=token_file,
        ca_file=ca_file,
        insecure=insecure,
        profile=profile,
        timeout_s=timeout_s,
        direct=direct,
    )
    calls = Calls(settings)
    try:
        info = calls.catalog.server_info(Deadline(min(CONNECT_TIMEOUT_S, settings.timeout_s)), wait_for_ready=False)
        check_wire_version(info, settings.address)
    except BaseException:
        calls.close()
        raise
    return Client(settings, calls, info)


def check_wire_version(info: ServerInfo, address: str) -> None:
    """Check that client and cluster understand each other.

    Raises:
        IncompatibleModelError: They do not.
    """
    if info.wire_version != WIRE_VERSION:
        older = "client" if info.wire_version > WIRE_VERSION else "cluster"
        raise IncompatibleModelError(
            f"the cluster at {address} (version {info.version}) speaks wire version {info.wire_version}; "
            f"this client speaks {WIRE_VERSION}",
            hint=f"Upgrade the {older}: pip install -U trunkline",
        )
