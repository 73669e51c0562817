"""The model on a GPU: what a CPU computes, causal to the bit, without synchronisation, compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from titanmac_integration import TitanMACConfig, create_titanmac_model
from titanmac_integration._attention import _window, _window_kernels
from titanmac_integration._layers import _norm, _project, _rotary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # the compiler recommends TF32 to whoever compiles single precision
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # and looks at .grad of tensors that are no leaves: torch hides that warning, but not an error
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

Make = Callable[..., TitanMACConfig]
VARIANTS = ["none", "MAC", "MAG", "MAL"]
CASES = [(variant, depth) for variant in VARIANTS for depth in (1, 2)][1:]


def config(make: Make, variant: str, depth: int, **changes: object) -> TitanMACConfig:
    memory = {} if variant == "none" else {"use_neural_memory": True, "titans_variant": variant}
    sizes = {"memory_depth": depth, "memory_heads": 2, "memory_width": 16, "memory_chunk_size": 16}
    return make(max_seq_len=4096, segment_size=64, **{**memory, **sizes, **changes})


@pytest.fixture
def compiler() -> None:
    """What earlier tests compiled counts towards the limit of recompilations until it is freed."""
    torch._dynamo.reset()


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_it_computes_what_the_cpu_computes(tiny_config: Make, variant: str, depth: int) -> None:
    """In double precision but for the rotary angles, which are single."""
    shape = config(tiny_config, variant, depth)
    tokens = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        model = create_titanmac_model(shape, dtype=torch.float64, device=device)
        output = model(tokens.to(device), tokens.to(device))
        output["loss"].backward()
        results.append((output["logits"], {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0].cpu(), results[0][0], rtol=1e-5, atol=1e-6)
    for name, gradient in results[0][1].items():
        scale = gradient.abs().max()
        error = (results[1][1][name].cpu() - gradient).abs().max()
        assert error < 1e-5 * scale, name


@pytest.mark.parametrize("length", [150, 2500])
@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_causality_is_exact(tiny_config: Make, variant: str, depth: int, length: int) -> None:
    """By the kernels; MAC attends by segments."""
    model = create_titanmac_model(config(tiny_config, variant, depth), device="cuda").eval()
    tokens = torch.randint(256, (2, length), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        before = model(tokens)["logits"]
        for t in (1, 64, 101, length - 1):
            changed = tokens.clone()
            changed[:, t:] = (changed[:, t:] + 1) % 256
            after = model(changed)["logits"]
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_waits_for_nothing(tiny_config: Make, variant: str) -> None:
    model = create_titanmac_model(config(tiny_config, variant, 1), device="cuda")
    tokens = torch.randint(256, (2, 150), device="cuda")
    for _ in range(2):
        model(tokens, tokens)["loss"].backward()
    with no_host_synchronisation():
        model(tokens, tokens)["loss"].backward()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_blocks_compute_the_same(tiny_config: Make, variant: str) -> None:
    model = create_titanmac_model(config(tiny_config, variant, 1), device="cuda")
    tokens = torch.randint(256, (2, 70), device="cuda")
    expected = model(tokens, tokens)
    expected["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for block in model.blocks:
        block.compile(dynamic=False)
    got = model(tokens, tokens)
    got["loss"].backward()
    torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-3, atol=1e-4)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() < 1e-2 * scale, name


@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_attend_by_the_kernels(tiny_config: Make) -> None:
    model = create_titanmac_model(config(tiny_config, "none", 1, d_model=64), device="cuda")
    tokens = torch.randint(256, (2, 70), device="cuda")
    results, calls = [], []
    attend = _window_kernels.attend

    def watched(*args: object) -> object:
        calls.append(len(args))
        return attend(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_window_kernels, "attend", watched)
        for compiled in (False, True):
            if compiled:
                for block in model.blocks:
                    block.compile(dynamic=False, fullgraph=True)
            model.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                output = model(tokens, tokens)
            output["loss"].backward()
            grads = {n: p.grad for n, p in model.named_parameters()}
            results.append((output["logits"], grads, len(calls)))
    assert results[1][2] == 2 * results[0][2] > 0
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.05, atol=0.02)
    for name, plain in results[0][1].items():
        assert (results[1][1][name] - plain).norm() < 0.05 * plain.norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_runs(tiny_config: Make, variant: str) -> None:
    shape = config(tiny_config, variant, 1)
    model = create_titanmac_model(shape, device="cuda", dtype=torch.float64)
    prompt = torch.randint(256, (2, 70), device="cuda")
    written = model.generate(prompt, 12)
    with torch.no_grad():
        expected = model.eval()(written[:, :-1])["logits"][:, 69:].argmax(-1)
    assert torch.equal(written[:, 70:], expected)


def test_the_loss_without_logits(tiny_config: Make) -> None:
    """Of a vocabulary that takes the kernel several blocks, without waiting for the device."""
    shape = tiny_config(vocab_size=20_000)
    model = create_titanmac_model(shape, device="cuda")
    tokens = torch.randint(20_000, (4, 60), device="cuda")
    labels = tokens.clone()
    labels[1, 20:] = -100
    model(tokens, labels, return_logits=False)["loss"].backward()  # compiles
    gradients, losses, peaks = [], [], []
    for return_logits in (True, False):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with no_host_synchronisation(), torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels, return_logits=return_logits)["loss"]
            loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert peaks[1] < peaks[0]
    for name, plain in gradients[0].items():
        error = (gradients[1][name] - plain).norm() / plain.norm()
        assert error < 0.02, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_err_no_more_than_torch(
    tiny_config: Make, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary, norms, biases and window attention in bfloat16, against double precision."""
    shape = config(tiny_config, variant, 1)
    tokens = torch.randint(256, (2, 150), device="cuda")
    gradients = []
    for dtype, kernels in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        with monkeypatch.context() as patch:
            if not kernels:
                for module in (_norm, _project, _rotary, _window):
                    patch.setattr(module, "_on_gpu", lambda *_: False)
            model = create_titanmac_model(shape, dtype=dtype, device="cuda")
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
                loss = model(tokens, tokens)["loss"]
            loss.backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    exact, plain, kernel = gradients
    assert any(not torch.equal(plain[name], kernel[name]) for name in exact)
    size = sum(float(g.norm() ** 2) for g in exact.values()) ** 0.5
    for name, gradient in exact.items():
        allowed = 1.5 * float((plain[name] - gradient).norm()) + 1e-3 * size
        assert float((kernel[name] - gradient).norm()) < allowed, name
