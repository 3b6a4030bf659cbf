"""Named points before and after every durable step, where a test may kill.

A failpoint does nothing unless it was armed. Armed, it ends the process at once (``EXIT``, as ``kill -9`` would), or
raises ``SimulatedKill`` (``RAISE``) so that a whole history of deaths and restarts fits in one process.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass

EXIT_STATUS = 86
"""Exit status of a process that an armed failpoint ended."""


class SimulatedKill(BaseException):
    """Death at a failpoint. Not an ``Exception``: nobody may handle it, as nobody can handle a real one."""


class Action(enum.Enum):
    """What an armed failpoint does."""

    RAISE = "raise"
    EXIT = "exit"


@dataclass
class _Armed:
    action: Action
    skip: int


class Failpoints:
    """The failpoints of one process. Can be pickled, armed or not."""

    def __init__(self, armed: Mapping[str, Action] | None = None) -> None:
        """Arm the failpoints given; none by default."""
        self._armed = {name: _Armed(action, 0) for name, action in (armed or {}).items()}
        self._seen: list[str] | None = None

    @classmethod
    def from_text(cls, text: str) -> Failpoints:
        """Read ``name=action[:skip],...``, as an environment variable would carry it. Empty text arms nothing.

        Raises:
            ValueError: Where the text is not of that form.
        """
        failpoints = cls()
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, _, rest = part.partition("=")
            action, _, skip = rest.partition(":")
            failpoints.arm(name, Action(action), skip=int(skip or "0"))
        return failpoints

    def arm(self, name: str, action: Action = Action.RAISE, *, skip: int = 0) -> None:
        """Make ``name`` fire once, the first ``skip`` passes let through."""
        self._armed[name] = _Armed(action, skip)

    def disarm(self) -> None:
        """Make every failpoint a no-op again."""
        self._armed.clear()

    def record(self) -> list[str]:
        """Return a list that every later ``hit`` adds its name to."""
        self._seen = []
        return self._seen

    def hit(self, name: str) -> None:
        """Pass the failpoint ``name``.

        Raises:
            SimulatedKill: If it is armed to raise.
        """
        if self._seen is not None:
            self._seen.append(name)
        if not self._armed:
            return
        armed = self._armed.get(name)
        if armed is None:
            return
        if armed.skip > 0:
            armed.skip -= 1
            return
        del self._armed[name]
        if armed.action is Action.EXIT:
            os._exit(EXIT_STATUS)
        raise SimulatedKill(name)
