"""torch.compile of the layer."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter

from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager, sparse_layers


def model(candidate_score: str = "gradient") -> nn.Sequential:
    torch.manual_seed(0)
    scoring = ScoringConfig(
        candidate_score=candidate_score,
        max_swap_frac=0.3,
        max_row_swap_frac=0.5,
        swap_threshold=1.0,
    )
    return nn.Sequential(
        CMSBlockLinear(32, 64, tile_size=8, row_group=1, scoring=scoring),
        nn.GELU(),
        CMSBlockLinear(64, 32, tile_size=8, row_group=1, scoring=scoring),
    )


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("candidate_score", ["gradient", "outer"])
def test_fullgraph_equals_eager_through_topology_steps(candidate_score: str) -> None:
    eager, compiled_model = model(candidate_score), model(candidate_score)
    compiled = torch.compile(compiled_model, fullgraph=True)
    managers = [
        TopologyManager(m, periods=(1, 2, 4), sample_steps=2) for m in (eager, compiled_model)
    ]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (eager, compiled_model)]
    generator = torch.Generator().manual_seed(1)
    swaps = 0
    for _ in range(8):
        x = torch.randn(6, 32, generator=generator) * torch.linspace(0.2, 2, 32)
        outputs = [f(x) for f in (eager, compiled)]
        torch.testing.assert_close(*outputs)
        for output, optimizer, manager in zip(outputs, optimizers, managers, strict=True):
            output.square().sum().backward()
            optimizer.step()
            report = manager.step()
            optimizer.zero_grad()
            swaps += sum(result.num_swaps for result in report.swaps.values())
    assert swaps > 0
    for name, layer in sparse_layers(eager).items():
        assert torch.equal(layer.col_indices, sparse_layers(compiled_model)[name].col_indices)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    layer = CMSBlockLinear(32, 48, tile_size=8)
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(
        layer, (torch.randn(3, 32),), dynamic_shapes=({0: tokens},), strict=strict
    )
    assert "_probe" not in exported.constants
    x = torch.randn(7, 32)
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_topology_steps_do_not_recompile() -> None:
    net = model()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    layers = list(sparse_layers(net).values())
    for layer in layers:
        layer.collect_candidates = True

    def step() -> int:
        compiled(torch.randn(6, 32) * torch.linspace(0.2, 2, 32)).square().sum().backward()
        swapped = 0
        for layer in layers:
            layer.accumulate_scores()
            swapped += layer.topology_step(global_step=1).num_swaps
        net.zero_grad()
        return swapped

    assert step() > 0
    first = counter.frame_count
    assert sum(step() for _ in range(4)) > 0
    assert counter.frame_count == first == 1


def test_the_manager_costs_at_most_one_more_graph() -> None:
    """One graph with, one without statistics of absent blocks; none more, however long it runs."""
    net = model()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    manager = TopologyManager(net, periods=(1, 2, 4))
    counts = []
    for _ in range(12):
        compiled(torch.randn(6, 32)).square().sum().backward()
        manager.step()
        net.zero_grad()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[3] == 2
