from __future__ import annotations

import gc
import importlib.util
import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cms_topology import CMSBlockLinear, ScoringConfig


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


Backward = Callable[..., Tensor]


@pytest.fixture(scope="session")
def backward() -> Backward:
    """One backward pass with inputs whose scale varies by block column and output row."""

    def run(layer: CMSBlockLinear, tokens: int = 32) -> Tensor:
        layer.zero_grad()
        scale = torch.linspace(0.1, 3.0, layer.in_features)
        y = layer(torch.randn(tokens, layer.in_features) * scale)
        weight = torch.linspace(0.5, 2.0, layer.out_features)
        loss = (y * torch.randn(tokens, layer.out_features) * weight).sum()
        loss.backward()
        return loss.detach()

    return run


@pytest.fixture
def trained_layer(backward: Backward) -> Callable[..., CMSBlockLinear]:
    """A layer that has seen a few real backward passes, so that scores and statistics exist."""

    def make(steps: int = 3, **kwargs: object) -> CMSBlockLinear:
        kwargs.setdefault("scoring", ScoringConfig(max_swap_frac=0.3, max_row_swap_frac=0.5))
        layer = CMSBlockLinear(96, 64, tile_size=8, density=0.5, **kwargs)  # type: ignore[arg-type]
        for _ in range(steps):
            backward(layer)
            layer.accumulate_scores()
        return layer

    return make


@pytest.fixture(scope="session")
def run_alone() -> Callable[[str, Mapping[str, str]], None]:
    """Runs a check of Triton kernels in a process of its own, since its interpreter takes the
    compiler's place there. The check is told the device and has to print "agrees"."""

    def run(check: str, environment: Mapping[str, str]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", check, "cuda" if torch.cuda.is_available() else "cpu"],
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == "agrees", done.stderr[-2000:]

    return run


def _rank(
    rank: int, size: int, port: int, job: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    try:
        job(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _fork(size: int, job: Callable[..., None], *arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, size, port, job, arguments))
        for rank in range(size)
    ]
    # garbage of other tests may hold threads: a child lacks them, and its collector would wait
    gc.collect()
    gc.freeze()
    for process in processes:
        process.start()
    gc.unfreeze()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., None]:
    """Runs `job(rank, out, *texts)` in `size` forked processes of one group; all must succeed."""

    def run(size: int, job: Callable[..., None], out: Path, *texts: str) -> None:
        if not torch.cuda.is_available():
            _fork(size, job, out, *texts)
            return
        # a process that has asked for a GPU, or made a backward pass beside one, cannot be forked
        subprocess.run(
            [sys.executable, __file__, inspect.getfile(job), job.__name__, str(size), out, *texts],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            check=True,
        )

    return run


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("jobs", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    jobs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(jobs)
    _fork(int(sys.argv[3]), getattr(jobs, sys.argv[2]), Path(sys.argv[4]), *sys.argv[5:])
