"""The memory's kernels against the plain form in double precision, by name; in the interpreter."""

from collections.abc import Callable

import pytest

CHECK_CHUNKS = """
import sys, torch
from torch.nn import functional
from titanmac_integration._memory import Gates, _chunk_launch, linear_memory
from titanmac_integration._memory._chunked import recall_segments
device = sys.argv[1]
S = 2

def poisoned(make):
    return lambda *args, **named: make(*args, **named).fill_(torch.nan)

for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
    setattr(owner, name, poisoned(getattr(owner, name)))
CASES = ((1, 1, 5, 4, 0), (7, 2, 12, 16, 1), (21, 1, 5, 8, 2), (33, 1, 18, 32, 1))
CASES += ((19, 1, 70, 16, 1),)
for T, H, D, chunk, per in CASES:
    torch.manual_seed(T)
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device)
    query, key = (functional.normalize(draw(S, T, H, D), dim=-1) for _ in range(2))
    logits = 2 * draw(3, S, H, T)
    inputs = [
        torch.stack((query, key, draw(S, T, H, D)), dim=2),
        torch.stack(Gates.from_logits(logits, 1.0)),
        draw(H, D, D).expand(S, H, D, D),  # shared by the sequences, as an initial memory is
        draw(S, H, D, D),
    ]
    inputs = [x.float() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    q, k, v = exact[0].permute(2, 0, 3, 1, 4).unbind(0)
    answers, errors, (starts,), (M,), (X,) = linear_memory(
        q, k, v, Gates(*exact[1].unbind(0)), (exact[2],), (exact[3],), chunk
    )
    wanted = {"answers": answers.transpose(1, 2), "errors": errors, "M": M, "S": X}
    if per:
        segments = starts[:, :, ::per]
        retrieved = recall_segments(q, (segments,), per * chunk)
        wanted |= {"retrieved": retrieved.transpose(1, 2), "segment": segments[:, :, -1]}
    grads = {name: torch.randn_like(tensor) for name, tensor in wanted.items()}
    total = sum((tensor * grads[name]).sum() for name, tensor in wanted.items())
    d_wanted = torch.autograd.grad(total, exact)

    memory = inputs[2][:1].expand(S, H, D, D)
    got_answers, got_retrieved, final, latest, squares, kept = _chunk_launch.read_chunks(
        inputs[0], inputs[1], memory, inputs[3], chunk, per, "ieee" if device == "cpu" else "tf32x3"
    )
    got = {"answers": got_answers, "errors": kept.errors, "M": final[0], "S": final[1]}
    if per:
        got |= {"retrieved": got_retrieved, "segment": latest}
    got["squares"], wanted["squares"] = squares, errors.square().sum()
    singles = {
        name: grad.float().reshape(got[name].shape).contiguous() for name, grad in grads.items()
    }
    d_tokens, d_gates, d_states = _chunk_launch.read_chunks_backward(
        inputs[0],
        inputs[1],
        kept,
        singles["answers"],
        singles.get("retrieved"),
        singles["errors"],
        singles.get("segment"),
        singles["M"],
        singles["S"],
        chunk,
        per,
        "ieee" if device == "cpu" else "tf32x3",
    )
    for i, name in enumerate(("query", "key", "value")):
        got["gradient of " + name], wanted["gradient of " + name] = (
            d_tokens[:, :, i], d_wanted[0][:, :, i]
        )
    for i, name in enumerate(("keep", "eta", "step")):
        got["gradient of " + name], wanted["gradient of " + name] = d_gates[i], d_wanted[1][i]
    for i, name in enumerate(("M", "S")):
        got["gradient of " + name], wanted["gradient of " + name] = d_states[:, i], d_wanted[2 + i]
    for name, tensor in wanted.items():
        error = (got[name].double() - tensor.reshape(got[name].shape)).norm() / tensor.norm()
        # nothing can be said of keep and eta by a single token that starts from nothing
        assert error < 3e-6 or tensor.norm() == 0, ((T, H, D, chunk, per), name, float(error))

    # a later token changes no earlier answer, to the bit
    for t in {1, T // 2, T - 1} - {0, T}:
        tokens, gates = (x.clone() for x in inputs[:2])
        tokens[:, t:] *= -2
        gates[..., t:] *= 0.5
        later = _chunk_launch.read_chunks(
            tokens, gates, memory, inputs[3], chunk, per, "ieee" if device == "cpu" else "tf32x3"
        )
        assert torch.equal(later[0][:, :t], got_answers[:, :t]), t
        assert not torch.equal(later[0][:, t], got_answers[:, t]), t
        if per:
            assert torch.equal(later[1][:, :t], got_retrieved[:, :t]), t
print("agrees")
"""

CHECK_MODULE = """
import copy, sys, torch
from titanmac_integration import TitanMACConfig
from titanmac_integration._memory import NeuralMemory, _answers, _chunked, _module, _tokens
device, variant, depth = sys.argv[1], "VARIANT", DEPTH
for module in (_answers, _chunked, _module, _tokens):
    module.on_gpu = lambda x, **_: x.dtype != torch.float64
config = TitanMACConfig(
    d_model=20,
    n_heads=2,
    n_persistent=0,
    use_neural_memory=True,
    titans_variant=variant,
    memory_depth=depth,
    memory_heads=2 if variant == "MAC" else 1,
    memory_width=6,
    segment_size=8,
    memory_chunk_size=4,
)
memory = NeuralMemory(config, generator=torch.Generator().manual_seed(0)).to(device)
exact = copy.deepcopy(memory).double()
x = torch.randn(2, 13, 20, generator=torch.Generator().manual_seed(1)).to(device)

def run(memory, x, pieces, second):
    x = x.detach().requires_grad_()
    found, state, position = [], None, 0
    for piece in x.split(pieces, dim=1):
        # rows that are no tokens stand in front of the kernels' pieces only
        skipped = 3 if memory is not exact and position == 0 else 0
        front = torch.ones_like(piece[:, :1]).expand(-1, skipped, -1)
        said = memory(torch.cat((front, piece), dim=1), state, position, skipped)
        state, position = said.state, position + piece.shape[1]
        found.append(said)
    got = {"read": torch.cat([said.read for said in found], dim=1)}
    if variant == "MAC":
        got["retrieved"] = torch.cat([said.retrieved for said in found], dim=1)
    for name, part in state._asdict().items():
        tensors = part if isinstance(part, tuple) else (part,)
        got |= {f"{name} {i}": tensor for i, tensor in enumerate(tensors)}
    generator = torch.Generator().manual_seed(2)
    total = sum(
        (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum()
        for tensor in got.values()
    )
    got["loss"] = torch.stack([said.loss for said in found]).mean()
    assert not got["loss"].requires_grad
    leaves = {"x": x, **dict(memory.named_parameters())}
    grads = torch.autograd.grad(total, list(leaves.values()), create_graph=second)
    got |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    if second:
        total = sum(grad.sin().sum() for grad in grads)
        again = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves, again)
        got |= {f"second derivative in {name}": g for name, g in pairs if g is not None}
    return got

for pieces, second, tolerance in ((13, False, 1e-5), ((8, 2, 3), False, 1e-5), (13, True, 2e-4)):
    found = run(memory, x, pieces, second)
    for name, wanted in run(exact, x.double(), pieces, second).items():
        got = found[name]
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < tolerance or wanted.norm() == 0, (pieces, second, name, float(error))
print("agrees")
"""


CHECK_GATE = """
import sys, torch
from titanmac_integration._memory import _answers
device = sys.argv[1]

def run(kernel, beside, dtype):
    _answers.on_gpu = lambda x, **_: kernel
    generator = torch.Generator().manual_seed(0)
    def draw(tokens):
        return torch.randn(2, tokens, 5, generator=generator).to(device, dtype)
    x, logits, more, grad = draw(7), draw(9 if beside else 7), draw(10), draw(10)
    bias = draw(1)[0, 0] if beside else None
    leaves = [x, logits, bias, more] if beside else [x, logits]
    for leaf in leaves:
        leaf.requires_grad_()
    y = _answers.gated(x, logits, bias, 3, more if beside else None)
    once = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(y, leaves, grad, create_graph=True)
    return [y, *once, *torch.autograd.grad(sum(g.float().sin().sum() for g in again), leaves[:2])]

for beside in (False, True):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for plain, got in zip(*(run(kernel, beside, dtype) for kernel in (False, True))):
            assert got.dtype == plain.dtype
            error = (got.float() - plain.float()).norm() / plain.float().norm()
            assert error < tolerance, (beside, dtype, float(error))
print("agrees")
"""


CHECK_OPERATOR = """
import sys, torch
from torch.utils.checkpoint import checkpoint
from titanmac_integration import TitanMACConfig
from titanmac_integration._memory import Gates, NeuralMemory, _chunk_launch, _chunk_ops, _chunked
from titanmac_integration._memory import _answers, _module, _tokens
device = sys.argv[1]
S, H, D, chunk = 2, 2, 5, 4
for T, segment in ((7, 0), (7, 4), (2, 4)):
    generator = torch.Generator().manual_seed(T)
    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)
    gates = torch.stack(Gates.from_logits(draw(3, S, H, T), 1.0))
    tokens, first = draw(S, T, 3, H, D), draw(H, D, D)
    leaves = [x.requires_grad_() for x in (tokens, gates, first, draw(S, H, D, D))]
    inputs = (*leaves[:2], first.expand(S, H, D, D), leaves[3])
    said = _chunked.read(*inputs, chunk, segment, torch.float32)
    got = _chunk_ops.read(*inputs, chunk, segment, torch.float32)
    assert not any(part.requires_grad for part in got[4:])
    final = torch.stack((said.weights, said.momentum)).flatten(1, 2)
    wanted = [said.answers, final] + ([said.retrieved, said.segment] if segment else [])
    got = [got[0], got[2]] + ([got[1], got[3]] if segment else [])
    for used in (slice(None), slice(0, 1), slice(1, 2)):  # of all outputs, of some
        ways = [torch.randn_like(part) for part in wanted[used]]
        d_wanted, d_got = (
            torch.autograd.grad(parts[used], leaves, ways, retain_graph=True)
            for parts in (wanted, got)
        )
        for ours, plain in zip((*got, *d_got), (*wanted, *d_wanted), strict=True):
            assert torch.equal(ours, plain), (T, segment)
    options = (chunk, segment, torch.float32)
    torch.library.opcheck(_chunk_ops.read, (*inputs, *options))

def on_gpu(x, compiled=False):
    return compiled or not torch.compiler.is_compiling()

for module in (_answers, _chunked, _module, _tokens):
    module.on_gpu = on_gpu
read_chunks, calls = _chunk_launch.read_chunks, []

def counted(*args):
    calls.append(args)
    return read_chunks(*args)

_chunk_launch.read_chunks = counted
for variant in ("MAC", "MAG"):
    torch.compiler.reset()
    config = TitanMACConfig(
        d_model=12,
        n_heads=2,
        n_persistent=0,
        use_neural_memory=True,
        titans_variant=variant,
        memory_heads=2,
        memory_width=5,
        segment_size=4,
        memory_chunk_size=4,
    )
    memory = NeuralMemory(config, generator=torch.Generator().manual_seed(0)).to(device)
    compiled = torch.compile(memory, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for module in (memory, compiled):
        leaf = x.clone().requires_grad_()
        said = module(leaf)
        total = said.read.sin().sum()
        if variant == "MAC":
            total = total + said.retrieved.cos().sum()
        grads = torch.autograd.grad(total, [leaf, *memory.parameters()])
        assert not said.loss.requires_grad
        results.append([said.read, said.loss, *said.state.weights, *grads])
    assert len(calls) == 2, len(calls)
    leaf = x.clone().requires_grad_()
    said = checkpoint(memory, leaf, use_reentrant=False)  # what is saved may be asked for once
    total = said.read.sin().sum()
    if variant == "MAC":
        total = total + said.retrieved.cos().sum()
    again = torch.autograd.grad(total, [leaf, *memory.parameters()])
    calls.clear()
    results.append([*results[0][: -len(again)], *again])
    for want, *others in zip(*results, strict=True):
        for got in others:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
print("agrees")
"""


def test_compiled_code_calls_the_kernels_as_an_operator(
    assert_agrees: Callable[[str], None],
) -> None:
    """As `torch.library.opcheck` wants it; with the same bits; the module in one graph."""
    assert_agrees(CHECK_OPERATOR)


def test_chunks_agree_with_the_plain_form(assert_agrees: Callable[[str], None]) -> None:
    """Outputs and gradients, no unwritten output, and causality to the bit."""
    assert_agrees(CHECK_CHUNKS)


@pytest.mark.parametrize("variant", ["MAC", "MAG"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_module_agrees_with_itself(
    assert_agrees: Callable[[str], None], variant: str, depth: int
) -> None:
    """Whole and in pieces, gradients and second derivatives; depth 2 by the kernels around it."""
    check = CHECK_MODULE.replace("VARIANT", variant).replace("DEPTH", str(depth))
    assert_agrees(check)


def test_the_gate_agrees_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """Alone and behind other rows, beside a sum; first and second derivatives."""
    assert_agrees(CHECK_GATE)
