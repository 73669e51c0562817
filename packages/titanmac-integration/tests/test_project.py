"""Dense layers with the kernel for the bias are torch's, hooks included."""

from collections.abc import Callable

import pytest
import torch

from titanmac_integration import _project

CHECK = """
import sys, torch
from titanmac_integration import _project, _project_kernels
device = sys.argv[1]
_project_kernels.ROWS, _project_kernels.COLUMNS, _project_kernels.TILES = 4, 8, 2
layer = torch.nn.Linear(6, 19, device=device)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for rows in (1, 21):
        base = torch.randn(2, rows, 6, device=device, dtype=dtype)
        results = []
        for kernel in (False, True):
            _project._on_gpu = lambda x: kernel
            x = base.clone().requires_grad_()
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = _project.project(layer, x)
            loss = y.float().pow(3).sum()
            inputs = (x, layer.weight, layer.bias)
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            again = torch.autograd.grad(loss, inputs, create_graph=True)
            some = torch.autograd.grad(y[..., :1].sum(), layer.bias, retain_graph=True)
            second = torch.autograd.grad(again[2].pow(2).sum(), inputs[:2])
            results.append([y, *first, *again, *some, *second])
        for plain, got in zip(*results, strict=True):
            assert got.dtype == plain.dtype
            error = (got.float() - plain.float()).norm() / plain.float().norm()
            assert error < tolerance, float(error)
x = torch.randn(21, 38, device=device)
for view in (x[:, :19], x[:, ::2], x[:1].expand(21, 38)):
    torch.testing.assert_close(_project_kernels.column_sums(view), view.sum(0))
print("agrees")
"""


def test_the_kernel_agrees_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """Values, first and second derivatives."""
    assert_agrees(CHECK)


def test_hooks_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_project, "_on_gpu", lambda x: pytest.fail("looked past the hooks"))
    layer, seen = torch.nn.Linear(3, 2), []
    hook = layer.register_forward_hook(lambda *_: seen.append("own"))
    _project.project(layer, torch.ones(1, 3))
    hook.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("all")):
        _project.project(layer, torch.ones(1, 3))
    assert seen == ["own", "all"]
