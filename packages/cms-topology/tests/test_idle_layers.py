"""Layers that do not train keep their blocks, and averages of weights follow those that swap."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cms_topology import CMSBlockLinear, ScoringConfig, StepReport, TopologyManager

# swaps at every decision, whatever the scores say
RESTLESS = ScoringConfig(min_swap_frac=0.05, max_swap_frac=0.2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = (
            CMSBlockLinear(32, 32, tile_size=8, row_group=1, scoring=RESTLESS) for _ in range(2)
        )
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(x if self.skip else x + self.fc1(x).tanh())
        return y


def train(
    net: Net, optimizer: torch.optim.Optimizer, manager: TopologyManager, steps: range
) -> list[StepReport]:
    reports = []
    for i in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(i))
        (net(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        reports.append(manager.step())
        optimizer.zero_grad()
    return reports


def setup() -> tuple[Net, torch.optim.Optimizer, TopologyManager]:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, optimizer, TopologyManager(net, optimizer, periods=(1, 2, 4))


def swaps(reports: list[StepReport], name: str) -> int:
    return sum(report.swaps[name].num_swaps for report in reports if report.swaps)


@pytest.mark.parametrize("idle", ["frozen", "unused"])
def test_a_layer_that_stopped_training_keeps_its_blocks(idle: str) -> None:
    """Before, old scores went on to replace its blocks by random ones that nobody trained."""
    net, optimizer, manager = setup()
    assert swaps(train(net, optimizer, manager, range(4)), "fc1") > 0
    if idle == "frozen":
        net.fc1.requires_grad_(False)
    else:
        net.skip = True
    before = net.fc1.to_dense().detach().clone()
    reports = train(net, optimizer, manager, range(4, 12))
    assert torch.equal(net.fc1.to_dense(), before)
    assert swaps(reports, "fc1") == 0
    assert swaps(reports, "fc2") > 0
    net.fc1.requires_grad_(True)
    net.skip = False
    assert swaps(train(net, optimizer, manager, range(12, 16)), "fc1") > 0


def test_nothing_piles_up_in_a_frozen_layer() -> None:
    """Before, statistics of all its frozen steps counted as those of its first step after that."""
    net = Net()
    net.fc1.collect_candidates = net.fc2.collect_candidates = True
    net.fc1.values.requires_grad_(False)
    net(torch.randn(3, 32)).sum().backward()
    assert net.fc1._probe.grad is None
    assert net.fc2._probe.grad is not None


def test_who_trained_is_remembered_in_a_checkpoint() -> None:
    net, optimizer, manager = setup()
    train(net, optimizer, manager, range(6))  # fc1 last trained two steps before the decision
    net.skip = True
    other = copy.deepcopy((net, optimizer, manager))
    state = manager.state_dict()
    assert state["trained"] == ["fc1", "fc2"]
    resumed = TopologyManager(other[0], other[1], periods=(1, 2, 4))
    resumed.load_state_dict(state)
    train(other[0], other[1], resumed, range(6, 8))
    assert swaps(train(net, optimizer, manager, range(6, 8)), "fc1") > 0
    assert torch.equal(net.fc1.to_dense(), other[0].fc1.to_dense())
    del state["trained"]  # as written before it was kept
    resumed.load_state_dict(state)
    assert resumed.state_dict()["trained"] == ["fc1", "fc2"]


@pytest.mark.parametrize("at", [0, 4])
def test_a_layer_trained_in_evaluation_mode_keeps_its_blocks(at: int) -> None:
    """As those do who hold dropout still; before, none moved, or by statistics of long ago."""
    net, optimizer, manager = setup()
    train(net, optimizer, manager, range(at))
    net.fc1.eval()
    before = net.fc1.col_indices.clone()
    with pytest.warns(UserWarning, match=r"the layers \['fc1'\] collected no stat") as said:
        reports = train(net, optimizer, manager, range(at, at + 8))
    assert len(said) == 1
    assert torch.equal(net.fc1.col_indices, before)
    assert swaps(reports, "fc2") > 0
    net.fc1.train()
    assert swaps(train(net, optimizer, manager, range(at + 8, at + 12)), "fc1") > 0


@pytest.mark.parametrize("update_first", [True, False])
def test_an_average_of_a_replaced_block_starts_afresh(update_first: bool) -> None:
    """Before, the weights of the block that left were averaged on at the newcomer's place."""
    net, optimizer, _ = setup()
    decay = 0.9
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    manager = TopologyManager(net, optimizer, periods=(1, 2, 4), averages=[averaged])
    want = {name: p.detach().clone() for name, p in net.named_parameters()}
    first = True
    for i in range(12):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(i))
        (net(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        if update_first:
            averaged.update_parameters(net)
        report = manager.step()
        if not update_first:
            averaged.update_parameters(net)
        optimizer.zero_grad()
        for name, p in net.named_parameters():
            swapped = report.swaps.get(name.partition(".")[0])
            now = p.detach()
            want[name] = now.clone() if first else want[name].lerp(now, 1 - decay)
            if name.endswith("values") and swapped is not None:
                want[name] = torch.where(swapped.swapped[:, :, None, None], now, want[name])
        first = False
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p, want[name], msg=name)
    assert torch.equal(averaged.module.fc1.col_indices, net.fc1.col_indices)
    averaged(torch.randn(3, 32))
    assert manager.swap_rate


def test_an_average_of_another_model_is_refused() -> None:
    net, optimizer, _ = setup()
    said = re.escape("averages (=Linear) must have the CMSBlockLinear layers of model")
    with pytest.raises(ValueError, match=said):
        TopologyManager(net, optimizer, averages=[nn.Linear(3, 3)])


def test_an_average_of_columns_is_refused() -> None:
    """By exponential averaging over integers every fourth column would be another one."""
    net, optimizer, _ = setup()
    said = re.escape("averages (=AveragedModel) must be made with use_buffers=False")
    averaged = AveragedModel(net, use_buffers=True)
    with pytest.raises(ValueError, match=said):
        TopologyManager(net, optimizer, averages=averaged)


def test_pruned_values_are_refused() -> None:
    net, optimizer, manager = setup()
    train(net, optimizer, manager, range(2))
    prune.l1_unstructured(net.fc1, "values", 0.5)
    with pytest.raises(ValueError, match=re.escape('prune.remove(layer, "values")')):
        train(net, optimizer, manager, range(2, 3))
    prune.remove(net.fc1, "values")
    train(net, optimizer, manager, range(3, 4))


@pytest.mark.parametrize("shared", ["all", "fc2"])
def test_managers_that_take_turns_are_noticed(shared: str) -> None:
    """Every step counts twice then; a manager that follows another one is fine."""
    net, optimizer, first = setup()
    train(net, optimizer, first, range(2))
    part = net if shared == "all" else net.fc2
    second = TopologyManager(part, optimizer, periods=(1, 2, 4))
    train(net, optimizer, second, range(2, 4))
    net(torch.ones(1, 32)).sum().backward()
    with pytest.warns(UserWarning, match="two TopologyManagers step the same layers in turns"):
        first.step()
    net(torch.ones(1, 32)).sum().backward()
    first.step()  # said once


class Wrapped(torch.optim.Optimizer):
    """As Accelerate's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.gradient_state = SimpleNamespace(sync_gradients=True)

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, object]]:
        return self.optimizer.param_groups

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, object]:
        return self.optimizer.state

    def step(self, *_: object) -> None:  # type: ignore[override]
        if self.gradient_state.sync_gradients:
            self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.gradient_state.sync_gradients:
            self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_steps_that_only_accumulate_do_not_count(accumulated: int) -> None:
    """Before, every micro-batch under Accelerate's `accumulate` aged the blocks by a step."""
    net = Net()
    optimizer = Wrapped(torch.optim.AdamW(net.parameters(), lr=1e-2))
    manager = TopologyManager(net, optimizer, periods=(1, 2, 4))
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    for i in range(8 * accumulated):
        optimizer.gradient_state.sync_gradients = (i + 1) % accumulated == 0
        part = x[i % accumulated :: accumulated]
        (net(part) - part.roll(1, 1)).square().mean().div(accumulated).backward()
        optimizer.step()
        report = manager.step()
        assert report.step == (i + 1) // accumulated
        optimizer.zero_grad()
    assert report.swap_rate
    assert net.fc1.scorer.block_age.max() == 8


def test_a_wrapped_optimizer_is_seen_through() -> None:
    """As Accelerate wraps them; before, newborns' steps went uncorrected then."""

    found = []
    for wrap in (lambda o: o, Wrapped):
        net = Net()
        optimizer = wrap(torch.optim.AdamW(net.parameters(), lr=1e-2))
        manager = TopologyManager(net, optimizer, periods=(1, 2, 4))
        train(net, optimizer, manager, range(10))
        found.append(net)
    assert torch.equal(found[0].fc1.values, found[1].fc1.values)


@pytest.mark.parametrize("how", ["added", "replaced"])
def test_a_layer_that_came_later_is_named_once(how: str) -> None:
    net, optimizer, manager = setup()
    train(net, optimizer, manager, range(3))
    name = "fc3" if how == "added" else "fc2"
    layer = CMSBlockLinear(32, 32, tile_size=8, row_group=1, scoring=RESTLESS)
    net.add_module(name, layer)
    optimizer.add_param_group({"params": layer.parameters()})
    said = rf"the layers \['{name}'\] came into the model after this TopologyManager was made"
    with pytest.warns(UserWarning, match=said):
        train(net, optimizer, manager, range(3, 4))
    train(net, optimizer, manager, range(4, 8))

    newer = TopologyManager(net, optimizer, periods=(1, 2, 4))
    newer.load_state_dict(manager.state_dict())
    reports = train(net, optimizer, newer, range(8, 16))
    assert newer.global_step == 16
    assert swaps(reports, "fc1") > 0
    if how == "replaced":
        assert swaps(reports, name) > 0


def test_gradients_without_a_backward_pass_bring_no_statistics() -> None:
    net, optimizer, manager = setup()
    parameters = list(net.parameters())
    for i in range(4):
        loss = (net(torch.randn(16, 32)) - 1).square().mean()
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        optimizer.step()
        if i < 3:
            manager.step()
    with pytest.warns(UserWarning, match="come from backward.., not from torch.autograd.grad"):
        report = manager.step()
    assert report.swap_rate == 0
