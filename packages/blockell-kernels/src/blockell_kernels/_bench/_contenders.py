"""Who is measured, how a step of theirs is run, and the gate that ours passes before it is timed.

Legend: R block rows, C block columns, K blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockell_kernels import _reference as reference
from blockell_kernels._bench._cases import BenchCase, BenchOperands
from blockell_kernels._bench._peers import PEERS, UnavailableError
from blockell_kernels._functional import block_ell_linear

Step = Callable[[], object]
RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GATE_TOKENS, GATE_ROW_GROUPS = 64, 3


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute y = x W^T + bias."""

    name: str
    forward: Callable[[], Tensor]
    weight: Tensor | None
    """What its backward pass differentiates besides x and bias; None: it has no backward pass."""
    dense: bool
    """Whether it multiplies by the whole weight, absent blocks included."""
    compiles: bool = True
    """Whether torch.compile has something to work on."""


def contenders(
    case: BenchCase,
    o: BenchOperands,
    backends: Iterable[str],
    peers: Iterable[str] = (),
    refuse: Callable[[str], None] = lambda why: None,
) -> list[Contender]:
    """Everybody who can run the case. Dense first: it is what the others are compared with.

    `refuse` hears why a peer cannot.
    """
    linear = torch.nn.functional.linear
    found = [
        Contender(
            name="nn.Linear",
            forward=lambda: linear(o.x, o.dense, o.bias),
            weight=o.dense,
            dense=True,
        ),
        Contender(
            name="masked dense",
            forward=lambda: linear(o.x, o.dense * o.mask, o.bias),
            weight=o.dense,
            dense=True,
        ),
    ]
    for name in peers:
        try:
            forward, weight = PEERS[name](case, o)
            if case.mode == "forward" or weight is not None:
                found.append(
                    Contender(
                        name=name, forward=forward, weight=weight, dense=False, compiles=False
                    )
                )
        except UnavailableError as error:
            refuse(f"{name}: {error}")
    for backend in backends:

        def ours(backend: str = backend) -> Tensor:
            return block_ell_linear(
                o.x, o.values, o.col_indices, o.bias, row_group=case.row_group, index=o.index,
                backend=backend,
            )  # fmt: skip

        name = f"ours ({backend})"
        found.append(Contender(name=name, forward=ours, weight=o.values, dense=False))
    return found


def step_of(contender: Contender, case: BenchCase, o: BenchOperands) -> Step | None:
    """One timed step; None where the contender has no such way to run.

    Gradients are returned and dropped, as an optimizer would consume them.
    """
    forward = contender.forward
    if case.run == "compile":
        if not contender.compiles:
            return None
        forward = torch.compile(forward, dynamic=False)
    if case.mode == "forward":

        def step() -> object:
            with torch.no_grad():
                return forward()
    else:
        assert contender.weight is not None
        inputs = (o.x, contender.weight, o.bias)

        def step() -> object:
            return torch.autograd.grad(forward(), inputs, o.dy)

    return _captured(step) if case.run == "graph" else step


def _captured(step: Step) -> Step:
    """The step as a CUDA graph: what the device takes, without the host's launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def gate(case: BenchCase, o: BenchOperands, backend: str) -> str | None:
    """What is wrong with ours on this case, by the float64 reference; None if nothing.

    The output and the input's gradient are compared on the first and last tokens, the weight's
    gradient on a few row groups: each slice is exact, and the reference loops over blocks.
    """
    with torch.enable_grad():
        x, values, bias = (t.detach().requires_grad_() for t in (o.x, o.values, o.bias))
        y = block_ell_linear(
            x, values, o.col_indices, bias, row_group=case.row_group, backend=backend
        )
        got_dx, got_dv, got_db = torch.autograd.grad(y, (x, values, bias), o.dy)
    N, R, C, B = case.tokens, values.shape[0], case.in_features // case.tile, case.tile
    some = torch.tensor(sorted({*range(N)[:GATE_TOKENS], *range(N)[-GATE_TOKENS:]}))
    some = some.to(case.device)
    G = case.row_group
    groups = sorted({0, R // G // 2, R // G - 1})[:GATE_ROW_GROUPS]
    rows = torch.cat([torch.arange(g * G, (g + 1) * G) for g in groups]).to(case.device)

    x64, v64, b64, dy64 = (t.detach().double() for t in (o.x, o.values, o.bias, o.dy))
    dy_rows = dy64.view(N, R, B)[:, rows].reshape(N, -1)
    pairs = {
        "y": (y.detach()[some], reference.forward(x64[some], v64, o.col_indices, b64)),
        "dx": (got_dx[some], reference.grad_input(dy64[some], v64, o.col_indices, C)),
        "dvalues": (got_dv[rows], reference.grad_values(dy_rows, x64, o.col_indices[rows], B)),
        "dbias": (got_db, reference.grad_bias(dy64)),
    }
    for name, (got, want) in pairs.items():
        wrong = off_by(got, want, case.dtype)
        if wrong is not None:
            return f"{name} is off by {wrong:.2e} of its largest entry"
    return None


def off_by(got: Tensor, want: Tensor, dtype: torch.dtype) -> float | None:
    """The largest error as a share of the largest entry, if it is too large; else None."""
    scale = float(want.abs().max())
    error = float((got.double() - want.double()).abs().max()) / (scale or 1.0)
    return None if error <= RTOL[dtype] else error
