"""Scores in nats: what they are made of, and that they do not depend on how the loss is scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager, consolidate

NATS = ScoringConfig(
    candidate_score="loss", keep_score="loss", max_swap_frac=0.3, max_row_swap_frac=0.5,
    epsilon=0.0,
)  # fmt: skip


def make(**kwargs: Any) -> CMSBlockLinear:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"tile_size": 8, "density": 0.5, "row_group": 2, "scoring": NATS}
    layer = CMSBlockLinear(48, 32, **{**settings, **kwargs})
    layer.collect_candidates = True
    return layer


def data(seed: int, tokens: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 48, generator=generator) * torch.linspace(0.2, 2.0, 48)
    noise = torch.randn(tokens, 32, generator=generator)
    return x, x[:, -32:] + 0.5 * noise


def collect(layer: CMSBlockLinear, seed: int, parts: int = 1, scale: float = 1.0) -> None:
    x, y = data(seed)
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        # half the squared error is a negative log-likelihood, so nats
        (scale * 0.5 * (layer(xs) - ys).square().sum(1).mean() / parts).backward()
    assert layer.values.grad is not None
    layer.values.grad /= scale  # what a gradient scaler does before the optimizer
    layer.accumulate_scores()
    layer.zero_grad()


def token_gradients(layer: CMSBlockLinear, seed: int) -> Tensor:
    """Gradient of every token's own loss by the dense weight, as blocks [N, R, C, B, B]."""
    x, y = data(seed)
    delta = (layer(x) - y).detach()
    g = delta[:, :, None] * x[:, None]
    return g.view(len(x), layer.R, 8, layer.C, 8).transpose(2, 3)


def test_signal_and_curvature_are_what_they_say() -> None:
    layer = make()
    g = token_gradients(layer, 1)
    collect(layer, 1)
    layer.score_step()
    stats = layer.scorer.loss
    assert stats is not None
    trace = g.square().sum((3, 4)).mean(0)
    torch.testing.assert_close(stats.curvature, trace / 64, rtol=1e-4, atol=1e-6)
    signal = g.mean(0).square().sum((2, 3)) - trace / len(g)
    torch.testing.assert_close(stats.signal, signal, rtol=1e-3, atol=1e-4)
    damped = trace / 64 + 0.1 * trace.mean() / 64
    gain = 0.5 * signal.clamp(min=0) / damped
    torch.testing.assert_close(layer.scorer.compute_candidate_scores(), gain, rtol=1e-3, atol=1e-4)
    G = g.mean(0).gather(1, layer.col_indices.long()[:, :, None, None].expand(-1, -1, 8, 8))
    W = layer.values.detach()
    curvature = damped.gather(1, layer.col_indices.long())
    cost = -(G * W).sum((2, 3)) + 0.5 * curvature * W.square().sum((2, 3))
    torch.testing.assert_close(layer.block_scores(), cost.abs(), rtol=1e-3, atol=1e-4)


def test_noise_is_not_gain() -> None:
    """With no mean gradient the signal is zero on average; uncorrected it would be the noise."""
    layer = make()
    assert layer.scorer.loss is not None
    for seed in range(40):
        x = data(seed)[0]
        noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        (layer(x) * noise).sum(1).mean().backward()
        layer.accumulate_scores()
        layer.zero_grad()
    layer.score_step()
    noise_level = layer.scorer.loss.curvature * 64 / 64
    ratio = layer.scorer.loss.signal / noise_level
    assert float(ratio.abs().mean()) < 0.1
    assert float(layer.scorer.compute_candidate_scores().mean()) < 0.1 * float(
        0.5 * noise_level.mean() / layer.scorer.loss.damped(0.1).mean()
    )


@pytest.mark.parametrize("change", [{"scale": 1024.0}, {"parts": 1}])
def test_nats_do_not_depend_on_a_loss_scale(change: dict[str, Any]) -> None:
    scores = []
    for kwargs in ({}, change):
        layer = make()
        collect(layer, 1, **kwargs)
        layer.score_step()
        scores.append((layer.scorer.compute_candidate_scores(), layer.block_scores()))
    for a, b in zip(*scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_larger_batch_does_not_change_the_scale() -> None:
    means = []
    for tokens in (64, 1024):
        layer = make()
        for seed in range(8):
            x, y = data(seed, tokens)
            (0.5 * (layer(x) - y).square().sum(1).mean()).backward()
            layer.accumulate_scores()
            layer.zero_grad()
        layer.score_step()
        means.append(layer.scorer.compute_candidate_scores().mean())
    assert float(means[0]) == pytest.approx(float(means[1]), rel=0.15)


def test_gains_foretell_what_a_block_gains() -> None:
    layer = make(row_group=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for seed in range(200):
        x, y = data(1000 + seed)
        optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
    for probe in (layer._probe, layer._fisher_probe):
        assert probe is not None
        probe.grad = None
    for seed in range(8):
        layer.zero_grad()
        collect(layer, seed)
    layer.score_step()
    predicted = layer.scorer.compute_candidate_scores()
    absent = torch.ones(layer.R, layer.C, dtype=torch.bool)
    absent.scatter_(1, layer.col_indices.long(), False)
    x, y = data(0, 4096)
    residual = (y - layer(x)).detach()
    true = torch.zeros_like(predicted)
    for r, c in absent.nonzero().tolist():
        inputs, error = x[:, 8 * c : 8 * c + 8], residual[:, 8 * r : 8 * r + 8]
        left = error - inputs @ torch.linalg.lstsq(inputs, error).solution
        true[r, c] = 0.5 * (error.square().sum() - left.square().sum()) / len(x)
    gain, truth = predicted[absent], true[absent]
    ranks = torch.stack([v.argsort().argsort().float() for v in (gain, truth)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.6
    assert 0.1 < float(gain.sum() / truth.sum()) < 10  # nats, not just a ranking


def test_decisions_in_nats_swap_and_resume() -> None:
    layers = []
    for resume in (False, True):
        layer = make(row_group=1)
        model = nn.Sequential(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        manager = TopologyManager(model, optimizer, periods=(1, 2, 6))
        swaps = 0
        for step in range(12):
            if resume and step == 5:  # statistics are under way
                fresh = nn.Sequential(make(row_group=1))
                fresh.load_state_dict(model.state_dict())
                model, state = fresh, manager.state_dict()
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
                manager = TopologyManager(model, optimizer, periods=(1, 2, 6))
                manager.load_state_dict(state)
            x, y = data(step)
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().sum(1).mean()).backward()
            optimizer.step()
            swaps += sum(result.num_swaps for result in manager.step().swaps.values())
        assert swaps > 0
        layers.append(model[0])
    assert torch.equal(layers[0].col_indices, layers[1].col_indices)
    assert torch.equal(layers[0].values, layers[1].values)


def test_what_an_old_task_would_lose_is_part_of_the_cost() -> None:
    swapped = []
    for importance in (1.0, 1e6):
        layer = make(row_group=1)
        model = nn.Sequential(layer)
        x, y = data(100)

        def old_loss(m: nn.Module, x: Tensor, importance: float = importance) -> Tensor:
            return importance * m(x).square().sum(1).mean()

        memory = consolidate(model, [x], loss_fn=old_loss)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        manager = TopologyManager(
            model, optimizer, periods=(1, 1, 2), retention=memory, drop_cost=1e30
        )
        total = 0
        for step in range(4):
            x, y = data(step)
            model.zero_grad()
            (0.5 * (model(x) - y).square().sum(1).mean()).backward()
            optimizer.step()
            total += sum(result.num_swaps for result in manager.step().swaps.values())
        swapped.append(total)
    assert swapped[0] > 0
    assert swapped[1] == 0


def test_nothing_is_collected_in_evaluation_or_between_samples() -> None:
    layer = make().eval()
    x, y = data(0)
    (layer(x) - y).square().mean().backward()
    assert layer._fisher_probe is not None
    assert layer._fisher_probe.grad is None
    layer.train().collect_candidates = False
    (layer(x) - y).square().mean().backward()
    assert layer._fisher_probe.grad is None
    assert make(scoring=ScoringConfig())._fisher_probe is None


def test_the_scores_in_nats_come_together() -> None:
    with pytest.raises(ValueError, match=r"must both be 'loss' or neither"):
        ScoringConfig(candidate_score="loss")
    with pytest.raises(ValueError, match=r"damping \(=0\) must be greater than 0"):
        ScoringConfig(damping=0)
