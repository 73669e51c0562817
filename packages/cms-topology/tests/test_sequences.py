"""What users do in any order: every rule of the layer holds after each step of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from blockell_format import transposed_index, validate_col_indices
from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager

ACTIONS = ["train", "overflow", "grow", "resume", "assign", "copy", "strides", "freeze", "evaluate"]
OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
]


@st.composite
def settings_of_a_layer(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["gradient", "outer", "loss"]))
    keep = "loss" if kind == "loss" else draw(st.sampled_from(["gradient", "magnitude", "taylor"]))
    scoring = ScoringConfig(
        candidate_score=kind,
        keep_score=keep,
        max_swap_frac=draw(st.sampled_from([0.05, 0.3, 1.0])),
        max_row_swap_frac=draw(st.sampled_from([0.25, 1.0])),
        swap_threshold=draw(st.sampled_from([1.0, 1.5])),
        epsilon=draw(st.sampled_from([0.0, 0.5, 1.0])),
        grace_decisions=draw(st.integers(0, 2)),
        birth=draw(st.sampled_from(["kaiming", "zeros"])),
    )
    density = draw(st.sampled_from([0.2, 0.5, 1.0]))
    return {
        "scoring": scoring,
        "tile_size": 8,
        "density": density,
        "max_density": max(density, draw(st.sampled_from([0.5, 1.0]))),
        "row_group": draw(st.sampled_from([1, "auto"])),
    }


class Run:
    """A model, its optimizer and its manager."""

    def __init__(self, model: nn.Sequential, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.model, self.make = model, make
        self.optimizer = make(model.parameters())
        self.manager = TopologyManager(model, self.optimizer, periods=(1, 1, 2))

    def train(self, x: Tensor, overflow: bool = False) -> None:
        self.optimizer.zero_grad()
        (self.model(x).square().sum() / max(1, len(x))).backward()
        first = self.model[0].values
        if overflow and first.grad is not None:
            first.grad.fill_(torch.nan)
        else:
            self.optimizer.step()
        self.manager.step()

    def resumed(self, assign: bool) -> Run:
        """As loaded from a file into a model of another topology."""
        file = io.BytesIO()
        torch.save([t.state_dict() for t in (self.model, self.optimizer, self.manager)], file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        model = copy.deepcopy(self.model)
        for layer in (model[0], model[2]):
            layer.reset_parameters()
        model.load_state_dict(states[0], assign=assign)
        other = Run(model, self.make)
        other.optimizer.load_state_dict(states[1])
        other.manager.load_state_dict(states[2])
        return other


def check(model: nn.Sequential) -> None:
    y = x = torch.randn(5, model[0].in_features)
    for module in model:
        if not isinstance(module, CMSBlockLinear):
            y = module(y)
            continue
        columns, index = module.col_indices, transposed_index(module.col_indices, module.C)
        assert validate_col_indices(columns.numpy(), module.C, module.row_group) == module.num_live
        assert torch.equal(index.order, module._index.order)
        assert torch.equal(index.col_start, module._index.col_start)
        assert not module.values[:, module.num_live :].any()
        assert module.scorer.score_ema.isfinite().all()
        y = functional.linear(y, module.to_dense(), module.bias)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:all gradients of all sparse layers have been zero")
@pytest.mark.filterwarnings("ignore:the layers .* collected no statistics")
@settings(max_examples=12, deadline=None)
@given(
    layer=settings_of_a_layer(),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    make=st.sampled_from(OPTIMIZERS),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=8),
    tokens=st.integers(0, 20),
)
def test_any_order(
    layer: dict[str, Any],
    sizes: tuple[int, int],
    make: Callable[[Any], torch.optim.Optimizer],
    actions: list[str],
    tokens: int,
) -> None:
    torch.manual_seed(0)
    rows, columns = (8 * size for size in sizes)
    model = nn.Sequential(
        CMSBlockLinear(columns, rows, **layer), nn.Tanh(), CMSBlockLinear(rows, columns, **layer)
    )
    run = Run(model, make)
    for action in actions:
        if action == "grow":
            for grown in run.manager.layers.values():
                grown.grow((grown.density + grown.K / grown.C) / 2)
        elif action in ("resume", "assign"):
            one, other = copy.deepcopy(run), run.resumed(action == "assign")
            for _ in range(3):
                x = torch.randn(7, columns)
                one.train(x)
                other.train(x)
            for name, tensor in one.model.state_dict().items():
                assert torch.equal(tensor, other.model.state_dict()[name]), name
        elif action == "copy":
            run = copy.deepcopy(run)
        elif action == "strides":
            run.model.to(memory_format=torch.channels_last)
        elif action == "freeze":
            first = run.model[0]
            first.requires_grad_(not first.values.requires_grad)
        elif action == "evaluate":
            run.model.train(not run.model.training)
        run.train(torch.randn(tokens, columns), overflow=action == "overflow")
        check(run.model)
