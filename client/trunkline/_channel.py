"""gRPC channels: options, TLS, token, and what a fork must not break."""

from __future__ import annotations

import json
import os
import socket
import threading
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import grpc
from trunkline_wire.limits import MAX_MESSAGE_BYTES

from trunkline.config import Settings, is_loopback, split_address
from trunkline.errors import ConfigError

KEEPALIVE_TIME_MS = 30_000
"""Pause between pings while a call is under way. The server must allow pings this often."""

KEEPALIVE_TIMEOUT_MS = 10_000
"""How long an unanswered ping may take before the connection counts as dead."""

IDEMPOTENT_METHODS: dict[str, tuple[str, ...]] = {
    "CatalogService": ("GetServerInfo", "ListBackbones", "DescribeBackbone"),
    "InferenceService": ("Predict", "Extract"),
    # Commit, submit and cancel carry an idempotency key: a repetition has one effect and the same answer.
    "DatasetService": ("FindMissingRows", "CommitDataset", "GetDataset", "ListDatasets"),
    "TrainingService": ("SubmitJob", "GetJob", "ListJobs", "CancelJob"),
    "RegistryService": ("GetModel", "ListModels"),
    "TrunkService": ("PutBottleneck", "GetBottleneck"),
}
"""Unary calls that gRPC itself may repeat when the connection broke under them."""

CONNECT_ATTEMPT_MS = 2000
"""How long one try to connect to a replica may take."""


class Forgetful(Protocol):
    """Holds what must not be used in a forked child."""

    def forget_after_fork(self) -> None:
        """Let go of it. Runs in the child."""


_forgetful: weakref.WeakSet[Any] = weakref.WeakSet()


def forget_in_children(holder: Forgetful) -> None:
    """Have ``forget_after_fork`` called in every forked child, for as long as the holder lives."""
    _forgetful.add(holder)


def service_config() -> str:
    """Return gRPC's service config: finite, jittered repetitions of idempotent calls inside their one deadline."""
    names = [
        {"service": f"trunkline_wire.v1.{service}", "method": method}
        for service, methods in IDEMPOTENT_METHODS.items()
        for method in methods
    ]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})


@lru_cache(maxsize=1)
def _user_agent() -> str:
    from importlib import metadata  # takes as long as a good part of gRPC

    return f"trunkline/{metadata.version('trunkline')}"


def _shared_options(address: str) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        # A pool of connections shared between channels would be shared with a forked child as well.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.primary_user_agent", _user_agent()),
    ]
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def channel_options(address: str) -> list[tuple[str, int | str]]:
    """Return the options of a channel to a gateway at ``address``."""
    return [
        *_shared_options(address),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 3000),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", service_config()),
    ]


def direct_options(address: str, tls_name: str) -> list[tuple[str, int | str]]:
    """Return the options of a channel to a replica at ``address``.

    Args:
        address: ``host:port``.
        tls_name: The name in its certificate where that is not its address, else empty.
    """
    options = [
        *_shared_options(address),
        ("grpc.initial_reconnect_backoff_ms", 1000),
        ("grpc.min_reconnect_backoff_ms", CONNECT_ATTEMPT_MS),
        ("grpc.max_reconnect_backoff_ms", 60_000),
        # A repetition by gRPC itself would show the same proof twice, which the replica takes for someone else's.
        ("grpc.enable_retries", 0),
    ]
    return [*options, ("grpc.ssl_target_name_override", tls_name)] if tls_name else options


def open_channel(settings: Settings) -> grpc.Channel:
    """Open the channel to the gateway."""
    return _open(settings.address, settings, settings.tls, channel_options(settings.address))


def open_direct_channel(settings: Settings, address: str, *, tls: bool, tls_name: str) -> grpc.Channel:
    """Open a channel to a replica, with the same trust as in the gateway.

    Args:
        settings: Of the connection to the gateway.
        address: ``host:port`` of the replica.
        tls: Whether it speaks TLS.
        tls_name: As in ``direct_options``.
    """
    # With its scheme, so that nothing in an address can be taken for another one.
    return _open(f"dns:///{address}", settings, tls, direct_options(address, tls_name if tls else ""))


def _open(target: str, settings: Settings, tls: bool, options: list[tuple[str, int | str]]) -> grpc.Channel:
    if not tls:
        return grpc.insecure_channel(target, options=options)
    roots = Path(settings.ca_file).read_bytes() if settings.ca_file else None
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(roots), options=options)


class Connection:
    """One channel to a cluster, made when it is first needed and made anew in a forked child."""

    def __init__(self, settings: Settings) -> None:
        """Remember where to connect to; nothing is opened yet."""
        self.settings = settings
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._stubs: dict[type[Any], Any] = {}
        self._left_behind: list[grpc.Channel] = []
        self._closed = False
        forget_in_children(self)

    @property
    def channel(self) -> grpc.Channel:
        """The channel of this process.

        Raises:
            ConfigError: The client is closed.
        """
        with self._lock:
            if self._closed:
                raise ConfigError("this client is closed", hint="Make a new one with trunkline.connect()")
            if self._channel is None:
                self._channel = open_channel(self.settings)
            return self._channel

    def stub(self, kind: type[Any]) -> Any:
        """Return the stub of a service on the channel of this process."""
        channel = self.channel
        stub = self._stubs.get(kind)
        if stub is None:
            stub = self._stubs[kind] = kind(channel)
        return stub

    def metadata(self, request_id_key: str, request_id: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of one call: its id, and the token if there is one."""
        pairs: tuple[tuple[str, str], ...] = ((request_id_key, request_id),)
        if self.settings.token:
            pairs += (("authorization", f"Bearer {self.settings.token}"),)
        return pairs

    def close(self) -> None:
        """Close the channel for good. Calls under way end with an error."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def accepts(self, timeout_s: float = 0.5) -> bool:
        """Whether anything accepts TCP connections at the address."""
        try:
            with socket.create_connection(split_address(self.settings.address), timeout=timeout_s):
                return True
        except OSError:
            return False

    def forget_after_fork(self) -> None:
        """Let go of the parent's channel in a child: its threads are not here, so it cannot even be closed."""
        self._lock = threading.Lock()
        if self._channel is not None:
            self._left_behind.append(self._channel)
            self._stubs = {}
            self._channel = None


def _forget_all() -> None:
    for holder in list(_forgetful):
        holder.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
