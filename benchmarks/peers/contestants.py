"""Who takes part, and under which loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from model import ONNX, TORCH
from targets import DIRECT, GATEWAY, HTTP, IN_PROCESS, OIP, RAW_GRPC, SDK

AS_DOCUMENTED, OUR_RUNTIME = "as documented", "our runtime"
"""The two ways in which a peer is run: with eager torch, as tutorials do, and with the file that Trunkline exported."""


@dataclass(frozen=True)
class Peer:
    """A server that people would pick instead.

    Attributes:
        key: What ``--only`` calls it.
        label: What it calls itself.
        arguments: For its Python; ``{port}`` and ``{short}``, a folder with a short path, are filled in.
        target: How it is called, see ``targets``; its address is added.
        advice: What its documents advise, in words.
        package: What is installed for it, into an environment of its own. Empty: the worker's environment has it.
        also: What is installed with it, because it does not work with the newest.
        rests: Whether it may be frozen while others are measured. One that may not is stopped, and started anew.
    """

    key: str
    label: str
    arguments: tuple[str, ...]
    target: dict[str, Any]
    advice: str
    package: str = ""
    also: tuple[str, ...] = ()
    rests: bool = True


PEERS = (
    Peer(
        "litserve",
        "LitServe",
        ("{servers}/litserve_server.py",),
        {"kind": HTTP, "path": "/predict"},
        "batching on (32 requests, 10 ms), one worker; raw bytes as the body",
        package="litserve",
    ),
    Peer(
        "bentoml",
        "BentoML",
        ("-m", "bentoml", "serve", "bentoml_service:Pictures", "--host", "127.0.0.1", "--port", "{port}"),
        {"kind": HTTP, "path": "/predict"},
        "adaptive batching (32 rows), one worker; raw bytes as the body",
        package="bentoml",
    ),
    Peer(
        "mlserver",
        "MLServer",
        ("{servers}/mlserver_runtime.py",),
        {"kind": OIP, "name": "pictures"},
        "adaptive batching (32 requests, 10 ms), one inference worker; gRPC, raw contents of type BYTES",
        package="mlserver",
        # Its inference workers ask uvloop for a loop that newer releases no longer make: they die as they start.
        also=("uvloop<0.22",),
    ),
    Peer(
        "mosec",
        "mosec",
        ("{servers}/mosec_server.py",),
        {"kind": HTTP, "path": "/inference"},
        "dynamic batching (32 requests, 10 ms), one worker; raw bytes as the body",
        package="mosec",
    ),
    Peer(
        "ray",
        "Ray Serve",
        ("{servers}/ray_serve_server.py", "{short}"),
        {"kind": HTTP, "path": "/predict"},
        "`@serve.batch` (32 requests, 10 ms), one replica that owns the cores; HTTP, raw bytes as the body",
        rests=False,
    ),
    Peer(
        "grpc",
        "grpc.aio",
        ("{servers}/grpc_server.py",),
        {"kind": RAW_GRPC, "method": "/peers.Pictures/Predict"},
        "by hand: a call at a time, no batching; raw bytes",
    ),
)


@dataclass(frozen=True)
class Load:
    """A closed loop.

    Attributes:
        name: In tables.
        callers: At a time.
        rows_per_call: Pictures in a call.
        in_process_rows: Rows of a batch that stand for it where there is no server: what perfect batching would make.
    """

    name: str
    callers: int
    rows_per_call: int
    in_process_rows: int


LOADS = (
    Load("1 caller", 1, 1, 1),
    Load("8 callers", 8, 1, 8),
    Load("64 callers", 64, 1, 32),
    Load("4 callers, 32 rows a call", 4, 32, 32),
)

SHARES = (0.5, 0.8)
"""Offered loads of the open loop, as shares of a peer's own best rate with one row a call."""


@dataclass(frozen=True)
class Contestant:
    """A row of the tables.

    Attributes:
        id: In the raw results.
        label: Its name.
        variant: Which of its ways it is.
        group: What ``--only`` calls it.
        peer: What serves; None for Trunkline and where there is no server.
        runtime: Of a peer.
        target: How it is called, as far as that is known beforehand.
    """

    id: str
    label: str
    variant: str
    group: str
    peer: Peer | None = None
    runtime: str = ""
    target: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it is Trunkline, served."""
        return self.group == TRUNKLINE


TRUNKLINE = "trunkline"

OURS = (
    Contestant("trunkline/gateway", "Trunkline", "gateway, bare stub", TRUNKLINE, target={"kind": GATEWAY}),
    Contestant("trunkline/direct", "Trunkline", "direct, bare stub", TRUNKLINE, target={"kind": DIRECT}),
    Contestant("trunkline/sdk", "Trunkline", "its own client", TRUNKLINE, target={"kind": SDK}),
)

ALONE = (
    Contestant(
        "in-process/torch",
        "in-process",
        "torch, eager float32",
        IN_PROCESS,
        target={"kind": IN_PROCESS, "runtime": TORCH},
    ),
    Contestant(
        "in-process/chosen",
        "in-process",
        "the runtime that Trunkline chose",
        IN_PROCESS,
        target={"kind": IN_PROCESS, "runtime": "chosen"},
    ),
)


def contestants(only: Sequence[str] = ()) -> list[Contestant]:
    """Return who takes part; Trunkline always does.

    Args:
        only: Keys of peers, or ``in-process``. Empty: everybody.

    Raises:
        ValueError: There is nobody of that name.
    """
    keys = [peer.key for peer in PEERS] + [IN_PROCESS, TRUNKLINE]
    unknown = [one for one in only if one not in keys]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(keys)}")
    found = [one for one in ALONE if not only or IN_PROCESS in only]
    for peer in PEERS:
        if not only or peer.key in only:
            for runtime, variant in ((TORCH, AS_DOCUMENTED), (ONNX, OUR_RUNTIME)):
                found.append(
                    Contestant(f"{peer.key}/{runtime}", peer.label, variant, peer.key, peer, runtime, dict(peer.target))
                )
    return [*found, *OURS]
