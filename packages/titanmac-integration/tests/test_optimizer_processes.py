"""DeepNestedOptimizer in several processes (gloo): the ranks stay identical, to the bit."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cms_topology import CMSBlockLinear, ScoringConfig
from titanmac_integration import (
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    LearningRateController,
)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.roll(1, 1)).square().mean()


def worker(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        loose = ScoringConfig(max_swap_frac=0.2, max_row_swap_frac=0.5, swap_threshold=1.0)
        net = nn.Sequential(
            CMSBlockLinear(32, 64, tile_size=8, row_group=1, scoring=loose),
            nn.GELU(),
            nn.Linear(64, 32),
        )
        model = DistributedDataParallel(net)
        optimizer = DeepNestedOptimizer(
            model,
            lr=1e-2,
            cms=ContinuumMemorySystem((1, 2, 4), {"2.*": 1}),
            deep_momentum=True,
            controller=LearningRateController(period=2),
        )
        swaps = 0
        for step in range(12):
            generator = torch.Generator().manual_seed(1000 * rank + step)
            x = torch.randn(8, 32, generator=generator)
            loss_of(model, x).backward()
            report = optimizer.step()
            swaps += sum(result.num_swaps for result in report.swaps.values())
            optimizer.zero_grad()
            if step % 4 == 3:
                optimizer.meta_update(x, [x * 0.5], loss_fn=loss_of)
        assert optimizer.controller is not None
        factors = torch.tensor(optimizer.controller.factors)
        torch.save([net.state_dict(), factors, swaps], out / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_stay_identical_with_every_option(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, tmp_path), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[2] == second[2] > 0
    assert torch.equal(first[1], second[1])
    for name, value in first[0].items():
        if "scorer" not in name:  # statistics between two decisions are a rank's own
            assert torch.equal(value, second[0][name]), name
