"""Several processes (gloo): the same topology on every rank, or an error that says where not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from blockell_format.snapshots import SnapshotWriter, open_run
from cms_topology import (
    CMSBlockLinear,
    ScoringConfig,
    TopologyDivergenceError,
    TopologyManager,
    densify,
    sparse_layers,
    sparsify,
)


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
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(model, manager, rank, 4)
    except TopologyDivergenceError as error:
        message = str(error)
    heard = [str(warning.message) for warning in said]
    (out / f"{rank}.json").write_text(json.dumps([message, heard]))


def sharded(rank: int, out: Path, kind: str) -> None:
    warnings.simplefilter("ignore")  # FSDP2 warns about views among a module's outputs
    model = build()
    if kind == "later":
        manager = manage(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        if kind == "before":
            manager = manage(model)
        train(model, manager, rank, 1)
        message = "no error"
    except ValueError as error:
        message = str(error)
    (out / f"{rank}.json").write_text(json.dumps(message))


def sharded_to_dense(rank: int, out: Path, _: str) -> None:
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        densify(model)
        message = "no error"
    except ValueError as error:
        message = str(error)
    whole = build()
    whole[2].reset_parameters()
    whole.load_state_dict(
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    )
    same = torch.equal(densify(whole)[2].weight, densify(build())[2].weight)
    (out / f"{rank}.json").write_text(json.dumps([message, same]))


def uneven(rank: int, out: Path, _: str) -> None:
    ddp = DistributedDataParallel(build())
    manager = manage(ddp)
    message = "no error"
    try:
        with Join([ddp]):
            train(ddp, manager, rank, 10 if rank == 0 else 5)
    except ValueError as error:
        message = str(error)
    (out / f"{rank}.json").write_text(json.dumps(message))


def apart(rank: int, out: Path, kind: str) -> None:
    """Ranks that train models of their own, as the stages of a pipeline are."""
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    torch.manual_seed(rank)
    tile = 8 if rank == 0 else 16
    model: nn.Module = CMSBlockLinear(32, 32, tile_size=tile, density=0.5 / (1 + rank))
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=groups[rank])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    group = None if kind == "ddp" else groups[rank]
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4), process_group=group)
    train(model, manager, rank, 4)
    (out / f"{rank}.json").write_text(json.dumps(manager.layers["layer"].swap_rates()))


def unsharded(rank: int, out: Path, kind: str) -> None:
    """The recipe of docs/topology.md: FSDP2 around layers that stay whole."""
    warnings.simplefilter("ignore")
    model = nn.Sequential(build(), nn.Linear(32, 32))
    whole = [p for layer in sparse_layers(model).values() for p in layer.parameters()]
    if kind == "averaged":
        for parameter in whole:
            parameter.register_post_accumulate_grad_hook(
                lambda p: dist.all_reduce(p.grad.div_(dist.get_world_size()))
            )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params=set(whole))
    sharded = [p for p in model.parameters() if p not in set(whole)]
    optimizers = [torch.optim.AdamW(whole, lr=1e-2), torch.optim.AdamW(sharded, lr=1e-2)]
    manager = TopologyManager(model, optimizers, periods=(1, 2, 4))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, manager, rank, 8)
    heard = [str(w.message) for w in said if "differ between ranks" in str(w.message)]
    sums = {name: layer.topology_checksum() for name, layer in manager.layers.items()}
    swaps = [layer.swap_rates() for layer in manager.layers.values()]
    (out / f"{rank}.json").write_text(json.dumps([sums, swaps, heard]))


def sharing_optimizer_state(rank: int, out: Path, _: str) -> None:
    ddp = DistributedDataParallel(build())
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=1e-2)
    manager = TopologyManager(ddp, optimizer, periods=(1, 2, 4))
    train(ddp, manager, rank, 4)
    old = {}
    for name, layer in manager.layers.items():
        state = optimizer.optim.state.get(layer.values)
        newborn = layer.scorer.block_age == 0
        assert newborn.any()
        if state is not None:
            old[name] = float(state["exp_avg_sq"][newborn].abs().sum())
    sums = {name: layer.topology_checksum() for name, layer in manager.layers.items()}
    (out / f"{rank}.json").write_text(json.dumps([sums, old]))


def converting(rank: int, out: Path, _: str) -> None:
    messages = []
    for convert, model in ((sparsify, nn.Sequential(nn.Linear(16, 16))), (densify, build())):
        try:
            convert(DistributedDataParallel(model))
        except ValueError as error:
            messages.append(str(error))
    (out / f"{rank}.json").write_text(json.dumps(messages))


class Parts(nn.Module):
    """`build()`, maybe recomputed in the backward pass, before a layer that may be left out."""

    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.body, self.more = build(), build()[2:]
        self.more[0] = CMSBlockLinear(32, 32, tile_size=8, row_group=1)
        self.skip = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.body, x, use_reentrant=False) if self.recomputed else self.body(x)
        return y if self.skip else self.more(y)


def with_flags(rank: int, out: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = Parts(recomputed=kind == "static_graph")
    ddp = DistributedDataParallel(model, **{kind: True})
    manager = manage(ddp)
    for step in range(8):
        model.skip = kind == "find_unused_parameters" and (step + rank) % 2 == 0
        if kind == "gradient_as_bucket_view":
            with ddp.no_sync():
                ddp(torch.randn(8, 32)).square().mean().backward()
        train(ddp, manager, rank, 1)
    sums = {name: layer.topology_checksum() for name, layer in manager.layers.items()}
    swaps = [max(layer.swap_rates()) for layer in manager.layers.values()]
    (out / f"{rank}.json").write_text(json.dumps([sums, swaps]))


def growing(rank: int, out: Path, kind: str) -> None:
    torch.manual_seed(0)
    scoring = ScoringConfig(max_swap_frac=0.0)
    layer = CMSBlockLinear(64, 32, tile_size=8, density=0.25, max_density=0.5, scoring=scoring)
    torch.manual_seed(rank)  # as where every rank shuffles data of its own
    if kind == "scored":
        for _step in range(2):
            layer(torch.randn(4, 64)).square().sum().backward()
            layer.accumulate_scores()
    layer.grow(0.5)
    (out / f"{rank}.json").write_text(json.dumps(layer.col_indices.tolist()))


Launch = Callable[..., list[Any]]


@pytest.fixture
def launch(on_ranks: Callable[..., None]) -> Launch:
    """Runs `job(rank, out, kind)` on every rank; what each wrote into its JSON file."""

    def run(job: Callable[[int, Path, str], None], out: Path, size: int = 2, kind: str = "") -> Any:
        on_ranks(size, job, out, kind)
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]

    return run


@pytest.mark.parametrize("candidate_score", ["gradient", "outer"])
@pytest.mark.parametrize("size", [2, 4])
def test_topology_is_identical_on_all_ranks(
    launch: Launch, tmp_path: Path, candidate_score: str, size: int
) -> None:
    results = launch(identical, tmp_path, size, candidate_score)
    assert all(result == results[0] for result in results)
    assert all(max(rates) > 0 for rates in results[0]["swaps"].values())
    run = open_run(tmp_path / "run")
    for digests in run.snapshot(12).checksums.values():
        assert len(digests) == size
        assert len(set(digests)) == 1


def test_statistics_are_averaged_over_ranks_and_not_broadcast(
    launch: Launch, tmp_path: Path
) -> None:
    first, second = launch(averaging, tmp_path)
    local = [torch.tensor(r["local"]) for r in (first, second)]
    torch.testing.assert_close(local[1], 2 * local[0])
    mean = (local[0] + local[1]) / 2
    for result in (first, second):
        torch.testing.assert_close(torch.tensor(result["synced"]), mean)


def test_divergence_is_an_error_and_on_record(launch: Launch, tmp_path: Path) -> None:
    for message, heard in launch(diverging, tmp_path):
        assert any("the gradients of ['0', '2'] differ between ranks" in said for said in heard)
        assert "layer '2' differs between ranks after the decision at step 4" in message
        assert "ranks [1] disagree with rank 0" in message
    checksums = open_run(tmp_path / "run").snapshot(4).checksums
    assert any(len(set(digests)) == 2 for digests in checksums.values())


@pytest.mark.parametrize("manager", ["before", "later"])
def test_sharded_parameters_are_refused(launch: Launch, tmp_path: Path, manager: str) -> None:
    for message in launch(sharded, tmp_path, kind=manager):
        assert "must be the layer's whole [R, K, B, B] = [8, 2, 8, 8] tensor" in message
        assert "use DistributedDataParallel" in message


def test_sharded_parameters_become_dense_by_way_of_the_whole_state(
    launch: Launch, tmp_path: Path
) -> None:
    for message, same in launch(sharded_to_dense, tmp_path):
        assert message.startswith("values (=DTensor, shape (8, 2, 8, 8)) must be the layer's whole")
        assert "get_model_state_dict returns with full_state_dict=True" in message
        assert same


@pytest.mark.parametrize("kind", ["averaged", "forgotten"])
def test_layers_left_out_of_the_sharding(launch: Launch, tmp_path: Path, kind: str) -> None:
    """FSDP does not average the gradients of what it ignores: who forgets it is told."""
    (sums, swaps, heard), (other, *_) = launch(unsharded, tmp_path, kind=kind)
    assert min(rates[-1] for rates in swaps) > 0
    assert (sums == other) == (kind == "averaged")
    assert len(heard) == (kind == "forgotten")


def test_uneven_inputs_are_refused_in_place_of_waiting(launch: Launch, tmp_path: Path) -> None:
    for message in launch(uneven, tmp_path):
        assert "must not be inside Join when a decision is due" in message


@pytest.mark.parametrize("kind", ["ddp", "argument"])
def test_only_the_ranks_of_the_group_decide_together(
    launch: Launch, tmp_path: Path, kind: str
) -> None:
    assert [len(rates) for rates in launch(apart, tmp_path, kind=kind)] == [1, 1]


def test_optimizer_state_that_ranks_share_out_is_reset(launch: Launch, tmp_path: Path) -> None:
    (sums, old), (other, its) = launch(sharing_optimizer_state, tmp_path)
    assert sums == other
    assert {**old, **its} == {"0": 0.0, "2": 0.0}


def test_models_are_converted_before_they_are_wrapped(launch: Launch, tmp_path: Path) -> None:
    """Before, the ranks' new layers drifted apart."""
    for messages in launch(converting, tmp_path):
        assert len(messages) == 2
        for message, name in zip(messages, ("sparsify", "densify"), strict=True):
            assert "must not be wrapped by DistributedDataParallel yet" in message
            assert message.endswith(f"Call {name}() before.")


@pytest.mark.parametrize(
    "kind", ["static_graph", "find_unused_parameters", "gradient_as_bucket_view"]
)
def test_flags_of_ddp(launch: Launch, tmp_path: Path, kind: str) -> None:
    """Also where every rank leaves out the last layer at every second step."""
    first, second = launch(with_flags, tmp_path, kind=kind)
    assert first == second
    assert min(first[1]) > 0


@pytest.mark.parametrize("kind", ["scored", "unscored"])
def test_ranks_grow_alike(launch: Launch, tmp_path: Path, kind: str) -> None:
    first, second = launch(growing, tmp_path, kind=kind)
    assert first == second
