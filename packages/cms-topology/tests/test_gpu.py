"""The lifecycle on a GPU: no host synchronisation, and the topology a CPU finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager, sparse_layers

pytestmark = pytest.mark.gpu

LOOSE = ScoringConfig(max_swap_frac=0.2, max_row_swap_frac=0.5, swap_threshold=1.0)


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


EXPLORING = ScoringConfig(keep_score="magnitude", birth="zeros", min_swap_frac=0.01)


def build(dtype: torch.dtype = torch.float32, scoring: ScoringConfig = LOOSE) -> nn.Sequential:
    torch.manual_seed(0)
    kwargs = {"tile_size": 16, "row_group": 2, "scoring": scoring, "dtype": dtype}
    return nn.Sequential(
        CMSBlockLinear(128, 256, **kwargs), nn.GELU(), CMSBlockLinear(256, 128, **kwargs)
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, manager: TopologyManager, steps: int
) -> int:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    swaps = 0
    for _ in range(steps):
        x = torch.randn(64, 128, generator=generator) * torch.logspace(-1, 0.5, 128)
        x = x.to(device)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        swaps += sum(result.num_swaps for result in manager.step().swaps.values())
        optimizer.zero_grad()
    return swaps


class Halves(nn.Sequential):
    """A model whose first layer is on the CPU, the second on the GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](self[1](self[0](x)).cuda()).cpu()


@pytest.mark.parametrize("score", ["gradient", "outer", "loss"])
def test_a_model_on_several_devices(score: str) -> None:
    keep = "loss" if score == "loss" else "gradient"
    scoring = dataclasses.replace(LOOSE, candidate_score=score, keep_score=keep)
    plain, split = build(scoring=scoring), Halves(*build(scoring=scoring))
    split[2].cuda()
    ways = []
    for model in (plain, split):
        optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2)
        logged: list[dict[str, float]] = []
        logger = SimpleNamespace(log=lambda metrics, step, to=logged: to.append(dict(metrics)))
        manager = TopologyManager(model, optimizer, periods=(1, 2, 4), logger=logger)
        assert train(model, optimizer, manager, 8) > 0
        assert manager.swap_rate
        assert len(logged) == 2
        ways.append([x.col_indices.cpu() for x in sparse_layers(model).values()])
    for one, other in zip(*ways, strict=True):
        assert (one == other).float().mean() > 0.95


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
def test_the_same_topology_as_on_the_cpu(options: dict[str, bool]) -> None:
    topologies = []
    for device in ("cpu", "cuda"):
        model = build().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
        assert train(model, optimizer, manager, 8) > 0
        topologies.append([x.col_indices.cpu() for x in sparse_layers(model).values()])
    for on_cpu, on_gpu in zip(*topologies, strict=True):
        # scores differ in the last bits, so a near-tie may fall otherwise: nearly all must agree
        assert (on_cpu == on_gpu).float().mean() > 0.95


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_device_while_the_first_is_current() -> None:
    found = []
    for device in ("cuda:0", "cuda:1"):
        model = build().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
        assert train(model, optimizer, manager, 8) > 0
        assert torch.cuda.current_device() == 0
        found.append([tensor.cpu() for tensor in model.state_dict().values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scoring", [LOOSE, EXPLORING])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
def test_the_clock_does_not_wait_for_the_device(
    options: dict[str, bool], scoring: ScoringConfig
) -> None:
    model = nn.Sequential(build(scoring=scoring), build(scoring=scoring)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    train(model, optimizer, manager, 4)  # first use of kernels and allocations
    for _ in range(4):
        model(torch.randn(64, 128, device="cuda")).square().mean().backward()
        optimizer.step()
        with no_host_synchronisation():
            report = manager.step()
        optimizer.zero_grad()
    assert report.swaps


def test_bf16_layers_learn_and_swap() -> None:
    model = build(torch.bfloat16).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    for _ in range(8):
        x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
        model(x).square().mean().backward()
        optimizer.step()
        manager.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(layer.scorer.block_age.max() == 8 for layer in manager.layers.values())
