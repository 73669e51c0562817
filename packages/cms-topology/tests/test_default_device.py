"""`torch.set_default_device`, as notebooks call it, decides where new models are and nothing else.

"meta" stands in for a device that is not the model's: it has no content, so whatever is made there
by mistake fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockell_format.snapshots import SnapshotWriter, open_run
from cms_topology import (
    BlockBank,
    CMSBlockLinear,
    Consolidation,
    RetentionGuard,
    ScoringConfig,
    TopologyManager,
    consolidate,
    densify,
    grow_for_task,
    make_probes,
    sample_tokens,
)


@pytest.fixture(autouse=True)
def _elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def layers(**scoring: Any) -> nn.Sequential:
    config = ScoringConfig(max_swap_frac=0.2, swap_threshold=1.0, **scoring)
    settings: dict[str, Any] = {"tile_size": 8, "row_group": 1, "scoring": config, "device": "cpu"}
    return nn.Sequential(
        *(CMSBlockLinear(32, 32, density=0.5, max_density=0.75, **settings) for _ in range(2))
    )


def batch() -> Tensor:
    return torch.randn(16, 32, device="cpu")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.roll(1, 1)).square().mean()


@pytest.mark.parametrize("score", ["gradient", "outer", "loss"])
def test_the_life_of_blocks(score: str, tmp_path: Path) -> None:
    kinds = {"candidate_score": score, "keep_score": "loss" if score == "loss" else "gradient"}
    model = layers(**kinds)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)  # Adam counts on "meta"
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    with SnapshotWriter(tmp_path / "run", layers=manager.layer_table()) as writer:
        manager.writer = manager.logger = writer
        for _ in range(8):
            loss_of(model, batch()).backward()
            optimizer.step()
            manager.step()
            optimizer.zero_grad()
    assert open_run(tmp_path / "run").steps == [4, 8]
    for layer in manager.layers.values():
        assert layer.grow(0.75) == 1
        assert layer.get_topology_stats().density == 0.75
        assert layer.get_block_age_distribution().counts.sum() == layer.R * layer.num_live
    y = model(x := batch())
    model.load_state_dict(model.state_dict())
    manager.load_state_dict(manager.state_dict())
    assert torch.equal(model(x), y)
    torch.testing.assert_close(densify(model)(x), y)


def test_retention() -> None:
    model, old = layers(), batch()
    memory = consolidate(model, [old], task="a", loss_fn=loss_of)
    before = model(old).detach()
    grow_for_task(model, memory, density=0.75)
    assert torch.equal(model(old), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    guard = RetentionGuard(model, optimizer, memory, drift=1e-3)
    bank = BlockBank()
    manager = TopologyManager(
        model, optimizer, periods=(1, 2, 4), retention=memory, drop_cost=0.1, bank=bank
    )
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
        manager.step()
    assert guard.metrics()
    assert bank.recall("0", model[0]) >= 0
    assert Consolidation.from_tensors(memory.to_tensors()).tasks == ["a"]


def test_probes() -> None:
    model = nn.Sequential(nn.Embedding(32, 32, device="cpu"), *layers())

    def written(model: nn.Module, generator: torch.Generator) -> Tensor:
        first = torch.zeros(2, 1, dtype=torch.int64, device="cpu")
        return sample_tokens(model, first, 4, generator=generator)

    probes = make_probes(model, written, confidence=0.0)
    assert probes.inputs.shape == (2, 4)
