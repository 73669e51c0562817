"""Random operands, and memory that is never accidentally right."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass
class Operands:
    """One call of the operator and the gradient of its result. N tokens, R, C, K, B as always."""

    x: Tensor  # [N, C*B]
    values: Tensor  # [R, slots, B, B]
    col_indices: Tensor  # int32 [R, slots]
    bias: Tensor | None  # [R*B]
    dy: Tensor  # [N, R*B]
    row_group: int
    num_live: int

    @property
    def C(self) -> int:  # noqa: N802
        return self.x.shape[1] // self.values.shape[-1]

    def to(self, dtype: torch.dtype) -> Operands:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Operands(
            self.x.to(dtype),
            self.values.to(dtype),
            self.col_indices,
            bias,
            self.dy.to(dtype),
            self.row_group,
            self.num_live,
        )


def make_operands(
    N: int,
    R: int,
    C: int,
    K: int,
    B: int,
    *,
    row_group: int = 1,
    spare: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    columns: range | None = None,
) -> Operands:
    """Random operands. `columns`: the only block columns that may be used (others stay empty).

    Drawn in `dtype`'s precision, so that a float64 copy holds the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.arange(C) if columns is None else torch.tensor(list(columns))
    rows = [pool[torch.randperm(len(pool), generator=generator)[:K]] for _ in range(R // row_group)]
    live = torch.stack(rows).int().repeat_interleave(row_group, 0)
    col_indices = torch.nn.functional.pad(live, (0, spare), value=-1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    values = normal(R, K + spare, B, B)
    values[:, K:] = float("nan")  # what lies in spare slots must not matter
    return Operands(
        x=normal(N, C * B),
        values=values,
        col_indices=col_indices,
        bias=normal(R * B) if bias else None,
        dy=normal(N, R * B),
        row_group=row_group,
        num_live=K,
    )


@pytest.fixture(name="make_operands")
def _make_operands():
    return make_operands


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` and relatives return NaN, so that an unwritten output fails."""

    def poison(function):
        def filled(*args, **kwargs):
            result = function(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return filled

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    """No request from the environment, and no warning remembered from another test."""
    from blockell_kernels import _backends

    monkeypatch.delenv("BLOCKELL_BACKEND", raising=False)
    monkeypatch.setattr(_backends, "_warned", set())


@pytest.fixture
def tf32():
    """Torch's settings of products on GPUs, put back afterwards; choices made by them forgotten."""
    from blockell_kernels import _backends

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    yield matmul
    matmul.allow_tf32 = before
    _backends.forget()


@pytest.fixture(scope="module")
def pretended_hopper():
    """An H200 to the rules that cut products, where there may be none."""
    from blockell_kernels._triton import _tilings, _tilings_gluon

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tilings, "capability", lambda device: (9, 0))
        for module in (_tilings, _tilings_gluon, *_tilings._MIDDLE.values()):
            patch.setattr(module, "num_sms", lambda device: 132)
        _tilings.tiling_for.cache_clear()
        yield
    _tilings.tiling_for.cache_clear()
