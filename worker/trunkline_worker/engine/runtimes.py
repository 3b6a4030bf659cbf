"""What runs a trunk: torch in some precision, or ONNX Runtime. All of them take numpy and give float32 torch."""

from __future__ import annotations

import contextlib
import copy
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import INPUT_CUT, CutSpec

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import session_options

# Shape suffix legend: B = rows, D = embedding columns

TRUNK_INPUT = "features"
TRUNK_OUTPUT = "embedding"

TORCH_FP32 = "torch-fp32"
TORCH_BF16 = "torch-bf16"
TORCH_FP16 = "torch-fp16"
ONNX_FP32 = "onnxruntime-fp32"

_AUTOCAST = {TORCH_FP32: None, TORCH_BF16: torch.bfloat16, TORCH_FP16: torch.float16}


class Runtime(Protocol):
    """A trunk behind one cut, ready to run. Called from one thread at a time."""

    @property
    def name(self) -> str:
        """What is used, such as ``torch-bf16``."""

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch.

        Shape:
            features: (B, ...) float32 or float16, or (B, H, W, 3) uint8 images; returns (B, D), float32, CPU.

        Raises:
            WireError: WORKER_OOM.
        """


class TorchRuntime:
    """Torch, eager, channels last, in float32 or under autocast."""

    def __init__(self, trunk: nn.Module, name: str, device: torch.device, *, channels_first: bool = True) -> None:
        """Wrap a trunk of a backbone that ``place`` has put on the device.

        Args:
            trunk: The part behind a cut.
            name: One of the ``TORCH_`` names.
            device: Where it runs.
            channels_first: Whether features of three axes are (C, H, W), whose memory is then laid out channels last.
                Those with their channels elsewhere are left as they come.

        Raises:
            ValueError: If ``name`` is not one of the ``TORCH_`` names.
        """
        if name not in _AUTOCAST:
            raise ValueError(f"{name!r} is not one of {', '.join(_AUTOCAST)}")
        self.name = name
        self._device = device
        self._dtype = _AUTOCAST[name]
        self._trunk = trunk
        self._channels_first = channels_first

    @torch.inference_mode()
    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        try:
            return self._run(_to_torch(features))
        except torch.OutOfMemoryError as error:
            out_of_memory = error
        # Outside of the handler, where the traceback no longer holds on to the tensors of the failed attempt.
        out_of_memory.__traceback__ = None
        return self._run_halves(features)

    def _run_halves(self, features: npt.NDArray[np.generic]) -> Tensor:
        torch.cuda.empty_cache()
        half = len(features) // 2
        if half == 0:
            raise WireError(
                ErrorCode.WORKER_OOM,
                f"one row of shape {features.shape[1:]} does not fit the memory of {self._device}; use a smaller "
                "input size",
            )
        return torch.cat([self.run(features[:half]), self.run(features[half:])])

    def _run(self, features: Tensor) -> Tensor:
        features = features.to(self._device, non_blocking=True)
        if features.dtype != torch.uint8:
            features = features.to(torch.float32)
            if features.ndim == 4 and self._channels_first:
                features = features.contiguous(memory_format=torch.channels_last)
        autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._dtype is not None:
            autocast = torch.autocast(self._device.type, dtype=self._dtype)
        with autocast:
            embedding_BD = self._trunk(features)
        return embedding_BD.float().cpu()


def place(backbone: Backbone, device: torch.device) -> Backbone:
    """Return the backbone on a device, channels last: itself on the CPU, a copy elsewhere."""
    placed = backbone if device.type == "cpu" else copy.deepcopy(backbone)
    for module in placed.modules():
        module.to(device).to(memory_format=torch.channels_last)
    return placed


def torch_runtime(placed: Backbone, cut: CutSpec, name: str, device: torch.device, *, tap: str = "") -> TorchRuntime:
    """Return the trunk behind a cut in torch.

    Args:
        placed: On the device, see ``place``.
        cut: Where the features enter.
        name: One of the ``TORCH_`` names.
        device: Where it runs.
        tap: Where it ends, if not at the embedding.
    """
    return TorchRuntime(placed.trunk(cut.name, tap), name, device, channels_first=cut.channel_axis == 0)


@torch.inference_mode()
def exact_features(
    placed: Backbone, cut: str, images_BHWC: npt.NDArray[np.uint8], device: torch.device
) -> npt.NDArray[np.generic]:
    """Return what the exact stem makes of pictures, float32; at ``input`` the pictures themselves.

    Args:
        placed: On the device, see ``place``.
        cut: Where the stem ends.
        images_BHWC: (B, H, W, 3), at the input size.
        device: Where it runs.
    """
    if cut == INPUT_CUT:
        return images_BHWC
    features: npt.NDArray[np.generic] = placed.stem(cut)(_to_torch(images_BHWC).to(device)).cpu().contiguous().numpy()
    return features


def _to_torch(features: npt.NDArray[np.generic]) -> Tensor:
    # Rows decoded from a message share its memory and are read-only, which torch does not accept.
    if not features.flags.writeable or not features.flags.c_contiguous:
        features = features.copy(order="C")
    return torch.from_numpy(features)


class OnnxRuntime:
    """ONNX Runtime on the CPU, in float32."""

    name = ONNX_FP32

    def __init__(self, data: bytes, *, num_threads: int) -> None:
        """Load a trunk that ``export_module`` wrote and ``check_onnx`` has passed."""
        options = session_options(num_threads)
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        if features.dtype == np.float16:
            features = features.astype(np.float32)
        (embedding_BD,) = self._session.run([TRUNK_OUTPUT], {TRUNK_INPUT: np.ascontiguousarray(features)})
        return torch.from_numpy(embedding_BD)


def find_device(name: str) -> torch.device:
    """Return a device by name; ``auto`` is a GPU where there is one.

    Raises:
        WireError: INVALID_ARGUMENT for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"{name[:40]!r} is not a device: auto, cpu, cuda, cuda:1 ..."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware. Elsewhere it is emulated, and slower than float32."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(one)) for one in ("avx512_bf16", "amx_bf16", "bf16"))


def torch_candidates(device: torch.device) -> tuple[str, ...]:
    """Return the precisions worth trying on a device, float32 first."""
    if device.type == "cpu":
        return (TORCH_FP32, TORCH_BF16) if has_fast_bf16() else (TORCH_FP32,)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return (TORCH_FP32, TORCH_FP16, TORCH_BF16) if bf16 else (TORCH_FP32, TORCH_FP16)
