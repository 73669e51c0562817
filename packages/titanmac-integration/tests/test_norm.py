"""RMS normalisation by the kernels is torch's."""

from collections.abc import Callable

import torch

from titanmac_integration._layers._norm import NormBeforeLinear

CHECK = """
import sys, torch
from titanmac_integration._layers import _norm, _norm_kernels
device = sys.argv[1]
torch.manual_seed(0)
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

CHECK_SUM = """
import itertools, sys, torch
from titanmac_integration._layers import _norm, _norm_kernels
device = sys.argv[1]
torch.manual_seed(0)
_norm_kernels.PROGRAMS = 3
norm = _norm.NormBeforeLinear(12, eps=1e-5, device=device)
with torch.no_grad():
    norm.weight.normal_()
pairs = [(torch.float32, torch.float32, 1e-5), (torch.float32, torch.bfloat16, 3e-2)]
pairs.append((torch.bfloat16, torch.bfloat16, 3e-2))
uses = ((True, True, True), (True, False, True), (False, True, True), (True, True, False))
for (kind, other, tolerance), (total_used, normed_used, biased) in itertools.product(pairs, uses):
    base = torch.randn(2, 5, 24, device=device, dtype=kind)[..., :12]  # rows lie apart
    more = torch.randn(2, 5, 24, device=device, dtype=other)[..., :12]
    offset = torch.randn(12, device=device)
    results = []
    for kernel in (False, True):
        _norm._on_gpu = lambda x: kernel
        x, added = base.detach().requires_grad_(), more.detach().requires_grad_()
        # torch would round, or widen, the sum of a bias and what it is added to
        bias = offset.to(other).requires_grad_() if biased else None
        total, y = norm.after_adding(x, added, bias)
        assert total.dtype == kind
        weights = torch.arange(12.0, device=device)
        loss = 0.0
        if normed_used:
            loss = (y.float() * weights).sum()
        if total_used:
            loss = loss + (total.float().sin() * weights.flip(0)).sum()
        inputs = (x, added)
        inputs += (bias,) if biased else ()
        inputs += (norm.weight,) if normed_used else ()
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.float().pow(2).sum() for g in again), inputs)
        results.append([total, y.to(kind), *once, *again, *second])
    for plain, got in zip(*results, strict=True):
        assert got.dtype == plain.dtype, (got.dtype, plain.dtype)
        error = (got.float() - plain.float()).norm() / plain.float().norm()
        assert error < tolerance, (kind, other, total_used, normed_used, float(error))
print("agrees")
"""


def test_the_kernels_agree_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """Values, first and second derivatives; in Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)


def test_a_sum_and_its_norm_in_one_pass(assert_agrees: Callable[[str], None]) -> None:
    """The same, whatever is read of the two: both, the sum, the norm."""
    assert_agrees(CHECK_SUM)


def test_hooks_see_the_norm_of_a_sum() -> None:
    norm, seen = NormBeforeLinear(8, eps=1e-5), []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x, added = torch.randn(3, 8), torch.randn(3, 8)
    total, normed = norm.after_adding(x, added)
    assert torch.equal(total, x + added)
    assert torch.equal(seen[0], total)
    assert torch.equal(normed, torch.nn.RMSNorm(8, eps=1e-5)(total))
    assert norm.after_adding(x, None)[0] is x


def test_on_a_cpu_it_is_torchs_norm_to_the_bit() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(NormBeforeLinear(8, eps=1e-5)(x), torch.nn.RMSNorm(8, eps=1e-5)(x))
