"""What is the matter, and what to do: a few checks that answer within three seconds."""

from __future__ import annotations

import os
import platform
import socket
import ssl
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from trunkline_wire import WIRE_VERSION

from trunkline.config import Settings, cache_dir, redact, split_address
from trunkline.errors import AuthenticationError, IncompatibleModelError, TrunklineError

if TYPE_CHECKING:
    from trunkline._calls import Calls
    from trunkline._direct import Reach
    from trunkline.records import ServerInfo

Status = Literal["ok", "warn", "fail"]

TCP_TIMEOUT_S = 1.0
"""Longest time for a connection."""

CALL_TIMEOUT_S = 1.2
"""Longest time for the calls after it, which run side by side."""

DIRECT_TIMEOUT_S = 1.6
"""Longest time for asking where replicas listen and connecting to them, beside those calls."""

CLOCK_WARN_S = 5.0
"""Difference between the clocks that is worth a word."""

CERTIFICATE_WARN_DAYS = 14
"""Days before a certificate's end from which on that is worth a word."""

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One finding. ``fix`` is what to do about it, empty if nothing."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def examine(find_settings: Callable[[], Settings]) -> list[Check]:
    """Run every check.

    Args:
        find_settings: Finds the settings, as ``connect`` would.
    """
    return list(_checks(find_settings))


def _checks(find_settings: Callable[[], Settings]) -> Iterator[Check]:
    yield Check("client", "ok", f"trunkline {version('trunkline')}, wire {WIRE_VERSION}, {_python()}")
    yield _onnxruntime()
    yield _cache()
    try:
        settings = find_settings()
    except TrunklineError as error:
        yield Check("settings", "fail", error.message, error.hint)
        return
    yield from _settings(settings)
    reachable = _reachable(settings)
    yield reachable
    if reachable.status == "ok":
        yield from _cluster(settings)


def _python() -> str:
    return f"Python {platform.python_version()} on {platform.system()}"


def _onnxruntime() -> Check:
    try:
        return Check("onnxruntime", "ok", f"onnxruntime {version('onnxruntime')}: stems can run here")
    except PackageNotFoundError:
        return Check(
            "onnxruntime", "warn", "not installed: images are sent, not features", "pip install 'trunkline[stem]'"
        )


def _cache() -> Check:
    directory, source = cache_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        return Check(
            "cache",
            "warn",
            f"{directory} ({source}) cannot be written: {error.strerror}. Stems are fetched each time",
            "export TRUNKLINE_CACHE_DIR=DIRECTORY",
        )
    return Check("cache", "ok", f"{directory} ({source})")


def _settings(settings: Settings) -> Iterator[Check]:
    sources = settings.sources
    yield Check("address", "ok", f"{settings.address} (from {sources['address']})")
    if not settings.token:
        yield Check("token", "warn", "none found", "export TRUNKLINE_TOKEN_FILE=FILE")
        return
    detail = f"{redact(settings.token)} (from {sources['token']})"
    path = sources["token"].rpartition(", file ")[2]
    if path != sources["token"] and _others_can_read(Path(path).expanduser()):
        yield Check("token", "warn", f"{detail}: others on this machine can read the file", f"chmod 600 {path}")
    else:
        yield Check("token", "ok", detail)


def _others_can_read(path: Path) -> bool:
    try:
        return os.name == "posix" and bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except OSError:
        return False


def _reachable(settings: Settings) -> Check:
    host, port = split_address(settings.address)

    def connect() -> None:
        socket.create_connection((host, port), timeout=TCP_TIMEOUT_S).close()

    started = time.monotonic()
    outcome = _Within(connect).outcome(TCP_TIMEOUT_S + 0.1)
    if outcome is None:
        return Check("reachable", "ok", f"TCP connection in {1000 * (time.monotonic() - started):.0f} ms")
    reason = outcome.strerror if isinstance(outcome, OSError) and outcome.strerror else str(outcome)
    own = settings.sources["address"] == "local cluster"
    fix = "trunkline up" if own or host in ("127.0.0.1", "localhost", "::1") else "check the address and the firewall"
    return Check("reachable", "fail", f"no connection to {settings.address}: {reason or 'timed out'}", fix)


def _cluster(settings: Settings) -> Iterator[Check]:
    from trunkline._calls import Calls
    from trunkline._deadline import Deadline

    calls = Calls(settings)
    try:
        direct = _Within(lambda: _reaches(calls))
        health = _Within(lambda: calls.catalog.is_serving(Deadline(CALL_TIMEOUT_S)))
        info = _Within(lambda: calls.catalog.server_info(Deadline(CALL_TIMEOUT_S), wait_for_ready=False, retry=False))
        if settings.tls:
            yield _certificate(settings)
        else:
            yield Check("tls", "ok", f"not used ({settings.sources['tls']})")
        yield _health(health)
        yield from _server(settings, info)
        yield from _direct(settings, direct)
    finally:
        calls.close()


def _reaches(calls: Calls) -> dict[str, Reach]:
    """Connect to the replicas of every backbone."""
    from trunkline._deadline import Deadline

    deadline = Deadline(DIRECT_TIMEOUT_S)
    if not calls.connection.settings.direct:
        return {}
    names = [one.name for one in calls.catalog.backbones(deadline)]
    for name in names:
        calls.direct.pool(name)
    return {name: calls.direct.reach(name, deadline.remaining() or 0.0) for name in names}


def _direct(settings: Settings, check: _Within[dict[str, Reach]]) -> Iterator[Check]:
    if not settings.direct:
        yield Check("direct", "ok", f"switched off (from {settings.sources['direct']})")
        return
    if check.outcome(DIRECT_TIMEOUT_S + 0.2) is not None:
        return  # whatever is the matter with the gateway has been said
    reaches = check.value()
    listening = {name: one for name, one in reaches.items() if one.num_listed}
    if not listening:
        why = next((one.why for one in reaches.values()), "there is no backbone")
        yield Check("direct", "ok", f"calls go through the gateway: {why or 'it did not say in time'}")
        return
    detail = ", ".join(f"{one.num_ready} of {one.num_listed} replicas of {name}" for name, one in listening.items())
    short = [one for one in listening.values() if one.num_ready < one.num_listed]
    if short:
        why = next((one.why for one in short if one.why), "the others do not answer")
        yield Check(
            "direct",
            "warn",
            f"{detail}: {why}. Calls that reach none go through the gateway",
            "let this machine through the firewall to the replicas' ports, or set TRUNKLINE_DIRECT=0",
        )
    else:
        yield Check("direct", "ok", detail)


def _certificate(settings: Settings) -> Check:
    host, port = split_address(settings.address)

    def end_of_certificate() -> float:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
        # As gRPC has it: a certificate that is trusted itself needs none of the strict extensions.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, port), timeout=CALL_TIMEOUT_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as secured,
        ):
            certificate: Any = secured.getpeercert()
            return float(ssl.cert_time_to_seconds(certificate["notAfter"]))

    check = _Within(end_of_certificate)
    error = check.outcome(CALL_TIMEOUT_S)
    if isinstance(error, ssl.SSLCertVerificationError):
        expired = "expired" in error.verify_message
        fix = "renew the cluster's certificate" if expired else "export TRUNKLINE_CA_FILE=CERTIFICATE.pem"
        return Check("tls", "fail", f"the certificate is not accepted: {error.verify_message}", fix)
    if isinstance(error, ssl.SSLError):
        return Check("tls", "fail", "the other side does not speak TLS", "give the port of the gateway")
    if error is not None:
        return Check("tls", "fail", f"no secure connection: {error or 'timed out'}", "try again")
    days = (check.value() - time.time()) / 86400
    if days < CERTIFICATE_WARN_DAYS:
        return Check("tls", "warn", f"the certificate ends in {days:.1f} days", "renew the cluster's certificate")
    return Check("tls", "ok", f"certificate accepted, {days:.0f} days left (trust from {settings.sources['ca_file']})")


def _health(check: _Within[bool]) -> Check:
    error = check.outcome(CALL_TIMEOUT_S + 0.2)
    if error is not None:
        return Check("health", "fail", _message(error), _hint(error, "trunkline status"))
    if not check.value():
        return Check("health", "fail", "the gateway answers and is not serving", "trunkline status")
    return Check("health", "ok", "serving")


def _server(settings: Settings, check: _Within[ServerInfo]) -> Iterator[Check]:
    from trunkline.connection import check_wire_version

    error = check.outcome(CALL_TIMEOUT_S + 0.2)
    if isinstance(error, AuthenticationError):
        yield Check("login", "fail", error.message, "export TRUNKLINE_TOKEN_FILE=FILE")
        return
    if error is not None:
        yield Check("cluster", "fail", _message(error), _hint(error, "trunkline status"))
        return
    info = check.value()
    yield Check("login", "ok", f"accepted, tenant {info.tenant!r}")
    versions = ", ".join(f"{name} {number}" for name, number in sorted(info.versions.items()))
    detail = f"trunkline {info.version}, wire {info.wire_version}" + (f" ({versions})" if versions else "")
    try:
        check_wire_version(info, settings.address)
        yield Check("cluster", "ok", detail)
    except IncompatibleModelError as mismatch:
        yield Check("cluster", "fail", mismatch.message, "pip install -U trunkline")
    yield _clock(info.time_s, check)
    if info.storage_shared:
        yield Check("storage", "ok", info.storage_note or "shared by every node")
    else:
        yield Check(
            "storage",
            "fail",
            info.storage_note or "a worker cannot read what another one wrote",
            "put the cluster's storage on a shared mount or an object store",
        )


def _clock(server_time_s: float, check: _Within[ServerInfo]) -> Check:
    # The answer was written somewhere between question and arrival: compare with the middle.
    apart = server_time_s - (check.started_s + check.ended_s) / 2
    if abs(apart) > CLOCK_WARN_S:
        ahead = "ahead of" if apart > 0 else "behind"
        return Check("clock", "warn", f"the cluster's is {abs(apart):.0f} s {ahead} this one", "set the clocks by NTP")
    return Check("clock", "ok", f"{abs(apart):.1f} s apart")


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, TrunklineError) else str(error) or "timed out"


def _hint(error: BaseException, default: str) -> str:
    return default if not isinstance(error, TrunklineError) else error.hint or default


class _Within(Generic[T]):
    """Runs something on a thread that nobody has to wait for: a name server that hangs must not hang the doctor."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.started_s = time.time()
        self.ended_s = self.started_s
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except Exception as error:
            self._error = error
        self.ended_s = time.time()

    def outcome(self, timeout_s: float) -> BaseException | None:
        """Return the error, or None if it went well."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return TimeoutError("timed out")
        return self._error

    def value(self) -> T:
        """Return the result."""
        return self._result[0]
