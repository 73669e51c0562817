"""Training from CUDA graphs: all but the graphs, which need a GPU (test_train_gpu)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titanmac_integration import (
    Batch,
    ProseTask,
    TitanMACConfig,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
)
from titanmac_integration._training import _graphed_step, _graphed_update
from titanmac_integration._training._graphed_step import can_be_graphed
from titanmac_integration._training._graphed_update import GraphedUpdate

Make = Callable[..., TitanMACConfig]
TEXT = "the quick brown fox jumps over the lazy dog. " * 200
SETTINGS = {"batch_size": 8, "seq_len": 32, "lr": 1e-2, "warmup_steps": 5}


class NotCaptured:
    """Computes what a graph would."""

    def __init__(self, function: Callable[..., Tensor], model: nn.Module) -> None:
        self.function, self.calls, self.forgotten = function, 0, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.function(*inputs).detach()

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU pass for the place where graphs are."""
    monkeypatch.setattr(_graphed_step, "check_place", lambda device: None)
    monkeypatch.setattr(_graphed_step, "GraphedBackward", NotCaptured)
    monkeypatch.setattr(_graphed_update, "make_capturable", lambda optimizer: None)
    monkeypatch.setattr(_graphed_update, "captured", lambda optimizer: optimizer.step)


def trained(config: TitanMACConfig, steps: int = 25, **changes: Any) -> tuple[Trainer, float]:
    settings = TrainingConfig(**{**SETTINGS, "level_periods": (1, 5, 10), **changes})
    trainer = Trainer(create_titanmac_model(config, seed=0), settings)
    return trainer, trainer.fit(ProseTask(TEXT), steps).final_loss


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulation_steps": 3}, {"precision": "bf16"}, {"optimizer": "nested"}],
    ids=["plain", "accumulation", "bf16", "nested"],
)
def test_it_computes_what_plain_steps_do(here: None, tiny_config: Make, changes: dict) -> None:
    config = tiny_config(use_block_sparse=True)
    plain, loss = trained(config, **changes)
    graphed, same = trained(config, cuda_graph=True, **changes)
    assert graphed._runner._graphed.calls == 25
    assert same == pytest.approx(loss, rel=1e-5)
    for name, value in plain.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(graphed.model.state_dict()[name], value, msg=name)


def test_a_part_without_counted_tokens_is_left_to_plain_steps(
    here: None, tiny_config: Make
) -> None:
    class HalfEmpty(ProseTask):
        def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
            ids, labels = super().batch(batch_size, seq_len, generator)
            labels = labels.clone()
            labels[: batch_size // 2] = -100
            return Batch(ids, labels)

    settings = TrainingConfig(**SETTINGS, accumulation_steps=2, cuda_graph=True)
    trainer = Trainer(create_titanmac_model(tiny_config()), settings)
    report = trainer.fit(HalfEmpty(TEXT), 5)
    assert report.final_loss == report.final_loss
    assert trainer._runner._graphed.calls == 0


def test_batches_of_many_lengths_are_padded_to_two(here: None, tiny_config: Make) -> None:
    class Cut(ProseTask):
        def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
            ids, labels = super().batch(batch_size, seq_len, generator)
            length = int(torch.randint(seq_len // 2, seq_len - 4, (), generator=generator))
            drawn.add(length)
            return Batch(ids[:, :length], labels[:, :length])

    finals, shapes, drawn = [], set(), set()
    for graph in (False, True):
        settings = TrainingConfig(**SETTINGS, cuda_graph=graph)
        trainer = Trainer(create_titanmac_model(tiny_config(), seed=0), settings)
        if graph:
            function = trainer._runner._graphed.function

            def note(*tensors: Tensor, function: Any = function) -> Tensor:
                shapes.update(tensor.shape for tensor in tensors)
                return function(*tensors)

            trainer._runner._graphed.function = note
        finals.append(trainer.fit(Cut(TEXT), 20).final_loss)
    assert finals[1] == pytest.approx(finals[0], rel=1e-4)
    assert len(shapes) <= 2 < len(drawn)


def test_graphs_are_dropped_before_every_task(here: None, tiny_config: Make) -> None:
    trainer, _ = trained(tiny_config(), steps=3, cuda_graph=True)
    trainer.fit(ProseTask(TEXT), 2)
    assert trainer._runner._graphed.forgotten == 2


def test_it_refuses_what_cannot_be_captured(tiny_config: Make) -> None:
    settings = TrainingConfig(**SETTINGS, cuda_graph=True)
    with pytest.raises(
        ValueError, match=r"cuda_graph \(=True\) needs a model on a CUDA device, .* is on cpu"
    ):
        Trainer(create_titanmac_model(tiny_config()), settings)
    drops = tiny_config(activation_checkpointing=True, dropout=0.1)
    with pytest.raises(ValueError, match=r"cannot hold the model's dropout \(=0.1\) together with"):
        Trainer(create_titanmac_model(drops), settings)
    with pytest.raises(ValueError, match=r"cannot hold the loss scaling of precision \(='fp16'\)"):
        TrainingConfig(cuda_graph=True, precision="fp16")


def test_where_steps_can_be_replayed(tiny_config: Make) -> None:
    cuda, settings = torch.device("cuda"), TrainingConfig(**SETTINGS)
    assert can_be_graphed(settings, tiny_config(), cuda)
    assert not can_be_graphed(settings, tiny_config(), torch.device("cpu"))
    assert not can_be_graphed(TrainingConfig(**SETTINGS, precision="fp16"), tiny_config(), cuda)
    drops = tiny_config(activation_checkpointing=True, dropout=0.1)
    assert not can_be_graphed(settings, drops, cuda)


# -- the update -----------------------------------------------------------------------------------


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done: "captured" and "replayed"; plain steps say nothing."""
    done: list[str] = []

    def captured(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        done.append("captured")

        def replay() -> None:
            done.append("replayed")
            optimizer.step()

        return replay

    monkeypatch.setattr(_graphed_update, "make_capturable", lambda optimizer: None)
    monkeypatch.setattr(_graphed_update, "captured", captured)
    return done


def make_update() -> tuple[nn.Parameter, torch.optim.Optimizer, GraphedUpdate]:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    assert GraphedUpdate.fits(optimizer)
    return weight, optimizer, GraphedUpdate(optimizer)


def test_an_update_is_captured_when_its_places_stay(replays: list[str]) -> None:
    weight, _, update = make_update()
    weight.grad = torch.ones(4)
    for _ in range(5):
        update.look()
        update.step()
    assert replays == ["captured", *3 * ["replayed"]], "the first makes the state"
    weight.grad = torch.ones(4)
    update.look()
    update.step()
    assert len(replays) == 4, "elsewhere: a plain step"
    update.look()
    update.step()
    assert replays[4:] == ["captured", "replayed"]


def test_exchanged_gradients_and_hooks_are_seen(replays: list[str]) -> None:
    weight, optimizer, update = make_update()
    weight.grad = torch.ones(4)
    for _ in range(3):
        update.look()
        update.step()
    del replays[:]
    update.look()
    kept, weight.grad = weight.grad, torch.full((4,), -1.0)
    before = weight.detach().clone()
    update.step()
    assert (weight < before).any(), "momentum still points the other way"
    assert replays == []
    weight.grad = kept
    seen: list[int] = []
    handle = optimizer.register_step_post_hook(lambda *arguments: seen.append(1))
    update.look()
    update.step()
    assert seen == [1]
    assert replays == []
    handle.remove()
    update.look()
    update.step()
    assert replays == ["replayed"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD([p], lr=0.1),
        lambda p: torch.optim.AdamW([p], lr=0.1),
        lambda p: torch.optim.Adam([p], lr=0.1, foreach=True),
    ],
)
def test_other_optimizers_step_as_they_are(make: Callable[..., torch.optim.Optimizer]) -> None:
    assert not GraphedUpdate.fits(make(nn.Parameter(torch.ones(2))))
