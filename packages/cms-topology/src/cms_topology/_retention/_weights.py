"""Which parameter a tensor is made of, and whether something else than a product uses it.

A weight's covariance describes the inputs of the products that were seen. If the same weight acts
in another way too, say transposed at the end of an autoencoder, those inputs say nothing of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from cms_topology._retention._layout import PLAIN, Layout

COPIES = {
    "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach",
    "data",
}  # fmt: skip
"""What makes the same matrix anew."""
BLIND = {
    "new", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "zeros_like",
    "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
}  # fmt: skip
"""What takes a shape, not values."""
MOST_SLICES = 16


class Source(NamedTuple):
    """A parameter's matrix, or consecutive rows of it, as the second factor [m, n] of a product."""

    parameter: nn.Parameter
    layout: Layout
    first: int = 0
    span: int | None = None
    """As in `Product`."""


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """The tensors inside lists, tuples and dicts."""
    waiting = [arguments]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())


class WeightUses:
    """Follows parameters through the functions of one pass.

    Args:
        exempt: parameters whose products are seen elsewhere.
    """

    def __init__(self, exempt: frozenset[Tensor] = frozenset()) -> None:
        self._exempt = exempt
        self.others: dict[Tensor, str] = {}
        """Parameters that act on something where no product is seen, by which function."""
        # tensors computed of parameters alone; held, so that no other gets their id
        self._made: dict[int, tuple[Tensor, frozenset[Tensor]]] = {}
        self._copies: dict[int, nn.Parameter] = {}

    def parameters_of(self, tensor: Tensor) -> frozenset[Tensor] | None:
        """The parameters that a tensor consists of; None if anything else is in it."""
        for candidate in (tensor, tensor._base):
            if isinstance(candidate, nn.Parameter):
                return frozenset((candidate,))
            if candidate is not None and id(candidate) in self._made:
                return self._made[id(candidate)][1]
        return None

    def note(self, name: str, arguments: Any, result: Any) -> None:
        """Take note of a function that is no product."""
        given = list(tensors_in(arguments))
        sources = [self.parameters_of(t) for t in given]
        used = frozenset[Tensor]().union(*(s for s in sources if s)) - self._exempt
        made = list(tensors_in(result))
        if name == "__setitem__":  # returns nothing
            made = given[:1]
        if not used or not made or name in BLIND:
            return
        if all(s is not None for s in sources):
            for tensor in made:
                self._made[id(tensor)] = (tensor, used)
            whole = self._whole(given[0]) if len(given) == 1 and name in COPIES else None
            if whole is not None and made[0].shape == whole.shape:
                self._copies[id(made[0])] = whole
        elif any(t.numel() > 1 for t in (*given, *made)):
            # else a penalty on weights that is added to the loss: no answer depends on it
            for parameter in used:
                self.others.setdefault(parameter, name)
            for tensor in made:  # changed in place, it is no longer of parameters alone
                self._made.pop(id(tensor), None)
                self._copies.pop(id(tensor), None)

    def _whole(self, tensor: Tensor) -> nn.Parameter | None:
        if isinstance(tensor, nn.Parameter):
            return tensor
        return self._copies.get(id(tensor))

    def kernel(self, weight: Tensor, *, reshaped: bool = False) -> nn.Parameter | None:
        """The parameter that `weight` is, whole; `reshaped`: or a view of it with as many rows."""
        whole, base = self._whole(weight), weight._base
        if whole is not None or not reshaped or base is None:
            return whole
        same = (weight.numel(), len(weight)) == (base.numel(), len(base))
        plain = weight.is_contiguous() and base.is_contiguous()
        return self._whole(base) if same and plain else None

    def stack(self, weight: Tensor) -> Source | None:
        """What `weight` [G, n, m], the second argument of `torch.matmul`, is of a parameter."""
        whole, base = self._whole(weight), weight._base
        if whole is not None:
            return Source(whole, Layout(len(weight), inputs_first=True, stacked=True))
        whole = None if base is None else self._whole(base)
        if whole is None or base is None or base.ndim != 3 or weight.numel() != base.numel():
            return None
        if (weight.mT.shape, weight.mT.stride()) != (base.shape, base.stride()):
            return None
        return Source(whole, Layout(len(weight), stacked=True))

    def matrix(self, weight: Tensor) -> Source | None:
        """What `weight`, the second argument of `functional.linear`, is of a parameter."""
        whole = self._whole(weight)
        if whole is not None:
            return Source(whole, PLAIN)
        base = weight._base
        whole = None if base is None else self._whole(base)
        if whole is None or weight.ndim != 2:
            return None
        assert base is not None
        if base.ndim == 3:
            return _one_of(whole, base, weight)
        if self.kernel(weight, reshaped=True) is not None:
            return Source(whole, PLAIN)
        turned = base.shape[::-1], base.stride()[::-1]
        if base.ndim == 2 and (weight.shape, weight.stride()) == turned:
            return Source(whole, Layout(inputs_first=True))
        offset = int(weight.storage_offset() - base.storage_offset())
        if base.ndim == 2 and weight.stride() == base.stride() and base.is_contiguous():
            return _rows(whole, weight, offset)
        return None


def _one_of(whole: nn.Parameter, base: Tensor, one: Tensor) -> Source | None:
    """One of the matrices of a parameter [G, ...]."""
    offset = int(one.storage_offset() - base.storage_offset())
    straight = (one.shape, one.stride()) == (base.shape[1:], base.stride()[1:])
    turned = (one.mT.shape, one.mT.stride()) == (base.shape[1:], base.stride()[1:])
    if offset % base.stride(0) or not (straight or turned):
        return None
    return Source(whole, Layout(len(base), not straight, stacked=True), offset // base.stride(0), 1)


def _rows(whole: nn.Parameter, part: Tensor, offset: int) -> Source | None:
    """Consecutive rows of a matrix as some of equally large groups of them."""
    if part.shape[1] != whole.shape[1] or len(part) == 0:
        return None
    first, count = offset // whole.shape[1], len(part)
    size = math.gcd(first, count, len(whole))
    groups = len(whole) // size
    if groups > MOST_SLICES:
        return None
    return Source(whole, Layout(groups), first // size, count // size)
