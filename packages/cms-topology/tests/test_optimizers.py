"""The manager beside optimizers of every kind, and what they are mistaken for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cms_topology import (
    CMSBlockLinear,
    ScoringConfig,
    TopologyManager,
    reset_optimizer_state,
)

LOOSE = ScoringConfig(max_swap_frac=0.3, max_row_swap_frac=0.5, swap_threshold=1.0)
Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"tile_size": 8, "row_group": 1, "scoring": LOOSE}
    return nn.Sequential(
        CMSBlockLinear(32, 64, **settings), nn.GELU(), CMSBlockLinear(64, 32, **settings)
    )


def train(
    model: nn.Module,
    step: Callable[[Callable[[], Tensor]], object],
    manager: TopologyManager,
    n: int,
) -> list[float]:
    """Losses of n steps; `step` is given a closure."""
    losses = []
    for i in range(n):
        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(i))
        x = x * torch.linspace(0.1, 2, 32)

        def closure(x: Tensor = x) -> Tensor:
            model.zero_grad()
            loss = (model(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            return loss

        step(closure)
        manager.step()
    return losses


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trains_and_swaps_under(kind: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    losses = train(model, optimizer.step, manager, 16)
    assert manager.swap_rate
    assert losses[-1] < losses[0]


class ScheduleFree(torch.optim.Optimizer):
    """SGD that trains between two sets of weights (Defazio et al. 2024, algorithm 1)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_sum": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["weight_sum"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["weight_sum"]).sub_(p.grad, alpha=0.1 * group["lr"])
                z.sub_(p.grad, alpha=group["lr"])


FRESH: dict[str, Make] = {
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5),
    "schedule-free": lambda p: ScheduleFree(p, lr=0.01),
}


@pytest.mark.parametrize("kind", FRESH)
def test_state_of_newborn_blocks_is_that_of_a_fresh_optimizer(kind: str) -> None:
    layer = CMSBlockLinear(32, 64, tile_size=8, max_density=0.75, row_group=1)
    optimizer = FRESH[kind](iter([layer.values]))
    for _ in range(3):
        layer.values.grad = torch.randn_like(layer.values)
        optimizer.step()
    born = torch.zeros(8, layer.num_live, dtype=torch.bool)
    born[1, 0] = born[5, 1] = True
    with torch.no_grad():
        layer.values[:, : layer.num_live][born] = 0.25
    old = {name: x.clone() for name, x in optimizer.state[layer.values].items() if x.ndim == 4}
    assert old
    reset_optimizer_state([optimizer], layer.values, born)
    fresh = nn.Parameter(layer.values.detach().clone())
    other = FRESH[kind](iter([fresh]))
    fresh.grad = torch.zeros_like(fresh)
    other.step()
    for name, before in old.items():
        after = optimizer.state[layer.values][name]
        assert torch.equal(after[1, 0], other.state[fresh][name][1, 0]), name
        assert torch.equal(after[5, 1], other.state[fresh][name][5, 1]), name
        expected, live = before.clone(), after[:, : layer.num_live]
        expected[:, : layer.num_live][born] = live[born]
        assert torch.equal(after, expected), f"{name} of survivors"


class InBytes(torch.optim.Optimizer):
    """Keeps codes of 8 bits, as bitsandbytes does; its zero stands for the lowest number."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("state1", torch.full(p.shape, 127, dtype=torch.uint8))
            p.sub_(p.grad, alpha=0.1)


def test_state_in_bytes_is_left_alone_with_one_warning() -> None:
    model = net()
    optimizer = InBytes(model.parameters(), {})
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    said = re.escape("the optimizer (=InBytes) keeps 'state1' of its state in torch.uint8, which")
    with pytest.warns(UserWarning, match=said):
        train(model, optimizer.step, manager, 4)
    train(model, optimizer.step, manager, 4)
    assert manager.swap_rate
    assert all(state["state1"].eq(127).all() for state in optimizer.state.values())


def test_lbfgs_forgets_what_led_to_other_blocks() -> None:
    """Its history is of one vector: differences across a swap are no curvature."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    train(model, optimizer.step, manager, 3)
    assert len(optimizer.state[model[0].values]["old_dirs"]) > 1
    train(model, optimizer.step, manager, 1)
    assert manager.swap_rate
    assert not optimizer.state
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    for layer in manager.layers.values():
        layer.scorer.config = ScoringConfig(max_swap_frac=0.0)
    train(model, optimizer.step, manager, 4)
    assert optimizer.state, "nothing was swapped, nothing is forgotten"


def test_zeroed_gradients_are_noticed_once() -> None:
    """Before, zeros were scored without a word and nothing was ever swapped."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = TopologyManager(model, optimizer, periods=(1, 1, 2))

    def step(closure: Callable[[], Tensor]) -> None:
        optimizer.step(closure)  # type: ignore[arg-type]
        optimizer.zero_grad(set_to_none=False)

    said = re.escape("call TopologyManager.step before optimizer.zero_grad(set_to_none=False)")
    with pytest.warns(UserWarning, match=said) as warned:
        train(model, step, manager, 6)
    assert len(warned) == 1


def test_gradients_that_are_zero_at_first_are_no_mistake() -> None:
    """Behind a projection that starts at zero all gradients are zero for a step."""
    model = net().append(nn.Linear(32, 32, bias=False))
    nn.init.zeros_(model[3].weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = TopologyManager(model, optimizer, periods=(1, 1, 1))
    train(model, optimizer.step, manager, 3)


def test_gradients_that_overflow_at_first_are_not_taken_for_zeros() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = TopologyManager(model, optimizer, periods=(1, 1, 2))

    def overflowing(closure: Callable[[], Tensor]) -> None:
        closure()
        model[0].values.grad.fill_(torch.inf)

    train(model, overflowing, manager, 3)
    train(model, optimizer.step, manager, 3)
    assert manager.swap_rate


def test_a_layer_that_no_optimizer_trains_keeps_its_blocks() -> None:
    """Before, its newborn blocks were random and stayed so."""
    model = net()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    before = model[2].to_dense().detach()
    with pytest.warns(UserWarning, match=re.escape("the layers ['2'] have gradients but")) as said:
        train(model, optimizer.step, manager, 8)
    assert len(said) == 1
    assert torch.equal(model[2].to_dense(), before)
    assert manager.layers["0"].swap_rates()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer.step, manager, 4)
    assert model[2].swap_rates()[-1] > 0


def test_without_an_optimizer_all_layers_take_part() -> None:
    model = net()
    manager = TopologyManager(model, periods=(1, 2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer.step, manager, 4)
    assert all(layer.swap_rates()[-1] > 0 for layer in manager.layers.values())


@pytest.mark.parametrize("wrong", ["parameters", "scheduler", "list", "word"])
def test_what_is_no_optimizer(wrong: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given: Any = {
        "parameters": model.parameters(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "list": [optimizer, 3],
        "word": "adam",
    }[wrong]
    name = {"parameters": "Parameter", "scheduler": "StepLR", "list": "int", "word": "str"}[wrong]
    said = re.escape(f"optimizer (={name}) must be a torch.optim.Optimizer, or several of them")
    with pytest.raises(ValueError, match=said):
        TopologyManager(model, given)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"logger": print}, "logger (=builtin_function_or_method) must have a method log."),
        ({"writer": "runs"}, "writer (=str) must have a method write."),
        ({"periods": 100}, "periods (=100) must have three entries, whole numbers of steps"),
        ({"periods": (1, 10.0, 100)}, "periods (=(1, 10.0, 100)) must have three entries"),
    ],
)
def test_settings_that_would_fail_late(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TopologyManager(net(), **kwargs)


def test_tiles_of_two_topologies_are_refused() -> None:
    """Two layers with one `values` would each move the other's blocks."""
    model = net()
    model.append(CMSBlockLinear(32, 64, tile_size=8, row_group=1))
    model[3].values = model[0].values
    said = re.escape("the values of '3' and '0' are one parameter")
    with pytest.raises(ValueError, match=said):
        TopologyManager(model)
    model[3] = model[0]  # one module in two places is one layer
    manager = TopologyManager(model)
    assert list(manager.layers) == ["0", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 32)).sum().backward()
        manager.step()
