"""The guard in real training loops: resume, scaling, accumulation, compilation, other ranks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cms_topology import (
    CMSBlockLinear,
    Consolidation,
    RetentionGuard,
    ScoringConfig,
    TopologyManager,
    consolidate,
    grow_for_task,
    make_probes,
)
from cms_topology._retention._still import StillParameters

LOOSE = ScoringConfig(max_swap_frac=0.3, max_row_swap_frac=0.5, swap_threshold=1.0)


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {"tile_size": 8, "density": 0.5, "max_density": 0.75, "scoring": LOOSE}
    return nn.Sequential(
        CMSBlockLinear(32, 64, row_group=2, **kwargs),
        nn.GELU(),
        CMSBlockLinear(64, 32, row_group=1, **kwargs),
        nn.LayerNorm(32),
        nn.Linear(32, 8),
    )


def tokens(seed: int, old: bool = False, count: int = 16) -> Tensor:
    x = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    # the old task lives in half of the dimensions
    return x * (torch.arange(32) < 16) if old else x


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :8].roll(1, 1)).square().mean()


def remember(model: nn.Module) -> Consolidation:
    return consolidate(
        model, [tokens(s, old=True) for s in range(4)], "a", loss_fn=loss_of, sensitivity_batches=1
    )


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int,
          manager: TopologyManager | None = None) -> None:  # fmt: skip
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, tokens(100 + step)).backward()
        optimizer.step()
        if manager is not None:
            manager.step()


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    "controls",
    [
        {"drift": 1e-3, "eps": math.inf},
        {"drift": None, "eps": 0.05},
        {"drift": None, "eps": 0.05, "release": 10},
        {"drift": 1e-3, "eps": 0.1, "every": 10, "ramp": 9},
    ],
)
@pytest.mark.parametrize("swapping", [False, True])
def test_resumed_in_mid_interval_it_continues_to_the_bit(
    controls: dict[str, Any], swapping: bool, tmp_path: Path
) -> None:
    def setup(model: nn.Module, memory: Consolidation) -> tuple[Any, Any, Any]:
        optimizer = adam(model)
        guard = RetentionGuard(model, optimizer, memory, **controls)
        manager = None
        if swapping:
            manager = TopologyManager(
                model, optimizer, periods=(1, 1, 3), retention=memory, drop_cost=1e-3
            )
        return optimizer, guard, manager

    model = build()
    memory = remember(model)
    optimizer, guard, manager = setup(model, memory)
    steps(model, optimizer, 0, 7, manager)
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "guard": guard.state_dict(),
        "memory": memory.state_dict(),
        "manager": manager.state_dict() if manager else None,
    }
    torch.save(saved, tmp_path / "checkpoint.pt")
    steps(model, optimizer, 7, 14, manager)

    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = build(seed=1)
    kept = Consolidation()
    kept.load_state_dict(loaded["memory"])
    other.load_state_dict(loaded["model"])
    optimizer, guard, manager = setup(other, kept)
    optimizer.load_state_dict(loaded["optimizer"])
    guard.load_state_dict(loaded["guard"])
    if manager is not None:
        manager.load_state_dict(loaded["manager"])
    steps(other, optimizer, 7, 14, manager)
    same(model, other)


def test_state_of_another_model_is_refused() -> None:
    model = build()
    state = RetentionGuard(model, None, remember(model)).state_dict()
    other = nn.Sequential(nn.Linear(32, 8))
    guard = RetentionGuard(other, None, remember(other))
    with pytest.raises(ValueError, match=r"state \(with 3 weight matrices\) must be of this model"):
        guard.load_state_dict(state)


def test_a_gradient_scaler_and_accumulation_change_nothing() -> None:
    models = []
    for scaled in (False, True):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        guard = RetentionGuard(model, optimizer, remember(model), drift=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        for step in range(6):
            x = tokens(step)
            parts = x.chunk(2) if scaled else (x,)
            for part in parts:
                scaler.scale(loss_of(model, part) / len(parts)).backward()
            if scaled and step == 3:  # an overflow: the optimizer is not called
                model[0].values.grad.view(-1)[0] = torch.inf
            if not scaled and step == 3:
                optimizer.zero_grad()
                continue
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert guard.steps == 5
        assert max(guard.drift().values()) <= 1e-3 * (1 + 1e-4)
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_compiled_models_are_guarded_alike() -> None:
    models = []
    for compiled in (False, True):
        model = build()
        memory = remember(model)
        run = torch.compile(model, backend="eager") if compiled else model
        optimizer = adam(run)
        RetentionGuard(run, optimizer, memory, drift=1e-3, eps=0.1)
        steps(run, optimizer, 0, 5)
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_what_stays_stays_although_its_storage_is_exchanged() -> None:
    """As by SAM, whose second step gives `parameter.data` back, and by `model.to`."""
    model = build()
    optimizer = adam(model)
    guard = RetentionGuard(model, optimizer, remember(model), drift=1e-3)
    before = {name: model.get_parameter(name).detach().clone() for name in guard.still}
    assert "3.weight" in before
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    steps(model, optimizer, 0, 2)
    for name, values in before.items():
        assert torch.equal(model.get_parameter(name), values), name
    assert max(guard.drift().values()) <= 1e-3 * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(9,), (9, 3), (9, 8), (9, 2, 4)])
def test_rows_are_put_back_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    before, kept = parameter.detach().clone(), torch.tensor([1, 4, 8])
    still = StillParameters()
    still.add("rows", parameter, kept)
    with torch.no_grad():
        parameter.add_(1)[4] = torch.nan
    version = parameter._version
    still.put_back()
    assert parameter._version > version
    expected = (before + 1).index_copy(0, kept, before[kept])
    assert torch.equal(parameter, expected)


def test_every_tenth_step_keeps_what_every_step_keeps() -> None:
    """The projection is linear: only the gradients differ, as they are taken on the way."""
    model = build()
    memory = remember(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0, every=10)
    x = tokens(0, old=True)
    before = model(x).detach()
    steps(model, optimizer, 0, 9)
    assert not torch.allclose(model(x), before, rtol=0, atol=1e-6)  # pending
    pending = copy.deepcopy(model.state_dict())
    guard.flush()
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    model.load_state_dict(pending)
    guard.remove()
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    free = model[0].values.detach().clone()
    steps(model, optimizer, 9, 12)
    assert not torch.equal(model[0].values, free)
    assert not torch.allclose(model(x), before, rtol=0, atol=1e-6)  # the guard has gone


def test_the_budget_widens_along_the_ramp() -> None:
    model = build()
    optimizer = adam(model)
    guard = RetentionGuard(model, optimizer, remember(model), drift=1e-2, ramp=10)
    for step in range(12):
        steps(model, optimizer, step, step + 1)
        allowed = 1e-2 * min(1.0, (step + 1) / 10) ** 2
        assert guard.budget == pytest.approx(allowed)
        assert max(guard.drift().values()) <= allowed * (1 + 1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 0}, r"every \(=0\) must be at least 1"),
        ({"eps": -1.0}, r"eps \(=-1.0\) must be 0 or more"),
        ({"eps": float("nan")}, r"eps \(=nan\) must be 0 or more"),
        ({"drift": 0.0}, r"drift \(=0.0\) must be greater than 0; for no drift at all use eps=0"),
        ({"drift": "some"}, r"drift \(='some'\) must be 'auto', a number, a Drift"),
        ({"ramp": -1}, r"ramp \(=-1\) must be 0 or more"),
        ({"measure_every": 0}, r"measure_every \(=0\) must be at least 1"),
        ({"tolerance": 0.0}, r"tolerance \(=0.0\) must be greater than 0 nats"),
    ],
)
def test_settings_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        RetentionGuard(model, None, remember(model), **kwargs)


def test_a_memory_that_does_not_fit_is_refused() -> None:
    model = build()
    memory = remember(model)
    with pytest.raises(ValueError, match=r"memory \(of tasks \['a'\]\) must fit the model: it has"):
        RetentionGuard(nn.Linear(4, 4), None, memory)
    wider = build()
    wider[4] = nn.Linear(40, 8)
    with pytest.raises(ValueError, match=r"memory of 4.weight \(=32 inputs\) must fit the layer"):
        RetentionGuard(wider, None, memory)
    blind = consolidate(model, [tokens(0)], usage="none", loss_fn=loss_of)
    with pytest.raises(ValueError, match="needs probes, or a sensitivity measured at"):
        RetentionGuard(model, None, blind)


# -- several processes ------------------------------------------------------------------------


def distributed(rank: int, out: Path) -> None:
    world = dist.get_world_size()
    model = DistributedDataParallel(build())
    mine = [tokens(s, old=True) for s in range(4) if s % world == rank]
    # answers differ from rank to rank, the budget must not
    probes = make_probes(model.module, mine[0], confidence=0.0)
    memory = consolidate(model, mine, "a", loss_fn=loss_of, probes=probes)
    grow_for_task(model, memory, 0.75, generator=torch.Generator().manual_seed(0))
    optimizer = adam(model)
    guard = RetentionGuard(model, optimizer, memory, every=3, measure_every=3)
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, tokens(100 + step).chunk(world)[rank]).backward()
        optimizer.step()
    torch.save(
        {
            "model": model.module.state_dict(),
            "guard": guard.state_dict(),
            "memory": memory.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        out / f"{rank}.pt",
    )


def test_ranks_stay_identical_and_one_process_can_go_on(
    on_ranks: Callable[..., None], tmp_path: Path
) -> None:
    on_ranks(2, distributed, tmp_path)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for part in ("model", "memory"):
        for name, tensor in first[part].items():
            if not name.startswith("probes/"):
                assert torch.equal(tensor, second[part][name]), f"{part} {name}"
    budget = first["guard"]["budget"]
    assert torch.equal(budget["budget"], second["guard"]["budget"]["budget"])
    assert budget["budget"] != 1e-5  # it has moved

    # the same statistics as one process gathers
    expected = remember(build()).to_tensors()
    for name, tensor in expected.items():
        if name != "drift_rises":
            torch.testing.assert_close(first["memory"][name], tensor, rtol=1e-4, atol=1e-6)

    # and the run goes on with another number of ranks, in mid-interval
    model = build(seed=3)
    model.load_state_dict(first["model"])
    memory = Consolidation.from_tensors(first["memory"])
    optimizer = adam(model)
    optimizer.load_state_dict(first["optimizer"])
    guard = RetentionGuard(model, optimizer, memory)
    guard.load_state_dict(first["guard"])
    assert (guard.steps, guard.every, guard.eps) == (7, 3, 0.1)
    assert guard.budget == float(budget["budget"])
    steps(model, optimizer, 7, 9)
    # projected at step 9, with the budget from before the look at the probes
    assert max(guard.drift().values()) <= float(budget["budget"]) * (1 + 1e-4)
    json.dumps(guard.metrics())
