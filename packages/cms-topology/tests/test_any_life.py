"""Whatever is done to a layer, in whatever order: it stays a linear layer with a valid topology."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn import functional

from blockell_format import validate_col_indices
from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager

FLOATS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


class AnyLife(RuleBasedStateMachine):
    """A layer of 5 x 6 or 6 x 4 blocks of 8 x 8, an optimizer and a manager."""

    @initialize(
        tall=st.booleans(),
        bias=st.booleans(),
        spare=st.booleans(),
        candidate=st.sampled_from(["gradient", "outer"]),
        keep=st.sampled_from(["gradient", "magnitude", "taylor"]),
        seed=st.integers(0, 99),
    )
    def start(
        self, tall: bool, bias: bool, spare: bool, candidate: str, keep: str, seed: int
    ) -> None:
        torch.manual_seed(seed)
        scoring = ScoringConfig(
            candidate_score=candidate,
            keep_score=keep,
            max_swap_frac=0.5,
            max_row_swap_frac=0.5,
            swap_threshold=1.0,
        )
        R, C = (6, 4) if tall else (5, 6)
        self.options: dict[str, Any] = {
            "bias": bias,
            "tile_size": 8,
            "max_density": 1.0 if spare else None,
            "row_group": 2 if tall else 1,
            "scoring": scoring,
        }
        self.sizes = C * 8, R * 8
        self.layer = CMSBlockLinear(*self.sizes, **self.options)
        self.count = 0
        self.manage()

    def manage(self, state: dict[str, Any] | None = None) -> None:
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1e-2, eps=1e-4)
        self.manager = TopologyManager(self.layer, self.optimizer, periods=(1, 1, 2))
        if state is not None:
            self.manager.load_state_dict(state)

    def inputs(self, tokens: int = 5) -> Tensor:
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        x = torch.randn(tokens, self.layer.in_features, generator=generator)
        return (x * torch.linspace(0.2, 2, x.shape[1])).to(self.layer.values.dtype)

    @rule(steps=st.integers(1, 3), tokens=st.sampled_from([1, 7]))
    def train(self, steps: int, tokens: int) -> None:
        before = self.layer.num_live
        self.layer.train()  # who trains in evaluation mode is told what is missing
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.layer(self.inputs(tokens)).float() - 1).square().mean().backward()
            self.optimizer.step()
            self.manager.step()
        assert self.layer.num_live == before

    @rule()
    def decide_by_hand(self) -> None:
        before = self.layer.to_dense().detach()
        result = self.layer.topology_step(optimizer=self.optimizer)
        if result.num_swaps == 0:
            assert torch.equal(self.layer.to_dense(), before)

    @precondition(lambda self: self.layer.num_live < self.layer.K)
    @rule()
    def grow(self) -> None:
        x = self.inputs()
        before = self.layer(x)
        born = self.layer.grow((self.layer.num_live + 1) / self.layer.C)
        assert born == 1
        torch.testing.assert_close(self.layer(x), before)

    @rule(dtype=FLOATS)
    def cast(self, dtype: torch.dtype) -> None:
        self.layer.to(dtype)
        self.manage()

    @rule(way=st.sampled_from(["deepcopy", "pickle", "torch"]))
    def copied(self, way: str) -> None:
        x = self.inputs()
        before, manager = self.layer(x), self.manager.state_dict()
        if way == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        elif way == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        else:
            file = io.BytesIO()
            torch.save(self.layer.state_dict(), file)
            file.seek(0)
            other = CMSBlockLinear(*self.sizes, **self.options, dtype=self.layer.values.dtype)
            other.load_state_dict(torch.load(file, weights_only=True))
            self.layer = other
        assert torch.equal(self.layer(x), before)
        self.manage(manager)

    @rule(assign=st.booleans(), empty=st.booleans())
    def loaded(self, assign: bool, empty: bool) -> None:
        x = self.inputs()
        before, state = self.layer(x), copy.deepcopy(self.layer.state_dict())
        other = CMSBlockLinear(*self.sizes, **self.options, dtype=self.layer.values.dtype)
        if empty:
            other = other.to("meta")
            other = other if assign else other.to_empty(device="cpu")
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), before)
        self.layer = other
        self.manage()

    @rule()
    def called_as_a_function(self) -> None:
        x, dense = self.inputs(), self.layer.to_dense().detach()
        state = {name: 2 * p.detach() for name, p in self.layer.named_parameters()}
        doubled = torch.func.functional_call(self.layer, state, (x,))
        bias = None if self.layer.bias is None else 2 * self.layer.bias
        self.close(doubled, functional.linear(x, 2 * dense, bias))
        gradient = torch.func.grad(
            lambda p: torch.func.functional_call(self.layer, p, (x,)).float().sum()
        )({name: p.detach() for name, p in self.layer.named_parameters()})
        assert gradient["values"].shape == self.layer.values.shape

    @rule()
    def dense_and_back(self) -> None:
        if self.layer.values.dtype == torch.bfloat16:
            return
        dense = self.layer.to_linear()
        options = self.options | {"density": self.layer.density}
        del options["bias"]
        again = CMSBlockLinear.from_dense(dense, **options)
        self.close(again.to_dense(), dense.weight)

    @rule()
    def clipped_and_vectored(self) -> None:
        self.layer(self.inputs()).float().square().sum().backward()
        nn.utils.clip_grad_norm_(self.layer.parameters(), 0.1)
        vector = nn.utils.parameters_to_vector(self.layer.parameters())
        nn.utils.vector_to_parameters(vector.clone(), self.layer.parameters())

    @rule(frozen=st.booleans(), training=st.booleans())
    def modes(self, frozen: bool, training: bool) -> None:
        self.layer.requires_grad_(not frozen).train(training)
        if frozen:
            assert not self.layer(self.inputs()).requires_grad
            self.layer.requires_grad_(True)

    def close(self, got: Tensor, want: Tensor) -> None:
        tolerance = TOLERANCE[got.dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    @invariant()
    def it_is_a_linear_layer(self) -> None:
        layer, x = self.layer, self.inputs()
        self.close(layer(x), functional.linear(x, layer.to_dense(), layer.bias))
        validate_col_indices(layer.col_indices.numpy(), layer.C, layer.row_group)
        assert int((layer.col_indices[0] >= 0).sum()) == layer.num_live
        assert layer.get_topology_stats().num_blocks == layer.R * layer.num_live
        assert not layer.values[:, layer.num_live :].any()
        assert (layer.scorer.block_age >= 0).all()


AnyLife.TestCase.settings = settings(
    max_examples=8,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyLife = AnyLife.TestCase
