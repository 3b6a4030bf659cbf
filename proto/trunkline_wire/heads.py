"""What a head is made of: declared by whoever trains it, checked on both sides before anything is sent or queued."""

from __future__ import annotations

from dataclasses import dataclass

from trunkline_wire.errors import ErrorCode, WireError

CLASSIFICATION, REGRESSION, MULTI_LABEL, ORDINAL = TASKS = ("classification", "regression", "multi_label", "ordinal")
"""What a head is trained to say: one of the classes, numbers, any of the classes, or one of classes in order."""

LINEAR, MLP, CONV, PROTOTYPE, TAIL = HEAD_KINDS = ("linear", "mlp", "conv", "prototype", "tail")
"""``tail`` is what fine-tuning makes; nobody asks for one by name."""
RELU, GELU = ACTIVATIONS = ("relu", "gelu")
CONCAT, ADD, GATE = FUSIONS = ("concat", "add", "gate")

MAX_HIDDEN_LAYERS = 8
MAX_HIDDEN_WIDTH = 65_536
MAX_CONVOLUTIONS = 8
MAX_CHANNELS = 4096
MAX_LORA_RANK = 1024
DEFAULT_FUSE_WIDTH = 256


@dataclass(frozen=True)
class HeadConfig:
    """What a head is made of. See ``HeadConfig`` in training.proto.

    Columns are standardised, inputs fused, then come hidden layers and the output layer.

    Attributes:
        kind: ``linear``, ``mlp``, ``conv`` (3x3 convolutions on the map at ``tap``, their mean over the places, then as
            an MLP), ``prototype`` (cosine similarity to what the rows of a class have in common) or ``tail`` (the last
            blocks of the backbone, trained for this head alone, on the map at ``tap``; then as a linear one).
        hidden: Widths of the hidden layers. ``mlp`` has at least one, ``conv`` may have some.
        activation: ``relu`` or ``gelu``, behind every hidden layer and convolution.
        batch_norm: Whether batch normalisation stands between a hidden layer or convolution and its activation.
        dropout: Fraction of each hidden layer's units, or of the pooled channels, that a training step leaves out.
        channels: Channels of each convolution; ``conv`` has at least one.
        tap: Name of the cut whose map the convolutions, or the blocks of a tail, read. Empty: the last that is a map.
        fuse: ``concat``, ``add`` or ``gate``. See ``Fusion`` in training.proto. Means nothing with a single input.
        fuse_width: Common width of ``add`` and ``gate``. 0: the largest input's, at most 256.
        slices: Of a tail: the slices of the embedding that its blocks make.
        lora_rank: Of a tail: the rank of what was added to the weights of its linear layers and 1x1 convolutions. 0:
            all weights of its blocks are its own.

    Raises:
        WireError: INVALID_ARGUMENT.
    """

    kind: str = LINEAR
    hidden: tuple[int, ...] = ()
    activation: str = RELU
    batch_norm: bool = False
    dropout: float = 0.0
    channels: tuple[int, ...] = ()
    tap: str = ""
    fuse: str = CONCAT
    fuse_width: int = 0
    slices: tuple[str, ...] = ()
    lora_rank: int = 0

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        _check_choice("head kind", self.kind, HEAD_KINDS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("fusion", self.fuse, FUSIONS)
        self._check_layers()
        self._check_convolutions()
        self._check_fusion()
        self._check_tail()
        if not 0.0 <= self.dropout < 1.0:
            raise invalid(f"dropout is at least 0 and below 1; got {self.dropout}")

    def _check_layers(self) -> None:
        if self.kind in (LINEAR, PROTOTYPE, TAIL) and (self.hidden or self.dropout or self.batch_norm):
            raise invalid(
                f"a {self.kind} head has no hidden layers, dropout or batch normalisation; ask for kind 'mlp' to have "
                "them"
            )
        if self.kind == MLP and not self.hidden:
            raise invalid("an MLP has at least one hidden layer; ask for kind 'linear' to have none")
        if len(self.hidden) > MAX_HIDDEN_LAYERS:
            raise invalid(f"a head has at most {MAX_HIDDEN_LAYERS} hidden layers; got {len(self.hidden)}")
        if not all(1 <= width <= MAX_HIDDEN_WIDTH for width in self.hidden):
            raise invalid(f"a hidden layer is 1 to {MAX_HIDDEN_WIDTH} wide; got {self.hidden}")

    def _check_convolutions(self) -> None:
        if self.kind != CONV:
            if self.channels or (self.tap and self.kind != TAIL):
                raise invalid(f"a {self.kind} head has no convolutions and no tap; ask for kind 'conv' to have them")
            return
        if not 1 <= len(self.channels) <= MAX_CONVOLUTIONS:
            raise invalid(f"a convolutional head has 1 to {MAX_CONVOLUTIONS} convolutions; got {len(self.channels)}")
        if not all(1 <= width <= MAX_CHANNELS for width in self.channels):
            raise invalid(f"a convolution has 1 to {MAX_CHANNELS} channels; got {self.channels}")

    def _check_tail(self) -> None:
        if self.kind != TAIL:
            if self.slices or self.lora_rank:
                raise invalid(f"a {self.kind} head has no blocks of the backbone; ask for fine-tuning to have them")
            return
        if not self.tap or not self.slices or self.fuse != CONCAT:
            raise invalid("a tail reads the map at a tap, makes some slices of it, and has a single input")
        if not 0 <= self.lora_rank <= MAX_LORA_RANK:
            raise invalid(f"the rank is 1 to {MAX_LORA_RANK}, or 0 for all weights; got {self.lora_rank}")

    def _check_fusion(self) -> None:
        if not 0 <= self.fuse_width <= MAX_HIDDEN_WIDTH:
            raise invalid(f"the common width of fused inputs is 1 to {MAX_HIDDEN_WIDTH}, or 0; got {self.fuse_width}")
        if self.fuse == CONCAT and self.fuse_width:
            raise invalid("inputs side by side have no common width; ask for fusion 'add' or 'gate' to have one")
        if self.kind == PROTOTYPE and self.fuse != CONCAT:
            raise invalid("a prototype head has nothing to train that could fuse inputs; only fusion 'concat' is there")


def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise invalid(f"{what} {str(value)[:40]!r} is not known; one of {', '.join(known)} is needed")


def invalid(message: str) -> WireError:
    """Return the error of a head or a job that asks for something there is not."""
    return WireError(ErrorCode.INVALID_ARGUMENT, message)
