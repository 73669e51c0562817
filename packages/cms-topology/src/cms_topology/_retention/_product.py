"""One product of a weight with the inputs that a pass gives it.

Legend: N tokens, G groups of a layer, g of them that this product computes; m outputs and n inputs
of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cms_topology._retention._layout import PLAIN, Layout

Rows = Callable[[Tensor], Tensor]
"""From the input of a product to its tokens, [N, n] or, where groups read inputs of their own,
[N, g, n]; what makes them larger is done when asked."""


def flat(x: Tensor) -> Tensor:
    """[..., n] -> [N, n]; dense."""
    x = x if x.layout is torch.strided else x.to_dense()
    return x.reshape(-1, x.shape[-1])


class Product(NamedTuple):
    """What is told of every product that is seen."""

    weight: Tensor
    """The parameter."""
    input: Tensor
    output: Tensor
    """[..., g m]; its gradient is asked for."""
    rows: Rows = flat
    layout: Layout = PLAIN
    first: int = 0
    """The first of the groups that are computed."""
    span: int | None = None
    """g; None: all."""


OnProduct = Callable[[Product], None]
OnRows = Callable[[Tensor, Tensor], None]
"""Called with an embedding's weight parameter and the indices that were looked up."""
