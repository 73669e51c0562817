"""Einstein sums that multiply inputs by a matrix, as such products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

DOTS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def as_linear(
    equation: Any, x: Tensor, weight: Tensor, linear: Callable[[Tensor, Tensor], Tensor]
) -> Tensor | None:
    """`torch.einsum(equation, x, weight)` by `linear`, which takes a weight [m, n] as
    `functional.linear` does; None if it is another kind of sum.

    That is: the weight has two indices, of which one is summed over and the other stays; all
    others of x stay, too.
    """
    if not isinstance(equation, str) or equation.count(",") != 1 or "->" not in equation:
        return None
    operands, _, out = equation.replace(" ", "").partition("->")
    of_x, _, of_weight = operands.partition(",")
    if "..." in of_x:
        dots = x.ndim - (len(of_x) - 3)
        if "..." not in out or any(letter in equation for letter in DOTS[:dots]):
            return None
        of_x, out = (letters.replace("...", DOTS[:dots]) for letters in (of_x, out))
    summed = [i for i in of_weight if i in of_x and i not in out]
    left = [i for i in of_weight if i not in of_x and i in out]
    stay = [i for i in of_x if i not in summed]
    plain = len(set(of_x)) == len(of_x) == x.ndim and len(of_weight) == weight.ndim == 2
    if not plain or len(summed) != 1 or len(left) != 1 or sorted(out) != sorted(stay + left):
        return None
    matrix = weight if of_weight[0] == left[0] else weight.mT
    y = linear(x.movedim(of_x.index(summed[0]), -1), matrix)
    return y.permute([(stay + left).index(i) for i in out])
