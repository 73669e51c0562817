"""A training continued from a checkpoint is the training that was not interrupted, to the bit."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from blockell_format.snapshots import SnapshotWriter, open_run
from titanmac_integration import (
    ArithmeticTask,
    CheckpointStore,
    Mixture,
    ProseTask,
    TitanMACConfig,
    Trainer,
    TrainingConfig,
    TrainingStopped,
    create_titanmac_model,
)

Make = Callable[..., TitanMACConfig]
TEXT = "the quick brown fox jumps over the lazy dog. " * 200
SETTINGS = {"batch_size": 6, "seq_len": 32, "lr": 1e-2, "warmup_steps": 5, "log_every": 4}


def training(**changes: object) -> TrainingConfig:
    return TrainingConfig(**{**SETTINGS, "level_periods": (1, 5, 10), **changes})


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Model and optimizer, by name."""
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    names = {p: name for name, p in trainer.model.named_parameters()}
    for parameter, entry in trainer.optimizer.state.items():
        tensors = {key: value for key, value in entry.items() if isinstance(value, torch.Tensor)}
        state |= {f"{names[parameter]}.{key}": value.clone() for key, value in tensors.items()}
    return state


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Noise:
    """Adds noise from every global stream to the gradients, so that lost randomness shows."""

    def on_backward(self, trainer: Trainer, loss: torch.Tensor) -> None:
        for parameter in trainer.model.parameters():
            parameter.grad += torch.randn_like(parameter) * 1e-3
            parameter.grad += (random.random() + numpy.random.rand()) * 1e-3


CASES = {
    "dense": ({}, {}, ()),
    "sparse": ({"use_block_sparse": True}, {}, ()),
    "outer product": (
        {"use_block_sparse": True, "block_sparse_candidate_score": "outer"},
        {"level_periods": (1, 10, 20)},
        (),
    ),
    "dropout, bf16, accumulation": (
        {"use_block_sparse": True, "dropout": 0.1},
        {"precision": "bf16", "accumulation_steps": 3},
        (),
    ),
    "fp16": ({"use_block_sparse": True}, {"precision": "fp16"}, ()),
    "nested optimizer": (
        {"use_block_sparse": True},
        {
            "optimizer": "nested",
            "cms_levels": {"blocks.1.mlp.*": 1, "persistent": 2},
            "deep_momentum": True,
            "lr_controller": True,
        },
        (),
    ),
    "global randomness": ({}, {}, (Noise(),)),
}


@pytest.mark.parametrize("case", CASES)
def test_continued_is_uninterrupted(tiny_config: Make, tmp_path: Path, case: str) -> None:
    shape, settings, callbacks = CASES[case]
    steps, taken = 26, 13  # past a decision, with statistics of absent blocks half collected
    tasks = Mixture([ArithmeticTask(n_digits=1, held_out=0.3), ProseTask(TEXT)])

    def trainer(run: Path, **options: object) -> Trainer:
        torch.manual_seed(0)
        model = create_titanmac_model(tiny_config(**shape), seed=1)
        table = [] if not shape else Trainer(model, training(**settings)).manager.layer_table()
        mode = {"mode": "resume", "resume_step": taken} if (run / "run.json").exists() else {}
        writer = SnapshotWriter(run, layers=table, **mode)
        made = Trainer(model, training(**settings), writer=writer, callbacks=callbacks, **options)
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)
        return made

    whole = trainer(tmp_path / "whole")
    report = whole.fit(tasks, steps)

    store = CheckpointStore(tmp_path / "checkpoints")
    first = trainer(tmp_path / "parts", checkpoints=store, checkpoint_every=taken)
    first.fit(tasks, steps)  # goes on past the checkpoint, as a run does that is killed
    first.writer.close()
    assert store.steps() == [taken, steps]
    torch.manual_seed(99)
    random.seed(99)
    second = trainer(tmp_path / "parts")
    torch.rand(3)
    second.load(store.path(taken))
    assert second.step == taken
    continued = second.fit(tasks, steps)

    assert_same(state_of(second), state_of(whole))
    assert continued.final_loss == report.final_loss
    assert continued.tokens == report.tokens
    assert continued.swap_rates == report.swap_rates
    assert torch.equal(second._data.get_state(), whole._data.get_state())
    whole.writer.close()
    second.writer.close()
    runs = [open_run(tmp_path / name) for name in ("whole", "parts")]
    assert runs[0].problems == runs[1].problems == []
    assert runs[0].steps == runs[1].steps
    losses = [
        [(m["step"], m["train/loss"]) for m in r.metrics() if "train/loss" in m] for r in runs
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [4, 8, 12, 16, 20, 24, 26]


@pytest.mark.parametrize("first", [False, True])
def test_a_rate_in_a_tensor_is_a_choice_of_the_run_that_goes_on(
    tiny_config: Make, tmp_path: Path, first: bool
) -> None:
    def trainer(in_tensor: bool) -> Trainer:
        model = create_titanmac_model(tiny_config(use_block_sparse=True), seed=1)
        rate = torch.tensor(1e-2) if in_tensor else 1e-2
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
        store = CheckpointStore(tmp_path)
        return Trainer(
            model, training(), optimizer=optimizer, checkpoints=store, checkpoint_every=6
        )

    whole = trainer(first)
    report = whole.fit(ProseTask(TEXT), 12)
    other = trainer(not first)
    rate = other.optimizer.param_groups[0]["lr"]
    other.load(CheckpointStore(tmp_path).path(6))
    assert other.fit(ProseTask(TEXT), 12).final_loss == pytest.approx(report.final_loss, rel=1e-5)
    after = other.optimizer.param_groups[0]["lr"]
    assert after is rate if not first else isinstance(after, float)
    assert float(after) == pytest.approx(float(whole.optimizer.param_groups[0]["lr"]))


def test_something_is_lost_if_a_part_is_not_put_back(tiny_config: Make, tmp_path: Path) -> None:
    """The test above can fail: without the optimizer's state the result is another."""
    store = CheckpointStore(tmp_path)
    config = tiny_config()
    whole = Trainer(create_titanmac_model(config), training(), checkpoints=store)
    whole.checkpoint_every = 4
    whole.fit(ProseTask(TEXT), 8)
    second = Trainer(create_titanmac_model(config), training())
    second.load(store.path(4))
    second.optimizer.state.clear()
    second.fit(ProseTask(TEXT), 8)
    left, right = state_of(whole), state_of(second)
    assert not torch.equal(left["embedding.weight"], right["embedding.weight"])


def test_stopping_saves(tiny_config: Make, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    model = create_titanmac_model(tiny_config())
    trainer = Trainer(model, training(), checkpoints=store, stop=lambda: trainer.step == 2)
    with pytest.raises(TrainingStopped, match="stopped after step 3"):
        trainer.fit(ProseTask(TEXT), 10)
    assert store.steps() == [3]
    again = Trainer(create_titanmac_model(tiny_config()), training(), checkpoints=store)
    again.load(store.path())
    again.fit(ProseTask(TEXT), 10)
    whole = Trainer(create_titanmac_model(tiny_config()), training())
    whole.fit(ProseTask(TEXT), 10)
    assert_same(state_of(again), state_of(whole))


def test_accumulation_computes_the_same_gradient(tiny_config: Make) -> None:
    """Parts with different numbers of counted tokens weigh as much as they have."""
    gradients = []
    for parts in (1, 2, 6):
        model = create_titanmac_model(tiny_config(), seed=0).double()
        trainer = Trainer(model, training(accumulation_steps=parts))
        batch = ArithmeticTask(n_digits=1).batch(6, 32, torch.Generator().manual_seed(0))
        batch.labels[0] = -100
        batch.labels[1:3, 3:] = -100
        loss = trainer._runner.backward(batch, trainer.optimizer)
        gradients.append((loss, [p.grad for p in model.parameters()]))
    for loss, other in gradients[1:]:
        torch.testing.assert_close(loss, gradients[0][0])
        for mine, theirs in zip(other, gradients[0][1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_another_configuration_is_named(tiny_config: Make, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    make = lambda **c: create_titanmac_model(tiny_config(**c))  # noqa: E731
    options = {"checkpoints": store, "checkpoint_every": 2}
    Trainer(make(), training(), **options).fit(ProseTask(TEXT), 4)
    path = store.path(2)
    for trainer, message in (
        (Trainer(make(d_ff=128), training()), r"d_ff is 64 in the checkpoint and 128 here"),
        (Trainer(make(), training(lr=0.5)), r"lr is 0.01 in the checkpoint and 0.5 here"),
        (
            Trainer(make(n_persistent=4), training(seed=2)),
            r"n_persistent is 2 .*; seed is 0 in the checkpoint and 2 here\.",
        ),
    ):
        with pytest.raises(ValueError, match=f"belongs to another configuration: .*{message}"):
            trainer.load(path)
    free = Trainer(make(), training(log_every=1, accumulation_steps=2))
    free.load(path)
    with pytest.raises(ValueError, match=r"task \(='arithmetic'\) differs from that of the check"):
        free.fit(ArithmeticTask(), 4)
    free.load(path)
    with pytest.raises(ValueError, match=r"data \(=.*\) differs from that of the checkpoint"):
        free.fit(ProseTask(TEXT.upper()), 4)
    free.load(path)
    with pytest.raises(ValueError, match=r"steps \(=1\) must be at least 2, which the checkpoint"):
        free.fit(ProseTask(TEXT), 1)
    free.load(path)
    assert free.fit(ProseTask(TEXT), 3).steps == 3
    free.load(store.path(4))  # a task that is finished: the next may begin
    assert free.fit(ArithmeticTask(), 2).task == "arithmetic"
    assert free.step == 6
    model = make()
    part = Trainer(model, training(), optimizer=torch.optim.SGD([*model.parameters()][1:]))
    with pytest.raises(ValueError, match=r"parameter group 0 of the optimizer differs"):
        part.load(path)
    model = make()
    sgd = Trainer(model, training(), optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"optimizer has no dampening, momentum, which SGD needs"):
        sgd.load(path)


def test_nothing_is_pickled(tiny_config: Make, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    Trainer(model, training(), checkpoints=store).fit(ProseTask(TEXT), 10)
    files = sorted(p.name for p in store.path().iterdir())
    assert files == ["model.json", "model.safetensors", "state.json", "state.safetensors"]
    state = json.loads((store.path() / "state.json").read_text())["state"]
    assert "blocks.0.mlp.fc1.values" in state["optimizer"]["state"]
    for name in ("model.safetensors", "state.safetensors"):
        data = (store.path() / name).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert "PK\x03\x04" not in header
