"""TopologyManager: the clock, the records, exact resume, and what must not matter."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from blockell_format import column_usage
from blockell_format.snapshots import SnapshotWriter, open_run
from cms_topology import CMSBlockLinear, CMSClock, ScoringConfig, StepReport, TopologyManager

LOOSE = ScoringConfig(max_swap_frac=0.2, max_row_swap_frac=0.5, swap_threshold=1.0)


class Net(nn.Module):
    def __init__(self, seed: int = 0, scoring: ScoringConfig = LOOSE, checkpoint: str = "") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = CMSBlockLinear(64, 128, tile_size=8, row_group=4, scoring=scoring)
        self.fc2 = CMSBlockLinear(128, 64, tile_size=8, row_group=2, scoring=scoring)
        self.checkpoint = checkpoint

    def body(self, x: Tensor) -> Tensor:
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint:
            return torch.utils.checkpoint.checkpoint(
                self.body, x, use_reentrant=self.checkpoint == "reentrant"
            )
        return self.body(x)


def data(step: int, tokens: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(tokens, 64, generator=generator) * torch.logspace(-1, 0.5, 64)
    return x, torch.roll(x, 3, 1).cos()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    manager: TopologyManager,
    steps: range,
    loss_scale: float = 1.0,
    micro_batches: int = 1,
    clip: float | None = None,
) -> list[StepReport]:
    reports = []
    for step in steps:
        x, y = data(step)
        for xs, ys in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss = (model(xs.requires_grad_()) - ys).square().mean() / micro_batches
            (loss * loss_scale).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= loss_scale
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        reports.append(manager.step())
        optimizer.zero_grad()
    return reports


def setup(
    seed: int = 0, scoring: ScoringConfig = LOOSE, checkpoint: str = "", **kwargs: object
) -> tuple[Net, torch.optim.Optimizer, TopologyManager]:
    model = Net(seed, scoring, checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kwargs.setdefault("periods", (1, 2, 4))
    return model, optimizer, TopologyManager(model, optimizer, **kwargs)  # type: ignore[arg-type]


def test_the_clock() -> None:
    clock = CMSClock((1, 10, 100))
    assert clock.due(1) == (0,)
    assert clock.due(10) == (0, 1)
    assert clock.due(100) == (0, 1, 2)
    assert [clock.steps_to_decision(s) for s in (1, 99, 100, 101)] == [99, 1, 0, 99]


def test_levels_fall_due_and_sampling_comes_just_before_a_decision() -> None:
    model, optimizer, manager = setup(periods=(1, 2, 6), sample_steps=2)
    reports = train(model, optimizer, manager, range(12))
    assert [r.step for r in reports] == list(range(1, 13))
    assert [r.due_levels for r in reports][:6] == [(0,), (0, 1), (0,), (0, 1), (0,), (0, 1, 2)]
    assert [r.sampled for r in reports] == [s % 6 in (5, 0) for s in range(1, 13)]
    decisions = [r for r in reports if r.swaps]
    assert [r.step for r in decisions] == [6, 12]
    assert all(set(r.swaps) == {"fc1", "fc2"} for r in decisions)
    assert all(r.swap_rate is not None and 0 < r.swap_rate <= 0.2 for r in decisions)
    assert reports[0].swap_rate is None
    assert manager.swap_rate == pytest.approx(sum(r.swap_rate or 0 for r in decisions) / 2)
    assert manager.overhead_seconds == pytest.approx(sum(r.overhead_s for r in reports))
    assert model.fc1.scorer.block_age.max() == 12


def test_default_sampling() -> None:
    for kind, samples in (("gradient", 1), ("outer", 10)):
        model = Net(scoring=ScoringConfig(candidate_score=kind))
        manager = TopologyManager(model, periods=(1, 10, 50))
        armed = []
        for _ in range(50):
            armed.append(model.fc1.collect_candidates)
            model(data(0)[0]).sum().backward()
            manager.step()
        assert sum(armed) == samples
        assert all(armed[-samples:])


def test_freeze_after() -> None:
    model, optimizer, manager = setup(freeze_after=5)
    reports = train(model, optimizer, manager, range(12))
    assert [r.step for r in reports if r.swaps] == [4]
    assert not any(r.sampled for r in reports[4:])


@pytest.mark.parametrize("scoring", [LOOSE, ScoringConfig(candidate_score="outer")])
def test_2n_steps_equal_n_save_load_n_bit_for_bit(scoring: ScoringConfig) -> None:
    """Into a freshly built model with another topology, in the middle of a sampling window."""
    model, optimizer, manager = setup(scoring=scoring, sample_steps=2)
    train(model, optimizer, manager, range(7))
    buffer = io.BytesIO()
    state = [model.state_dict(), optimizer.state_dict(), manager.state_dict()]
    torch.save(state, buffer)
    train(model, optimizer, manager, range(7, 14))

    other, other_optimizer, other_manager = setup(seed=99, scoring=scoring, sample_steps=2)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    torch.manual_seed(12345)
    other.load_state_dict(loaded[0], strict=True)
    other_optimizer.load_state_dict(loaded[1])
    other_manager.load_state_dict(loaded[2])
    train(other, other_optimizer, other_manager, range(7, 14))

    assert manager.state_dict() == other_manager.state_dict()
    for (name, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    first, second = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    for key, entries in first.items():
        for name, value in entries.items():
            assert torch.equal(value, second[key][name]), (key, name)
    assert sum(layer.scorer.num_decisions for layer in manager.layers.values()) == 6


def test_a_copy_of_a_managed_layer_can_be_driven_by_hand() -> None:
    """Before, it took itself for managed, and collected no statistics of absent blocks."""
    model, optimizer, manager = setup()
    train(model, optimizer, manager, range(5))
    layer = copy.deepcopy(model).fc1
    assert not layer.collect_candidates
    for _ in range(3):
        layer.zero_grad()
        layer(torch.randn(16, 64) * torch.logspace(-1, 0.5, 64)).cos().sum().backward()
        layer.accumulate_scores()
    assert layer.topology_step(global_step=3).num_swaps > 0


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copied_training_goes_on_bit_for_bit(
    way: str, kind: Callable[..., torch.optim.Optimizer]
) -> None:
    model = Net()
    optimizer = kind(model.parameters(), lr=1e-2)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    train(model, optimizer, manager, range(7))
    both = (model, optimizer, manager)
    other = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    for its_model, its_optimizer, its_manager in (both, other):
        train(its_model, its_optimizer, its_manager, range(7, 14))
    assert manager.state_dict() == other[2].state_dict()
    for (name, a), (_, b) in zip(
        model.state_dict().items(), other[0].state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("score", ["gradient", "outer", "loss"])
@pytest.mark.parametrize("bad", [torch.nan, 1e3])
def test_statistics_go_with_gradients_that_are_thrown_away(score: str, bad: float) -> None:
    """As by who passes over a batch; before, they stayed, and a NaN took the whole step with it."""
    found = []
    for passes_over in (False, True):
        torch.manual_seed(0)
        keep = "loss" if score == "loss" else "gradient"
        scoring = ScoringConfig(candidate_score=score, keep_score=keep)
        layer = CMSBlockLinear(32, 48, tile_size=8, scoring=scoring)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        manager = TopologyManager(layer, optimizer, periods=(1, 1, 1))
        x = torch.randn(9, 32)
        if passes_over:
            (layer(x) * bad).sum().backward()
            optimizer.zero_grad()
        for part in x.chunk(3):  # these belong together
            layer(part).square().sum().backward()
        optimizer.step()
        manager.step()
        found.append((layer.scorer._means, layer.block_scores(), layer.col_indices))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_is_no_state_is_refused() -> None:
    manager = TopologyManager(Net())
    said = re.escape(
        "state (keys ['step']) must be what state_dict() returned; it lacks ['periods'"
    )
    with pytest.raises(ValueError, match=said):
        manager.load_state_dict({"step": 1})
    state = manager.state_dict() | {"periods": (1, 10, 100), "step": 7}
    manager.load_state_dict(state)  # some formats know no lists
    assert manager.global_step == 7


def test_resume_with_other_settings_is_refused() -> None:
    _, _, manager = setup()
    state = manager.state_dict()
    with pytest.raises(ValueError, match=r"seed \(=1\) differs from the checkpoint's \(=0\)"):
        TopologyManager(Net(), seed=1, periods=(1, 2, 4)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"periods \(=\[1, 2, 8\]\) differs"):
        TopologyManager(Net(), periods=(1, 2, 8)).load_state_dict(state)


def topology(model: Net) -> list[list[list[int]]]:
    return [model.fc1.col_indices.tolist(), model.fc2.col_indices.tolist()]


@pytest.mark.parametrize("candidate_score", ["gradient", "outer"])
@pytest.mark.parametrize(
    "variant", ["loss_scale", "checkpoint reentrant", "checkpoint non-reentrant"]
)
def test_what_must_not_change_decisions(candidate_score: str, variant: str) -> None:
    """A loss scale reaches the statistics but not the gradients; recomputation runs twice."""
    scoring = ScoringConfig(
        candidate_score=candidate_score,
        max_swap_frac=0.2,
        max_row_swap_frac=0.5,
        swap_threshold=1.0,
    )
    model, optimizer, manager = setup(scoring=scoring)
    train(model, optimizer, manager, range(4))
    checkpoint = variant.split()[1] if "checkpoint" in variant else ""
    other, other_optimizer, other_manager = setup(scoring=scoring, checkpoint=checkpoint)
    scale = 1024.0 if variant == "loss_scale" else 1.0
    train(other, other_optimizer, other_manager, range(4), loss_scale=scale)
    assert topology(model) == topology(other)
    assert topology(model) != topology(Net())
    assert int(other.fc1.scorer.num_samples) == (1 if candidate_score == "gradient" else 2)


@pytest.mark.parametrize("variant", [{"micro_batches": 4}, {"clip": 0.01}])
def test_accumulation_and_clipping_keep_ranking_and_swap_rate(
    variant: dict[str, float],
) -> None:
    rates, scores = [], []
    for kwargs in ({}, variant):
        model, optimizer, manager = setup()
        reports = train(model, optimizer, manager, range(4), **kwargs)  # type: ignore[arg-type]
        rates.append(reports[-1].swap_rate)
        scores.append(model.fc1.scorer.candidate_norm.flatten())
    assert rates[0] == pytest.approx(rates[1], abs=0.02)
    ranks = [s.argsort().argsort().float() for s in scores]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.9


def test_a_step_with_an_overflow_contributes_nothing() -> None:
    model, optimizer, manager = setup()
    train(model, optimizer, manager, range(3))
    before = copy.deepcopy({k: v for k, v in model.state_dict().items() if "scorer" in k})
    model(data(3)[0]).sum().backward()
    assert model.fc2.values.grad is not None
    model.fc2.values.grad[0, 0, 0, 0] = float("inf")
    manager.step()  # the optimizer's step was skipped by its gradient scaler
    for name, value in model.state_dict().items():
        if "scorer" in name and "decisions" not in name and "history" not in name:
            assert torch.equal(value, before[name]), name
    assert topology(model) == topology(Net()), "no candidate statistics, no swaps"


def test_loss_scaler_with_inf_steps_trains_on() -> None:
    model, optimizer, manager = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
    for step in range(40):
        x, y = data(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        manager.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert manager.swap_rate is not None
    assert manager.swap_rate > 0


def test_missing_gradients_warn_once() -> None:
    _, _, manager = setup()
    with pytest.warns(UserWarning, match=r"before optimizer.zero_grad\(\)"):
        manager.step()
    manager.step()  # a second warning would be an error here


def test_a_frozen_layer_is_left_out() -> None:
    model, _, _ = setup()
    model.fc1.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.fc2.parameters())
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    before = model.fc1.col_indices.clone()
    for step in range(4):
        model(data(step)[0]).square().sum().backward()
        optimizer.step()
        manager.step()
        optimizer.zero_grad()
    assert torch.equal(model.fc1.col_indices, before)
    assert model.fc2.swap_rates()[0] > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"periods": (1, 10)}, r"periods \(=\(1, 10\)\) must have three entries"),
        ({"periods": (1, 0, 10)}, r"periods\[1\] \(=0\) must be at least 1"),
        (
            {"periods": (1, 10, 25)},
            r"periods\[2\] \(=25\) must be a multiple .*; nearest: 20",
        ),
        ({"periods": (2, 10, 20)}, r"periods\[0\] \(=2\) must be 1"),
        ({"sample_steps": 0}, r"sample_steps \(=0\) must be between 1 and .* \(=100\)"),
    ],
)
def test_bad_settings(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopologyManager(Net(), **kwargs)  # type: ignore[arg-type]


def test_a_model_without_sparse_layers() -> None:
    with pytest.raises(ValueError, match=r"model \(=Linear\) has no CMSBlockLinear.*sparsify"):
        TopologyManager(nn.Linear(4, 4))


class Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(metrics)))


def test_snapshots_and_metrics(tmp_path: Path) -> None:
    model, optimizer, manager = setup()
    lines = Lines()
    with SnapshotWriter(tmp_path / "run", layers=manager.layer_table()) as writer:
        manager.writer, manager.logger = writer, lines
        manager.write_snapshot()
        reports = train(model, optimizer, manager, range(8))
    run = open_run(tmp_path / "run")
    assert not run.problems
    assert run.steps == [0, 4, 8]
    assert [step for step, _ in lines.lines] == [4, 8]
    assert lines.lines[0][1]["topology/swap_rate"] == reports[3].swap_rate
    last = run.snapshot(8)
    result = reports[7].swaps["fc2"]
    assert last.swap_counts == {n: r.num_swaps for n, r in reports[7].swaps.items()}
    layer = last.layer("fc2")
    assert layer.col_indices.tolist() == model.fc2.col_indices.tolist()
    assert layer.swapped.tolist() == result.swapped.tolist()
    assert layer.previous_columns.tolist() == result.old_columns.tolist()
    assert layer.block_age_steps.max() == 8
    assert column_usage(layer.col_indices, model.fc2.C).sum() == model.fc2.R * model.fc2.K
    assert len(last.checksums["fc1"]) == 1
    json.dumps(lines.lines)


def test_layers_used_alone_need_no_manager(
    trained_layer: Callable[..., CMSBlockLinear],
) -> None:
    layer = trained_layer()
    layer.score_step()
    assert layer.topology_step().num_swaps > 0
