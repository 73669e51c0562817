"""Which parameters a pass used at all. One that no old task used may train freely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


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
    waiting, seen = [result.grad_fn], {result.grad_fn}
    while waiting:
        node: Any = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):  # the end of a graph: where a gradient is accumulated
            yield node.variable
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
