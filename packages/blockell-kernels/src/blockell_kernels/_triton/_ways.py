"""The ways to compute the three products, as a table, and which of them a call takes.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

Ways are asked in the table's order whether, and how, they compute a case, and whether they can read
its operands; the first that says yes to both is taken. The last says so always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from blockell_kernels._backends import Case, Direction, Pattern

# Under another name: of a submodule's, importing that would make it the submodule.
from blockell_kernels._gluon import _halves as _by_halves
from blockell_kernels._gluon import _whole, _whole_values
from blockell_kernels._triton import _few_tokens, _forward, _grad_input, _grad_values, _walk
from blockell_kernels._triton._rule import takes_whole
from blockell_kernels._triton._tilings import tiling_for


class Way(NamedTuple):
    """One way to compute the three products."""

    name: str
    """In words, after "by"."""
    cost: str
    """In words, after "in"."""
    how: Callable[[Case], Any]
    """How it computes a case, for its launchers; None: another way. Asked at every call."""
    takes: Callable[[Tensor, Tensor, int], bool]
    """Whether it reads a product's two operands, x, dy or the values, as they lie, at a tile."""
    forward: Callable[[Tensor, Tensor, Tensor | None, Pattern, Any], Tensor]
    """y of x, values, bias, pattern, how."""
    grad_input: Callable[[Tensor, Tensor, Pattern, Any], Tensor]
    """dx of dy, values, pattern, how."""
    grad_values: Callable[[Tensor, Tensor, Pattern, Any], Tensor]
    """dv of dy, x, pattern, how."""


# Gluon's modules by name only: whoever imports one of them first comes by here before it is there.
WHOLE = Way(
    "the whole weight, put together block by block",
    "nearly as much time at any density",
    lambda case: takes_whole(case) or None,
    lambda a, b, B: _whole.takes(a, b, B),
    lambda x, values, bias, pattern, _: _whole.product(x, values, bias, pattern, forward=True),
    lambda dy, values, pattern, _: _whole.product(dy, values, None, pattern, forward=False),
    lambda dy, x, pattern, _: _whole_values.grad_values(dy, x, pattern),
)
WALK = Way(
    "a walk over the whole weight",
    "as much time at any density",
    _walk.walk_for,
    _walk.takes,
    _walk.forward,
    _walk.grad_input,
    _walk.grad_values,
)
HALVES = Way(
    "float16 halves",
    "the time of three float16 products",
    lambda case: _by_halves.chosen(case),
    lambda a, b, B: _by_halves.reads(a, b, B),
    _forward.forward,
    _grad_input.grad_input,
    _grad_values.grad_values,
)
FEW = Way(
    "kernels for few tokens",
    "the time that reading the live blocks once takes",
    _few_tokens.strip_for,
    lambda a, b, B: True,
    _few_tokens.forward,
    _few_tokens.grad_input,
    _few_tokens.grad_values,
)
BLOCKS = Way(
    "its live blocks",
    "time in proportion to them",
    tiling_for,
    lambda a, b, B: True,
    _forward.forward,
    _grad_input.grad_input,
    _grad_values.grad_values,
)
WAYS = (WHOLE, WALK, HALVES, FEW, BLOCKS)


def way_of(case: Case) -> Way:
    """The way of a case whose operands every way can read."""
    return next(way for way in WAYS if way.how(case) is not None)


def way_for(direction: Direction, a: Tensor, b: Tensor, pattern: Pattern) -> tuple[Way, Any]:
    """The way of a product, and how it computes it.

    Args:
        direction: which of the three.
        a: x [N, C*B], or dy [N, R*B].
        b: values [R, slots, B, B], or x.
        pattern: where the blocks lie.
    """
    B = pattern.B
    case = Case(
        direction, a.device, a.dtype, a.shape[0], pattern.R, pattern.C, pattern.num_live, B,
        pattern.row_group,
    )  # fmt: skip
    for way in WAYS:
        how = way.how(case)
        if how is not None and way.takes(a, b, B):
            return way, how
    raise AssertionError(case)


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """y [N, R*B]."""
    way, how = way_for("forward", x, values, pattern)
    return way.forward(x, values, bias, pattern, how)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dx [N, C*B]."""
    way, how = way_for("grad_input", dy, values, pattern)
    return way.grad_input(dy, values, pattern, how)


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dv [R, slots, B, B]."""
    way, how = way_for("grad_values", dy, x, pattern)
    return way.grad_values(dy, x, pattern, how)
