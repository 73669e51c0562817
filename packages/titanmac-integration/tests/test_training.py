"""The training loop: exactness, learning, topology, non-finite losses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blockell_format.snapshots import SnapshotWriter, open_run
from titanmac_integration import (
    ArithmeticTask,
    Batch,
    CheckpointStore,
    NonFiniteLossError,
    ProseTask,
    Task,
    TitanMACConfig,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
    run_continual,
)

Make = Callable[..., TitanMACConfig]
TEXT = "the quick brown fox jumps over the lazy dog. " * 200
SETTINGS = {"batch_size": 8, "seq_len": 32, "lr": 1e-2, "warmup_steps": 5}


def training(**changes: object) -> TrainingConfig:
    return TrainingConfig(**{**SETTINGS, "level_periods": (1, 5, 10), **changes})


@pytest.mark.parametrize("sparse", [False, True])
def test_same_seed_same_result_to_the_bit(tiny_config: Make, sparse: bool) -> None:
    config = tiny_config(use_block_sparse=sparse)
    results, states = [], []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)  # global randomness must not matter
        trainer = Trainer(create_titanmac_model(config, seed=7), training(seed=7))
        tasks = [ArithmeticTask(n_digits=1, held_out=0.3), ProseTask(TEXT)]
        results.append(run_continual(trainer, tasks, [25, 15]))
        states.append(trainer.model.state_dict())
    assert results[0].matrix == results[1].matrix
    assert results[0].swap_rates == results[1].swap_rates
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(results[0].swap_rates) == (4 if sparse else 0)


def test_another_seed_another_result(tiny_config: Make) -> None:
    losses = []
    for seed in (0, 1):
        model = create_titanmac_model(tiny_config(), seed=0)
        losses.append(Trainer(model, training(seed=seed)).fit(ProseTask(TEXT), 5).final_loss)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("sparse", [False, True])
def test_it_learns(tiny_config: Make, sparse: bool) -> None:
    task = ProseTask(TEXT)
    trainer = Trainer(create_titanmac_model(tiny_config(use_block_sparse=sparse)), training())
    before = task.evaluate(trainer.model)
    report = trainer.fit(task, 80)
    assert before > 7.0
    assert task.evaluate(trainer.model) < 3.0
    assert report.tokens == 80 * 8 * 32
    assert report.seconds > 0
    assert trainer.step == 80


def test_the_topology_changes_at_the_slow_level_only(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    trainer = Trainer(model, training())
    layer = model.blocks[0].mlp.fc2
    assert trainer.manager is not None
    start = layer.col_indices.clone()
    trainer.fit(ProseTask(TEXT), 9)
    assert torch.equal(layer.col_indices, start)
    report = trainer.fit(ProseTask(TEXT), 1)
    assert len(report.swap_rates) == 1
    assert 0.0 < report.swap_rates[0] <= 0.1
    assert report.topology_seconds > 0.0


def test_decisions_end_before_a_task_does(tiny_config: Make, tmp_path: Path) -> None:
    """Also of a training that goes on where another was stopped."""
    config = tiny_config(use_block_sparse=True)
    settings, store = training(decide_until=0.5), CheckpointStore(tmp_path)
    model = create_titanmac_model(config)
    first = Trainer(model, settings, checkpoints=store, checkpoint_every=15)
    assert len(first.fit(ProseTask(TEXT), 40).swap_rates) == 2
    stood = model.blocks[0].mlp.fc2.col_indices.clone()
    second = Trainer(create_titanmac_model(config), settings)
    second.load(store.path(30))
    assert len(second.fit(ProseTask(TEXT), 40).swap_rates) == 2
    assert torch.equal(second.model.blocks[0].mlp.fc2.col_indices, stood)
    assert len(first.fit(ProseTask(TEXT), 40).swap_rates) == 2, "the next task decides again"


def test_a_run_directory_tells_the_story(tiny_config: Make, tmp_path: Path) -> None:
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    probe = Trainer(model, training())
    assert probe.manager is not None
    with SnapshotWriter(tmp_path, layers=probe.manager.layer_table()) as writer:
        trainer = Trainer(
            model,
            training(eval_every=10, log_every=5, eval_max_frac=1.0),
            writer=writer,
            eval_tasks=[ProseTask(TEXT)],
        )
        report = trainer.fit(ProseTask(TEXT), 20)
    run = open_run(tmp_path)
    assert run.problems == []
    assert run.steps == [0, 10, 20]
    assert set(run.layers) == set(model.block_sparse_layers)
    last = run.snapshot(20).layer("blocks.0.mlp.fc2")
    live = model.blocks[0].mlp.fc2.col_indices.numpy()
    assert (last.col_indices == live).all()
    lines = run.metrics()
    assert [m["step"] for m in lines if "train/loss" in m] == [5, 10, 15, 20]
    assert [m["step"] for m in lines if "eval/prose/bits_per_byte" in m] == [10, 20]
    rates = [m["topology/swap_rate"] for m in lines if "topology/swap_rate" in m]
    assert rates == pytest.approx(report.swap_rates)


class Poisoned(Task):
    """Prose whose batches poison the embedding's gradient from some batch on."""

    name, metric, higher_is_better, chance = "poisoned", "none", True, 0.0

    def __init__(self, bad_batches: set[int], model: torch.nn.Module) -> None:
        self.bad, self.count, self.inner = bad_batches, 0, ProseTask(TEXT)
        self.model = model
        self.clean = model.norm.weight.detach().clone()

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        batch = self.inner.batch(batch_size, seq_len, generator)
        if self.count in self.bad:
            batch = Batch(batch.input_ids, torch.full_like(batch.labels, -100))  # loss is NaN
        self.count += 1
        return batch

    def measure(self, model: torch.nn.Module, device: torch.device) -> float:
        return 0.0


def test_a_batch_without_finite_loss_is_passed_over(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    trainer = Trainer(model, training())
    task = Poisoned({2, 3, 7}, model)
    trainer.fit(task, 10)
    assert task.count == 13
    assert trainer.step == 10
    assert trainer.manager is not None
    assert trainer.manager.global_step == 10
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_many_in_a_row_stop_the_training(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config())
    trainer = Trainer(model, training(max_nonfinite=4))
    message = r"no finite loss and gradient in 4 batches in a row after step 2 .*lower lr"
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.fit(Poisoned(set(range(2, 100)), model), 10)


def test_bad_calls_are_explained(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config())
    with pytest.raises(ValueError, match=r"seq_len \(=65\) must not exceed"):
        Trainer(model, TrainingConfig(seq_len=65))
    trainer = Trainer(model, training())
    for steps in (0, 2.5):
        with pytest.raises(ValueError, match=rf"steps \(={steps}\) must be an integer of at lea"):
            trainer.fit(ProseTask(TEXT), steps)
    with pytest.raises(ValueError, match=r"steps \(=\[1, 2\]\) must have one entry per task"):
        run_continual(trainer, [ProseTask(TEXT)], [1, 2])


def test_continual_matrix_and_forgetting(tiny_config: Make) -> None:
    tasks = [ProseTask(TEXT), ProseTask(TEXT.upper())]
    trainer = Trainer(create_titanmac_model(tiny_config(use_block_sparse=True)), training())
    result = run_continual(trainer, tasks, [60, 60], name="tiny")
    assert len(result.matrix) == 3
    assert all(len(row) == 2 for row in result.matrix)
    before, after = result.after_learning(0), result.at_end(0)
    assert before == result.matrix[1][0] < 4.0
    assert after == result.matrix[2][0] > before
    assert result.forgetting(0) == pytest.approx((before - after) / (before - 8.0))
    assert result.forgetting(1) is None
    assert result.density == pytest.approx(0.5)
    assert result.column_entropy is not None
    assert 0.0 < result.column_entropy <= 1.0
    assert len(result.swap_rates) == 12
    assert 0.0 < result.topology_share < 1.0
    assert result.to_dict()["relative_forgetting"][1] is None


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_shows_loss_speed_and_swaps(
    tiny_config: Make, capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    Trainer(model, training(), progress=progress, label="tiny").fit(ProseTask(TEXT), 12)
    shown = capsys.readouterr().err
    if progress:
        assert "tiny prose" in shown
        assert all(word in shown.splitlines()[-1] for word in ("loss=", "tok/s=", "swap="))
    else:
        assert shown == ""


class Recorder:
    """Writes down what it is told; knows only some of the events."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def on_fit_start(self, trainer: Trainer, task: Task, steps: int) -> None:
        self.events.append(("start", task.name, steps, trainer.step))

    def on_backward(self, trainer: Trainer, loss: torch.Tensor) -> None:
        assert loss.ndim == 0
        assert not loss.requires_grad
        self.events.append(("backward", trainer.step))

    def on_fit_end(self, trainer: Trainer, report: object) -> None:
        self.events.append(("end", trainer.step))


class Freeze:
    """Takes all gradients away."""

    def on_backward(self, trainer: Trainer, loss: torch.Tensor) -> None:
        for parameter in trainer.model.parameters():
            parameter.grad.zero_()

    def on_step(self, trainer: Trainer, step: int) -> None:
        assert all(p.grad is not None for p in trainer.model.parameters())
        self.last = step


def test_callbacks_see_every_event_and_may_change_gradients(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recorder, freeze = Recorder(), Freeze()
    Trainer(model, training(), callbacks=[recorder, freeze]).fit(ProseTask(TEXT), 2)
    expected = [("start", "prose", 2, 0), ("backward", 0), ("backward", 1), ("end", 2)]
    assert recorder.events == expected
    assert freeze.last == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_ready_optimizer_keeps_its_own_learning_rates(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config())
    names = dict(model.named_parameters())
    still = names.pop("embedding.weight")
    groups = [{"params": list(names.values())}, {"params": [still], "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    before = still.detach().clone()
    trainer = Trainer(model, training(warmup_steps=0), optimizer=optimizer)
    trainer.fit(ProseTask(TEXT), 2)
    assert trainer.optimizer is optimizer
    assert torch.equal(still, before)
    halfway = trainer.config.lr_at(1, 2, peak=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [halfway, 0.0]
    assert 0.2 < halfway < 0.3
