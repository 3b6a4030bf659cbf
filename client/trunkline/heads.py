"""Heads: the trained task layers on the embedding, and on what stands beside it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from trunkline_wire import heads as wire
from trunkline_wire.errors import WireError
from trunkline_wire.heads import HeadConfig

from trunkline.errors import InvalidArgumentError, from_wire


@dataclass(frozen=True)
class Head:
    """What all heads have in common: their fields are those of the ``HeadConfig`` that is sent."""

    kind: ClassVar[str]

    @property
    def config(self) -> HeadConfig:
        """The head as it is sent.

        Raises:
            InvalidArgumentError: Its parts do not fit each other.
        """
        values: dict[str, Any] = dict(vars(self))
        try:
            for name in ("hidden", "channels"):
                if name in values:
                    values[name] = tuple(operator.index(width) for width in values[name])
            return HeadConfig(self.kind, **values)
        except WireError as error:
            raise from_wire(error) from None
        except TypeError:
            raise InvalidArgumentError(f"{self} has a field of the wrong type: widths are whole numbers") from None


@dataclass(frozen=True)
class Linear(Head):
    """A head of one linear layer on standardised columns.

    Attributes:
        fuse: How the columns of several inputs become one vector: ``concat`` puts them side by side, ``add`` brings
            each to a common width by a layer of its own and adds them, ``gate`` also weights them, unit by unit.
        fuse_width: Common width of ``add`` and ``gate``. 0: the largest input's, at most 256.
    """

    kind = wire.LINEAR

    fuse: str = wire.CONCAT
    fuse_width: int = 0


@dataclass(frozen=True)
class MLP(Head):
    """A head with hidden layers.

    Attributes:
        hidden: Width of each hidden layer.
        dropout: Probability of dropping a hidden unit while training, 0 to below 1.
        activation: ``relu`` or ``gelu``.
        batch_norm: Whether batch normalisation stands before each activation.
        fuse: As in ``Linear``.
        fuse_width: As in ``Linear``.
    """

    kind = wire.MLP

    hidden: Sequence[int] = (1024,)
    dropout: float = 0.0
    activation: str = wire.RELU
    batch_norm: bool = False
    fuse: str = wire.CONCAT
    fuse_width: int = 0


@dataclass(frozen=True)
class Conv(Head):
    """A head of 3x3 convolutions on the features at a tap, their mean over the places, then as an MLP.

    Attributes:
        channels: Channels of each convolution.
        tap: Name of the cut whose features the convolutions read. Empty: the last stage that is a map.
        hidden: Width of each hidden layer behind the mean.
        dropout: Probability of dropping a pooled channel or hidden unit while training, 0 to below 1.
        activation: As in ``MLP``.
        batch_norm: As in ``MLP``.
        fuse: As in ``Linear``.
        fuse_width: As in ``Linear``.
    """

    kind = wire.CONV

    channels: Sequence[int] = (64,)
    tap: str = ""
    hidden: Sequence[int] = ()
    dropout: float = 0.0
    activation: str = wire.RELU
    batch_norm: bool = False
    fuse: str = wire.CONCAT
    fuse_width: int = 0


@dataclass(frozen=True)
class Prototype(Head):
    """A head of cosine similarities to what the rows of a class have in common: for few rows a class."""

    kind = wire.PROTOTYPE


_KINDS: dict[str, type[Head]] = {one.kind: one for one in (Linear, MLP, Conv, Prototype)}


def head_config(head: str | Head) -> HeadConfig:
    """Return a head as it is sent.

    Args:
        head: A head, or the name of a kind, which stands for its defaults.

    Raises:
        InvalidArgumentError: There is no such kind, or its parts do not fit each other.
    """
    if isinstance(head, Head):
        return head.config
    if isinstance(head, str) and head in _KINDS:
        return head_of_kind(head, {}).config
    raise InvalidArgumentError(
        f"head is {head!r}; expected {', '.join(map(repr, _KINDS))}, or one such as trunkline.MLP(hidden=(256,))"
    )


def head_of_kind(kind: str, given: Mapping[str, Any]) -> Head:
    """Return a head of a kind, with fields that are not its defaults.

    Raises:
        InvalidArgumentError: There is no such kind, or it has no such field.
    """
    chosen = _KINDS.get(kind)
    if chosen is None:
        raise InvalidArgumentError(f"there is no head of kind {kind!r}; there are {', '.join(_KINDS)}")
    strange = [name for name in given if name not in {one.name for one in fields(chosen)}]
    if strange:
        raise InvalidArgumentError(f"a head of kind {kind!r} has no {', '.join(strange)}", hint="Leave it out")
    return chosen(**given)


def head_summary(head: HeadConfig) -> str:
    """Return a head in a few words: ``mlp 256 gelu, fused by add``."""
    words = [head.kind]
    if head.channels:
        words.append("-".join(map(str, head.channels)) + " channels" + (f" at {head.tap}" if head.tap else ""))
    if head.slices:
        rank = f" of rank {head.lora_rank}" if head.lora_rank else ""
        words.append(f"own blocks{rank} behind {head.tap}")
    if head.hidden:
        words.append("hidden " + "-".join(map(str, head.hidden)))
    if head.hidden or head.channels:
        words.append(head.activation + (" with batch norm" if head.batch_norm else ""))
    if head.dropout:
        words.append(f"dropout {head.dropout:g}")
    if head.fuse != wire.CONCAT:
        words.append(f"fused by {head.fuse}" + (f" at width {head.fuse_width}" if head.fuse_width else ""))
    return ", ".join(words)
