"""Which blocks are swapped: properties, and agreement with a loop that says it plainly."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockell_format import create_random_topology
from cms_topology import ScoringConfig, Selection, select_top_k


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    G = draw(st.sampled_from([1, 2, 4]))
    R = G * draw(st.integers(1, 5))
    C = draw(st.integers(1, 12))
    K = draw(st.integers(1, C))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    columns = create_random_topology(R, C, K, generator, G)
    present = torch.rand(R, K, generator=generator)
    candidates = 3 * torch.rand(R, C, generator=generator)
    return present, candidates, columns, G


def select(
    problem: tuple[Tensor, Tensor, Tensor, int], seed: int = 0, **settings: float
) -> Selection:
    present, candidates, columns, G = problem
    return select_top_k(
        present,
        candidates,
        columns,
        ScoringConfig(**settings),  # type: ignore[arg-type]
        row_group=G,
        generator=torch.Generator().manual_seed(seed),
    )


def plainly(
    problem: tuple[Tensor, Tensor, Tensor, int],
    threshold: float,
    row_frac: float,
    layer_frac: float,
) -> set[tuple[int, int, int]]:
    """(group, slot, new column) of every swap without exploration, by loops."""
    present, candidates, columns, G = problem
    R, K = present.shape
    C = candidates.shape[1]
    proposals = []
    for group in range(R // G):
        rows = slice(group * G, group * G + G)
        old = present[rows].square().sum(0).sqrt().tolist()
        new = candidates[rows].square().sum(0).sqrt().tolist()
        have = columns[group * G].tolist()
        slots = sorted(range(K), key=lambda s: old[s])
        absent = sorted((c for c in range(C) if c not in have), key=lambda c: -new[c])
        limit = max(1, int(row_frac * K))
        for slot, column in list(zip(slots, absent, strict=False))[:limit]:
            if new[column] > threshold * old[slot]:
                proposals.append((new[column] - old[slot], group, slot, column))
    proposals.sort(key=lambda p: -p[0])
    limit = max(1, int(layer_frac * K * (R // G)))
    return {(group, slot, column) for _, group, slot, column in proposals[:limit]}


@given(problems(), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_agrees_with_the_plain_loop(
    problem: tuple[Tensor, Tensor, Tensor, int], row_frac: float, layer_frac: float
) -> None:
    got = select(problem, epsilon=0.0, max_row_swap_frac=row_frac, max_swap_frac=layer_frac)
    G = problem[3]
    groups = {
        (int(row) // G, int(slot), int(got.columns[row, slot]))
        for row, slot in got.swapped.nonzero().tolist()
    }
    assert groups == plainly(problem, 1.5, row_frac, layer_frac)
    assert int(got.swapped.sum()) == len(groups) * G


@given(problems(), st.integers(0, 5), st.floats(0.0, 1.0))
def test_topology_stays_valid(
    problem: tuple[Tensor, Tensor, Tensor, int], seed: int, epsilon: float
) -> None:
    _, candidates, columns, G = problem
    got = select(problem, seed, epsilon=epsilon, max_swap_frac=1.0, max_row_swap_frac=1.0)
    R, C = candidates.shape
    for row in range(R):
        assert len(set(got.columns[row].tolist())) == columns.shape[1], "distinct in every row"
        assert torch.equal(got.columns[row], got.columns[row // G * G]), "equal within a group"
    assert got.columns.dtype == torch.int32
    assert int(got.columns.min()) >= 0
    assert int(got.columns.max()) < C
    assert torch.equal(got.columns[~got.swapped], columns[~got.swapped]), "survivors keep slots"
    arrived = (got.columns != columns) & got.swapped
    assert torch.equal(arrived, got.swapped), "a swap changes the column"
    for row, slot in got.swapped.nonzero().tolist():
        assert int(got.columns[row, slot]) not in columns[row].tolist(), "newcomers were absent"
    assert int(got.swapped.sum()) <= got.max_swaps


@given(problems(), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0, 1))
def test_caps(
    problem: tuple[Tensor, Tensor, Tensor, int], row_frac: float, layer_frac: float, epsilon: float
) -> None:
    got = select(problem, epsilon=epsilon, max_row_swap_frac=row_frac, max_swap_frac=layer_frac)
    R, K = problem[0].shape
    G = problem[3]
    per_row = 0 if row_frac == 0 else max(1, math.floor(row_frac * K))
    in_total = 0 if layer_frac == 0 else max(G, math.floor(layer_frac * K * (R // G)) * G)
    assert int(got.swapped.sum(1).max()) <= per_row
    assert int(got.swapped.sum()) <= in_total


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("kind", ["zero", "tied", "nan", "inf present", "inf candidate"])
@given(problem=problems())
@settings(max_examples=20)
def test_scores_without_evidence_swap_nothing(
    problem: tuple[Tensor, Tensor, Tensor, int], kind: str, epsilon: float
) -> None:
    present, candidates, columns, G = problem
    if kind == "zero":
        present, candidates = torch.zeros_like(present), torch.zeros_like(candidates)
    elif kind == "tied":
        present, candidates = torch.ones_like(present), torch.ones_like(candidates)
    elif kind == "nan":
        present = torch.full_like(present, math.nan)
    elif kind == "inf present":
        present = torch.full_like(present, math.inf)
    else:
        candidates = torch.full_like(candidates, math.inf)
    got = select(
        (present, candidates, columns, G),
        epsilon=epsilon,
        max_swap_frac=1.0,
        max_row_swap_frac=1.0,
    )
    assert not got.swapped.any()
    assert torch.equal(got.columns, columns)


def test_nan_in_one_block_disables_only_that_block() -> None:
    columns = torch.tensor([[0, 1]], dtype=torch.int32)
    present = torch.tensor([[math.nan, 1.0]])
    candidates = torch.tensor([[9.0, 9.0, math.nan, 5.0]])
    got = select((present, candidates, columns, 1), epsilon=0.0, max_row_swap_frac=1.0)
    assert got.swapped.tolist() == [[False, True]]
    assert got.columns.tolist() == [[0, 3]]


def test_threshold_is_strict() -> None:
    columns = torch.tensor([[0]], dtype=torch.int32)
    for candidate, swaps in ((1.5, 0), (1.5001, 1)):
        problem = (torch.ones(1, 1), torch.tensor([[0.0, candidate]]), columns, 1)
        assert int(select(problem, epsilon=0.0).swapped.sum()) == swaps


def test_epsilon_one_makes_every_swap_random() -> None:
    """The best absent column is always 9; random newcomers take it once in 8 times."""
    R, C, K = 512, 10, 2
    columns = torch.tensor([[0, 1]], dtype=torch.int32).expand(R, K).contiguous()
    candidates = torch.full((R, C), 5.0)
    candidates[:, 9] = 50.0
    problem = (torch.ones(R, K), candidates, columns, 1)
    loose = {"max_swap_frac": 1.0, "max_row_swap_frac": 0.5}
    greedy = select(problem, epsilon=0.0, **loose)
    assert (greedy.columns[greedy.swapped] == 9).all()
    explored = select(problem, epsilon=1.0, **loose)
    assert int(explored.swapped.sum()) == int(greedy.swapped.sum()) == R
    share = (explored.columns[explored.swapped] == 9).float().mean()
    assert 0.05 < float(share) < 0.22
    counts = torch.bincount(explored.columns[explored.swapped].long(), minlength=C)
    assert (counts[:2] == 0).all()
    assert (counts[2:] > 0.4 * R / 8).all(), "every absent column has its chance"
    mixed = select(problem, epsilon=0.25, **loose)
    share = (mixed.columns[mixed.swapped] != 9).float().mean()
    assert 0.15 < float(share) < 0.30  # 0.25 * 7/8


def test_protected_blocks_stay() -> None:
    columns = torch.tensor([[0, 1]], dtype=torch.int32)
    got = select_top_k(
        torch.tensor([[0.1, 0.2]]),
        torch.tensor([[0.0, 0.0, 9.0, 8.0]]),
        columns,
        ScoringConfig(epsilon=0.0, max_swap_frac=1.0, max_row_swap_frac=1.0),
        protected=torch.tensor([[True, False]]),
    )
    assert got.columns.tolist() == [[0, 2]]


def test_exploration_draws_the_same_amount_whatever_happens() -> None:
    columns = create_random_topology(4, 8, 4, torch.Generator().manual_seed(1))
    states = []
    for factor in (0.0, 10.0):
        generator = torch.Generator().manual_seed(7)
        candidates = factor * torch.rand(4, 8)
        select_top_k(torch.rand(4, 4), candidates, columns, ScoringConfig(), generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


@given(problems(), st.floats(0.01, 0.5), st.floats(1.0, 3.0))
def test_the_floor_takes_the_largest_gains_and_then_the_smallest_losses(
    problem: tuple[Tensor, Tensor, Tensor, int], floor: float, threshold: float
) -> None:
    G = problem[3]
    free = {"epsilon": 0.0, "max_row_swap_frac": 1.0, "max_swap_frac": 1.0}
    strict = select(problem, swap_threshold=threshold, **free)
    every = select(problem, swap_threshold=threshold, min_swap_frac=1.0, **free)
    got = select(problem, swap_threshold=threshold, min_swap_frac=floor, **free)
    # nothing that the threshold allows is lost
    assert bool((got.swapped | ~strict.swapped).all())
    assert bool((every.swapped | ~got.swapped).all())
    count, allowed, possible = (int(x.swapped.sum()) // G for x in (got, strict, every))
    wanted = math.ceil(floor * problem[0].numel() / G)
    assert count == max(allowed, min(wanted, possible))
    present, candidates, _, _ = problem
    new = candidates.gather(1, every.columns.long()).view(-1, G, present.shape[1])
    old = present.view(-1, G, present.shape[1])
    gain = (new.square().sum(1).sqrt() - old.square().sum(1).sqrt()).repeat_interleave(G, 0)
    added, left = got.swapped & ~strict.swapped, every.swapped & ~got.swapped
    if added.any() and left.any():
        assert gain[added].min() >= gain[left].max()


def test_a_floor_explores_where_no_candidate_is_better_and_spares_the_protected() -> None:
    columns = create_random_topology(8, 16, 4, torch.Generator().manual_seed(1), 1)
    present, candidates = 1.0 + torch.rand(8, 4), torch.rand(8, 16)
    config = ScoringConfig(min_swap_frac=0.05, max_swap_frac=0.5)
    result = select_top_k(present, candidates, columns, config)
    assert int(result.swapped.sum()) == 2
    assert result.columns.sort(1).values.diff().min() > 0
    protected = torch.ones(8, 4, dtype=torch.bool)
    protected[3, 2] = False
    result = select_top_k(present, candidates, columns, config, protected=protected)
    assert result.swapped.nonzero().tolist() == [[3, 2]]
    unknown = torch.full((8, 4), math.nan)
    assert int(select_top_k(unknown, candidates, columns, config).swapped.sum()) == 0


def test_without_a_floor_nothing_changes_and_the_cap_is_kept() -> None:
    present = torch.ones(8, 4)
    candidates = 1.2 + torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) / 10
    columns = create_random_topology(8, 16, 4, torch.Generator().manual_seed(1), 1)
    problem = (present, candidates, columns, 1)
    assert int(select(problem, epsilon=0.0).swapped.sum()) == 0
    # two of 32 blocks for the floor, one for the cap
    assert int(select(problem, epsilon=0.0, min_swap_frac=0.05).swapped.sum()) == 1
    more = select(problem, epsilon=0.0, min_swap_frac=0.05, max_swap_frac=0.5)
    assert int(more.swapped.sum()) == 2


def test_a_floor_above_the_cap_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"min_swap_frac \(=0.2\) must be in \[0, max_swap_frac"):
        ScoringConfig(min_swap_frac=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": torch.ones(3, 5)}, "candidates (shape (3, 5)) must have shape (4, 5)"),
        ({"col_indices": torch.zeros(4, 1)}, "col_indices (shape (4, 1)) must have shape (4, 2)"),
        ({"protected": torch.ones(4, 5)}, "protected (shape (4, 5)) must have shape (4, 2)"),
        (
            {"candidates": torch.ones(4, 1)},
            "present (shape (4, 2)) must have at most C (=1) blocks",
        ),
        ({"row_group": 3}, "row_group (=3) must be a divisor of the block rows (=4)."),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "present": torch.ones(4, 2),
        "candidates": torch.ones(4, 5),
        "col_indices": torch.tensor([[0, 1]] * 4, dtype=torch.int32),
        "config": ScoringConfig(),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        select_top_k(**arguments | change)
