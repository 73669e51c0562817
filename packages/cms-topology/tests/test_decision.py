"""Layers decided together do what each of them does alone, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cms_topology import (
    CMSBlockLinear,
    ScoringConfig,
    TopologyManager,
    decision_generator,
    reset_optimizer_state,
    sparse_layers,
)
from cms_topology._decision import alike
from cms_topology._ordered_sum import ordered_sum

LOOSE = {"max_swap_frac": 0.2, "max_row_swap_frac": 0.5, "swap_threshold": 1.0}
CASES = {
    "gradient": {},
    "magnitude": {"keep_score": "magnitude", "birth": "zeros", "min_swap_frac": 0.05},
    "outer": {"candidate_score": "outer", "epsilon": 0.5},
    "taylor": {"keep_score": "taylor"},
    "nats": {"candidate_score": "loss", "keep_score": "loss"},
}


def build(config: ScoringConfig, row_group: int) -> nn.Sequential:
    torch.manual_seed(0)
    kwargs = {"tile_size": 8, "density": 0.4, "row_group": row_group, "scoring": config}
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [CMSBlockLinear(48, 80, **kwargs), nn.GELU()]
        layers += [CMSBlockLinear(80, 48, max_density=0.6, **kwargs)]
    return nn.Sequential(*layers)


def one_by_one(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, periods: tuple[int, int, int]
) -> None:
    """What `TopologyManager.step` does, layer after layer."""
    for name, layer in sparse_layers(model).items():
        layer.accumulate_scores()
        if step % periods[1] == 0:
            layer.score_step()
        if step % periods[2] == 0:
            generator = decision_generator(0, step, name)
            result = layer.topology_step(generator, step)
            reset_optimizer_state([optimizer], layer.values, result.swapped)


def same_gradients(target: nn.Module, source: nn.Module) -> None:
    """A GPU's gradients of two equal models may differ in the last bit."""
    pairs = list(zip(target.parameters(), source.parameters(), strict=True))
    for mine, theirs in zip(
        sparse_layers(target).values(), sparse_layers(source).values(), strict=True
    ):
        pairs.append((mine._probe, theirs._probe))
        if mine._fisher_probe is not None and theirs._fisher_probe is not None:
            pairs.append((mine._fisher_probe, theirs._fisher_probe))
    for one, other in pairs:
        one.grad = None if other.grad is None else other.grad.clone()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("row_group", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_together_is_one_by_one(case: str, row_group: int, device: str) -> None:
    together = build(ScoringConfig(**{**LOOSE, **CASES[case]}), row_group).to(device)
    alone = copy.deepcopy(together)
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True) for model in (together, alone)
    ]
    periods = (1, 2, 4)
    manager = TopologyManager(
        together, optimizers[0], periods=periods, sample_steps=2, correct_newborn_steps=False
    )
    assert len(alike(manager.layers.values())) == (6 if case == "nats" else 2)
    swaps = 0
    for step in range(1, 13):
        x = (torch.randn(33, 48) * torch.logspace(-1, 0.5, 48)).to(device)
        together.zero_grad()
        (together(x) - x.roll(1, 1)).square().mean().backward()
        same_gradients(alone, together)
        for optimizer in optimizers:
            optimizer.step()
        swaps += sum(result.num_swaps for result in manager.step().swaps.values())
        one_by_one(alone, optimizers[1], step, periods)
    assert swaps > 0
    for (name, one), (_, other) in zip(
        together.state_dict().items(), alone.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    for one, other in zip(
        sparse_layers(together).values(), sparse_layers(alone).values(), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one._index, other._index, strict=True))
        assert one.swap_rates() == other.swap_rates()
        states = [
            optimizer.state[layer.values]
            for optimizer, layer in zip(optimizers, (one, other), strict=True)
        ]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_order_of_a_sum_does_not_depend_on_what_is_beside_it() -> None:
    x = torch.randn(5, 37, 11)
    total = ordered_sum(x, 1)
    torch.testing.assert_close(total, x.sum(1))
    assert torch.equal(ordered_sum(x[2:3, :, 4:5].clone(), 1), total[2:3, 4:5])
    assert torch.equal(ordered_sum(x[:, :1], 1), x[:, 0])
    assert ordered_sum(x[:, :0], 1).abs().sum() == 0


def test_layers_of_other_shape_or_settings_are_decided_apart() -> None:
    def make(size: int = 16, **changes: object) -> CMSBlockLinear:
        return CMSBlockLinear(16, size, tile_size=8, **changes)  # type: ignore[arg-type]

    layers = [make(), make(24), make(), make(scoring=ScoringConfig(epsilon=0.0)), make()]
    layers += [make(dtype=torch.float64), make(24, row_group=1)]
    assert alike(layers) == [[0, 2, 4], [1], [3], [5], [6]]
