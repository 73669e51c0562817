"""What one kind of call needs, looked up once: backends per direction, sizes, and how they join.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

A plan belongs to sizes, dtype, device and the backend asked for; calls of one kind share it. Its
methods are the operator's forward and backward over checked operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from blockell_kernels._activation import sum_over_tokens
from blockell_kernels._backends import (
    DIRECTIONS,
    Backend,
    Case,
    Choice,
    Pattern,
    arithmetic,
    get_backend,
    select,
    shares,
    warn_refused,
)
from blockell_kernels._dense import BACKEND as DENSE
from blockell_kernels._dense import WHOLE_GRADIENT_BYTES
from blockell_kernels._gpu import gpu_replay
from blockell_kernels._stats import probe_gradient

MAX_PLANS = 4096
MAX_FORKED = 2**27
"""Elements of input and output up to which both gradients are computed at a time: that gains 6% of
a step on the mean of 60 layers of 1 to 256 tokens, 19% at 2**25 (68 -> 59 us) and 16% at 2**27 (791
-> 666 us), most where blocks are few and large. Beyond, the time changed by -4 to +2%."""
FORKED_TOKENS, FORKED_WEIGHT = 512, 2**24
"""Weights of more elements, for fewer tokens, take all of the memory's bandwidth one after the
other: side by side they took 4% less to 16% more."""
KEPT_DENSITY = 2 / 3
"""Up to this density a dense copy of the weight is kept from the forward to the backward pass: with
the tiles and Adam's two moments of them it takes no more than a dense weight and its moments."""
KEPT_FOR_FEW_TOKENS = 3 / 4
"""The same where activations are small beside the weights. A dense model's memory then peaks when
all gradients are there, at four weights a layer; with copies one has three times the density and
one before the backward pass, and where gradients are added up four times the density and one."""
PROMISED_DENSITY = 0.9
"""From this density on nothing is said of memory, and the copy is kept."""


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, the values, the bias and the probe; None where not needed."""


def compute_dtype(t: Tensor) -> torch.dtype:
    """float32 for 16-bit floats on the CPU, where their own products are slow; else as it is."""
    dtype = t.dtype
    if dtype is not torch.float32 and not t.is_cuda and t.device.type == "cpu":
        return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return dtype


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """How one kind of call is computed."""

    N: int
    R: int
    C: int
    B: int
    row_group: int
    num_live: int
    dtype: torch.dtype
    """In which it is computed."""
    forward_backend: Backend
    grad_input_backend: Backend
    grad_values_backend: Backend
    keeps: bool
    """Whether forward and grad_input share one dense copy of the weight, if it may be kept."""
    forks: bool
    """Whether both gradients are computed at a time where a CUDA graph is captured."""
    requested: str
    refused: tuple[Choice, ...]
    """Choices that are not what was asked for."""
    sparse: bool
    """Whether all three products are the block-sparse GPU kernels', nothing but launches."""

    def pattern(self, col_indices: Tensor, order: Tensor | None, start: Tensor | None) -> Pattern:
        """The pattern of one call."""
        return Pattern(
            col_indices, self.C, self.B, self.row_group, self.num_live, order, start
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """y [..., R*B] from x [..., C*B], and the dense weight [R*B, C*B] if it is to be kept."""
        x2d = x if x.ndim == 2 else x.reshape(self.N, self.C * self.B)
        given = x.dtype
        if given is not self.dtype:
            x2d, values = x2d.to(self.dtype), values.to(self.dtype)
            bias = None if bias is None else bias.to(self.dtype)
        weight = None
        if keep and self.keeps:
            weight = DENSE.weight(values, pattern)
            y = DENSE.forward_by(weight, x2d, bias)
        else:
            y = self.forward_backend.forward(x2d, values, bias, pattern)
        if given is not self.dtype:
            y = y.to(given)
        # Not `view`: of a view made here autograd allows no change in place.
        if x.ndim != 2 or y._is_view():
            y = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], self.R * self.B))
        return y, weight

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        values: Tensor | None,
        pattern: Pattern,
        needs: tuple[bool, bool, bool],
        sample: str,
        weight: list[Tensor | None] | None = None,
    ) -> Gradients:
        """(dx, dvalues, dbias, dprobe) of dy [..., R*B]; None where not needed.

        Args:
            dy: gradient of y.
            x: as in `forward`; None where neither dvalues nor dprobe is needed.
            values: as in `forward`; None where dx is not needed.
            pattern: as in `forward`.
            needs: whether dx, dvalues and dbias are needed.
            sample: what the probe collects.
            weight: holds the dense weight that `forward` kept, and is emptied: it is not in memory
                any more when the gradient of the values is computed.
        """
        need_input, need_values, need_bias = needs
        dy2d = dy if dy.ndim == 2 else dy.reshape(self.N, self.R * self.B)
        if dy.dtype is not self.dtype:
            dy2d = dy2d.to(self.dtype)
        if not dy2d.is_contiguous():
            dy2d = dy2d.contiguous()
        if self.forks and need_input and need_values and torch.cuda.is_current_stream_capturing():
            return self._backward_forked(dy, dy2d, x, values, pattern, needs, sample, weight)

        def run(_: list[Tensor | None]) -> Gradients:
            dx = self._grad_input(dy, dy2d, values, pattern, weight) if need_input else None
            dvalues, dprobe = self._grad_values(dy, dy2d, x, pattern, need_values, sample)
            dbias = sum_over_tokens(dy2d, dy.dtype) if need_bias else None
            return dx, dvalues, dbias, dprobe

        if self.sparse and sample == "none" and (replay := gpu_replay(dy)) is not None:
            parts = (pattern.col_indices, pattern.order, pattern.col_start)
            gradients: Gradients = replay.call((self, needs), [dy, x, values, *parts], run)
            return gradients
        return run([])

    def _backward_forked(
        self,
        dy: Tensor,
        dy2d: Tensor,
        x: Tensor | None,
        values: Tensor | None,
        pattern: Pattern,
        needs: tuple[bool, bool, bool],
        sample: str,
        weight: list[Tensor | None] | None,
    ) -> Gradients:
        """`backward` as two branches of a CUDA graph: neither gradient alone fills the GPU."""
        here, side = torch.cuda.current_stream(dy.device), branch(dy.device)
        with torch.cuda.stream(side):
            dvalues, dprobe = self._grad_values(dy, dy2d, x, pattern, True, sample)
        dx = self._grad_input(dy, dy2d, values, pattern, weight)
        dbias = sum_over_tokens(dy2d, dy.dtype) if needs[2] else None
        here.wait_stream(side)
        return dx, dvalues, dbias, dprobe

    def _grad_input(
        self,
        dy: Tensor,
        dy2d: Tensor,
        values: Tensor | None,
        pattern: Pattern,
        weight: list[Tensor | None] | None,
    ) -> Tensor:
        """dx, of the shape and dtype that dy's say."""
        assert values is not None
        if weight is not None and weight[0] is not None:
            dx = DENSE.grad_input_by(weight[0], dy2d)
            weight[0] = None
        else:
            if values.dtype is not self.dtype:
                values = values.to(self.dtype)
            dx = self.grad_input_backend.grad_input(dy2d, values, pattern)
        if dy.dtype is not self.dtype:
            dx = dx.to(dy.dtype)
        return dx if dy.ndim == 2 else dx.view(*dy.shape[:-1], self.C * self.B)

    def _grad_values(
        self,
        dy: Tensor,
        dy2d: Tensor,
        x: Tensor | None,
        pattern: Pattern,
        need_values: bool,
        sample: str,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dvalues, dprobe); None where not needed."""
        if not need_values and sample == "none":
            return None, None
        assert x is not None
        x2d = x if x.ndim == 2 else x.reshape(self.N, self.C * self.B)
        if x2d.dtype is not self.dtype:
            x2d = x2d.to(self.dtype)
        backend, dvalues, norms_sq = self.grad_values_backend, None, None
        if sample == "gradient" and need_values:
            dvalues, norms_sq = backend.grad_values_and_norms(dy2d, x2d, pattern)
        elif sample == "gradient":
            norms_sq = backend.block_grad_norms(dy2d, x2d, self.B)
        elif need_values:
            dvalues = backend.grad_values(dy2d, x2d, pattern)
        if dvalues is not None and dy.dtype is not self.dtype:
            dvalues = dvalues.to(dy.dtype)
        if sample == "none":
            return dvalues, None
        return dvalues, probe_gradient(dy2d, x2d, self.C, self.B, norms_sq)


@cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One that is not the current one: torch lends its 32 streams again and again, these, too."""
    first, second = _side_streams(device)
    return second if first == torch.cuda.current_stream(device) else first


def branch(device: torch.device) -> torch.cuda.Stream:
    """The stream beside the current one, after what was put on that so far.

    What its work reads must be held until the current stream has waited for it.
    """
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    return side


def join(device: torch.device) -> None:
    """Let the current stream wait for what was put on the stream beside it."""
    torch.cuda.current_stream(device).wait_stream(_side_stream(device))


_plans: dict[tuple[Any, ...], Plan] = {}


def plan_for(t: Tensor, N: int, sizes: tuple[int, int, int, int, int], requested: str) -> Plan:
    """The plan of calls with this tensor's dtype and device.

    Args:
        t: an operand: x, or dy.
        N: tokens.
        sizes: (R, C, B, row_group, num_live).
        requested: one of `BACKEND_NAMES`.
    """
    dtype, device = t.dtype, t.device
    key = (N, sizes, dtype, device, requested, arithmetic(dtype))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = _make(compute_dtype(t), device, N, sizes, requested)
    for choice in plan.refused:
        warn_refused(requested, choice)
    return plan


def may_keep(case: Case) -> bool:
    """Whether a model with AdamW takes no more memory than a dense one if copies are kept."""
    if case.density <= KEPT_DENSITY or case.density >= PROMISED_DENSITY:
        return True
    # Saved by a layer's forward pass: its input; and as much again by what lies around it.
    activations = 2 * case.N * (case.R + case.C) * case.B
    room = 3 * (1 - case.density) * case.R * case.C * case.B**2
    return case.density <= KEPT_FOR_FEW_TOKENS and activations <= room


def keeps_copy(case: Case, choices: Sequence[Choice], requested: str) -> bool:
    """Whether a training step keeps one dense copy of the weight for both products.

    Beside a weight gradient that is dense, too, and gathered, a copy hides less: nine such steps
    took 1.4% longer on the mean than with one copy for both.
    """
    forward, grad_input, grad_values = choices
    beside = case.device.type == "cuda" and _is_small(case) and _gains_by_forks(case)
    beside = beside and grad_values.backend != "dense"
    return (
        case.device.type in ("cuda", "cpu")
        and may_keep(case)
        and shares(case, forward, grad_input, requested, beside)
    )


def forget() -> None:
    """Decide anew from here on."""
    _plans.clear()


def _gains_by_forks(case: Case) -> bool:
    """Whether both gradients had better be computed at a time."""
    N, R, C, B = case.N, case.R, case.C, case.B
    small = N >= FORKED_TOKENS or R * C * B * B <= FORKED_WEIGHT
    return small and 0 < N * (R + C) * B <= MAX_FORKED


def _is_small(case: Case) -> bool:
    """Whether a dense copy of the weight may be in memory beside its dense gradient."""
    return case.R * case.C * case.B**2 * case.dtype.itemsize < WHOLE_GRADIENT_BYTES


def _make(
    dtype: torch.dtype,
    device: torch.device,
    N: int,
    sizes: tuple[int, int, int, int, int],
    requested: str,
) -> Plan:
    R, C, B, row_group, num_live = sizes
    case = Case("forward", device, dtype, N, R, C, num_live, B, row_group)
    choices = [select(case._replace(direction=direction), requested) for direction in DIRECTIONS]
    keeps = keeps_copy(case, choices, requested)
    # A large dense copy must be gone before the weight's gradient is computed, for memory.
    copies = keeps or "dense" in (choices[1].backend, choices[2].backend)
    lean = _is_small(case) or not copies
    forks = device.type == "cuda" and lean and _gains_by_forks(case)
    refused = tuple(choice for choice in choices if choice.refused is not None)
    forward, grad_input, grad_values = (get_backend(choice.backend) for choice in choices)
    sparse = not keeps and all(choice.backend == "triton" for choice in choices)
    return Plan(
        N, R, C, B, row_group, num_live, dtype, forward, grad_input, grad_values, keeps, forks,
        requested, refused, sparse,
    )  # fmt: skip
