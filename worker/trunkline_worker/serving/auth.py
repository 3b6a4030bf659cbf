"""Who is calling, and what they may call.

Tokens come from a file, one per line: ``token [tenant [role]]``. Only their hashes are kept. Every RPC has a row in
``ACCESS``; one without a row is refused, and a test fails.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.names import check_name

DEFAULT_TENANT = "default"


class Role(enum.IntEnum):
    """What a token allows. A higher role may do all that a lower one may."""

    ANYONE = 0
    READER = 1
    USER = 2


@dataclass(frozen=True)
class Principal:
    """The caller: whose data they see, and what they may do."""

    tenant: str
    role: Role


NOBODY = Principal("", Role.ANYONE)
"""A caller without a token."""

Authorise = Callable[[str, Mapping[str, str | bytes]], Principal]
"""From a method's full name and a call's metadata to who is calling. Raises ``WireError`` if they may not."""

_WIRE = "/trunkline_wire.v1."
ACCESS: dict[str, Role] = {
    "/grpc.health.v1.Health/Check": Role.ANYONE,
    "/grpc.health.v1.Health/Watch": Role.ANYONE,
    "/grpc.health.v1.Health/List": Role.ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.READER,
    f"{_WIRE}CatalogService/GetServerInfo": Role.READER,
    f"{_WIRE}CatalogService/ListBackbones": Role.READER,
    f"{_WIRE}CatalogService/DescribeBackbone": Role.READER,
    f"{_WIRE}CatalogService/DescribeCut": Role.READER,
    f"{_WIRE}CatalogService/FetchStem": Role.READER,
    f"{_WIRE}CatalogService/TuneBackbone": Role.USER,
    f"{_WIRE}CatalogService/GetEndpoints": Role.READER,
    f"{_WIRE}InferenceService/Predict": Role.READER,
    f"{_WIRE}InferenceService/StreamPredict": Role.READER,
    f"{_WIRE}InferenceService/Extract": Role.READER,
    f"{_WIRE}InferenceService/StreamExtract": Role.READER,
    f"{_WIRE}DatasetService/FindMissingRows": Role.USER,
    f"{_WIRE}DatasetService/UploadRows": Role.USER,
    f"{_WIRE}DatasetService/CommitDataset": Role.USER,
    f"{_WIRE}DatasetService/GetDataset": Role.READER,
    f"{_WIRE}DatasetService/ListDatasets": Role.READER,
    f"{_WIRE}TrainingService/SubmitJob": Role.USER,
    f"{_WIRE}TrainingService/GetJob": Role.READER,
    f"{_WIRE}TrainingService/ListJobs": Role.READER,
    f"{_WIRE}TrainingService/CancelJob": Role.USER,
    f"{_WIRE}TrainingService/WatchJob": Role.READER,
    f"{_WIRE}TrunkService/Forward": Role.READER,
    f"{_WIRE}TrunkService/Backward": Role.READER,
    f"{_WIRE}TrunkService/StreamTrunk": Role.READER,
    f"{_WIRE}TrunkService/PutBottleneck": Role.USER,
    f"{_WIRE}TrunkService/GetBottleneck": Role.READER,
    f"{_WIRE}RegistryService/GetModel": Role.READER,
    f"{_WIRE}RegistryService/ListModels": Role.READER,
    f"{_WIRE}RegistryService/GetModelEvaluation": Role.READER,
}
"""Who may call what: full method name to the least role."""


class Tokens:
    """The tokens that are accepted, as hashes."""

    def __init__(self, entries: Iterable[tuple[str, Principal]]) -> None:
        """Keep the hash of each token."""
        self._principals = [(_digest(token), principal) for token, principal in entries]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._principals)

    def find(self, token: str) -> Principal | None:
        """Return whose token this is, comparing with every one in constant time."""
        digest = _digest(token)
        found = None
        for known, principal in self._principals:
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Read a token file.

        Raises:
            ValueError: A line is not ``token [tenant [role]]``, or the file holds no token.
        """
        entries = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            if len(words) > 3 or len(words[0]) < 16:
                raise ValueError(
                    f"{path}:{number}: expected 'token [tenant [role]]' with a token of 16 characters or more"
                )
            tenant = check_name(words[1], "tenant") if len(words) > 1 else DEFAULT_TENANT
            role = words[2].upper() if len(words) > 2 else Role.USER.name
            if role not in (Role.READER.name, Role.USER.name):
                raise ValueError(f"{path}:{number}: role {words[2]!r} is not 'reader' or 'user'")
            entries.append((words[0], Principal(tenant, Role[role])))
        if not entries:
            raise ValueError(f"{path} holds no token")
        return cls(entries)


def create_token_file(path: Path) -> str:
    """Write a new random token, readable by its owner only, unless the file is there. Return the token."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().split()[0]
    token = secrets.token_urlsafe(32)
    with open(descriptor, "w") as file:
        file.write(token + "\n")
    return token


def authorise(method: str, authorization: str | None, tokens: Tokens | None) -> Principal:
    """Return who is calling, if they may.

    Args:
        method: Full name, ``/package.Service/Method``.
        authorization: The metadata value, ``Bearer ...``.
        tokens: None where the operator runs without tokens: then everyone is a user of the default tenant.

    Raises:
        WireError: UNAUTHENTICATED or PERMISSION_DENIED.
    """
    needed = role_for(method)
    if needed is Role.ANYONE:
        return NOBODY
    if tokens is None:
        return Principal(DEFAULT_TENANT, Role.USER)
    if not authorization:
        raise WireError(ErrorCode.UNAUTHENTICATED, "a token is needed: send it as 'authorization: Bearer TOKEN'")
    scheme, _, token = authorization.partition(" ")
    principal = tokens.find(token.strip()) if scheme.lower() == "bearer" else None
    if principal is None:
        raise WireError(ErrorCode.UNAUTHENTICATED, "the token is not known here")
    check_role(principal, needed)
    return principal


def by_tokens(tokens: Tokens | None) -> Authorise:
    """Return what lets callers in by their tokens."""

    def authorise_call(method: str, metadata: Mapping[str, str | bytes]) -> Principal:
        value = metadata.get("authorization")
        return authorise(method, value if isinstance(value, str) else None, tokens)

    return authorise_call


def role_for(method: str) -> Role:
    """Return the least role that may call a method.

    Raises:
        WireError: UNSUPPORTED if there is none of that name.
    """
    needed = ACCESS.get(method)
    if needed is None:
        raise WireError(ErrorCode.UNSUPPORTED, "there is no such method")
    return needed


def check_role(principal: Principal, needed: Role) -> None:
    """Refuse a caller whose role is too low.

    Raises:
        WireError: PERMISSION_DENIED.
    """
    if principal.role < needed:
        raise WireError(ErrorCode.PERMISSION_DENIED, f"this needs the role {needed.name.lower()!r}")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
