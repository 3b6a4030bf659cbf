"""Heads to messages and back."""

from __future__ import annotations

from trunkline_wire import heads
from trunkline_wire.errors import WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.v1 import training_pb2 as pb

_KINDS = {
    heads.LINEAR: pb.HEAD_KIND_LINEAR,
    heads.MLP: pb.HEAD_KIND_MLP,
    heads.CONV: pb.HEAD_KIND_CONV,
    heads.PROTOTYPE: pb.HEAD_KIND_PROTOTYPE,
    heads.TAIL: pb.HEAD_KIND_TAIL,
}
_ACTIVATIONS = {heads.RELU: pb.ACTIVATION_RELU, heads.GELU: pb.ACTIVATION_GELU}
_FUSIONS = {heads.CONCAT: pb.FUSION_CONCAT, heads.ADD: pb.FUSION_ADD, heads.GATE: pb.FUSION_GATE}
_KIND_NAMES = {value: name for name, value in _KINDS.items()}
_ACTIVATION_NAMES = {pb.ACTIVATION_UNSPECIFIED: heads.RELU, **{value: name for name, value in _ACTIVATIONS.items()}}
_FUSION_NAMES = {pb.FUSION_UNSPECIFIED: heads.CONCAT, **{value: name for name, value in _FUSIONS.items()}}


def head_to_message(head: HeadConfig) -> pb.HeadConfig:
    """Return the message of a head."""
    return pb.HeadConfig(
        kind=_KINDS[head.kind],
        hidden=head.hidden,
        dropout=head.dropout,
        activation=_ACTIVATIONS[head.activation],
        batch_norm=head.batch_norm,
        channels=head.channels,
        tap=head.tap,
        fuse=_FUSIONS[head.fuse],
        fuse_width=head.fuse_width,
        slices=head.slices,
        lora_rank=head.lora_rank,
    )


def head_from_message(message: pb.HeadConfig) -> HeadConfig | None:
    """Return the head of a message, None where it says nothing or something that this version does not know."""
    try:
        return HeadConfig(
            kind=_KIND_NAMES.get(message.kind, ""),
            hidden=tuple(message.hidden),
            activation=_ACTIVATION_NAMES.get(message.activation, ""),
            batch_norm=message.batch_norm,
            dropout=message.dropout,
            channels=tuple(message.channels),
            tap=message.tap,
            fuse=_FUSION_NAMES.get(message.fuse, ""),
            fuse_width=message.fuse_width,
            slices=tuple(message.slices),
            lora_rank=message.lora_rank,
        )
    except WireError:
        return None
