"""cuSPARSE's Blocked-ELL matrix times a dense one, through ctypes: C = A B, column-major B and C.

Legend: R block rows, K blocks per row, B tile side, N tokens. With A = W [R*B, in], the row-major
x [N, in] is the column-major x^T, and the column-major C the row-major y [N, R*B].

Names and numbers are those of the library's documentation (cuSPARSE generic API, SpMM).
"""

from __future__ import annotations

import ctypes
import glob
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # CUDA_R_32F, _16F, _16BF
INDEX_32 = 2
COLUMN_MAJOR = 1
BLOCKED_ELL = 13  # CUSPARSE_SPMM_BLOCKED_ELL_ALG1


def library() -> ctypes.CDLL:
    """The library that torch brought, or the system's. OSError where there is none."""
    around_torch = Path(torch.__file__).parent.parent / "nvidia"
    names = sorted(glob.glob(str(around_torch / "**" / "libcusparse.so*"), recursive=True))
    for name in [*names, "libcusparse.so.13", "libcusparse.so.12", "libcusparse.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("no libcusparse was found next to torch or in the system")


class BlockedEll:
    """y = x W^T for W in Blocked-ELL form: values [R, K, B, B], columns int32 [R, K], sorted."""

    def __init__(self, values: Tensor, columns: Tensor, x: Tensor) -> None:
        from blockell_kernels._bench._peers import UnavailableError

        if not x.is_cuda or x.dtype not in DATA_TYPES:
            raise UnavailableError(f"it runs on CUDA devices in {', '.join(map(str, DATA_TYPES))}")
        try:
            self._library = library()
        except OSError as error:
            raise UnavailableError(str(error)) from error
        R, K, B, _ = values.shape
        N, width = x.shape
        # [R*B, K*B], row-major: the blocks of a row side by side
        self._values = values.transpose(1, 2).reshape(R * B, K * B).contiguous()
        self._columns, self._x = columns.contiguous(), x.contiguous()
        self._y = torch.empty(N, R * B, dtype=x.dtype, device=x.device)
        kind, long = DATA_TYPES[x.dtype], c_int64
        self._handle, self._A, self._B, self._C = (c_void_p() for _ in range(4))
        self._one, self._zero = c_float(1.0), c_float(0.0)
        self._call("cusparseCreate", byref(self._handle))
        self._call(
            "cusparseCreateBlockedEll", byref(self._A), long(R * B), long(width), long(B),
            long(K * B), self._at(self._columns), self._at(self._values), c_int(INDEX_32),
            c_int(0), c_int(kind),
        )  # fmt: skip
        for descriptor, rows, t in ((self._B, width, self._x), (self._C, R * B, self._y)):
            self._call(
                "cusparseCreateDnMat", byref(descriptor), long(rows), long(N), long(rows),
                self._at(t), c_int(kind), c_int(COLUMN_MAJOR),
            )  # fmt: skip
        size = c_size_t()
        self._call("cusparseSpMM_bufferSize", *self._product(), byref(size))
        self._buffer = torch.empty(max(1, size.value), dtype=torch.uint8, device=x.device)

    def _product(self) -> tuple[object, ...]:
        return (
            self._handle, c_int(0), c_int(0), byref(self._one), self._A, self._B,
            byref(self._zero), self._C, c_int(0), c_int(BLOCKED_ELL),
        )  # fmt: skip

    @staticmethod
    def _at(t: Tensor) -> c_void_p:
        return c_void_p(t.data_ptr())

    def _call(self, name: str, *args: object) -> None:
        from blockell_kernels._bench._peers import UnavailableError

        status = getattr(self._library, name)(*args)
        if status != 0:
            raise UnavailableError(f"{name} returned status {status}")

    def __call__(self) -> Tensor:
        """The same tensor at every call."""
        stream = torch.cuda.current_stream(self._x.device).cuda_stream
        self._call("cusparseSetStream", self._handle, c_void_p(stream))
        self._call("cusparseSpMM", *self._product(), self._at(self._buffer))
        return self._y
