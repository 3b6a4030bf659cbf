"""Bottlenecks: stems whose features are encoded into fewer channels, and the files that the encoders come from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from trunkline_wire import bottleneck_file
from trunkline_wire.bottleneck import Bottleneck
from trunkline_wire.errors import WireError
from trunkline_wire.quantise import CodecChoice
from trunkline_wire.specs import Preprocessing

from trunkline.errors import CorruptDataError, IncompatibleModelError, from_wire
from trunkline.stems import Stem

if TYPE_CHECKING:
    from trunkline._calls.trunk import TrunkCalls
    from trunkline._deadline import Deadline
    from trunkline.client import Client


class BottleneckStem(Stem):
    """A stem with an encoder behind it: its features are codes of fewer channels.

    They are good for models that were trained on codes of the same bottleneck, and for nothing else.

    Attributes:
        bottleneck: What turns features into codes, and on the cluster codes into features.
        codec_error: Embedding error of bottleneck and codec together, on the pictures it was measured on.
    """

    def __init__(
        self,
        data: bytes,
        preprocessing: Preprocessing,
        bottleneck: Bottleneck,
        sha256: str,
        *,
        zstd: bool = False,
        threads: int | None = None,
    ) -> None:
        """Keep the file of the exact stem, and a checked bottleneck for its features.

        Args:
            data: The stem's ONNX file.
            preprocessing: How a picture becomes the numbers that enter.
            bottleneck: For this stem's features.
            sha256: Hex SHA-256 of the bottleneck's file.
            zstd: Whether codes are compressed on the way.
            threads: Threads of ONNX Runtime; None leaves it the choice.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            InvalidArgumentError: ``threads`` is out of range.
        """
        super().__init__(
            data,
            bottleneck.code_space(sha256),
            preprocessing,
            bottleneck.code_shape,
            channel_axis=bottleneck.channel_axis,
            codec=str(CodecChoice(bottleneck.codec, zstd)),
            codec_error=bottleneck.embedding_error,
            threads=threads,
        )
        self.bottleneck = bottleneck

    def _compute(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        features, bottleneck = super()._compute(pixels_BHWC), self.bottleneck
        if features.shape[1:] != bottleneck.feature_shape:
            raise IncompatibleModelError(
                f"the stem gave {features.shape[1:]}; the bottleneck is for {bottleneck.feature_shape}"
            )
        return bottleneck.encoder.apply(features, bottleneck.channel_axis)


class Bottlenecks:
    """The bottlenecks that a client uses, each fetched once."""

    def __init__(self, calls: TrunkCalls) -> None:
        """Keep who is asked."""
        self._calls = calls
        self._known: dict[str, Bottleneck] = {}

    def get(self, sha256: str, deadline: Deadline) -> Bottleneck:
        """Return a bottleneck that lies on the cluster.

        Raises:
            NotFoundError: There is none of that hash.
            CorruptDataError: It arrived damaged.
        """
        if sha256 not in self._known:
            file = self._calls.get_bottleneck(sha256, deadline)
            if hashlib.sha256(file).hexdigest() != sha256:
                raise CorruptDataError(f"the bottleneck {sha256[:12]} arrived damaged", hint="Try again")
            self._known[sha256] = read_bottleneck(file)
        return self._known[sha256]

    def put(self, file: bytes, deadline: Deadline) -> str:
        """Put a bottleneck on the cluster and return the hex SHA-256 of its file. Repeating it changes nothing.

        Raises:
            IncompatibleModelError: It is for features that the cluster's backbone does not have.
        """
        bottleneck = read_bottleneck(file)
        sha256 = self._calls.put_bottleneck(file, deadline)
        self._known[sha256] = bottleneck
        return sha256


def read_bottleneck(file: bytes) -> Bottleneck:
    """Read a bottleneck's file.

    Raises:
        CorruptDataError: It is damaged.
        UnsupportedError: It is of another version.
    """
    try:
        return bottleneck_file.from_bytes(file)
    except WireError as error:
        raise from_wire(error) from None


def install_bottleneck(
    client: Client,
    file: bytes | str | Path,
    *,
    threads: int | None = None,
    timeout_s: float | None = None,
    progress: bool | None = None,
) -> Stem:
    """Put a bottleneck on the cluster and return the stem that goes with it.

    Args:
        client: Of the cluster.
        file: Its bytes, or the path where ``FittedBottleneck.save`` has put them.
        threads: As in ``Client.stem``.
        timeout_s: As in ``Client.stem``.
        progress: As in ``Client.stem``.

    Raises:
        CorruptDataError: The file is damaged.
        IncompatibleModelError: It is for features that the cluster's backbone does not have.
    """
    data = file if isinstance(file, bytes) else Path(file).expanduser().read_bytes()
    space = read_bottleneck(data).space
    return client.stem(
        space.backbone,
        cut=space.cut,
        input_size=space.input_size,
        bottleneck=client._bottlenecks.put(data, client._deadline(timeout_s)),
        threads=threads,
        timeout_s=timeout_s,
        progress=progress,
    )
