"""Dense layers with the kernel for the bias are torch's, hooks included."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from titanmac_integration._layers import _project

CHECK = """
import sys, torch
from titanmac_integration._layers import _project, _project_kernels
device = sys.argv[1]
_project_kernels.ROWS, _project_kernels.COLUMNS, _project_kernels.TILES = 4, 8, 2
if device == "cpu":  # which has no such product
    _project.wide_product = lambda left, right: left.float() @ right.float()
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


APART = """
import sys, torch
from titanmac_integration import TitanMACConfig, create_titanmac_model
from titanmac_integration._layers import _norm, _project
device = sys.argv[1]
SHAPE = dict(
    d_model=32, n_heads=4, n_layers=2, d_ff=64, max_seq_len=64, window_size=8, n_persistent=2,
    block_sparse_layers=(1,), block_sparse_tile_size=8,
)
changes = {"dense": {}, "sparse": {"use_block_sparse": True}, "dropout": {"dropout": 0.3}}
changes["checkpoints"] = {"activation_checkpointing": True}
changes["memory"] = {"use_neural_memory": True, "memory_layers": (0,), "memory_heads": 2,
                     "memory_width": 8, "titans_variant": "MAG"}
tokens = torch.randint(256, (2, 20), device=device)
for name, fields in changes.items():
    results = []
    for kernels in (False, True):
        _norm._on_gpu = _project._on_gpu = lambda x: kernels
        model = create_titanmac_model(TitanMACConfig(**SHAPE | fields), seed=0, device=device)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases, too, shall matter
                parameter.data += torch.linspace(-1, 1, len(parameter), device=device)
        torch.manual_seed(0)
        output = model(tokens, tokens)
        output["loss"].backward()
        found = {n: p.grad for n, p in model.named_parameters()}
        results.append({"logits": output["logits"], **found})
    plain, got = results
    for key, value in plain.items():
        error = (got[key] - value).norm() / value.norm()
        assert error < 1e-4, (name, key, float(error))
print("agrees")
"""


def test_biases_that_are_added_with_the_residual_stream(
    assert_agrees: Callable[[str], None],
) -> None:
    """A model whose norms add them is the model, gradients by name included."""
    assert_agrees(APART)


def test_hooks_see_a_whole_result() -> None:
    torch.manual_seed(0)
    layer, x, seen = nn.Linear(4, 3), torch.randn(2, 4), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    product, bias = _project.project_apart(layer, x)
    assert bias is None
    assert torch.equal(seen[0], product)
