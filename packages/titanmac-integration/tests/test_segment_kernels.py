"""MAC's attention by the Triton kernels agrees with masked calls of torch's attention."""

from collections.abc import Callable

CHECK = """
import sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from titanmac_integration._attention import _segment_kernels, _segment_ops, _window
from titanmac_integration._attention._window import _segments_by_torch, plan_segments
device, dtype = sys.argv[1], torch.float32
if device == "cuda":
    dtype = torch.bfloat16
S, H, D = 2, 1, 16
CASES = [
    # tokens, persistent, segment, window
    (150, 5, 64, 64), (150, 0, 64, 20), (70, 70, 300, 33), (1, 2, 64, 9), (130, 3, 128, 500),
]
for T, P, G, W in CASES:
    generator = torch.Generator().manual_seed(T)
    def draw(rows):
        # rows lie apart, as those of one of several projections do
        x = torch.randn(S, rows, H, 2 * D, generator=generator)[..., :D].to(device, dtype)
        return x.transpose(1, 2)
    inputs = [draw(P + T) for _ in range(3)] + [draw(T) for _ in range(2)]
    grad = draw(P + T)
    plan = plan_segments(T, segment_size=G, window_size=W, n_persistent=P, device=device)
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = _segments_by_torch(*exact[:3], tuple(exact[3:]), plan, 0.0)
    d_wanted = torch.autograd.grad(wanted, exact, grad.double())
    out, log = _segment_kernels.attend(*inputs, W, plan.size)
    grads = _segment_kernels.attend_backward(grad, *inputs, out, log, W, plan.size)
    names = ("output", "query", "key", "value", "retrieved key", "retrieved value")
    for name, got, want in zip(names, (out, *grads), (wanted, *d_wanted)):
        error = (got.double() - want).norm() / want.norm()
        assert error < (1e-2 if device == "cuda" else 1e-5), ((T, P, G, W), name, float(error))
    # as compiled models call them
    leaves = [x.detach().requires_grad_() for x in inputs]
    as_operator, _ = _segment_ops.attend(*leaves, W, plan.size)
    same = (as_operator, *torch.autograd.grad(as_operator, leaves, grad))
    assert all(torch.equal(a, b) for a, b in zip(same, (out, *grads), strict=True))
    if T == 70:
        torch.library.opcheck(_segment_ops.attend, (*leaves, W, plan.size))
    # what comes later changes nothing, to the bit
    for t in {0, T // 2, T - 1}:
        later = [x.clone() for x in inputs]
        for x, first in zip(later, (P + t,) * 3 + (t,) * 2):
            x[:, :, first:] = 9.0
        again, _ = _segment_kernels.attend(*later, W, plan.size)
        assert torch.equal(again[:, :, : P + t], out[:, :, : P + t]), ((T, P, G, W), t)
# turned in place, attended to and turned back
from titanmac_integration._layers._rotary import rotary_table, rotate
rotary = rotary_table(P + T, D, 10.0, device=torch.device(device))
behind = (rotary[0][P:], rotary[1][P:])
found = []
for fused, kind in ((True, dtype), (False, torch.float64)):
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(S, rows, parts, H, D, generator=generator).to(device, dtype).to(kind)
        for rows, parts in ((P + T, 3), (T, 2))
    ]
    leaves = [x.requires_grad_() for x in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        if fused:
            copies = [x.clone() for x in leaves]
            out = _window.turned_segment_attention_(*copies, rotary, plan)
        else:
            turned = [
                torch.cat((rotate(x[:, :, :-1], *table), x[:, :, -1:]), 2).transpose(1, 3).unbind(2)
                for x, table in zip(leaves, (rotary, behind))
            ]
            out = _segments_by_torch(*turned[0], turned[1], plan, 0.0)
        way = grad.to(kind)
        once = torch.autograd.grad(out, leaves, way, retain_graph=True)
        first = torch.autograd.grad(out, leaves, way, create_graph=True)
        total = sum(x.square().sum() for x in first)
        found.append([out, *once, *first, *torch.autograd.grad(total, leaves)])
for got, want in zip(*found):
    error = (got.double() - want).norm() / want.norm()
    assert error < (3e-2 if device == "cuda" else 1e-5), float(error)
# gradients that are differentiated in turn
_window._on_gpu = lambda query, dropout: True
leaves = [x.detach().requires_grad_() for x in inputs]
found = []
for again in (False, True):
    def attend(q, k, v, rk, rv):
        return _window.segment_attention(q, k, v, (rk, rv), plan, 0.0)
    out = checkpoint(attend, *leaves, use_reentrant=False) if again else attend(*leaves)
    found.append(torch.autograd.grad(out, leaves, grad))
assert all(torch.equal(a, b) for a, b in zip(*found))
found = []
for kernels, kind in ((True, dtype), (False, torch.float64)):
    leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
    attend = _window.segment_attention if kernels else _segments_by_torch
    with sdpa_kernel(SDPBackend.MATH):
        out = attend(*leaves[:3], tuple(leaves[3:]), plan, 0.0)
        first = torch.autograd.grad(out, leaves, grad.to(kind), create_graph=True)
        total = sum(x.square().sum() for x in first)
        found.append([out, *first, *torch.autograd.grad(total, leaves)])
for got, want in zip(*found):
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-6)
    assert error < (3e-2 if device == "cuda" else 1e-5), float(error)
print("agrees")
"""


def test_the_kernels_agree_with_masked_calls(assert_agrees: Callable[[str], None]) -> None:
    """Values, all gradients, causality; in Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)
