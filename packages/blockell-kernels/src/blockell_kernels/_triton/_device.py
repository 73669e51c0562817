"""What the GPU at hand can do, and which arithmetic torch asks for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from triton import knobs

# The interpreter runs kernels on CPU tensors, for tests. It has to be on before the kernels are
# imported (TRITON_INTERPRET=1), hence one look at import is enough.
INTERPRETED: bool = bool(knobs.runtime.interpret)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def on_its_device(
    launch: Callable[Concatenate[Tensor, _P], _T],
) -> Callable[Concatenate[Tensor, _P], _T]:
    """Run with the first operand's GPU current: Triton launches on the current one."""

    @wraps(launch)
    def guarded(t: Tensor, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not t.is_cuda or t.device.index == torch.cuda.current_device():
            return launch(t, *args, **kwargs)
        with torch.cuda.device(t.device):
            return launch(t, *args, **kwargs)

    return guarded


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; that of Hopper in the interpreter."""
    return (9, 0) if device.type != "cuda" else torch.cuda.get_device_capability(device)


_OVERLAPS_IN_GRAPHS = 12030
"""The CUDA driver from which a captured graph keeps such launches, as CUDA writes 12.3."""


@cache
def overlaps(device: int) -> bool:
    """Whether a CUDA device starts a kernel while the one before it ends, if asked to."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:  # the driver has another name here
        return False
    return failed == 0 and version.value >= _OVERLAPS_IN_GRAPHS


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; a small number in the interpreter, so that tests stay small."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 operands are multiplied: 3xTF32 (float32-accurate) unless torch allows TF32."""
    if dtype != torch.float32 or capability(device) < (8, 0):
        return "ieee"
    return "tf32" if _torch_allows_tf32() else "tf32x3"


def _torch_allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32
    except RuntimeError:  # the newer setting is in use, and reading the older one is an error
        return matmul.fp32_precision == "tf32"


def upcast(t: Tensor) -> bool:
    """Whether operands need upcasting: the interpreter multiplies 16-bit operands wrongly."""
    return INTERPRETED and t.dtype in (torch.float16, torch.bfloat16)


def describable(t: Tensor) -> bool:
    """Whether a matrix can be read through a tensor descriptor (TMA): Hopper's, and aligned."""
    size = t.element_size()
    return (
        capability(t.device)[0] == 9
        and t.stride(-1) == 1
        and all(stride * size % 16 == 0 for stride in t.stride()[:-1])
        and t.data_ptr() % 16 == 0
    )


def far_apart(t: Tensor) -> bool:
    """Whether 32 bits do not hold the distance between a matrix's first and last column."""
    return t.stride(1) * (t.shape[1] - 1) >= 2**31
