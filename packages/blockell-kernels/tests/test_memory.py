"""No path on the CPU holds the gathered input of all row groups at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockell_kernels._backends import Pattern, get_backend
from blockell_kernels._cpu import BUFFER_ELEMENTS


class Largest(TorchDispatchMode):
    """Elements of the largest storage that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                size = t.untyped_storage().nbytes() // t.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("backend", ["gathered", "dense"])
@pytest.mark.parametrize("row_group", [1, 8])
def test_largest_buffer(make_operands, backend, row_group):
    N, R, C, K, B = 4096, 32, 32, 16, 16
    o = make_operands(N, R, C, K, B, row_group=row_group)
    pattern = Pattern(o.col_indices, C, B, row_group, K)
    chosen = get_backend(backend)
    with Largest() as watch, torch.no_grad():
        chosen.forward(o.x, o.values, o.bias, pattern)
        chosen.grad_input(o.dy, o.values, pattern)
        chosen.grad_values(o.dy, o.x, pattern)
    operands = N * max(R, C) * B
    assert watch.elements <= max(operands, BUFFER_ELEMENTS)
    assert watch.elements < N * R * K * B / 8
