"""Deep momentum, the controller, and gradients that reach both through unrolled steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cms_topology import CMSBlockLinear, sparsify
from titanmac_integration import (
    ContinuumMemorySystem,
    DeepMomentum,
    DeepNestedOptimizer,
    LearningRateController,
    TitanMACConfig,
    create_titanmac_model,
)
from titanmac_integration._optimizer._unroll import unrolled_loss

Pair = tuple[Tensor, Tensor]


def toy(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def pair(seed: int, dtype: torch.dtype = torch.float64) -> Pair:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, x[:, :2].sin()


def loss_of(model: nn.Module, batch: Pair) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def train(optimizer: DeepNestedOptimizer, model: nn.Module, steps: int, start: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        loss_of(model, pair(step, dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()


def nested(model: nn.Module, **changes: Any) -> DeepNestedOptimizer:
    """Both networks on, with weights that are not at their start, on a few steps of state."""
    settings: dict[str, Any] = {
        "deep_momentum": DeepMomentum(hidden=3),
        "controller": LearningRateController(hidden=3, period=2),
        "cms": ContinuumMemorySystem((1, 2, 4), {"2.*": 1}),
        "weight_decay": 0.1,
        "lr": 0.05,
        **changes,
    }
    optimizer = DeepNestedOptimizer(model, **settings)
    train(optimizer, model, 3)
    generator = torch.Generator().manual_seed(1)
    for weight in weights_of(optimizer):
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.data.add_(0.3 * noise)
    return optimizer


def weights_of(optimizer: DeepNestedOptimizer) -> list[Tensor]:
    assert optimizer._meta is not None
    return [weight for network in optimizer._meta.networks.values() for weight in network]


# -- meta-learning ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"deep_momentum": DeepMomentum(hidden=3, keep_length=False)},
        {"deep_momentum": False},
        {"controller": False, "maximize": True},
        {"cms": None},
    ],
    ids=str,
)
def test_gradients_match_finite_differences(changes: dict[str, Any]) -> None:
    """Every weight of both networks, through three unrolled steps with a slow level, in float64."""
    optimizer = nested(toy(), **changes)
    data = [pair(100 + i) for i in range(3)]

    def value() -> Tensor:
        return unrolled_loss(optimizer, pair(99), data, loss_fn=loss_of)

    weights = weights_of(optimizer)
    gradients = torch.autograd.grad(value(), weights)
    total = 0.0
    for weight, gradient in zip(weights, gradients, strict=True):
        flat, slopes = weight.data.view(-1), gradient.reshape(-1)
        for i in range(len(flat)):
            kept, values = float(flat[i]), []
            for shift in (1e-5, -1e-5):
                flat[i] = kept + shift
                values.append(float(value().detach()))
            flat[i] = kept
            difference = (values[0] - values[1]) / 2e-5
            assert float(slopes[i]) == pytest.approx(difference, rel=1e-4, abs=1e-9)
            total += abs(difference)
    assert total > 1e-4, "the networks have to matter for this to be a test"


def test_the_first_order_gradient_differs_and_points_the_same_way() -> None:
    optimizer = nested(toy())
    data = [pair(100 + i) for i in range(3)]
    found = []
    for second_order in (True, False):
        loss = unrolled_loss(optimizer, pair(99), data, loss_fn=loss_of, second_order=second_order)
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights_of(optimizer))])
        )
    assert not torch.equal(found[0], found[1])
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.9


def test_the_unrolled_steps_are_the_real_ones() -> None:
    """With the networks standing still, loss after unrolling = loss after stepping."""
    model = toy()
    optimizer = nested(
        model,
        deep_momentum=DeepMomentum(hidden=3, lr=0, decay=0),
        controller=False,
    )
    expected = unrolled_loss(optimizer, pair(99), [pair(3), pair(4), pair(5)], loss_fn=loss_of)
    train(optimizer, model, 3, start=3)
    torch.testing.assert_close(loss_of(model, pair(99)), expected, rtol=1e-9, atol=1e-12)


def test_meta_update_changes_the_networks_and_nothing_else() -> None:
    model = toy()
    optimizer = nested(model)
    loss_of(model, pair(7)).backward()
    parameters = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = copy.deepcopy(optimizer.state_dict())
    before = [weight.detach().clone() for weight in weights_of(optimizer)]
    report = optimizer.meta_update(pair(50), [pair(51), pair(52)], loss_fn=loss_of)
    assert report.steps == 2
    assert report is optimizer.last_meta
    assert set(report.gradient_norms) == {"deep_momentum", "controller"}
    assert all(norm > 0 for norm in report.gradient_norms.values())
    assert not all(map(torch.equal, before, weights_of(optimizer)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, parameters[name]), name
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)
    for key, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state["state"][key][n]) for n, v in entries.items())


def test_meta_updates_lower_the_loss_after_the_unrolled_steps() -> None:
    optimizer = nested(toy(), meta_lr=0.05)
    data = [pair(100 + i) for i in range(3)]
    losses = [optimizer.meta_update(pair(99), data, loss_fn=loss_of).val_loss for _ in range(30)]
    assert losses[-1] < losses[0]
    train(optimizer, optimizer.model or toy(), 5)


def test_meta_update_of_a_block_sparse_titanmac() -> None:
    """Kernels and fused attention have no second derivative and are replaced while unrolling."""
    config = TitanMACConfig(
        d_model=32, n_heads=2, n_layers=1, d_ff=64, max_seq_len=16, window_size=8, n_persistent=2,
        use_block_sparse=True, block_sparse_layers=None, block_sparse_tile_size=8,
    )  # fmt: skip
    model = create_titanmac_model(config)
    optimizer = DeepNestedOptimizer(model, deep_momentum=True, controller=True)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(tokens, tokens)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.meta_update((tokens, tokens), [{"input_ids": tokens, "labels": tokens}])
    assert all(norm > 0 for norm in report.gradient_norms.values())
    layer = next(m for m in model.modules() if isinstance(m, CMSBlockLinear))
    assert "forward" not in vars(layer)


def test_the_dense_stand_in_computes_the_same() -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(16, 16)), tile_size=8).double()
    optimizer = DeepNestedOptimizer(model, deep_momentum=True)
    x = torch.randn(4, 16, dtype=torch.float64)

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return net(batch).square().mean()

    torch.testing.assert_close(unrolled_loss(optimizer, x, [], loss_fn=loss), loss(model, x))


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({}, [1], "needs a network to train"),
        ({"deep_momentum": True}, [], r"train_batches \(=\[\]\) must hold at least one"),
    ],
)
def test_meta_update_says_what_it_needs(
    settings: dict[str, Any], batches: list[Any], message: str
) -> None:
    optimizer = DeepNestedOptimizer(toy(), **settings)
    with pytest.raises(ValueError, match=message):
        optimizer.meta_update(pair(0), batches, loss_fn=loss_of)


def test_meta_update_needs_the_model_and_a_scalar_loss() -> None:
    model = toy()
    with pytest.raises(ValueError, match="pass the model as params_or_model"):
        DeepNestedOptimizer(model.parameters(), controller=True).meta_update(pair(0), [pair(1)])
    optimizer = DeepNestedOptimizer(model, controller=True)
    with pytest.raises(ValueError, match=r"loss_fn \(shape \(6, 2\)\) must return a scalar"):
        optimizer.meta_update(pair(0), [pair(1)], loss_fn=lambda m, b: m(b[0]))
    with pytest.raises(TypeError, match=r"batch \(a Tensor\) must be a mapping or a sequence of"):
        optimizer.meta_update(pair(0), [pair(1)[0]])


# -- deep momentum ----------------------------------------------------------------------------


def test_deep_momentum_starts_as_adamw() -> None:
    """The first step is AdamW's: the second layer of the network starts at zero."""
    nets = [toy(), toy()]
    deep = DeepNestedOptimizer(nets[0], lr=0.05, deep_momentum=DeepMomentum(lr=0))
    train(deep, nets[0], 4)
    train(DeepNestedOptimizer(nets[1], lr=0.05), nets[1], 4)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_the_inner_objective_is_learned() -> None:
    """A gradient that alternates is predicted better than by its moving average."""
    weight = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    optimizer = DeepNestedOptimizer([weight], lr=1e-3, deep_momentum=DeepMomentum(lr=0.2))
    sizes = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    losses = []
    for step in range(300):
        weight.grad = sizes * (-1) ** step
        optimizer.step()
        assert optimizer.deep_momentum is not None
        losses.append(optimizer.deep_momentum.inner_losses[0])
    assert losses[0] is None
    assert losses[1] is not None
    assert losses[-1] is not None
    assert float(losses[-1]) < 0.05 * float(losses[2] or 0)


def test_the_step_keeps_adams_length_unless_told_otherwise() -> None:
    lengths = {}
    for keep in (True, False):
        model = toy()
        optimizer = nested(
            model, deep_momentum=DeepMomentum(hidden=3, keep_length=keep, lr=0),
            controller=False, cms=None, weight_decay=0,
        )  # fmt: skip
        before = model[0].weight.detach().clone()
        train(optimizer, model, 1, start=3)
        state = optimizer.state[model[0].weight]
        t = float(state["step"])
        plain = state["exp_avg"] / (1 - 0.9**t)
        plain = plain / ((state["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8)
        lengths[keep] = float((model[0].weight.detach() - before).norm() / (0.05 * plain.norm()))
    assert lengths[True] == pytest.approx(1.0, rel=1e-6)
    assert abs(lengths[False] - 1) > 0.01


def test_a_gradient_that_is_not_finite_does_not_spoil_the_networks() -> None:
    model = toy()
    optimizer = nested(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    optimizer.step()
    assert all(bool(weight.isfinite().all()) for weight in weights_of(optimizer))
    assert optimizer.controller is not None
    assert all(0.1 <= factor <= 2 for factor in optimizer.controller.factors)


# -- the controller ---------------------------------------------------------------------------


def test_factors_start_at_one_and_stay_in_range() -> None:
    model = toy()
    controller = LearningRateController(lr=50.0, period=1)
    optimizer = DeepNestedOptimizer(model, lr=0.05, controller=controller)
    assert optimizer.controller is not None
    assert optimizer.controller.factors == [1.0, 1.0]
    seen = []
    for step in range(40):
        train(optimizer, model, 1, start=step)
        assert optimizer.last_report is not None
        seen.append(optimizer.last_report.lr_factors or ())
    flat = [factor for factors in seen for factor in factors]
    assert min(flat) >= 0.1
    assert max(flat) <= 2.0
    assert max(flat) - min(flat) > 0.5
    assert all(len(factors) == 2 for factors in seen)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_unrolled_controller_sees_what_the_real_one_sees(maximize: bool) -> None:
    """Two ways to the same statistics and so to the same steps."""
    model = toy()
    optimizer = nested(
        model,
        deep_momentum=False,
        controller=LearningRateController(hidden=3, period=1, lr=0),
        maximize=maximize,
    )
    expected = unrolled_loss(optimizer, pair(99), [pair(3), pair(4), pair(5)], loss_fn=loss_of)
    train(optimizer, model, 3, start=3)
    assert optimizer.controller is not None
    assert len(set(optimizer.controller.factors)) > 1
    torch.testing.assert_close(loss_of(model, pair(99)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pattern", "expected"), [("constant", "up"), ("alternating", "down")])
def test_agreeing_gradients_raise_the_rate_and_opposing_ones_lower_it(
    pattern: str, expected: str
) -> None:
    weight = nn.Parameter(torch.zeros(8))
    optimizer = DeepNestedOptimizer(
        [weight], lr=1e-4, betas=(0.3, 0.9), controller=LearningRateController(period=1)
    )
    for step in range(60):
        weight.grad = torch.ones(8) * (1 if pattern == "constant" else (-1) ** step)
        optimizer.step()
    assert optimizer.controller is not None
    factor = optimizer.controller.factors[0]
    assert factor > 1.5 if expected == "up" else factor < 0.5


def test_factors_change_only_every_period() -> None:
    model = toy()
    optimizer = DeepNestedOptimizer(model, lr=0.05, controller=LearningRateController(period=5))
    changes, last = [], (1.0, 1.0)
    for step in range(1, 21):
        train(optimizer, model, 1, start=step)
        assert optimizer.last_report is not None
        if optimizer.last_report.lr_factors != last:
            changes.append(step)
        last = optimizer.last_report.lr_factors or ()
    assert set(changes) <= {5, 10, 15, 20}
    assert len(changes) >= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepMomentum(hidden=0), r"deep_momentum.hidden \(=0\) must be at least 1"),
        (lambda: DeepMomentum(lr=-1), "deep_momentum.lr"),
        (lambda: DeepMomentum(decay=1), r"deep_momentum.decay \(=1\) must be in \[0, 1\)"),
        (lambda: DeepMomentum(sample=0), "deep_momentum.sample"),
        (lambda: LearningRateController(low=0.01), r"controller.low \(=0.01\) must be in \[0.1"),
        (lambda: LearningRateController(high=3.0), r"controller.high \(=3.0\) must be in \(1, 2"),
        (lambda: LearningRateController(period=0), "controller.period"),
        (lambda: LearningRateController(hidden=0), "controller.hidden"),
        (lambda: LearningRateController(lr=-0.1), "controller.lr"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
