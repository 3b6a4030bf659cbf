"""Straight to the replicas of a backbone, past the gateway, wherever they listen themselves and can be reached.

Everything slow happens on a thread of its own: asking for endpoints, connecting, closing. A call only looks at which
replicas are ready at this moment, and goes through the gateway where there are none.
"""

from __future__ import annotations

from trunkline._direct.keeper import Direct, Reach
from trunkline._direct.pool import Pool
from trunkline._direct.replica import Metadata, Replica

__all__ = ["Direct", "Metadata", "Pool", "Reach", "Replica"]
