"""Devices: selection, precision, deterministic algorithms, synchronization."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.errors import InputError

PrecisionName = Literal["fp64", "fp32", "bf16", "fp16"]

CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""The setting that makes cuBLAS deterministic (https://docs.nvidia.com/cuda/cublas/#results-reproducibility)."""


def select_device(kind: str, local_rank: int = 0) -> torch.device:
    """Return the device that a job asks for; `auto` prefers cuda, then mps, then cpu.

    Raises
    ------
    InputError: the device is not available.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    is_available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_available[kind]:
        available = ", ".join(name for name, available in is_available.items() if available)
        raise InputError(
            f"{kind} is not available on this machine", where="scale.device", fix=f"available: {available}; or use auto"
        )
    return torch.device(kind, local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run: `dtype` of parameters and sums, `autocast_dtype` of the forward pass if set."""

    dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    scales_loss: bool

    @classmethod
    def from_name(cls, precision: PrecisionName, device: torch.device) -> Precision:
        """Return the dtypes of a precision.

        Raises
        ------
        InputError: fp64 on mps, which does not support it.
        """
        if precision == "fp64" and device.type == "mps":
            raise InputError("mps does not support fp64", where="train.precision", fix="use fp32, or scale.device: cpu")
        dtype = torch.float64 if precision == "fp64" else torch.float32
        return cls(dtype, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision), precision == "fp16")

    def autocast_context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the model's forward pass; it does nothing for fp32 and fp64."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def set_deterministic(device: torch.device) -> None:
    """Use deterministic algorithms. Nothing to do on the CPU: torch's CPU kernels for our models are deterministic."""
    if device.type != "cuda":
        return
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; for more speed there is bf16
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def default_settings() -> Iterator[None]:
    """Reset torch's global settings to their defaults while entered, so that those of the caller do not change results.

    These are: default dtype float32, default device CPU, highest matmul precision, no autocast, gradients enabled. The
    caller's settings are restored on exit.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(_set_matmul_precision, _get_matmul_precision())
        _set_matmul_precision("highest")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def restore_torch_settings() -> Iterator[None]:
    """`default_settings`, and restore on exit what is set while entered: threads, random generators, determinism."""
    cudnn, workspace = torch.backends.cudnn, os.environ.get(CUBLAS_VARIABLE)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(_restore_rng_states, *_get_rng_states())
        stack.callback(_restore_determinism, *_get_determinism())
        stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        for holder, name in _cudnn_precisions():
            stack.callback(setattr, holder, name, getattr(holder, name))
        deterministic: Any = torch.utils.deterministic
        stack.callback(setattr, deterministic, "fill_uninitialized_memory", deterministic.fill_uninitialized_memory)
        if workspace is None:
            stack.callback(os.environ.pop, CUBLAS_VARIABLE, None)
        stack.enter_context(default_settings())
        yield


def _get_determinism() -> tuple[bool, bool]:
    """Return whether deterministic algorithms are enabled, and whether other algorithms only warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _restore_determinism(mode: bool, warn_only: bool) -> None:
    if _get_determinism() != (mode, warn_only):  # setting it imports torch's compiler, which takes a second
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _get_matmul_precision() -> str | tuple[str, str]:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set separately for each library
        backends: Any = torch.backends
        return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


def _set_matmul_precision(precision: str | tuple[str, str]) -> None:
    if isinstance(precision, str):
        torch.set_float32_matmul_precision(precision)
    else:
        backends: Any = torch.backends
        backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = precision


def _cudnn_precisions() -> list[tuple[Any, str]]:
    """Return the objects and attribute names of cuDNN's precision, in the API by which it was set."""
    cudnn: Any = torch.backends.cudnn
    try:
        return [(cudnn, "allow_tf32")] if isinstance(cudnn.allow_tf32, bool) else []
    except RuntimeError:
        return [(cudnn.conv, "fp32_precision"), (cudnn.rnn, "fp32_precision")]


def _get_rng_states() -> tuple[torch.Tensor, list[torch.Tensor] | None, torch.Tensor | None, int]:
    """Return the states of torch's global random generators (CPU, CUDA if initialized, MPS) and the CPU's seed."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return torch.get_rng_state(), cuda, mps, torch.initial_seed()


def _restore_rng_states(
    cpu: torch.Tensor, cuda: list[torch.Tensor] | None, mps: torch.Tensor | None, seed: int
) -> None:
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    else:
        torch.cuda.manual_seed_all(seed)  # it takes effect when CUDA is first used
    if mps is not None:
        torch.mps.set_rng_state(mps)
    torch.set_rng_state(cpu)


def synchronize(device: torch.device) -> None:
    """Wait for all work submitted to the device. For time measurements and the end of a run, never in a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def environment_info(device: torch.device) -> dict[str, Any]:
    """Return what the bits of a result depend on besides the job; recorded with every attempt, compared on resume."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        "torch": torch.__version__,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that host or device ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's host allocator
