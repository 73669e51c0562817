"""The memory's kernels on a GPU, at sizes that the interpreter does not reach."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch

from titanmac_integration import TitanMACConfig, create_titanmac_model
from titanmac_integration._memory import NeuralMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Make = Callable[..., TitanMACConfig]
SEGMENT = 128
SHAPES = [(64, 64, 300), (64, 48, 129), (32, 64, 63), (16, 16, 257), (32, 80, 65)]
"""Chunk, width, tokens; in float32 a width of 80 is left to torch's operators."""


def module(make: Make, variant: str, chunk: int = 64, width: int = 64) -> NeuralMemory:
    config = make(
        d_model=96,
        use_neural_memory=True,
        titans_variant=variant,
        memory_heads=2,
        memory_width=width,
        memory_chunk_size=chunk,
        segment_size=SEGMENT,
    )
    return NeuralMemory(config, generator=torch.Generator().manual_seed(0)).cuda()


def outputs_and_gradients(memory: NeuralMemory, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    said = memory(x)
    found = {"read": said.read, "M": said.state.weights[0], "S": said.state.momentum[0]}
    if said.retrieved is not None:
        found["retrieved"] = said.retrieved
    generator = torch.Generator("cuda").manual_seed(1)
    total = sum(
        (part * torch.randn(part.shape, generator=generator, device="cuda")).sum()
        for part in found.values()
    )
    leaves = {"x": x, **dict(memory.named_parameters())}
    grads = torch.autograd.grad(total, list(leaves.values()))
    found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in (found | {"loss": said.loss}).items()}


def sequences(tokens: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(count, tokens, 96, generator=generator).cuda()


@pytest.mark.parametrize("variant", ["MAC", "MAG"])
@pytest.mark.parametrize(("chunk", "width", "tokens"), SHAPES)
def test_float32_is_as_exact_as_float32_is(
    tiny_config: Make, variant: str, chunk: int, width: int, tokens: int
) -> None:
    memory, x = module(tiny_config, variant, chunk, width), sequences(tokens)
    exact = outputs_and_gradients(copy.deepcopy(memory).double(), x.double())
    for name, got in outputs_and_gradients(memory, x).items():
        error = (got.double() - exact[name]).norm() / exact[name].norm()
        assert error < 2e-5, (name, float(error))


@pytest.mark.parametrize(("variant", "width"), [("MAC", 64), ("MAG", 64), ("MAC", 128)])
def test_half_precision_errs_as_its_projections_do(
    tiny_config: Make, variant: str, width: int
) -> None:
    """As torch's operators do, which go on in float32 from there, plus at most TF32's rounding."""
    memory, x = module(tiny_config, variant, width=width), sequences(300)
    exact = outputs_and_gradients(copy.deepcopy(memory).double(), x.double())
    with torch.autocast("cuda", torch.bfloat16):
        got = outputs_and_gradients(memory, x)
        plain = outputs_and_gradients_plainly(memory, x)
    for name, wanted in exact.items():
        ours, theirs = (
            float((found[name].double() - wanted).norm() / wanted.norm()) for found in (got, plain)
        )
        assert ours < 1.25 * theirs + 2e-3, (name, ours, theirs)


def test_half_precision_parameters(tiny_config: Make) -> None:
    memory, x = module(tiny_config, "MAC").bfloat16(), sequences(150).bfloat16()
    got, plain = outputs_and_gradients(memory, x), outputs_and_gradients_plainly(memory, x)
    assert got["M"].dtype == torch.float32
    for name, wanted in plain.items():
        assert got[name].dtype == wanted.dtype, name
        error = (got[name].double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 0.03, (name, float(error))


def outputs_and_gradients_plainly(memory: NeuralMemory, x: torch.Tensor) -> dict[str, torch.Tensor]:
    from titanmac_integration._memory import _answers, _chunked, _module, _tokens

    with pytest.MonkeyPatch.context() as patch:
        for part in (_answers, _chunked, _module, _tokens):
            patch.setattr(part, "on_gpu", lambda *_, **__: False)
        return outputs_and_gradients(memory, x)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("variant", ["MAC", "MAG"])
def test_later_tokens_and_other_sequences_change_no_bit(
    tiny_config: Make, variant: str, half: bool
) -> None:
    memory, x = module(tiny_config, variant), sequences(300)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        before = memory(x)
        assert torch.equal(memory(x).read, before.read)
        for t in (1, 63, 64, 130, 299):
            changed = x.clone()
            changed[1, t:] = torch.randn_like(changed[1, t:])
            after = memory(changed)
            for got, was in ((after.read, before.read), (after.retrieved, before.retrieved)):
                if was is not None:
                    assert torch.equal(got[1, :t], was[1, :t]), t
                    assert torch.equal(got[::2], was[::2]), t
            assert not torch.equal(after.read[1, t], before.read[1, t])


def test_the_same_gradients_come_again(tiny_config: Make) -> None:
    memory, x = module(tiny_config, "MAC"), sequences(300)
    with torch.autocast("cuda", torch.bfloat16):
        once, again = (outputs_and_gradients(memory, x) for _ in range(2))
    for name, got in once.items():
        assert torch.equal(got, again[name]), name


@pytest.mark.parametrize("variant", ["MAC", "MAG"])
def test_tokens_one_by_one_are_the_whole(tiny_config: Make, variant: str) -> None:
    """Generation: the carried state and what full recomputation says."""
    memory, x = module(tiny_config, variant, width=32), sequences(200)
    with torch.no_grad():
        whole = memory(x)
        for first in (128, 100):
            said = memory(x[:, :first])
            for t in range(first, 200):
                said = memory(x[:, t : t + 1], said.state, t)
                torch.testing.assert_close(said.read[:, 0], whole.read[:, t], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(said.state, whole.state, rtol=1e-4, atol=1e-5)


def test_a_state_does_not_drift(tiny_config: Make) -> None:
    """Errors of products in TF32 do not add up: 8,192 tokens on, M errs as it did after 256."""
    memory, x = module(tiny_config, "MAG"), sequences(8192, 1)
    exact = copy.deepcopy(memory).double()
    for parameter in exact.parameters():
        parameter.requires_grad_(False)
    found = []
    for tokens in (256, 8192):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            got = memory(x[:, :tokens]).state.weights[0]
        with torch.no_grad():
            wanted = exact(x[:, :tokens].double()).state.weights[0]
        found.append(float((got.double() - wanted).norm() / wanted.norm()))
    assert found[1] < 1.5 * found[0] < 0.05, found


def test_a_captured_step_computes_what_it_computed(tiny_config: Make) -> None:
    memory, x = module(tiny_config, "MAC"), sequences(300)

    def step() -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            said = memory(x)
            total = said.read.float().square().sum() + said.retrieved.float().sum()
        grads = torch.autograd.grad(total, list(memory.parameters()))
        return [said.read.detach(), said.loss, *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_()
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.equal(got, wanted)


def small(make: Make, variant: str, **changes: object) -> TitanMACConfig:
    sizes = {"memory_heads": 2, "memory_width": 32, "memory_chunk_size": 32, "segment_size": 64}
    memory = {"use_neural_memory": True, "titans_variant": variant}
    return make(d_model=64, n_heads=4, max_seq_len=256, **{**sizes, **memory, **changes})


def count_and_run(calls: list[str], name: str, run: Callable, *args: object) -> object:
    calls.append(name)
    return run(*args)


@pytest.mark.parametrize("variant", ["MAC", "MAG"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_keep_the_kernels(tiny_config: Make, variant: str) -> None:
    """The recurrence's and MAC's attention's, forward and backward; without a graph break."""
    from titanmac_integration._attention import _segment_kernels
    from titanmac_integration._memory import _chunk_launch

    torch._dynamo.reset()  # what earlier tests compiled counts towards its limit
    model = create_titanmac_model(small(tiny_config, variant), device="cuda")
    tokens = torch.randint(256, (2, 150), device="cuda")
    watched = [(_chunk_launch, "read_chunks"), (_chunk_launch, "read_chunks_backward")]
    if variant == "MAC":
        watched += [(_segment_kernels, "attend"), (_segment_kernels, "attend_backward")]
    results, calls = [], []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in watched:
            counted = functools.partial(count_and_run, calls, name, getattr(owner, name))
            patch.setattr(owner, name, counted)
        for compiled in (False, True):
            if compiled:
                for block in model.blocks:
                    block.compile(dynamic=False, fullgraph=True)
            model.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                output = model(tokens, tokens)
            output["loss"].backward()
            grads = {name: p.grad.clone() for name, p in model.named_parameters()}
            results.append((output["logits"], grads, sorted(calls)))
            calls.clear()
    assert results[1][2] == results[0][2]
    assert set(results[0][2]) == {name for _, name in watched}
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.05, atol=0.05)
    for name, plain in results[0][1].items():
        assert (results[1][1][name] - plain).norm() < 0.08 * plain.norm(), name


@pytest.mark.parametrize("variant", ["MAC", "MAG"])
def test_rows_in_front_are_no_tokens(tiny_config: Make, variant: str) -> None:
    """As persistent tokens are none: they change nothing, and get no gradient."""
    memory, x = module(tiny_config, variant), sequences(300)
    results = []
    for skipped in (0, 5):
        rows = torch.cat((x.new_ones(3, skipped, 96), x), dim=1).requires_grad_()
        beside = torch.zeros_like(rows)
        with torch.autocast("cuda", torch.bfloat16):
            said = memory(rows, None, 0, skipped)
            total = said.behind(skipped, beside.bfloat16()).sin().sum()
            if said.retrieved is not None:
                total = total + said.retrieved.float().cos().sum()
        grads = torch.autograd.grad(total, [rows, *memory.parameters()])
        assert not grads[0][:, :skipped].any()
        results.append([said.read, grads[0][:, skipped:], *grads[1:]])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).float().norm() < 0.01 * wanted.float().norm()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("variant", ["MAC", "MAG", "MAL"])
def test_checkpointing_and_hooks_change_nothing(
    tiny_config: Make, variant: str, sparse: bool
) -> None:
    """Heads are turned in place where nobody else sees them, also when they are computed again."""
    parts = {"use_block_sparse": True, "block_sparse_components": ("mlp", "attention")}
    tokens = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(0)).cuda()
    results = []
    for recompute, hooked in ((False, False), (True, False), (False, True)):
        changes = {"activation_checkpointing": recompute, **(parts if sparse else {})}
        model = create_titanmac_model(small(tiny_config, variant, **changes), device="cuda")
        if hooked:  # so heads are left as they are, and turned copies attend
            for block in model.blocks:
                block.attention.qkv.register_forward_hook(lambda *_: None)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(tokens, tokens)["loss"]
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    (loss, grads), *others = results
    for again, found in others:
        torch.testing.assert_close(again, loss, rtol=1e-3, atol=1e-3)
        for name, wanted in grads.items():
            assert (found[name] - wanted).norm() < 0.05 * wanted.norm(), name
