"""Scores: moving averages, calibration, statistics, state."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from blockell_format import column_entropy, create_random_topology
from cms_topology import (
    CMSBlockLinear,
    ScoringConfig,
    TopologyScorer,
    compute_column_entropy,
    compute_gradient_frobenius_norms,
)


def scorer(**kwargs: object) -> TopologyScorer:
    return TopologyScorer(2, 4, 3, 8, ScoringConfig(**kwargs))  # type: ignore[arg-type]


def test_frobenius_norms() -> None:
    grad = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    norms = compute_gradient_frobenius_norms(grad)
    assert norms.dtype == torch.float32
    expected = grad.float().flatten(2).square().sum(2).sqrt()
    torch.testing.assert_close(norms, expected)


def test_moving_average_with_bias_correction() -> None:
    s = scorer()
    values = torch.zeros(2, 3, 8, 8)
    history = [torch.rand(2, 3) for _ in range(5)]
    ema = torch.zeros(2, 3)
    for t, norms in enumerate(history, 1):
        s.update_gradient_ema(norms)
        ema = 0.95 * ema + 0.05 * norms
        torch.testing.assert_close(s.present_scores(values), ema / (1 - 0.95**t))
    assert s.block_age.unique().tolist() == [5]


def test_window_is_about_twenty_steps() -> None:
    s = scorer()
    for _ in range(200):
        s.update_gradient_ema(torch.ones(2, 3))
    for _ in range(20):
        s.update_gradient_ema(torch.zeros(2, 3))
    remaining = float(s.present_scores(torch.zeros(2, 3, 8, 8))[0, 0])
    assert remaining == pytest.approx(0.95**20, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_contributes_nothing(bad: float) -> None:
    s = scorer()
    s.update_gradient_ema(torch.rand(2, 3))
    before = {name: b.clone() for name, b in s.named_buffers()}
    norms = torch.rand(2, 3)
    norms[1, 2] = bad
    s.update_gradient_ema(norms)
    stats = torch.ones(2 + 4 + 8)
    stats[0] = bad
    s.accumulate_statistics(stats)
    s.fold()
    for name, buffer in s.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert float(s.num_samples) == 0


def test_statistics_are_means_of_norms_over_the_sampled_steps() -> None:
    s = scorer()
    steps = [torch.rand(2 + 4 + 8) for _ in range(3)]
    for stats in steps:
        s.accumulate_statistics(stats)
    s.fold()
    mean = torch.stack(steps).sqrt().mean(0)
    torch.testing.assert_close(s.error_norm, mean[:2])
    torch.testing.assert_close(s.activation_norm, mean[2:6])
    torch.testing.assert_close(s.candidate_norm, mean[6:].view(2, 4))
    assert float(s.num_samples) == 3
    s.fold()
    assert float(s.num_samples) == 3, "a fold without samples keeps what is known"


def test_candidate_scores_by_kind() -> None:
    stats = torch.rand(2 + 4 + 8)
    for kind in ("outer", "gradient"):
        s = scorer(candidate_score=kind)
        s.accumulate_statistics(stats)
        s.fold()
        expected = (
            torch.outer(stats[:2].sqrt(), stats[2:6].sqrt())
            if kind == "outer"
            else stats[6:].sqrt().view(2, 4)
        )
        torch.testing.assert_close(s.compute_candidate_scores(), expected)


def test_calibration_makes_sums_agree_and_cancels_any_scale() -> None:
    s = TopologyScorer(6, 8, 4, 8)
    columns = create_random_topology(6, 8, 4, torch.Generator().manual_seed(0))
    present, candidates = torch.rand(6, 4), 40 * torch.rand(6, 8)
    scaled = s.calibrate(candidates, present, columns)
    known = scaled.gather(1, columns.long())
    torch.testing.assert_close(known.sum(), present.sum())
    torch.testing.assert_close(s.calibrate(65536 * candidates, present, columns), scaled)


def test_calibration_without_evidence_is_not_a_number() -> None:
    s = TopologyScorer(2, 4, 2, 8)
    columns = create_random_topology(2, 4, 2, torch.Generator().manual_seed(0))
    assert s.calibrate(torch.zeros(2, 4), torch.ones(2, 2), columns).isnan().all()


def test_should_swap() -> None:
    s = scorer()
    present = torch.tensor([1.0, 1.0, 0.0, math.nan, 1.0])
    candidate = torch.tensor([1.5, 1.6, 0.0, 5.0, math.inf])
    assert s.should_swap(candidate, present).tolist() == [False, True, False, False, False]


def test_swap_history_is_a_ring() -> None:
    s = scorer()
    for i in range(70):
        swapped = torch.zeros(2, 3, dtype=torch.bool).flatten()
        swapped[: i % 4] = True
        s.record_decision(swapped.view(2, 3), torch.zeros(2, 3))
    assert s.swap_rates() == pytest.approx([(i % 4) / 6 for i in range(6, 70)])
    assert len(s.swap_rates()) == 64


def test_newborn_starts_with_its_candidate_score_and_grace() -> None:
    s = scorer(grace_decisions=2)
    s.update_gradient_ema(torch.ones(2, 3))
    swapped = torch.zeros(2, 3, dtype=torch.bool)
    swapped[0, 1] = True
    s.record_decision(swapped, torch.full((2, 3), 7.0))
    scores = s.present_scores(torch.zeros(2, 3, 8, 8))
    assert scores[0].tolist() == pytest.approx([1.0, 7.0, 1.0])
    assert s.block_age.tolist() == [[1, 0, 1], [1, 1, 1]]
    assert s.block_grace.tolist() == [[0, 2, 0], [0, 0, 0]]
    s.record_decision(torch.zeros_like(swapped), torch.zeros(2, 3))
    assert s.block_grace[0, 1] == 1


def test_column_entropy_equals_the_numpy_one() -> None:
    columns = create_random_topology(6, 9, 4, torch.Generator().manual_seed(0))
    padded = torch.cat((columns, torch.full((6, 2), -1, dtype=torch.int32)), 1)
    for indices in (columns, padded):
        expected = column_entropy(indices.numpy(), 9)
        assert float(compute_column_entropy(indices, 9)) == pytest.approx(expected, abs=1e-6)
    assert float(compute_column_entropy(torch.zeros(3, 1, dtype=torch.int32), 1)) == 1.0
    one = torch.zeros(3, 1, dtype=torch.int32)
    assert float(compute_column_entropy(one, 4)) == pytest.approx(0.0, abs=1e-7)


def test_extra_state_round_trip_and_its_error() -> None:
    a, b = scorer(), scorer()
    a.accumulate_statistics(torch.rand(14))
    a.fold()
    a.accumulate_statistics(torch.rand(14))
    b.load_state_dict(a.state_dict(), strict=True)
    assert torch.equal(a._sums, b._sums)
    assert torch.equal(a._means, b._means)
    other = TopologyScorer(2, 5, 3, 8)
    with pytest.raises(ValueError, match=r"must be a tensor of 36 elements .* R=2, C=5"):
        other.set_extra_state(a.get_extra_state())


def test_statistics_are_not_buffers() -> None:
    """DDP broadcasts rank 0's buffers at every forward: a rank's own sums must not be buffers."""
    names = dict(scorer().named_buffers())
    assert set(names) == {
        "score_ema",
        "score_weight",
        "block_age",
        "block_grace",
        "num_decisions",
        "swap_history",
    }


def test_cast_keeps_float32() -> None:
    s = scorer()
    s.update_gradient_ema(torch.full((2, 3), 1.0001))
    before = s.score_ema.clone()
    s.half()
    assert s.score_ema.dtype == torch.float32
    assert torch.equal(s.score_ema, before)
    assert s._sums.dtype == torch.float32
    s.to("meta")
    assert s._means.device.type == s.score_ema.device.type == "meta"


@pytest.mark.parametrize("row_group", [1, 4])
def test_a_scorer_by_itself_selects_as_its_layer_decides(
    trained_layer: Callable[..., CMSBlockLinear], row_group: int
) -> None:
    layer = trained_layer(row_group=row_group)
    layer.score_step()
    live = layer.col_indices[:, : layer.num_live].clone()
    locked = torch.zeros_like(live, dtype=torch.bool)
    selection, candidates = layer.scorer.select_top_k(
        layer.values,
        live,
        row_group=row_group,
        generator=torch.Generator().manual_seed(3),
        locked=locked,
    )
    assert candidates.shape == (layer.R, layer.C)
    kept, _ = layer.scorer.select_top_k(layer.values, live, row_group=row_group, locked=~locked)
    assert not kept.swapped.any()
    assert torch.equal(layer.col_indices[:, : layer.num_live], live), "it only selects"
    result = layer.topology_step(torch.Generator().manual_seed(3))
    assert result.num_swaps > 0
    assert torch.equal(selection.swapped, result.swapped)
    assert torch.equal(selection.columns, result.new_columns)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("candidate_score", "best", r"candidate_score \(='best'\) must be one of 'gradient', 'out"),
        ("keep_score", "x", r"keep_score \(='x'\) must be one of"),
        ("birth", "x", r"birth \(='x'\) must be one of 'kaiming', 'zeros'"),
        ("ema_decay", 1.0, r"ema_decay \(=1.0\) must be in \[0, 1\)"),
        ("swap_threshold", 0.5, r"swap_threshold \(=0.5\) must be at least 1"),
        ("swap_threshold", math.nan, r"swap_threshold \(=nan\) must be at least 1"),
        ("epsilon", 1.1, r"epsilon \(=1.1\) must be in \[0, 1\]"),
        ("max_swap_frac", -0.1, r"max_swap_frac \(=-0.1\) must be in \[0, 1\]"),
        ("max_row_swap_frac", 2.0, r"max_row_swap_frac \(=2.0\) must be in \[0, 1\]"),
        ("grace_decisions", -1, r"grace_decisions \(=-1\) must be 0 or more"),
        ("birth_scale", -1.0, r"birth_scale \(=-1.0\) must be 0 or more"),
    ],
)
def test_config_messages(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoringConfig(**{field: value})  # type: ignore[arg-type]
