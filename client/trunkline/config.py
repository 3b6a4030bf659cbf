"""Where the client finds its cluster: settings, and where each of them came from.

Read when a client connects, never at import. The order: argument, ``TRUNKLINE_*`` variable, profile in
``config.toml``, the local cluster's own file. A token found in a profile or in the local cluster's file is only used
for the address found beside it: naming another address never sends it there.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs
from trunkline_wire import hosts
from trunkline_wire.local import LocalCluster, cluster_file, read_local_cluster

from trunkline.errors import ConfigError, ServiceUnavailableError

DEFAULT_PORT = 50051
"""Port of an address that names none."""

DEFAULT_TIMEOUT_S = 60.0
"""Deadline of one call that states none."""

_PROFILE_KEYS = {"address", "token", "token_file", "ca_file", "insecure", "timeout_s", "direct"}
_BOOL_KEYS = {"insecure", "direct"}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Settings:
    """How to reach a cluster.

    Attributes:
        address: ``host:port``.
        token: Bearer token, empty for none. Never shown.
        ca_file: PEM file with the certificate to trust, empty for the system's.
        tls: Whether the connection is encrypted.
        timeout_s: Deadline of one call that states none.
        direct: Whether to talk to replicas themselves where they can be reached, past the gateway.
        cache_dir: Where stems are kept.
        sources: For every setting, where it came from.
    """

    address: str
    token: str = field(repr=False)
    ca_file: str
    tls: bool
    timeout_s: float
    direct: bool
    cache_dir: Path
    sources: Mapping[str, str]

    def __repr__(self) -> str:
        """Return the settings without the token."""
        parts = ", ".join(f"{name}={value!r}" for name, value, _ in self.describe())
        return f"Settings({parts})"

    def describe(self) -> list[tuple[str, str, str]]:
        """Return (setting, value, where it came from) for people to read. Secrets are redacted."""
        values = {one.name: str(getattr(self, one.name)) for one in fields(self) if one.name != "sources"}
        values["token"] = redact(self.token)
        return [(name, value, self.sources.get(name, "default")) for name, value in values.items()]


def redact(secret: str) -> str:
    """Return what may be shown of a secret: that it is there, and its length."""
    return f"({len(secret)} characters, hidden)" if secret else ""


def config_file() -> Path:
    """Return the path of ``config.toml``, whether or not it exists."""
    override = os.environ.get("TRUNKLINE_CONFIG")
    return Path(override) if override else Path(platformdirs.user_config_dir("trunkline")) / "config.toml"


def cache_dir() -> tuple[Path, str]:
    """Return the directory for files that can be fetched again, and where that setting came from."""
    override = os.environ.get("TRUNKLINE_CACHE_DIR")
    if override:
        return Path(override), "TRUNKLINE_CACHE_DIR"
    return Path(platformdirs.user_cache_dir("trunkline")), "default"


def resolve(
    address: str | None = None,
    *,
    token: str | None = None,
    token_file: str | Path | None = None,
    ca_file: str | Path | None = None,
    insecure: bool | None = None,
    profile: str | None = None,
    timeout_s: float | None = None,
    direct: bool | None = None,
) -> Settings:
    """Find every setting. Arguments are those of ``trunkline.connect``.

    Raises:
        ConfigError: A setting cannot be read, or a token would travel unencrypted to another machine.
        ServiceUnavailableError: Nothing names a cluster.
    """
    found = _Sources(profile)
    cluster_address, address_source = found.address(address)
    secret, token_source = found.token(token, token_file, cluster_address)
    trusted, ca_source = found.ca_file(ca_file, cluster_address)
    allowed, insecure_source = found.insecure(insecure, cluster_address)
    timeout, timeout_source = found.timeout_s(timeout_s)
    go_direct, direct_source = found.direct(direct)
    directory, cache_source = cache_dir()
    loopback = is_loopback(cluster_address)
    # Without TLS only on this machine or where the user said so: a token never crosses a network in the clear.
    tls = bool(trusted) or not (loopback or allowed)
    if trusted and not Path(trusted).is_file():
        raise ConfigError(f"there is no certificate file {trusted} (from {ca_source})", hint="Correct the path")
    if tls:
        tls_source = ca_source if trusted else "default for another machine"
    else:
        tls_source = "default on this machine" if loopback else insecure_source
    return Settings(
        address=cluster_address,
        token=secret,
        ca_file=trusted,
        tls=tls,
        timeout_s=timeout,
        direct=go_direct,
        cache_dir=directory,
        sources={
            "address": address_source,
            "token": token_source,
            "ca_file": ca_source,
            "tls": tls_source,
            "timeout_s": timeout_source,
            "direct": direct_source,
            "cache_dir": cache_source,
        },
    )


class _Sources:
    """The places where settings are looked for, read once."""

    def __init__(self, profile: str | None) -> None:
        self._profile_name, self._profile = _read_profile(profile or os.environ.get("TRUNKLINE_PROFILE"))
        self._local = read_local_cluster()

    def address(self, argument: str | None) -> tuple[str, str]:
        if argument:
            return check_address(argument, "argument"), "argument"
        variable = os.environ.get("TRUNKLINE_ADDRESS")
        if variable:
            return check_address(variable, "TRUNKLINE_ADDRESS"), "TRUNKLINE_ADDRESS"
        if "address" in self._profile:
            return check_address(self._profile["address"], self._profile_source), self._profile_source
        if self._local is not None:
            return check_address(self._local.address, _LOCAL), _LOCAL
        raise ServiceUnavailableError(
            f"no cluster is named and none runs on this machine ({cluster_file()} is not there)",
            hint="Start one with `trunkline up`, or give its address: connect('host:port') or TRUNKLINE_ADDRESS",
        )

    def token(self, token: str | None, token_file: str | Path | None, address: str) -> tuple[str, str]:
        environment = os.environ
        if token is not None:
            return _check_token(token, "argument"), "argument"
        if token_file:
            return _read_token(token_file, "argument"), f"argument, file {token_file}"
        if environment.get("TRUNKLINE_TOKEN"):
            return _check_token(environment["TRUNKLINE_TOKEN"], "TRUNKLINE_TOKEN"), "TRUNKLINE_TOKEN"
        if environment.get("TRUNKLINE_TOKEN_FILE"):
            path = environment["TRUNKLINE_TOKEN_FILE"]
            return _read_token(path, "TRUNKLINE_TOKEN_FILE"), f"TRUNKLINE_TOKEN_FILE, file {path}"
        if self._profile_fits(address):
            if "token" in self._profile:
                return _check_token(self._profile["token"], self._profile_source), self._profile_source
            if "token_file" in self._profile:
                path = self._profile["token_file"]
                return _read_token(path, self._profile_source), f"{self._profile_source}, file {path}"
        local = self._local_if(address)
        if local is not None and local.token_file:
            return _read_token(local.token_file, _LOCAL), f"{_LOCAL}, file {local.token_file}"
        return "", "none found"

    def ca_file(self, argument: str | Path | None, address: str) -> tuple[str, str]:
        if argument is not None:
            return str(argument), "argument"
        if os.environ.get("TRUNKLINE_CA_FILE"):
            return os.environ["TRUNKLINE_CA_FILE"], "TRUNKLINE_CA_FILE"
        if self._profile_fits(address) and "ca_file" in self._profile:
            return _expand(self._profile["ca_file"]), self._profile_source
        local = self._local_if(address)
        if local is not None and local.ca_file:
            return local.ca_file, _LOCAL
        return "", "default"

    def insecure(self, argument: bool | None, address: str) -> tuple[bool, str]:
        if argument is not None:
            return argument, "argument"
        variable = os.environ.get("TRUNKLINE_INSECURE")
        if variable:
            return _read_bool(variable, "TRUNKLINE_INSECURE"), "TRUNKLINE_INSECURE"
        if self._profile_fits(address) and "insecure" in self._profile:
            return self._profile["insecure"], self._profile_source
        return False, "default"

    def timeout_s(self, argument: float | None) -> tuple[float, str]:
        if argument is not None:
            return _check_timeout(argument, "argument"), "argument"
        variable = os.environ.get("TRUNKLINE_TIMEOUT_S")
        if variable:
            return _check_timeout(variable, "TRUNKLINE_TIMEOUT_S"), "TRUNKLINE_TIMEOUT_S"
        if "timeout_s" in self._profile:
            return _check_timeout(self._profile["timeout_s"], self._profile_source), self._profile_source
        return DEFAULT_TIMEOUT_S, "default"

    def direct(self, argument: bool | None) -> tuple[bool, str]:
        if argument is not None:
            return argument, "argument"
        variable = os.environ.get("TRUNKLINE_DIRECT")
        if variable:
            return _read_bool(variable, "TRUNKLINE_DIRECT"), "TRUNKLINE_DIRECT"
        if "direct" in self._profile:
            return self._profile["direct"], self._profile_source
        return True, "default"

    @property
    def _profile_source(self) -> str:
        return f"profile {self._profile_name!r} in {config_file()}"

    def _profile_fits(self, address: str) -> bool:
        """Whether the profile speaks about this address: its token must not go elsewhere."""
        own = self._profile.get("address")
        return bool(self._profile) and (own is None or check_address(own, self._profile_source) == address)

    def _local_if(self, address: str) -> LocalCluster | None:
        if self._local is None or check_address(self._local.address, _LOCAL) != address:
            return None
        return self._local


_LOCAL = "local cluster"


def check_address(address: str, source: str) -> str:
    """Return ``host:port``, the port added where it is missing.

    Raises:
        ConfigError: It is not an address.
    """
    text = address.strip()
    match = re.fullmatch(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^:/\s\[\]]+)(?::(?P<port>\d{1,5}))?", text)
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise ConfigError(f"{address!r} (from {source}) is not an address", hint="Write it as host:port")
    return f"{match['host']}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Return host (without brackets) and port of a checked address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether the address is this machine."""
    return hosts.is_loopback(split_address(address)[0])


def _read_profile(name: str | None) -> tuple[str, dict[str, Any]]:
    path = config_file()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if name:
            raise ConfigError(f"there is no profile {name!r}: {path} is not there", hint=f"Write {path}") from None
        return "", {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Correct the file") from error
    profiles = document.get("profiles", {})
    chosen = name or document.get("default", "")
    if not chosen:
        return "", {}
    if not isinstance(profiles, dict) or chosen not in profiles:
        names = ", ".join(sorted(profiles)) or "none"
        raise ConfigError(f"there is no profile {chosen!r} in {path}; there are: {names}", hint="Name one of these")
    return chosen, _check_profile(dict(profiles[chosen]), chosen, path)


def _check_profile(profile: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    unknown = sorted(set(profile) - _PROFILE_KEYS)
    if unknown:
        raise ConfigError(
            f"profile {name!r} in {path} has unknown settings: {', '.join(unknown)}",
            hint=f"Known are {', '.join(sorted(_PROFILE_KEYS))}",
        )
    for key, value in profile.items():
        wanted: tuple[type, ...] = (bool,) if key in _BOOL_KEYS else (int, float) if key == "timeout_s" else (str,)
        if not isinstance(value, wanted) or (key == "timeout_s" and isinstance(value, bool)):
            raise ConfigError(
                f"{key} of profile {name!r} in {path} must be a {wanted[-1].__name__}; got {value!r}",
                hint="Correct the file",
            )
    return profile


def _expand(path: str | Path) -> str:
    return str(Path(path).expanduser())


def _read_token(path: str | Path, source: str) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not plain text"
        raise ConfigError(
            f"the token file {path} (from {source}) cannot be read: {reason}", hint="Correct the path or its mode"
        ) from error
    return _check_token(text.strip(), f"{source}, file {path}")


def _check_token(token: str, source: str) -> str:
    # A line feed or a letter outside ASCII would make the call fail with a riddle; the token itself is not shown.
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            f"the token (from {source}) holds spaces, line ends or letters outside ASCII", hint="Copy it once more"
        )
    return token


def _read_bool(text: str, source: str) -> bool:
    lowered = text.strip().lower()
    if lowered in _TRUE | _FALSE:
        return lowered in _TRUE
    raise ConfigError(f"{source} is {text!r}; expected true or false")


def _check_timeout(value: float | str, source: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0 or math.isinf(seconds):
        raise ConfigError(f"timeout_s (from {source}) must be a positive number of seconds; got {value!r}")
    return seconds
