"""Keeps Serve's internal replica port off other interfaces where the whole cluster lives on loopback.

Every Serve replica binds ``[::]:0`` for calls between deployments and unpickles what arrives there. Ray puts all its
other ports on loopback when the node's address is loopback; this one it does not. There is no public setting, so the
function that binds it is replaced. A test looks at what listens.
"""

from __future__ import annotations

import os
from typing import Any

LOOPBACK_VARIABLE = "TRUNKLINE_LOOPBACK_ONLY"
"""Set in the environment of an embedded cluster."""


def keep_replica_port_on_loopback() -> None:
    """Replace Serve's binding of the internal port, in an embedded cluster only."""
    if os.environ.get(LOOPBACK_VARIABLE) != "1":
        return
    from ray.serve._private import replica

    module: Any = replica
    bind = module.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> Any:
        return bind(server, address.replace("[::]:", "127.0.0.1:"))

    if bind.__name__ != on_loopback.__name__:
        module.add_port_to_grpc_server = on_loopback
