"""RMS normalisation by the kernels is torch's."""

from collections.abc import Callable

import torch

from titanmac_integration._norm import NormBeforeLinear

CHECK = """
import sys, torch
from titanmac_integration import _norm, _norm_kernels
device = sys.argv[1]
_norm_kernels.PROGRAMS = 3
norm = _norm.NormBeforeLinear(12, eps=1e-5, device=device)
with torch.no_grad():
    norm.weight.normal_()
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    base = torch.randn(2, 5, 24, device=device, dtype=dtype)[..., :12]  # rows lie apart
    results = []
    for kernel in (False, True):
        _norm._on_gpu = lambda x: kernel
        x = base.detach().requires_grad_()
        y = norm(x)
        loss = (y.float() * torch.arange(12.0, device=device)).sum()
        once = torch.autograd.grad(loss, (x, norm.weight), retain_graph=True)
        again = torch.autograd.grad(loss, (x, norm.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.float().pow(2).sum() for g in again), (x, norm.weight))
        results.append([y.to(dtype), *once, *again, *second])
    for plain, got in zip(*results, strict=True):
        assert got.dtype == plain.dtype
        error = (got.float() - plain.float()).norm() / plain.float().norm()
        assert error < tolerance, float(error)
print("agrees")
"""


def test_the_kernels_agree_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """Values, first and second derivatives; in Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)


def test_on_a_cpu_it_is_torchs_norm_to_the_bit() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(NormBeforeLinear(8, eps=1e-5)(x), torch.nn.RMSNorm(8, eps=1e-5)(x))
