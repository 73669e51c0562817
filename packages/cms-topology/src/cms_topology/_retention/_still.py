"""Parameters, and rows of parameters, that stay as they are to the bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class StillParameters:
    """Remembers values and puts them back."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._whole: list[Tensor] = []
        self._whole_values: list[Tensor] = []
        self._rows: list[tuple[str, Tensor, Tensor, Tensor]] = []

    @property
    def names(self) -> list[str]:
        """Parameters that stay as a whole."""
        return list(self._names)

    def add(self, name: str, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Keep `parameter`, or only its `rows` (int64 indices, distinct)."""
        # the parameter, not its data: those may be exchanged (SAM, `model.to`)
        values = parameter.detach()
        if rows is None:
            self._names.append(name)
            self._whole.append(parameter)
            self._whole_values.append(values.clone())
        else:
            self._rows.append((name, parameter, rows, values[rows].clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo whatever happened to what is kept; a handful of launches for all together."""
        if self._whole:
            torch._foreach_copy_(self._whole, self._whole_values)
        for _, parameter, rows, values in self._rows:
            if _by_sixteen(parameter) and _by_sixteen(values):  # a fourth of the elements to copy
                parameter, values = (t.view(torch.complex128) for t in (parameter, values))
            parameter.index_copy_(0, rows, values)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is remembered."""
        held = self._whole_values + [values for *_, values in self._rows]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered, by parameter name."""
        return dict(self._entries())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state` remembered."""
        for name, values in self._entries():
            values.copy_(state[name])

    def _entries(self) -> list[tuple[str, Tensor]]:
        return [
            *((f"whole/{n}", v) for n, v in zip(self._names, self._whole_values, strict=True)),
            *((f"rows/{name}", values) for name, _, _, values in self._rows),
        ]


def _by_sixteen(tensor: Tensor) -> bool:
    """Whether rows are made of 16 bytes each that can be copied as one element."""
    size = tensor.element_size()
    places = (tensor.shape[-1] * size, tensor.storage_offset() * size)
    return tensor.ndim > 1 and tensor.is_contiguous() and not any(at % 16 for at in places)
