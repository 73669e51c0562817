"""DeepNestedOptimizer in the training loop, and through its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from titanmac_integration import (
    CheckpointStore,
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    LearningRateController,
    ProseTask,
    TitanMACConfig,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
)

Make = Callable[..., TitanMACConfig]
TEXT = "the quick brown fox jumps over the lazy dog. " * 200
PERIODS = (1, 5, 10)
LEVELS = {"blocks.0.mlp.*": 1, "blocks.1.attention.*": 2}

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"cms": ContinuumMemorySystem(PERIODS)},
    "all": lambda: {
        "cms": ContinuumMemorySystem(PERIODS, LEVELS),
        "deep_momentum": True,
        "controller": LearningRateController(period=5),
    },
}


def make(
    config: TitanMACConfig, option: str | None, fused: bool | None = None, **arguments: Any
) -> Trainer:
    settings = TrainingConfig(
        batch_size=6, seq_len=32, lr=1e-2, warmup_steps=5, level_periods=PERIODS, seed=3
    )
    model = create_titanmac_model(config, seed=1)
    optimizer = None
    if option is not None:
        optimizer = DeepNestedOptimizer(
            [{"params": model.parameters()}] if option == "parameters" else model,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=fused,
            **({} if option == "parameters" else {**OPTIONS[option](), "topology": {"seed": 3}}),
        )
    return Trainer(model, settings, optimizer=optimizer, **arguments)


@pytest.mark.parametrize("option", ["plain", "parameters"])
def test_the_trainer_does_the_same_with_it_as_with_adamw(tiny_config: Make, option: str) -> None:
    """Bit for bit, whether the optimizer drives the topology or the trainer does."""
    config = tiny_config(use_block_sparse=True)
    plain = make(config, None)
    trainers = [plain, make(config, option, fused=plain.optimizer.defaults["fused"])]
    reports = [trainer.fit(ProseTask(TEXT), 22) for trainer in trainers]
    assert reports[0].swap_rates == reports[1].swap_rates
    assert len(reports[0].swap_rates) == 2
    assert reports[0].final_loss == reports[1].final_loss
    states = [trainer.model.state_dict() for trainer in trainers]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_trainer_feeds_the_spike_detector(tiny_config: Make) -> None:
    trainer = make(tiny_config(use_block_sparse=True), "plain")
    trainer.fit(ProseTask(TEXT), 30)
    assert isinstance(trainer.optimizer, DeepNestedOptimizer)
    assert trainer.optimizer.spikes.running_mean is not None
    assert [step for step, _ in trainer.optimizer.spikes.ratios] == [10]
    assert trainer.manager is trainer.optimizer.topology


@pytest.mark.parametrize("option", OPTIONS)
def test_a_checkpoint_between_two_slow_updates_continues_to_the_bit(
    tiny_config: Make, tmp_path: Path, option: str
) -> None:
    config, steps, taken = tiny_config(use_block_sparse=True), 26, 13
    store = CheckpointStore(tmp_path)
    whole = make(config, option, checkpoints=store, checkpoint_every=taken)
    whole.fit(ProseTask(TEXT), steps)
    torch.manual_seed(99)
    second = make(config, option)
    second.load(store.path(taken))
    assert isinstance(second.optimizer, DeepNestedOptimizer)
    assert second.optimizer.global_step == taken
    second.fit(ProseTask(TEXT), steps)
    states = [trainer.model.state_dict() for trainer in (whole, second)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            lambda model: torch.optim.LBFGS(model.parameters()),
            r"\(=LBFGS\) must step without a clo",
        ),
        (lambda model: torch.optim.SGD([torch.ones(2)]), r"\(=SGD\) must hold parameters of model"),
        (lambda model: torch.optim.AdamW, r"\(=<class .*AdamW'>\) must be an optimizer, made"),
    ],
)
def test_optimizers_that_cannot_train_the_model_are_refused(
    tiny_config: Make, optimizer: Callable[[torch.nn.Module], Any], message: str
) -> None:
    model = create_titanmac_model(tiny_config(), seed=1)
    with pytest.raises((TypeError, ValueError), match=message):
        Trainer(model, TrainingConfig(seq_len=32), optimizer=optimizer(model))
