"""Triangular systems by the kernel are torch's."""

from collections.abc import Callable

CHECK = """
import sys, torch
from titanmac_integration._memory import _solve, _solve_kernels
device = sys.argv[1]
assert _solve_kernels.invert_unit_lower(torch.empty(0, 3, 3, device=device)).shape == (0, 3, 3)
for b, width in ((1, 3), (5, 4), (16, 1), (37, 7)):
    lower = torch.randn(2, 3, b, b, device=device).tril(-1) / b
    right = torch.randn(2, 3, b, width, device=device)
    garbage = torch.full_like(lower, torch.nan).triu()
    inverse = _solve_kernels.invert_unit_lower(lower + garbage)
    exact = torch.eye(b, device=device) + lower
    assert ((inverse @ exact) - torch.eye(b, device=device)).abs().max() < 1e-5
    assert not inverse.triu(1).any()
    results = []
    for kernel in (False, True):
        _solve._on_gpu = lambda x: kernel
        inputs = (lower.mT.contiguous().mT.requires_grad_(), right.requires_grad_())
        solution = _solve.solve_unit_lower(inputs[0].tril(-1), inputs[1])
        loss = solution.pow(3).sum()
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in again), inputs)
        results.append([solution, *once, *again, *second])
    for plain, got in zip(*results, strict=True):
        assert (got - plain).norm() <= 1e-5 * plain.norm(), (b, (got - plain).norm())
    # a later row changes no earlier one, to the bit
    later = lower.clone()
    later[..., -1, :] *= 3
    assert torch.equal(
        _solve_kernels.invert_unit_lower(later)[..., :-1, :], inverse[..., :-1, :]
    )
print("agrees")
"""


def test_the_kernel_agrees_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """Values, first and second derivatives; in Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)
