"""DeepNestedOptimizer as AdamW: bit for bit the same, and a true torch optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titanmac_integration import (
    ContinuumMemorySystem,
    DeepMomentum,
    DeepNestedOptimizer,
    LearningRateController,
)

SLOW = {"2.*": 1, "4.*": 2}


def make_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def batches(start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(start))
        yield x, x[:, :3].cos()
        start += 1


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(batch[0].to(dtype)) - batch[1].to(dtype)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Any]:
    data = batches(steps.start)
    reports = []
    for _ in steps:
        loss_of(model, next(data)).backward()
        reports.append(optimizer.step())
        optimizer.zero_grad()
    return reports


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def cms(**arguments: Any) -> ContinuumMemorySystem:
    return ContinuumMemorySystem((1, 2, 4), SLOW, **arguments)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "cms": lambda: {"cms": cms()},
    "deep momentum": lambda: {"deep_momentum": DeepMomentum(sample=64)},
    "controller": lambda: {"controller": LearningRateController(period=2)},
    "all": lambda: {
        "cms": cms(lr_scales=(1, 2, 3)),
        "deep_momentum": True,
        "controller": LearningRateController(period=2),
    },
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"amsgrad": True},
        {"amsgrad": True, "fused": True},
        {"maximize": True, "weight_decay": 0.3},
        {"betas": (0.5, 0.7), "eps": 1e-3, "lr": 0.1},
        {"fused": True, "lr": torch.tensor(0.01)},
    ],
    ids=str,
)
def test_with_everything_off_it_is_adamw_bit_for_bit(settings: dict[str, Any]) -> None:
    settings = {"lr": 0.02, **settings}
    mine, theirs = make_net(), make_net()
    a = DeepNestedOptimizer(mine.parameters(), **settings)
    b = torch.optim.AdamW(theirs.parameters(), **settings)
    train(mine, a, range(25))
    train(theirs, b, range(25))
    assert_same(mine, theirs)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert set(a.state[p]) == set(b.state[q])
        assert all(torch.equal(a.state[p][key], b.state[q][key]) for key in a.state[p])


def test_a_model_given_whole_decays_its_matrices_only() -> None:
    mine, theirs = make_net(), make_net()
    a = DeepNestedOptimizer(mine, lr=0.02, weight_decay=0.5)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    rest = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.5}]
    b = torch.optim.AdamW(groups, lr=0.02)
    train(mine, a, range(10))
    train(theirs, b, range(10))
    assert_same(mine, theirs)
    assert sum(len(group["params"]) for group in a.param_groups) == 6


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "plain"])
def test_each_option_changes_the_result(option: str) -> None:
    mine, theirs = make_net(), make_net()
    train(mine, DeepNestedOptimizer(mine, lr=0.02, **OPTIONS[option]()), range(30))
    train(theirs, DeepNestedOptimizer(theirs, lr=0.02), range(30))
    difference = (mine[0].weight - theirs[0].weight).abs().max()
    assert difference > 1e-4
    assert loss_of(mine, next(batches(999))) < loss_of(make_net(), next(batches(999)))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("stop", [5, 7])
def test_2n_steps_equal_n_save_load_n_in_a_new_model(option: str, stop: int) -> None:
    """5 and 7 lie between two updates of the slow levels (periods 2 and 4)."""
    model = make_net()
    optimizer = DeepNestedOptimizer(model, lr=0.02, **OPTIONS[option]())
    train(model, optimizer, range(stop))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    train(model, optimizer, range(stop, 2 * stop + 1))

    other = make_net(seed=5)
    resumed = DeepNestedOptimizer(other, lr=0.5, **OPTIONS[option]())
    train(other, resumed, range(40, 43))  # what it did before must not matter
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(stop, 2 * stop + 1))
    assert_same(model, other)
    assert resumed.global_step == 2 * stop + 1


def test_meta_updates_survive_a_round_trip() -> None:
    results = []
    for interrupted in (False, True):
        model = make_net()
        optimizer = DeepNestedOptimizer(model, lr=0.02, deep_momentum=True, controller=True)
        for i in range(4):
            train(model, optimizer, range(i, i + 1))
            if interrupted and i == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = DeepNestedOptimizer(model, lr=0.02, deep_momentum=True, controller=True)
                optimizer.load_state_dict(state)
            data = batches(100 + i)
            optimizer.meta_update(next(data), [next(data)], loss_fn=loss_of)
        results.append(model)
    assert_same(*results)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(option: str, how: str) -> None:
    model = make_net()
    optimizer = DeepNestedOptimizer(model, lr=0.02, **OPTIONS[option]())
    train(model, optimizer, range(5))
    pair = (model, optimizer)
    twin, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.param_groups[0]["params"][0] is dict(twin.named_parameters()).get(
        optimizer.param_groups[0]["param_names"][0]
    )
    train(model, optimizer, range(5, 10))
    train(twin, copied, range(5, 10))
    assert_same(model, twin)


def test_it_continues_from_a_plain_adamw() -> None:
    mine, theirs = make_net(), make_net()
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.02)
    train(theirs, plain, range(5))
    optimizer = DeepNestedOptimizer(mine.parameters(), lr=0.5)
    mine.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.global_step == 5
    train(theirs, plain, range(5, 10))
    train(mine, optimizer, range(5, 10))
    assert_same(mine, theirs)


def test_a_closure_returns_its_loss_as_in_torch() -> None:
    mine, theirs = make_net(), make_net()
    a = DeepNestedOptimizer(mine.parameters(), lr=0.02)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.02)
    for model, optimizer in ((mine, a), (theirs, b)):
        data = batches()
        for _ in range(5):

            def closure(
                model: nn.Module = model, data: Any = data, optimizer: Any = optimizer
            ) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, next(data))
                loss.backward()
                return loss

            returned = optimizer.step(closure)
    assert_same(mine, theirs)
    assert isinstance(returned, Tensor)
    assert a.last_report is not None
    assert torch.equal(a.last_report.loss, returned)
    assert a.last_report.step == 5


def test_without_a_closure_it_returns_a_report() -> None:
    model = make_net()
    optimizer = DeepNestedOptimizer(model, cms=cms())
    reports = train(model, optimizer, range(4))
    assert [r.due_levels for r in reports] == [(0,), (0, 1), (0,), (0, 1, 2)]
    assert reports[-1] is optimizer.last_report
    assert reports[-1].swaps == {}
    assert reports[-1].swap_rate is None
    assert reports[-1].topology is None


@pytest.mark.parametrize("option", ["plain", "cms", "controller"])
def test_schedulers_drive_the_groups(option: str) -> None:
    """A schedule gives the same as setting the rates by hand."""
    nets = [make_net(), make_net()]
    for model, by_hand in zip(nets, (False, True), strict=True):
        optimizer = DeepNestedOptimizer(model, lr=0.02, **OPTIONS[option]())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
        for step in range(9):
            if by_hand:
                for group in optimizer.param_groups:
                    group["lr"] = 0.02 * 0.1 ** (step // 3)
            train(model, optimizer, range(step, step + 1))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 0.1 ** (step // 3))
            if not by_hand:
                scheduler.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("option", [*OPTIONS, "fused"])
def test_a_gradient_scaler_changes_nothing_and_skips_overflows(option: str) -> None:
    settings = {"fused": True} if option == "fused" else OPTIONS[option]()
    mine = make_net()
    optimizer = DeepNestedOptimizer(mine, lr=0.02, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80, growth_interval=10**6)
    data, good = batches(), []
    for step in range(12):
        batch = next(data)
        too_large = 1e20 if step % 3 == 1 else 1.0
        scaler.scale(loss_of(mine, batch) * too_large).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() == before:
            good.append(step)
    assert good == [step for step in range(12) if step % 3 != 1]
    settings = {"fused": True} if option == "fused" else OPTIONS[option]()
    theirs = make_net()
    plain = DeepNestedOptimizer(theirs, lr=0.02, **settings)
    for step in good:
        train(theirs, plain, range(step, step + 1))
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    if option != "fused":
        assert optimizer.global_step == len(good)


@pytest.mark.parametrize("option", OPTIONS)
def test_accumulated_micro_batches_equal_one_batch(option: str) -> None:
    nets = [make_net(dtype=torch.float64), make_net(dtype=torch.float64)]
    for model, parts in zip(nets, (1, 4), strict=True):
        optimizer = DeepNestedOptimizer(model, lr=0.02, **OPTIONS[option]())
        data = batches()
        for _ in range(8):
            x, y = next(data)
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_of(model, (xs, ys)) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_step_hooks_run_once_around_the_update() -> None:
    model = make_net()
    torch.optim.AdamW(make_net().parameters()).step()  # makes torch wrap AdamW.step
    optimizer = DeepNestedOptimizer(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(model[0].weight.clone()))
    optimizer.register_step_post_hook(lambda *_: calls.append(model[0].weight.clone()))
    train(model, optimizer, range(1))
    assert len(calls) == 2
    assert not torch.equal(calls[0], calls[1])
    assert torch.equal(calls[1], model[0].weight)


def test_two_optimizers_made_with_one_cms_count_apart() -> None:
    shared, nets = cms(), [make_net(), make_net()]
    optimizers = [DeepNestedOptimizer(model, lr=0.02, cms=shared) for model in nets]
    for step in range(6):
        for model, optimizer in zip(nets, optimizers, strict=True):
            train(model, optimizer, range(step, step + 1))
    assert_same(*nets)
    assert [optimizer.global_step for optimizer in optimizers] == [6, 6]
    assert shared.global_step == 0


def test_groups_may_name_their_level() -> None:
    model = make_net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "level": 1}]
    optimizer = DeepNestedOptimizer(groups, cms=ContinuumMemorySystem((1, 3, 9)))
    optimizer.add_param_group({"params": model[4].parameters(), "level": 2, "lr": 0.5})
    assert [group["period"] for group in optimizer.param_groups] == [1, 3, 9]
    assert optimizer.param_groups[2]["lr"] == 0.5
    named = DeepNestedOptimizer(model.named_parameters(), cms=cms())
    assert [group["level"] for group in named.param_groups] == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: {"params_or_model": m.parameters(), "cms": cms()}, "must come with names"),
        (
            lambda m: {"params_or_model": m, "deep_momentum": True, "fused": True},
            r"fused \(=True\)",
        ),
        (lambda m: {"params_or_model": m, "deep_momentum": True, "amsgrad": True}, "amsgrad"),
        (lambda m: {"params_or_model": m, "controller": True, "capturable": True}, "capturable"),
        (lambda m: {"params_or_model": m, "topology": {"seed": 1}}, "with CMSBlockLinear layers"),
        (lambda m: {"params_or_model": m, "meta_lr": 0}, r"meta_lr \(=0\) must be above 0"),
        (lambda m: {"params_or_model": m, "lr": -1.0}, "Invalid learning rate"),
        (lambda m: {"params_or_model": []}, r"params_or_model \(empty\) must hold at least one"),
        (lambda m: {"params_or_model": nn.Tanh()}, r"\(=Tanh\) holds no parameter that requires"),
        (
            lambda m: {"params_or_model": [{"params": m.parameters(), "level": 5}]},
            r"level of a parameter group \(=5\) must be 0, 1 or 2",
        ),
    ],
)
def test_bad_arguments(make: Callable[[nn.Module], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepNestedOptimizer(**make(make_net()))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("cms", (1, 2, 4), r"cms \(=\(1, 2, 4\)\) must be a ContinuumMemorySystem, for example"),
        ("deep_momentum", "yes", r"deep_momentum \(='yes'\) must be a DeepMomentum or bool"),
        ("controller", 3, r"controller \(=3\) must be a LearningRateController or bool"),
        ("spikes", True, r"spikes \(=True\) must be a LossSpikeDetector, for example"),
        ("topology", 3, r"topology \(=3\) must be a Mapping or bool, for example"),
        ("logger", 5, r"logger \(=5\) must have log\(metrics, step\), or be the path"),
    ],
)
def test_arguments_of_another_kind(argument: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DeepNestedOptimizer(make_net(), **{argument: value})


def test_a_group_without_names_may_come_later() -> None:
    """A model's parameters have names, and torch takes all with names or none."""
    model, more = make_net(), nn.Linear(2, 2)
    optimizer = DeepNestedOptimizer(model, cms=ContinuumMemorySystem((1, 2, 4)))
    optimizer.add_param_group({"params": more.parameters(), "level": 1})
    group = optimizer.param_groups[-1]
    assert group["params"] == [*more.parameters()]
    assert (group["level"], group["period"]) == (1, 2)
    assert group["param_names"] == [f"group{len(optimizer.param_groups) - 1}.{i}" for i in (0, 1)]
    before, moved = more.bias.detach().clone(), []
    for _ in range(4):
        more.bias.grad = torch.ones(2)
        optimizer.step()
        moved.append(not torch.equal(more.bias, before))
        before = more.bias.detach().clone()
    assert moved == [False, True, False, True]
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2)), "lr": 0.5})
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_lone_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="put the tensor into a list"):
        DeepNestedOptimizer(torch.zeros(3, requires_grad=True))


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"deep_momentum": True}, {}, r"deep_momentum \(=off\) differs .*\(=on\)"),
        ({}, {"controller": True}, r"controller \(=on\) differs .*\(=off\)"),
        (
            {"deep_momentum": DeepMomentum(hidden=4)},
            {"deep_momentum": True},
            r"deep_momentum.hidden \(=8\) differs .*\(=4\)",
        ),
        (
            {"controller": LearningRateController(hidden=4)},
            {"controller": True},
            r"controller.hidden \(=8\) differs",
        ),
        (
            {"cms": ContinuumMemorySystem((1, 2, 4))},
            {"cms": ContinuumMemorySystem((1, 2, 8))},
            r"periods \(=\[1, 2, 8\]\) differs",
        ),
    ],
)
def test_a_state_of_other_settings_is_refused(
    saved: dict[str, Any], loaded: dict[str, Any], message: str
) -> None:
    state = DeepNestedOptimizer(make_net(), **saved).state_dict()
    with pytest.raises(ValueError, match=message):
        DeepNestedOptimizer(make_net(), **loaded).load_state_dict(state)


def test_a_state_of_other_levels_is_refused() -> None:
    parts = [make_net()[0].parameters(), make_net()[2].parameters()]
    groups = [{"params": list(part)} for part in parts]
    other = [{**groups[0]}, {**groups[1], "level": 1}]
    state = DeepNestedOptimizer(groups).state_dict()
    with pytest.raises(ValueError, match=r"levels of the parameter groups \(=\[0, 1\]\) differ"):
        DeepNestedOptimizer(other).load_state_dict(state)
