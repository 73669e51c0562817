"""DeepNestedOptimizer in several processes (gloo): the ranks stay identical, to the bit."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
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


def build() -> nn.Sequential:
    torch.manual_seed(0)
    loose = ScoringConfig(max_swap_frac=0.2, max_row_swap_frac=0.5, swap_threshold=1.0)
    sparse = CMSBlockLinear(32, 64, tile_size=8, row_group=1, scoring=loose)
    return nn.Sequential(sparse, nn.GELU(), nn.Linear(64, 32))


def make(model: nn.Module) -> DeepNestedOptimizer:
    return DeepNestedOptimizer(
        model,
        lr=1e-2,
        cms=ContinuumMemorySystem((1, 2, 4), {"2.*": 1}),
        deep_momentum=True,
        controller=LearningRateController(period=2),
    )


def worker(rank: int, port: int, out: Path) -> None:
    """Data parallel training by hand: wrapping the model would import torch's compiler."""
    dist.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        net = build()
        optimizer = make(net)
        swaps = 0
        for step in range(8):
            generator = torch.Generator().manual_seed(1000 * rank + step)
            x = torch.randn(8, 32, generator=generator)
            loss_of(net, x).backward()
            for parameter in net.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
            report = optimizer.step()
            swaps += sum(result.num_swaps for result in report.swaps.values())
            optimizer.zero_grad()
            if step == 5:
                optimizer.meta_update(x, [x * 0.5], loss_fn=loss_of)
        assert optimizer.controller is not None
        factors = torch.tensor(optimizer.controller.factors)
        torch.save([net.state_dict(), factors, swaps], out / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_ranks_stay_identical_with_every_option(tmp_path: Path) -> None:
    port = free_port()
    # this process is rank 0: importing torch once more would take longer than the test
    other = subprocess.Popen([sys.executable, __file__, str(port), str(tmp_path)])
    try:
        worker(0, port, tmp_path)
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[2] == second[2] > 0
    assert torch.equal(first[1], second[1])
    for name, value in first[0].items():
        if "scorer" not in name:  # statistics between two decisions are a rank's own
            assert torch.equal(value, second[0][name]), name


def test_a_wrapped_model_is_the_same_as_a_bare_one() -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        nets = [build(), build()]
        models = [nets[0], DistributedDataParallel(nets[1])]
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        losses = []
        for model in models:
            optimizer = make(model)
            assert [group["level"] for group in optimizer.param_groups] == [0, 0, 1, 1]
            for _ in range(4):
                loss_of(model, x).backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(optimizer.meta_update(x, [x, x], loss_fn=loss_of).val_loss)
    finally:
        dist.destroy_process_group()
    assert losses[0] == losses[1]
    for name, value in nets[0].state_dict().items():
        assert torch.equal(value, nets[1].state_dict()[name]), name


if __name__ == "__main__":  # the other rank
    worker(1, int(sys.argv[1]), Path(sys.argv[2]))
