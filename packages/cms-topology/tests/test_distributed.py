"""Several processes (gloo): the same topology on every rank, or an error that says where not."""

from __future__ import annotations

import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from blockell_format.snapshots import SnapshotWriter, open_run
from cms_topology import CMSBlockLinear, ScoringConfig, TopologyDivergenceError, TopologyManager


def build(candidate_score: str = "gradient") -> nn.Sequential:
    torch.manual_seed(0)
    scoring = ScoringConfig(
        candidate_score=candidate_score,
        max_swap_frac=0.2,
        max_row_swap_frac=0.5,
        swap_threshold=1.0,
    )
    return nn.Sequential(
        CMSBlockLinear(32, 64, tile_size=8, row_group=1, scoring=scoring),
        nn.GELU(),
        CMSBlockLinear(64, 32, tile_size=8, row_group=1, scoring=scoring),
    )


def train(model: nn.Module, manager: TopologyManager, rank: int, steps: int) -> None:
    optimizer = manager._optimizers[0]
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x = torch.randn(8, 32, generator=generator) * torch.linspace(0.2, 2, 32)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        manager.step()
        optimizer.zero_grad()


def manage(model: nn.Module, **kwargs: object) -> TopologyManager:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return TopologyManager(model, optimizer, periods=(1, 2, 4), **kwargs)  # type: ignore[arg-type]


def identical(rank: int, out: Path, candidate_score: str) -> None:
    ddp = DistributedDataParallel(build(candidate_score))  # default flags: buffers are broadcast
    manager = manage(ddp)
    writer = None
    if rank == 0:
        writer = SnapshotWriter(
            out / "run", layers=manager.layer_table(), world_size=dist.get_world_size()
        )
    manager.writer = writer
    train(ddp, manager, rank, 12)
    swaps = {name: layer.swap_rates() for name, layer in manager.layers.items()}
    sums = {name: layer.topology_checksum() for name, layer in manager.layers.items()}
    (out / f"{rank}.json").write_text(json.dumps({"checksums": sums, "swaps": swaps}))


def averaging(rank: int, out: Path, _: str) -> None:
    ddp = DistributedDataParallel(build("outer"))
    manager = manage(ddp)
    layer = manager.layers["0"]
    for _step in range(2):  # the second forward broadcasts rank 0's buffers
        ddp(torch.full((8, 32), rank + 1.0)).sum().backward()
        layer.accumulate_scores()
        ddp.zero_grad()
    layer.score_step()
    local = layer.scorer.activation_norm.clone()
    layer.sync_topology_scores()
    result = {"local": local.tolist(), "synced": layer.scorer.activation_norm.tolist()}
    (out / f"{rank}.json").write_text(json.dumps(result))


def diverging(rank: int, out: Path, _: str) -> None:
    model = build()
    manager = manage(model)  # not wrapped by DDP: nobody averages the gradients
    manager.writer = (
        SnapshotWriter(out / "run", layers=manager.layer_table(), world_size=dist.get_world_size())
        if rank == 0
        else None
    )
    with torch.no_grad():
        manager.layers["2"].col_indices.copy_(manager.layers["2"].col_indices.roll(rank, 1))
    message = "no error"
    try:
        train(model, manager, rank, 4)
    except TopologyDivergenceError as error:
        message = str(error)
    (out / f"{rank}.json").write_text(json.dumps(message))


def sharded(rank: int, out: Path, _: str) -> None:
    warnings.simplefilter("ignore")  # FSDP2 warns about views among a module's outputs
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    manager = manage(model)
    try:
        train(model, manager, rank, 1)
        message = "no error"
    except ValueError as error:
        message = str(error)
    (out / f"{rank}.json").write_text(json.dumps(message))


def _worker(
    rank: int, size: int, port: int, job: Callable[[int, Path, str], None], out: Path, kind: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    try:
        job(rank, out, kind)
    finally:
        dist.destroy_process_group()


def launch(job: Callable[[int, Path, str], None], out: Path, size: int = 2, kind: str = "") -> list:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")
    processes = [
        context.Process(target=_worker, args=(rank, size, port, job, out, kind))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("candidate_score", ["gradient", "outer"])
@pytest.mark.parametrize("size", [2, 4])
def test_topology_is_identical_on_all_ranks(
    tmp_path: Path, candidate_score: str, size: int
) -> None:
    results = launch(identical, tmp_path, size, candidate_score)
    assert all(result == results[0] for result in results)
    assert all(max(rates) > 0 for rates in results[0]["swaps"].values())
    run = open_run(tmp_path / "run")
    for digests in run.snapshot(12).checksums.values():
        assert len(digests) == size
        assert len(set(digests)) == 1


def test_statistics_are_averaged_over_ranks_and_not_broadcast(tmp_path: Path) -> None:
    first, second = launch(averaging, tmp_path)
    local = [torch.tensor(r["local"]) for r in (first, second)]
    torch.testing.assert_close(local[1], 2 * local[0])
    mean = (local[0] + local[1]) / 2
    for result in (first, second):
        torch.testing.assert_close(torch.tensor(result["synced"]), mean)


def test_divergence_is_an_error_and_on_record(tmp_path: Path) -> None:
    messages = launch(diverging, tmp_path)
    for message in messages:
        assert "layer '2' differs between ranks after the decision at step 4" in message
        assert "ranks [1] disagree with rank 0" in message
    checksums = open_run(tmp_path / "run").snapshot(4).checksums
    assert any(len(set(digests)) == 2 for digests in checksums.values())


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    for message in launch(sharded, tmp_path):
        assert "must be the layer's whole [R, K, B, B] = [8, 2, 8, 8] tensor" in message
        assert "use DistributedDataParallel" in message
