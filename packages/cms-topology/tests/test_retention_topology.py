"""Growth, dropping, compensation and the bank, on the inputs of an old task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cms_topology import (
    BlockBank,
    CMSBlockLinear,
    Consolidation,
    RetentionGuard,
    ScoringConfig,
    TopologyManager,
    absorb,
    changed_blocks,
    consolidate,
    grow_for_task,
    removal_cost,
    sparse_layers,
    used_blocks,
)

IN, OUT, TILE = 48, 32, 8


def old_inputs(seed: int, tokens: int = 400) -> Tensor:
    """Correlated inputs: 20 hidden causes, some noise, energy that varies by column."""
    mixing = torch.randn(20, IN, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 20, generator=generator) @ mixing
    x = x + 0.3 * torch.randn(tokens, IN, generator=generator)
    return x * torch.linspace(0.3, 1.5, IN)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :OUT]).square().mean()


def make(**kwargs: Any) -> tuple[nn.Sequential, Consolidation]:
    torch.manual_seed(0)
    scoring = ScoringConfig(
        max_swap_frac=0.3, max_row_swap_frac=0.5, swap_threshold=1.0, grace_decisions=0
    )
    settings: dict[str, Any] = {"tile_size": TILE, "density": 0.5, "row_group": 2}
    layer = CMSBlockLinear(IN, OUT, scoring=scoring, **{**settings, **kwargs})
    model = nn.Sequential(layer)
    return model, consolidate(model, [old_inputs(1)], "a", loss_fn=loss_of)


def train(model: nn.Module, manager: TopologyManager, steps: int) -> int:
    (optimizer,) = manager._optimizers
    swaps = 0
    for step in range(steps):
        x = torch.randn(64, IN, generator=torch.Generator().manual_seed(100 + step))
        x = x * torch.linspace(0.1, 3.0, IN)  # so that some absent column is better
        optimizer.zero_grad()
        (model(x) - x[:, -OUT:]).square().mean().backward()
        optimizer.step()
        swaps += sum(result.num_swaps for result in manager.step().swaps.values())
    return swaps


# -- growth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer", ["energy", "freedom", "random"])
def test_growth_changes_no_output_by_a_bit_and_clears_the_optimizer(prefer: str) -> None:
    model, memory = make(max_density=0.9)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, old_inputs(1)).backward()
    optimizer.step()
    optimizer.state[model[0].values]["exp_avg"].fill_(1.0)
    x = old_inputs(2)
    before = model(x).detach()
    generator = torch.Generator().manual_seed(0)
    grown = grow_for_task(
        model, memory, 0.8, prefer=prefer, optimizers=optimizer, generator=generator
    )
    assert grown == {"0": 2}
    assert model[0].num_live == 5
    assert torch.equal(model(x), before)
    momentum = optimizer.state[model[0].values]["exp_avg"]
    assert momentum[:, :3].all()
    assert not momentum[:, 3:].any()
    assert grow_for_task(model, memory, 0.8) == {"0": 0}


def test_growth_by_energy_takes_the_quietest_columns() -> None:
    model, memory = make(max_density=1.0, row_group=1)
    layer = model[0]
    before = layer.col_indices.clone()
    grow_for_task(model, memory, 4 / 6)
    K = memory.layers["0.values"].covariance.diagonal().view(6, TILE).sum(1)
    for row in range(layer.R):
        absent = [c for c in range(6) if c not in before[row, :3].tolist()]
        assert layer.col_indices[row, 3] == min(absent, key=lambda c: float(K[c]))


def test_growth_by_freedom_takes_what_the_row_predicts_best() -> None:
    model, memory = make(max_density=1.0, row_group=1)
    layer = model[0]
    x = old_inputs(1).double()
    before = layer.col_indices.clone()
    grow_for_task(model, memory, 4 / 6, prefer="freedom")
    for row in range(layer.R):
        tiles = x.view(-1, 6, TILE)
        have = tiles[:, before[row, :3].long()].flatten(1)
        left = {}
        for c in set(range(6)) - set(before[row, :3].tolist()):
            fit = torch.linalg.lstsq(have, tiles[:, c]).solution
            left[c] = float((tiles[:, c] - have @ fit).square().sum())
        assert int(layer.col_indices[row, 3]) == min(left, key=lambda c: left[c])


def test_growth_says_what_is_wrong() -> None:
    model, memory = make(max_density=0.9)
    with pytest.raises(ValueError, match=r"prefer \(='best'\) must be one of 'energy'"):
        grow_for_task(model, memory, 0.8, prefer="best")
    with pytest.raises(ValueError, match=r"must be between the present one .* and max_density"):
        grow_for_task(model, memory, 1.0)
    with pytest.raises(ValueError, match="has no CMSBlockLinear layer to grow"):
        grow_for_task(nn.Linear(4, 4), memory, 0.8)


@pytest.mark.parametrize("attached_before", [True, False])
def test_a_grown_layer_learns_without_disturbing_the_old_outputs(attached_before: bool) -> None:
    model, memory = make(max_density=0.9)
    x = old_inputs(1)
    before = model(x).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    kwargs: dict[str, Any] = {"drift": 1e-9, "eps": 1e-3}
    if attached_before:
        guard = RetentionGuard(model, optimizer, memory, **kwargs)
    grow_for_task(model, memory, 0.8, optimizers=optimizer)
    if not attached_before:
        guard = RetentionGuard(model, optimizer, memory, **kwargs)
    for step in range(10):
        y = torch.randn(64, IN, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss_of(model, y).backward()
        optimizer.step()
    assert model[0].values[:, 3:5].any()
    assert guard.drift()["0.values"] < 1.01e-9
    error = (model(x) - before).square().sum() / before.square().sum()
    assert float(error.detach()) < 1e-8


# -- dropping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compensated", [True, False])
def test_removal_cost_is_the_second_order_rise_of_the_loss(compensated: bool) -> None:
    model, memory = make(row_group=1)
    layer = model[0]
    x = old_inputs(1).double()
    cost = removal_cost(layer, memory.layers["0.values"], compensated=compensated)
    error = memory.layers["0.values"].error
    assert error is not None
    for row in range(layer.R):
        tiles = x.view(-1, 6, TILE)[:, layer.col_indices[row].long()]
        for slot in range(layer.K):
            w = layer.values[row, slot].detach().double()
            lost = tiles[:, slot]
            if compensated:
                rest = tiles[:, [s for s in range(layer.K) if s != slot]].flatten(1)
                lost = lost - rest @ torch.linalg.lstsq(rest, lost).solution
            expected = 0.5 * (lost @ w.T).square().mean(0).sum() * error[row]
            # the ridge keeps a thousandth of the energy from being explained
            assert float(cost[row, slot]) == pytest.approx(float(expected), rel=0.05, abs=1e-12)


def test_compensation_reduces_the_error_on_held_out_inputs() -> None:
    model, memory = make()
    held_out = old_inputs(2)
    before = model(held_out).detach()
    errors = {}
    for compensate in (True, False):
        copy, _ = make()
        copy.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.0)
        manager = TopologyManager(
            copy, optimizer, periods=(1, 1, 2), retention=memory, drop_cost=1e9,
            compensate=compensate,
        )  # fmt: skip
        assert train(copy, manager, 2) > 0
        errors[compensate] = float((copy(held_out) - before).square().mean().detach())
    assert 0 < errors[True] < 0.5 * errors[False]


def test_locked_blocks_stay_and_later_ones_may_go() -> None:
    model, memory = make(max_density=0.9)
    grow_for_task(model, memory, 0.8)
    layer = model[0]
    locked = layer.col_indices[:, :3].clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    manager = TopologyManager(model, optimizer, periods=(1, 1, 2), retention=memory)
    assert train(model, manager, 8) > 0
    assert torch.equal(layer.col_indices[:, :3], locked)


@pytest.mark.parametrize("zeroed", [0.0, 1.0])
def test_a_block_without_effect_may_be_dropped(zeroed: float) -> None:
    model, _ = make(row_group=1)
    layer = model[0]
    with torch.no_grad():
        layer.values[:, 0] *= zeroed
    memory = consolidate(model, [old_inputs(1)], "a", loss_fn=loss_of)
    manager = TopologyManager(
        model, torch.optim.SGD(model.parameters(), lr=0.0), periods=(1, 1, 2), retention=memory,
        drop_cost=1e-12,
    )  # fmt: skip
    assert (train(model, manager, 4) > 0) == (zeroed == 0.0)


def test_the_guard_follows_a_swap_and_its_drift_is_the_true_one() -> None:
    model, memory = make()
    x = old_inputs(1)
    before = model(x).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard = RetentionGuard(model, optimizer, memory, drift=100.0, eps=math.inf)
    manager = TopologyManager(
        model, optimizer, periods=(1, 1, 4), retention=memory, drop_cost=1e9,
        correct_newborn_steps=False,
    )  # fmt: skip
    assert train(model, manager, 9) > 0
    bias = model[0].bias.detach()
    error = (model(x).detach() - before).square().sum() / (before - bias).square().sum()
    assert guard.drift()["0.values"] == pytest.approx(float(error), rel=0.02)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_absorption_is_least_squares(seed: int, read: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(8, 8, generator=generator, dtype=torch.float64)
    K = x.T @ x / 50
    columns = torch.randperm(8, generator=generator)[:read]
    lost = torch.randn(1, rows, 8, generator=generator, dtype=torch.float64)
    lost[:, :, columns] = 0
    result = absorb(K, columns[None], lost, ridge=0.0)
    target = x @ lost[0].T
    fit = torch.linalg.lstsq(x[:, columns], target).solution
    error = (target - x[:, columns] @ fit).square().sum() / 50
    made = (target - x[:, columns] @ result.increment[0].T).square().sum() / 50
    torch.testing.assert_close(made, error, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(result.leftover[0], error, rtol=1e-5, atol=1e-8)


# -- the bank ---------------------------------------------------------------------------------


def test_dropped_blocks_come_back_to_the_bit() -> None:
    model, memory = make(max_density=1.0)
    layer = model[0]
    original = {
        (row, int(c)): layer.values[row, slot].detach().clone()
        for row in range(layer.R)
        for slot, c in enumerate(layer.col_indices[row, :3])
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bank = BlockBank()
    bank.task = "b"
    manager = TopologyManager(
        model, optimizer, periods=(1, 1, 2), retention=memory, drop_cost=1e9, compensate=False,
        bank=bank,
    )  # fmt: skip
    swaps = train(model, manager, 2)
    assert len(bank) == swaps > 0
    assert bank.num_bytes == swaps * TILE * TILE * 4
    assert {b.task for b in bank.blocks} == {"b"}
    assert {b.age for b in bank.blocks} == {2}
    restored = BlockBank()
    restored.load_state_dict(bank.state_dict())
    layer.grow(1.0)
    assert restored.recall("0", layer, task="a") == 0
    assert restored.recall("0", layer, task="b", optimizers=[optimizer]) == swaps
    assert len(restored) == 0
    for (row, column), values in original.items():
        slot = layer.col_indices[row].tolist().index(column)
        assert torch.equal(layer.values[row, slot], values)


def test_the_bank_forgets_the_oldest_first() -> None:
    model, memory = make()
    bank = BlockBank(capacity=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager = TopologyManager(
        model, optimizer, periods=(1, 1, 2), retention=memory, drop_cost=1e9, bank=bank
    )
    assert train(model, manager, 2) == 2
    assert [block.row % 2 for block in bank.blocks] == [1]  # the second row of its group
    with pytest.raises(ValueError, match=r"capacity \(=0\) must be at least 1"):
        BlockBank(0)


def test_managers_without_retention_are_not_changed_by_it() -> None:
    assert sparse_layers(make()[0])["0"].scorer.config.birth == "kaiming"
    with pytest.raises(ValueError, match=r"drop_cost \(=-1\) must be 0 nats or more"):
        TopologyManager(make()[0], drop_cost=-1)


# -- masks ------------------------------------------------------------------------------------


def test_masks_hold_the_blocks_that_matter() -> None:
    model, memory = make()
    layer, known = model[0], memory.layers["0.values"]
    assert known.usage is not None
    assert known.live is not None
    used = used_blocks(known)
    assert not (used & ~known.live).any()
    live = known.usage * known.live
    assert live[used].sum() >= 0.9 * live.sum()
    assert live[used].sum() - live[used].min() < 0.9 * live.sum()  # none too many
    before = layer.to_dense().detach()
    with torch.no_grad():
        layer.values[1, 2] += 1.0
    changed = changed_blocks(before, layer.to_dense(), TILE)
    assert changed.nonzero().tolist() == [[1, int(layer.col_indices[1, 2])]]
    assert not changed_blocks(before, before, TILE).any()
    with pytest.raises(ValueError, match=r"share \(=0\) must be in \(0, 1\]"):
        used_blocks(known, share=0)
    with pytest.raises(ValueError, match="must be weights of one layer"):
        changed_blocks(before, before[:8], TILE)
    blind = consolidate(model, [old_inputs(1)], loss_fn=loss_of, usage="none")
    with pytest.raises(ValueError, match="must hold the usage of the blocks"):
        used_blocks(blind.layers["0.values"])
