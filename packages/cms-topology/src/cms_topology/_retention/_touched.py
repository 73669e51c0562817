"""Which parameters a pass used at all. One that no old task used may train freely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

PASSING = {
    "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0",
    "ReshapeAliasBackward0", "ToCopyBackward0", "CloneBackward0", "SliceBackward0",
    "AliasBackward0",
}  # fmt: skip
"""Nodes of a graph that hand on the same values."""


def parameters_in(arguments: Any) -> Iterator[nn.Parameter]:
    """The parameters among a function's arguments, inside lists, tuples and dicts too."""
    waiting = [arguments]
    while waiting:
        item = waiting.pop()
        if isinstance(item, nn.Parameter):
            yield item
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())


def parameters_behind(result: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph that `result` was computed by.

    They are found here whatever computed with them, an `autograd.Function` of somebody's own
    included, whose arguments no function mode is shown.
    """
    for node in _nodes(result):
        if hasattr(node, "variable"):  # the end of a graph: where a gradient is accumulated
            yield node.variable


def given_to_functions(result: Tensor) -> Iterator[tuple[Tensor, str]]:
    """The leaves that are arguments of somebody's own `autograd.Function`, and its name.

    Such as a loss fused with the head: what it multiplies is not shown to a function mode, even if
    the same weight is also seen elsewhere, as an embedding for example.
    """
    for node in _nodes(result):
        if not isinstance(node, BackwardCFunction):
            continue
        for following, _ in node.next_functions:
            end: Any = following
            while end is not None and end.name() in PASSING:
                end = end.next_functions[0][0]
            if hasattr(end, "variable"):
                yield end.variable, type(node).__name__.removesuffix("Backward")


def _nodes(result: Tensor) -> Iterator[Any]:
    waiting, seen = [result.grad_fn], {result.grad_fn}
    while waiting:
        node: Any = waiting.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
