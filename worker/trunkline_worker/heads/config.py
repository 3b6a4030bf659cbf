"""What a head is made of. No torch: the gateway checks it before a job is queued."""

from __future__ import annotations

from dataclasses import dataclass

from trunkline_wire.errors import ErrorCode, WireError

HEAD_KINDS = ("linear", "mlp")
MAX_HIDDEN_LAYERS = 8
MAX_HIDDEN_WIDTH = 65_536


@dataclass(frozen=True)
class HeadConfig:
    """What a head is made of.

    Attributes:
        kind: ``linear`` or ``mlp``.
        hidden: Widths of the MLP's hidden layers, from the embedding on. Empty for a linear head.
        dropout: Fraction of each hidden layer's units that a training step leaves out. 0 for a linear head.

    Raises:
        WireError: INVALID_ARGUMENT.
    """

    kind: str = "linear"
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if self.kind not in HEAD_KINDS:
            raise invalid(f"head kind {str(self.kind)[:40]!r} is not known; one of {', '.join(HEAD_KINDS)} is needed")
        if self.kind == "linear" and (self.hidden or self.dropout):
            raise invalid("a linear head has neither hidden layers nor dropout; ask for kind 'mlp' to have them")
        if self.kind == "mlp" and not 1 <= len(self.hidden) <= MAX_HIDDEN_LAYERS:
            raise invalid(f"an MLP has 1 to {MAX_HIDDEN_LAYERS} hidden layers; got {len(self.hidden)}")
        if not all(1 <= width <= MAX_HIDDEN_WIDTH for width in self.hidden):
            raise invalid(f"a hidden layer is 1 to {MAX_HIDDEN_WIDTH} wide; got {self.hidden}")
        if not 0.0 <= self.dropout < 1.0:
            raise invalid(f"dropout is at least 0 and below 1; got {self.dropout}")


def invalid(message: str) -> WireError:
    """Return the error of a head or a job that asks for something there is not."""
    return WireError(ErrorCode.INVALID_ARGUMENT, message)
