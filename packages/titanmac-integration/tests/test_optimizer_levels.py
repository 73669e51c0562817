"""Slow levels: they stand still, then move by the mean gradient; memory only where it is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cms_topology import reset_optimizer_state
from titanmac_integration import ContinuumMemorySystem, DeepNestedOptimizer

SUM = "cms_gradient"


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)


def make(model: nn.Module, period: int = 5, **arguments: object) -> DeepNestedOptimizer:
    cms = ContinuumMemorySystem((1, period, 4 * period), {"2.*": 1})
    return DeepNestedOptimizer(model, lr=0.05, weight_decay=0.5, cms=cms, **arguments)  # type: ignore[arg-type]


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    x = x.to(next(model.parameters()).dtype)
    (model(x) - x.cos()).square().mean().backward()


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"deep_momentum": True}], ids=str)
def test_slow_parameters_stand_still_between_their_updates(settings: dict[str, object]) -> None:
    """Weight decay included, to the bit; fast ones move at every step."""
    model = make_net()
    optimizer = make(model, **settings)
    for step in range(1, 16):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        backward(model, step)
        optimizer.step()
        for name, p in model.named_parameters():
            moved = not torch.equal(p, before[name])
            assert moved == (name.startswith("0") or step % 5 == 0), (name, step)
        optimizer.zero_grad()


def test_the_update_is_adamws_with_the_mean_gradient() -> None:
    model = make_net()
    optimizer = make(model)
    slow = model[2].weight
    twin = nn.Parameter(slow.detach().clone())
    reference = torch.optim.AdamW([twin], lr=0.05, weight_decay=0.5)
    gradients: list[Tensor] = []
    for step in range(1, 21):
        backward(model, step)
        assert slow.grad is not None
        gradients.append(slow.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            twin.grad = torch.stack(gradients[-5:]).sum(0) / 5
            reference.step()
        torch.testing.assert_close(slow, twin, rtol=1e-6, atol=1e-7)
    assert float(optimizer.state[slow]["step"]) == 4


def test_gradients_are_left_as_they_were() -> None:
    """The topology, gradient clipping and zero_grad(set_to_none=False) see the step's own."""
    model = make_net()
    optimizer = make(model, period=2)
    for step in range(1, 5):
        backward(model, step)
        own = [p.grad for p in model.parameters()]
        copies = [g.clone() for g in own if g is not None]
        optimizer.step()
        for p, g, copied in zip(model.parameters(), own, copies, strict=True):
            assert p.grad is g
            assert torch.equal(g, copied)
        optimizer.zero_grad(set_to_none=False)


def test_sums_exist_only_where_a_level_is_slow_and_only_while_needed() -> None:
    model = make_net()
    optimizer = make(model)
    for step in range(1, 11):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        holders = {n for n, p in model.named_parameters() if SUM in optimizer.state[p]}
        assert holders == (set() if step % 5 == 0 else {"2.weight", "2.bias"})


def test_a_parameter_without_gradient_is_left_out() -> None:
    model = make_net()
    unused = nn.Linear(3, 3)
    model.add_module("2u", unused)
    optimizer = DeepNestedOptimizer(
        model, cms=ContinuumMemorySystem((1, 2, 4), {"2u.*": 1, "2.*": 1}), weight_decay=0.5
    )
    before = unused.weight.detach().clone()
    for _ in range(4):
        x = torch.randn(8, 4)
        model[2](model[1](model[0](x))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(unused.weight, before)
    assert unused.weight not in optimizer.state


def test_a_gradient_of_some_steps_only_is_a_mean_over_the_period() -> None:
    """The other steps' gradient was zero."""
    model = make_net()
    optimizer = make(model, period=4)
    bias = model[2].bias
    for step in range(1, 5):
        backward(model, step)
        if step != 2:
            bias.grad = None
        else:
            bias.grad = torch.ones(4)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.state[bias]["exp_avg"], torch.full((4,), 0.1 / 4))


def test_small_gradients_of_bfloat16_are_not_lost() -> None:
    model = make_net(torch.bfloat16)
    optimizer = make(model, period=100)
    bias = model[2].bias
    for _ in range(99):
        backward(model, 0)
        bias.grad = torch.full_like(bias, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[bias][SUM].dtype == torch.float32
    assert optimizer.state[bias][SUM].tolist() == [99.0] * 4
    twin = make_net(torch.bfloat16)
    other = make(twin, period=100)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[twin[2].bias][SUM].dtype == torch.float32
    assert other.state[twin[2].bias][SUM].tolist() == [99.0] * 4
    other.state[twin[2].bias][SUM].zero_()
    assert optimizer.state[bias][SUM].tolist() == [99.0] * 4, "the state is a copy"


def test_replaced_blocks_lose_what_they_had_gathered() -> None:
    values = nn.Parameter(torch.zeros(2, 3, 4, 4))
    optimizer = DeepNestedOptimizer([{"params": [values], "level": 1}])
    values.grad = torch.ones_like(values)
    optimizer.step()
    swapped = torch.tensor([[True, False, False], [False, False, True]])
    reset_optimizer_state([optimizer], values, swapped)
    gathered = optimizer.state[values][SUM]
    assert float(gathered[swapped].sum()) == 0
    assert bool((gathered[~swapped] == 1).all())


def test_the_rate_of_a_level_can_be_scaled() -> None:
    lengths = []
    for scale in (1.0, 3.0):
        model = make_net()
        cms = ContinuumMemorySystem((1, 2, 4), {"2.*": 1}, lr_scales=(1, scale, 1))
        optimizer = DeepNestedOptimizer(model, lr=0.01, weight_decay=0, cms=cms)
        start = model[2].weight.detach().clone()
        for step in (1, 2):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        lengths.append(float((model[2].weight.detach() - start).norm()))
        assert [group["lr"] for group in optimizer.param_groups] == [0.01] * 4
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=1e-4)


def test_sparse_gradients_are_refused_on_slow_levels() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = DeepNestedOptimizer([{"params": embedding.parameters(), "level": 1}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradients \(sparse\) must be dense on slow levels"):
        optimizer.step()
    assert embedding.weight.grad is not None, "gradients are put back after an error, too"
