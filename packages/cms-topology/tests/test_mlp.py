"""Two block-sparse layers as one function: the same results, and nobody's hooks are bypassed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockell_kernels import _mlp_core
from cms_topology import CMSBlockLinear, ScoringConfig, block_sparse_mlp, mlp_is_fused


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry per fused forward pass."""
    calls: list[str] = []
    run = _mlp_core.forward

    def forward(*args: Any) -> Any:
        calls.append("fused")
        return run(*args)

    monkeypatch.setattr(_mlp_core, "forward", forward)
    return calls


def layers(candidate_score: str = "gradient", **kwargs: Any) -> nn.ModuleList:
    keep_score = "loss" if candidate_score == "loss" else "gradient"
    scoring = ScoringConfig(candidate_score=candidate_score, keep_score=keep_score)  # type: ignore[arg-type]
    kwargs = {"tile_size": 8, "density": 0.5, "max_density": 0.75, "scoring": scoring} | kwargs
    mlp = nn.ModuleList((CMSBlockLinear(48, 96, **kwargs), CMSBlockLinear(96, 32, **kwargs)))
    for layer in mlp:
        layer.collect_candidates = True
    return mlp


def step(mlp: nn.ModuleList, x: Tensor, separate: bool) -> dict[str, Tensor | None]:
    """Output, gradients and statistics, by name."""
    x = x.clone().requires_grad_()
    fc1, fc2 = mlp
    y = fc2(nn.functional.silu(fc1(x))) if separate else block_sparse_mlp(x, fc1, fc2, "silu")
    (y * torch.linspace(-1, 1, 32)).square().sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    for name, p in mlp.named_parameters():
        found[name] = p.grad
    for i, layer in enumerate(mlp):
        found[f"probe {i}"] = layer._probe.grad
        if layer._fisher_probe is not None:
            found[f"fisher probe {i}"] = layer._fisher_probe.grad
    return found


@pytest.mark.parametrize("candidate_score", ["gradient", "outer"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_same_as_two_layers(
    fused_calls: list[str], candidate_score: str, training: bool, bias: bool
) -> None:
    mlp = layers(candidate_score, bias=bias).train(training)
    x = torch.randn(3, 7, 48)
    want, got = step(copy.deepcopy(mlp), x, separate=True), step(mlp, x, separate=False)
    assert fused_calls == ["fused"]
    assert (got["probe 0"] is not None) == training
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, msg=name)


def test_scores_and_decisions_go_on_as_with_two_layers() -> None:
    mlp = layers()
    other = copy.deepcopy(mlp)
    for i in range(3):
        x = torch.randn(16, 48)
        step(mlp, x, separate=False)
        step(other, x, separate=True)
        for layer in (*mlp, *other):
            layer.accumulate_scores()
            layer.topology_step(torch.Generator().manual_seed(i))
            layer.zero_grad()
    for mine, theirs in zip(mlp, other, strict=True):
        assert torch.equal(mine.col_indices, theirs.col_indices)


def test_indices_changed_behind_its_back_are_noticed() -> None:
    mlp = layers().eval()
    loaded = layers().eval()
    mlp.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        mlp[0].col_indices.copy_(mlp[0].col_indices.flip(1).sort(1, descending=True).values)
    x = torch.randn(5, 48)
    torch.testing.assert_close(
        step(mlp, x, separate=False)["x"], step(copy.deepcopy(mlp), x, separate=True)["x"]
    )


def test_scores_in_nats_are_collected_as_by_two_layers(fused_calls: list[str]) -> None:
    """Between the layers, so in these steps they are not fused; before, nothing was collected."""
    mlp, x = layers("loss"), torch.randn(3, 7, 48)
    want, got = step(copy.deepcopy(mlp), x, separate=True), step(mlp, x, separate=False)
    assert fused_calls == []
    assert not mlp_is_fused(mlp[0], mlp[1])
    for name, expected in want.items():
        assert expected is not None
        torch.testing.assert_close(got[name], expected, msg=name)
    for layer in mlp:
        layer.collect_candidates = False
    step(mlp, x, separate=False)
    assert fused_calls == ["fused"]


class Subclass(CMSBlockLinear):
    pass


def test_no_hook_and_no_override_is_bypassed(fused_calls: list[str]) -> None:
    x, seen = torch.randn(4, 48, requires_grad=True), []

    def note(*_: object) -> None:
        seen.append(1)

    def run(mlp: nn.ModuleList) -> int:
        seen.clear()
        block_sparse_mlp(x, mlp[0], mlp[1]).sum().backward()
        return len(seen)

    register = [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ]
    for name in register:
        for position in (0, 1):
            mlp = layers()
            handle = getattr(mlp[position], name)(note)
            assert run(mlp) == 1, name
            assert fused_calls == []
            handle.remove()
            run(mlp)
            assert fused_calls == ["fused"]
            fused_calls.clear()
    for handle in (
        nn.modules.module.register_module_forward_hook(note),
        nn.modules.module.register_module_full_backward_hook(note),
    ):
        try:
            assert run(layers()) >= 2
        finally:
            handle.remove()
    mlp = layers()
    forward = mlp[1].forward
    mlp[1].forward = lambda h: (note(), forward(h))[1]
    assert run(mlp) == 1
    sub = nn.ModuleList((Subclass(48, 96, tile_size=8), layers()[1]))
    run(sub)
    mlp = layers()
    mlp[0].backend = "dense"
    run(mlp)
    run(nn.ModuleList((nn.Linear(48, 96), mlp[1])))
    assert fused_calls == []


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "silu"])
def test_activations_fused_and_not(activation: str) -> None:
    mlp, x = layers().eval(), torch.randn(4, 48)
    dense = [layer.to_linear() for layer in mlp]
    fused = block_sparse_mlp(x, mlp[0], mlp[1], activation)  # type: ignore[arg-type]
    by_layer = block_sparse_mlp(x, dense[0], dense[1], activation)  # type: ignore[arg-type]
    torch.testing.assert_close(fused, by_layer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [32, 64, 47])
def test_widths_are_checked_as_by_the_layers(width: int) -> None:
    """Before, features beyond those of a layer were left out without a word."""
    fc1, fc2 = layers()
    with pytest.raises(ValueError, match=rf"of x \(={width}\) must be fc1.in_features \(=48\)"):
        block_sparse_mlp(torch.randn(3, width), fc1, fc2)
    narrow = CMSBlockLinear(64, 32, tile_size=8)
    said = r"fc1.out_features \(=96\) must be fc2.in_features \(=64\)"
    with pytest.raises(ValueError, match=said):
        block_sparse_mlp(torch.randn(3, 48), fc1, narrow)


def test_messages() -> None:
    mlp, x = layers(), torch.randn(4, 48)
    for fc1, fc2 in (mlp, [layer.to_linear() for layer in mlp]):
        with pytest.raises(ValueError, match=r"activation \(='tanh'\) must be one of none, gelu"):
            block_sparse_mlp(x, fc1, fc2, "tanh")  # type: ignore[arg-type]
    other = CMSBlockLinear(96, 32, tile_size=8).double()
    with pytest.raises(ValueError, match=r"second layer: values has dtype torch.float64"):
        block_sparse_mlp(x, mlp[0], other)


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    mlp, x = layers(), torch.randn(16, 48)
    want = step(copy.deepcopy(mlp), x, separate=True)
    compiled = torch.compile(block_sparse_mlp, fullgraph=True)
    x = x.requires_grad_()
    y = compiled(x, mlp[0], mlp[1], "silu")
    (y * torch.linspace(-1, 1, 32)).square().sum().backward()
    torch.testing.assert_close(y.detach(), want["y"])
    torch.testing.assert_close(x.grad, want["x"])
    torch.testing.assert_close(mlp[0]._probe.grad, want["probe 0"])


def test_a_bias_that_somebody_else_adds() -> None:
    torch.manual_seed(0)
    fc1, fc2 = (CMSBlockLinear(*size, tile_size=8) for size in ((16, 32), (32, 16)))
    x = torch.randn(5, 16)
    assert mlp_is_fused(fc1, fc2)
    product = block_sparse_mlp(x, fc1, fc2, add_bias=False)
    torch.testing.assert_close(product + fc2.bias, block_sparse_mlp(x, fc1, fc2))
    hook = fc2.register_forward_hook(lambda *_: None)
    assert not mlp_is_fused(fc1, fc2)
    with pytest.raises(ValueError, match=r"add_bias \(=False\) must be True for layers"):
        block_sparse_mlp(x, fc1, fc2, add_bias=False)
    hook.remove()
    assert mlp_is_fused(fc1, fc2)
    assert not mlp_is_fused(fc1, nn.Linear(32, 16))
