"""Adam's first steps of a newborn block are those of a fresh parameter."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cms_topology import (
    CMSBlockLinear,
    NewbornStepCorrection,
    TopologyManager,
    _adam_rules,
    reset_optimizer_state,
)

RunAlone = Callable[[str, Mapping[str, str]], None]

ADAM: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    "adam short memory": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95)),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "nadam foreach": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True, maximize=True),
    "nadam decay": lambda p: torch.optim.NAdam(
        p, lr=0.01, momentum_decay=0.05, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "radam foreach": lambda p: torch.optim.RAdam(p, lr=0.01, foreach=True, maximize=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adamax foreach": lambda p: torch.optim.Adamax(p, lr=0.01, foreach=True, weight_decay=0.1),
}
CAPTURABLE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw capturable": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0, capturable=True),
    "nadam capturable": lambda p: torch.optim.NAdam(p, lr=0.01, capturable=True),
    "radam capturable": lambda p: torch.optim.RAdam(p, lr=0.01, capturable=True),
    "adamax capturable": lambda p: torch.optim.Adamax(p, lr=0.01, capturable=True),
}


def run(
    name: str, corrected: bool, *, steps_before: int = 0, strided: bool = False, device: str = "cpu"
) -> tuple[CMSBlockLinear, torch.Tensor, nn.Parameter]:
    """50 steps, then one block is reborn; 40 more steps beside a fresh parameter like it."""
    layer = CMSBlockLinear(32, 16, bias=False, tile_size=8, row_group=1, device=device)
    if strided:  # as what no CPU kernel takes
        layer.values.data = layer.values.data.to(memory_format=torch.channels_last)
    optimizer = (ADAM | CAPTURABLE)[name]([layer.values])
    correction = NewbornStepCorrection()
    generator = torch.Generator().manual_seed(0)
    born = torch.zeros(2, 2, dtype=torch.bool, device=device)
    born[1, 0] = True
    fresh: nn.Parameter | None = None
    for step in range(90):
        if step == 50:
            reset_optimizer_state([optimizer], layer.values, born)
            layer.scorer.block_age.masked_fill_(born, 0)
            fresh = nn.Parameter(layer.values.detach()[1, 0].clone())
            fresh_optimizer = (ADAM | CAPTURABLE)[name]([fresh])
            # capturable RAdam rounds a difference of large float32 numbers: 0.6% of its first steps
            fresh_optimizer.param_groups[0]["capturable"] = False
        drawn = torch.randn(layer.values.shape, generator=generator)
        layer.values.grad = torch.empty_like(layer.values).copy_(drawn)
        optimizer.step()
        if step == 0 and steps_before:
            optimizer.state[layer.values]["step"] += steps_before
            layer.scorer.block_age += steps_before
            if "mu_product" in optimizer.state[layer.values]:
                optimizer.state[layer.values]["mu_product"].zero_()
        layer.scorer.block_age += 1
        if corrected:
            correction.apply(optimizer, layer.values, layer.scorer.block_age, layer.num_live)
        if fresh is not None:
            fresh.grad = layer.values.grad[1, 0].clone()
            fresh_optimizer.step()
    assert fresh is not None
    return layer, born, fresh


@pytest.mark.parametrize("steps_before", [0, 50000])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ADAM)
def test_newborn_follows_a_fresh_parameter_and_survivors_do_not_move(
    name: str, strided: bool, steps_before: int
) -> None:
    plain, born, _ = run(name, corrected=False, steps_before=steps_before, strided=strided)
    torch.manual_seed(0)
    layer, _, fresh = run(name, corrected=True, steps_before=steps_before, strided=strided)
    assert layer.values.is_contiguous() != strided
    torch.testing.assert_close(layer.values[1, 0], fresh, atol=4e-6, rtol=1e-4)
    assert fresh.isfinite().all()
    assert torch.equal(layer.values[~born], plain.values[~born])
    assert not torch.allclose(plain.values[1, 0], fresh, atol=1e-2), "the correction matters"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ADAM, *CAPTURABLE])
def test_newborn_follows_a_fresh_parameter_on_a_gpu(name: str) -> None:
    torch.manual_seed(0)
    layer, _, fresh = run(name, corrected=True, steps_before=50000, device="cuda")
    torch.testing.assert_close(layer.values[1, 0], fresh, atol=4e-6, rtol=1e-4)


@pytest.mark.parametrize("age", [3000, 8000])
def test_nadams_momentum_is_scheduled_by_the_blocks_own_age(age: int) -> None:
    """It settles late: a block of 8000 steps has outlived Adam's corrections, but not NAdam's."""
    layer = CMSBlockLinear(16, 8, bias=False, tile_size=8, density=1.0)
    fresh = nn.Parameter(torch.zeros(8, 8))
    optimizers = [torch.optim.NAdam([p], lr=0.1) for p in (layer.values, fresh)]
    correction = NewbornStepCorrection()
    for step in range(3):
        layer.values.grad = torch.randn_like(layer.values)
        fresh.grad = layer.values.grad[0, 0].clone()
        for optimizer in optimizers:
            optimizer.step()
        layer.scorer.block_age += 1
        if step == 0:  # as if so many steps had gone by
            layer.scorer.block_age[0] = torch.tensor([age, 10**6])
            for optimizer, t in zip(optimizers, (10**6, age), strict=True):
                (state,) = optimizer.state.values()
                state["step"].fill_(t)
                state["mu_product"].zero_()
        uncorrected = layer.values.detach().clone()
        correction.apply(optimizers[0], layer.values, layer.scorer.block_age, layer.num_live)
        if step == 0:
            fresh.data.copy_(layer.values[0, 0])
    assert not torch.allclose(uncorrected[0, 0], fresh, atol=1e-3)
    torch.testing.assert_close(layer.values[0, 0], fresh, atol=1e-5, rtol=1e-4)


def test_nadams_steps_with_decay_in_the_gradient_are_left_alone_with_a_warning() -> None:
    layer = CMSBlockLinear(32, 16, bias=False, tile_size=8)
    optimizer = torch.optim.NAdam([layer.values], weight_decay=0.01)
    correction = NewbornStepCorrection()
    for step in range(3):
        layer.values.grad = torch.randn_like(layer.values)
        optimizer.step()
        before = layer.values.detach().clone()
        said = re.escape("NAdam with weight_decay (=0.01) adds it to the gradients")
        with pytest.warns(UserWarning, match=said) if step == 0 else contextlib.nullcontext():
            correction.apply(optimizer, layer.values, layer.scorer.block_age, layer.num_live)
        assert torch.equal(layer.values, before)


def test_nadams_step_without_its_gradient_is_left_alone() -> None:
    layer = CMSBlockLinear(32, 16, bias=False, tile_size=8)
    optimizer = torch.optim.NAdam([layer.values])
    for _ in range(2):
        layer.values.grad = torch.randn_like(layer.values)
        optimizer.step()
    optimizer.zero_grad()
    before = layer.values.detach().clone()
    NewbornStepCorrection().apply(optimizer, layer.values, layer.scorer.block_age, layer.num_live)
    assert torch.equal(layer.values, before)


class HomeMadeAdam(torch.optim.Optimizer):
    """Has Adam's moments, and nobody knows what else it does."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}


def test_an_unknown_optimizer_with_adams_moments_is_named_once() -> None:
    layer = CMSBlockLinear(32, 16, bias=False, tile_size=8)
    optimizer = HomeMadeAdam([layer.values], {})
    model = nn.Sequential(layer)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 100))
    for step in range(3):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
        said = re.escape("the optimizer (=HomeMadeAdam) keeps Adam's moments, but is none of")
        with pytest.warns(UserWarning, match=said) if step == 0 else contextlib.nullcontext():
            manager.step()
        optimizer.zero_grad()


def test_the_uncorrected_step_is_too_long_by_the_known_factor() -> None:
    lengths = []
    for corrected in (False, True):
        layer = CMSBlockLinear(8, 8, bias=False, tile_size=8, density=1.0)
        optimizer = torch.optim.AdamW([layer.values], lr=1.0, weight_decay=0.0)
        correction = NewbornStepCorrection()
        moves = []
        for step in range(20000, 20025):
            if step == 20000:
                layer.values.grad = torch.zeros_like(layer.values)
                optimizer.step()
                optimizer.state[layer.values]["step"].fill_(20000)
                layer.scorer.block_age.zero_()
            layer.values.grad = torch.ones_like(layer.values)
            before = layer.values.detach().clone()
            optimizer.step()
            layer.scorer.block_age += 1
            if corrected:
                correction.apply(optimizer, layer.values, layer.scorer.block_age, 1)
            moves.append(float((before - layer.values.detach()).abs().max()))
        lengths.append(max(moves))
    assert lengths[0] == pytest.approx(6.6, abs=0.1)
    assert lengths[1] == pytest.approx(1.0, abs=0.01)


KINDS = (torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


@given(
    kind=st.sampled_from(KINDS),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.9999)),
    t=st.integers(1, 10**6),
    ages=st.lists(st.integers(1, 10**6), min_size=1, max_size=4),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_the_short_way_is_the_long_way(
    kind: Callable[..., torch.optim.Optimizer],
    betas: tuple[float, float],
    t: int,
    ages: list[int],
    maximize: bool,
    seed: int,
) -> None:
    """`corrected`, in few passes, is what a fresh step is longer than the one that was taken."""
    optimizer = kind([nn.Parameter(torch.zeros(1))], lr=0.1, betas=betas, maximize=maximize)
    rule, group = _adam_rules.rule_of(optimizer), optimizer.param_groups[0]
    assert rule is not None
    generator = torch.Generator().manual_seed(seed)
    w, m, v, g = torch.randn(4, len(ages), 2, 2, generator=generator, dtype=torch.float64)
    v = v.square() + 0.01
    tensors = [m, v, g] if rule is _adam_rules.NADAM else [m, v]
    own = torch.tensor(ages).clamp(max=t)
    taken, meant = (
        _adam_rules.step(tensors, rule.parts(count, group, None), rule, group)
        for count in (torch.tensor(float(t)).double(), own.double()[:, None, None])
    )
    assert meant.isfinite().all()
    expected = w + 0.1 * (taken - meant)
    got = _adam_rules.corrected([w.clone(), *tensors], float(t), own, rule, group, None)
    torch.testing.assert_close(got, expected)


def test_a_skipped_step_is_not_corrected() -> None:
    """GradScaler skips optimizer.step() when gradients overflow."""
    layer = CMSBlockLinear(32, 16, bias=False, tile_size=8)
    optimizer = torch.optim.AdamW([layer.values])
    correction = NewbornStepCorrection()
    for _ in range(5):
        layer.values.grad = torch.randn_like(layer.values)
        optimizer.step()
        layer.scorer.block_age += 1
        correction.apply(optimizer, layer.values, layer.scorer.block_age, layer.num_live)
    layer.scorer.block_age[0, 0] = 1
    before = layer.values.detach().clone()
    correction.apply(optimizer, layer.values, layer.scorer.block_age, layer.num_live)
    assert torch.equal(layer.values, before)


def test_other_optimizers_are_left_alone() -> None:
    layer = CMSBlockLinear(32, 16, bias=False, tile_size=8)
    optimizer = torch.optim.SGD([layer.values], lr=0.1, momentum=0.9)
    layer.values.grad = torch.randn_like(layer.values)
    optimizer.step()
    before = layer.values.detach().clone()
    NewbornStepCorrection().apply(optimizer, layer.values, layer.scorer.block_age, layer.num_live)
    assert torch.equal(layer.values, before)


KERNEL = """
import sys, torch
from cms_topology import CMSBlockLinear, NewbornStepCorrection, _newborn_steps
device = sys.argv[1]
torch.manual_seed(0)
for tile, group, amsgrad, rate_on, betas in (
    (8, 1, False, None, (0.9, 0.999)), (16, 2, True, "cpu", (0.8, 0.95)),
    (128, 1, False, device, (0.9, 0.999)),
):
    layer = CMSBlockLinear(3 * tile, 4 * tile, tile_size=tile, density=0.4, max_density=0.7,
                           row_group=group, device=device)
    other = CMSBlockLinear(2 * tile, 6 * tile, tile_size=tile, row_group=group, device=device)
    rate = 0.01 if rate_on is None else torch.tensor(0.01, device=rate_on)
    optimizer = torch.optim.AdamW(
        [layer.values, other.values], lr=rate, betas=betas, amsgrad=amsgrad,
        capturable=rate_on == "cuda", foreach=rate_on is None,
    )
    for step in range(8):
        layer.values.grad = torch.randn_like(layer.values)
        other.values.grad = torch.randn_like(other.values)
        optimizer.step()
    age, its = (torch.randint(0, 10, x.scorer.block_age.shape, dtype=torch.int32, device=device)
                for x in (layer, other))
    age[0, 0] = its[0, 0] = 1
    both = [(other.values, its, other.num_live), (layer.values, age, layer.num_live)]
    old, results = layer.values.detach().clone(), []
    old_other = other.values.detach().clone()
    for kernel in (False, True):
        with torch.no_grad():
            layer.values.copy_(old)
            other.values.copy_(old_other)
        _newborn_steps._by_kernel = lambda *tensors: kernel
        correction = NewbornStepCorrection()
        correction.apply_all(optimizer, both)
        results.append([x.detach().clone() for x in (layer.values, other.values)])
        correction.apply_all(optimizer, both)
        assert torch.equal(layer.values, results[-1][0]), "no step, no correction"
    (plain, plain_other), (got, got_other) = results
    torch.testing.assert_close(got_other, plain_other, rtol=1e-4, atol=2e-6)
    old_enough = age >= 8
    old_enough[:, layer.num_live:] = True
    assert torch.equal(got[old_enough], old[old_enough])
    assert not torch.allclose(plain, old, atol=1e-3)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=2e-6)
print("agrees")
"""


def test_the_kernel_agrees_with_torch(run_alone: RunAlone) -> None:
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    gpu = torch.cuda.is_available()
    run_alone(KERNEL, os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}))


KEPT = """
import sys, torch
from cms_topology import CMSBlockLinear, NewbornStepCorrection, _newborn_steps
device = sys.argv[1]
torch.manual_seed(0)
_newborn_steps._by_kernel = lambda *tensors: True
layers = [CMSBlockLinear(24, 8 * n, tile_size=8, device=device) for n in (2, 3)]
optimizer = torch.optim.AdamW([layer.values for layer in layers], lr=0.01)
correction = NewbornStepCorrection()
launches = set()
for step in range(6):
    for layer in layers:
        layer.values.grad = torch.randn_like(layer.values)
    optimizer.step()
    if step == 2:
        state = optimizer.state[layers[1].values]
        state["exp_avg"] = 2 * state["exp_avg"]
    elif step == 3:
        layers[0].values.data = layers[0].values.data.clone()
    elif step == 4:
        layers[1].scorer.block_age = layers[1].scorer.block_age.clone()
    elif step == 5:
        optimizer.load_state_dict(optimizer.state_dict())
    for layer in layers:
        layer.scorer.block_age += 1
        layer.scorer.block_age[0, 0] = 1
    both = [(layer.values, layer.scorer.block_age, layer.num_live) for layer in layers]
    before = [layer.values.detach().clone() for layer in layers]
    results = []
    for one in (correction, NewbornStepCorrection()):
        with torch.no_grad():
            for layer, old in zip(layers, before):
                layer.values.copy_(old)
        one.apply_all(optimizer, both)
        results.append([layer.values.detach().clone() for layer in layers])
    for kept, anew, old in zip(*results, before):
        assert torch.equal(kept, anew) and (step == 0 or not torch.equal(kept, old)), step
    launches.add(correction._kept[id(optimizer)])
assert len(launches) == 5, "kept at step 1 only: then something moved"
print("agrees")
"""


def test_a_launch_is_kept_while_nothing_moves(run_alone: RunAlone) -> None:
    pytest.importorskip("triton")
    gpu = torch.cuda.is_available()
    run_alone(KEPT, os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}))
