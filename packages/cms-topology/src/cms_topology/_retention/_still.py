"""Parameters, and rows of parameters, that stay as they are to the bit."""

from __future__ import annotations

import torch
from torch import Tensor


class StillParameters:
    """Remembers values and puts them back."""

    def __init__(self) -> None:
        self._whole: list[Tensor] = []
        self._whole_values: list[Tensor] = []
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Keep `parameter`, or only its `rows` (int64 indices, distinct)."""
        data = parameter.detach()
        if rows is None:
            self._whole.append(data)
            self._whole_values.append(data.clone())
        else:
            self._rows.append((data, rows, data[rows].clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo whatever happened to what is kept; a handful of launches for all together."""
        if self._whole:
            torch._foreach_copy_(self._whole, self._whole_values)
        for data, rows, values in self._rows:
            data.index_copy_(0, rows, values)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is remembered."""
        held = self._whole_values + [values for _, _, values in self._rows]
        return sum(t.numel() * t.element_size() for t in held)
