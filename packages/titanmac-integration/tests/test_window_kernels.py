"""Window attention by the Triton kernels is torch's, gradients included, and causal to the bit."""

from collections.abc import Callable

CHECK = """
import sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from titanmac_integration._attention import _window, _window_kernels, _window_ops
from titanmac_integration._layers._rotary import rotary_table, rotate
device = sys.argv[1]
for tiles, M, N in (("FORWARD", 32, 16), ("GRAD_QUERY", 16, 32), ("GRAD_KEY", 32, 16)):
    getattr(_window_kernels, tiles).update(M=M, N=N)
for T, W, P in ((70, 20, 5), (70, 200, 0), (40, 1, 3), (65, 16, 20), (3, 8, 4)):
    base = torch.randn(2, P + T, 3, 3, 16, device=device, dtype=torch.float16)
    plan = _window.plan_window(T, window_size=W, n_persistent=P, device=torch.device(device))
    grad = torch.randn(2, 3, P + T, 16, device=device, dtype=torch.float16)
    wide = [x.detach().float().requires_grad_() for x in base.permute(2, 0, 3, 1, 4).unbind(0)]
    parts = [x.detach().requires_grad_() for x in base.permute(2, 0, 3, 1, 4).unbind(0)]
    expected = _window._by_torch(*wide, plan, 0.0)
    expected = [expected, *torch.autograd.grad(expected, wide, grad.float(), retain_graph=True)]
    _window._on_gpu = lambda query, dropout: True
    got = _window.window_attention(*parts, plan, 0.0)
    again = torch.autograd.grad(got, parts, grad, create_graph=True)
    assert again[0].requires_grad  # differentiable once more
    got = [got, *torch.autograd.grad(got, parts, grad)]
    for plain, kernel in zip([*expected, *expected[1:]], [*got, *again], strict=True):
        error = (kernel.float() - plain).norm() / plain.norm()
        assert error < 2e-3, float(error)
    out, _ = _window_ops.attend(*parts, W, P)  # what compiled models call
    same = [out, *torch.autograd.grad(out, parts, grad)]
    assert all(torch.equal(a, b) for a, b in zip(same, got, strict=True))
    if T == 40:
        torch.library.opcheck(_window_ops.attend, (*parts, W, P))
    # turned, attended to and turned back in the kernels
    rotary = rotary_table(P + T, 16, 10.0, device=torch.device(device))
    leaf, wide = (base.to(kind).requires_grad_() for kind in (torch.float16, torch.float32))
    turned = torch.cat((rotate(wide[:, :, :2], *rotary), wide[:, :, 2:]), 2)
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        plain = _window._by_torch(*_window._by_head(turned), plan, 0.0)
    fused = _window.turned_attention_(leaf.clone(), rotary, plan)
    results = []
    for out, heads, way in ((plain, wide, grad.float()), (fused, leaf, grad)):
        (first,) = torch.autograd.grad(out, heads, way, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), heads, retain_graph=True)
        results.append([out, first, second])
    results[1] += torch.autograd.grad(fused, leaf, grad)
    results[0].append(results[0][1])
    for want, kernel in zip(*results, strict=True):
        error = (kernel.float() - want).norm() / want.norm()
        assert error < 5e-3, float(error)
    t = P + T // 2
    late = [torch.cat((x[:, :, :t], x[:, :, t:] + 1), 2) for x in parts]
    changed = _window.window_attention(*late, plan, 0.0)
    assert torch.equal(changed[:, :, :t], got[0][:, :, :t])
    assert not torch.equal(changed[:, :, t], got[0][:, :, t])
print("agrees")
"""


def test_the_kernels_agree_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """In Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)
