"""Training on a GPU: mixed precision, accumulation, compilation, and continuing a run."""

import json
from pathlib import Path

import pytest
import torch

from titanmac_integration import (
    CheckpointStore,
    Mixture,
    PhaseReport,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
    make_task,
)
from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # the compiler recommends TF32 to whoever compiles single precision
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # and looks at .grad of tensors that are no leaves: torch hides that warning, but not an error
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
STEPS, TAKEN = 40, 20
SETTINGS = {
    "batch_size": 16,
    "seq_len": 64,
    "lr": 3e-3,
    "warmup_steps": 10,
    "level_periods": (1, 5, 10),
    "log_every": 5,
    "grad_clip": 1.0,
}


def make(directory: Path | None = None, **changes: object) -> Trainer:
    torch.manual_seed(0)
    model = create_titanmac_model(TitanMACConfig.preset("demo", dropout=0.1), seed=0, device="cuda")
    store = None if directory is None else CheckpointStore(directory)
    config = TrainingConfig(**{**SETTINGS, **changes})
    return Trainer(model, config, checkpoints=store, checkpoint_every=TAKEN)


def train(trainer: Trainer) -> PhaseReport:
    # one shape of batches only where every shape has to be compiled
    names = ["prose"] if trainer.config.compile else ["arithmetic", "prose"]
    return trainer.fit(Mixture([make_task(name) for name in names]), STEPS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "accumulation_steps": 2},
        {"precision": "fp16"},
        {"precision": "bf16", "compile": True},
        {"cuda_graph": True},
        {"precision": "bf16", "accumulation_steps": 2, "cuda_graph": True},
        {"precision": "bf16", "optimizer": "nested", "cuda_graph": True},
        {"precision": "bf16", "compile": True, "cuda_graph": True},
    ],
    ids=[
        "fp32",
        "bf16 accumulation",
        "fp16",
        "bf16 compile",
        "graph",
        "bf16 accumulation graph",
        "nested graph",
        "compile graph",
    ],
)
def test_it_learns_and_goes_on(tmp_path: Path, changes: dict) -> None:
    whole = make(tmp_path, **changes)
    report = train(whole)
    assert report.final_loss < 5.0
    assert report.peak_memory_bytes > 1_000_000
    assert len(report.swap_rates) == STEPS // 10
    second = make(**changes)
    torch.rand(7, device="cuda")
    second.load(CheckpointStore(tmp_path).path(TAKEN))
    again = train(second)
    # atomic additions in the backward pass are not ordered: equal up to rounding, and what rounding
    # grows into in a few steps
    assert again.final_loss == pytest.approx(report.final_loss, rel=0.02)
    assert again.tokens == report.tokens
    assert second.manager is not None
    assert second.manager.global_step == STEPS


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    first = make(tmp_path, precision="bf16")
    train(first)
    saved = {name: value.clone() for name, value in first.model.state_dict().items()}
    noise = torch.rand(5, device="cuda")
    second = make(precision="bf16")
    second.load(CheckpointStore(tmp_path).path(STEPS))
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert torch.equal(torch.rand(5, device="cuda"), noise), "the device's randomness, too"
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        for key, value in first.optimizer.state[left].items():
            assert torch.equal(value, second.optimizer.state[right][key]), key


def test_accumulation_and_compilation_change_rounding_only() -> None:
    losses = []
    for changes in ({}, {"accumulation_steps": 4}, {"compile": True}):
        trainer = make(**changes)
        trainer.model.eval()
        task = make_task("prose")
        batch = task.batch(16, 64, torch.Generator().manual_seed(0))
        losses.append(trainer._runner.backward(batch, trainer.optimizer))
        norm = torch.nn.utils.get_total_norm(p.grad for p in trainer.model.parameters())
        losses.append(norm)
    for index in (2, 4):
        torch.testing.assert_close(losses[index], losses[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses[index + 1], losses[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_train_like_plain_ones(precision: str) -> None:
    changes = {"precision": precision, "lr": 1e-3}
    plain, graphed = make(**changes), make(**changes, cuda_graph=True)
    for trainer in (plain, graphed):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # its stream of randomness is another in a graph
    expected, got = train(plain), train(graphed)
    assert graphed._runner._graphed.num_graphs >= 2, "two shapes of batches"
    assert len(graphed._runner._update._replays) >= 2
    assert got.final_loss == pytest.approx(expected.final_loss, rel=0.02)
    assert got.swap_rates == pytest.approx(expected.swap_rates, abs=0.05)
    rate = float(graphed.optimizer.param_groups[0]["lr"])
    assert rate == pytest.approx(plain.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_graphs_or_without(tmp_path: Path, first: bool) -> None:
    whole = make(tmp_path, cuda_graph=first)
    report = train(whole)
    other = make(cuda_graph=not first)
    other.load(CheckpointStore(tmp_path).path(TAKEN))
    again = train(other)
    assert again.final_loss == pytest.approx(report.final_loss, rel=0.05)
    group = other.optimizer.param_groups[0]
    assert bool(group["capturable"]) is not first
    assert isinstance(group["lr"], torch.Tensor) is not first


@pytest.mark.parametrize("variant", ["MAC", "MAG", "MAL", "MAG of depth 2"])
def test_a_memory_is_captured(variant: str) -> None:
    config = TitanMACConfig.preset(
        "demo",
        use_neural_memory=True,
        titans_variant=variant[:3],
        memory_depth=2 if "2" in variant else 1,
        memory_chunk_size=16,
        segment_size=32,
    )
    losses = []
    for graph in (False, True):
        model = create_titanmac_model(config, seed=0, device="cuda")
        settings = {**SETTINGS, "lr": 1e-3, "precision": "bf16", "cuda_graph": graph}
        trainer = Trainer(model, TrainingConfig(**settings))
        losses.append(trainer.fit(make_task("prose"), STEPS).final_loss)
    assert trainer._runner._graphed.num_graphs >= 1
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_command_replays_steps_unless_told_otherwise(tmp_path: Path) -> None:
    flags = ["--steps", "12", "--batch-size", "4", "--seq-len", "32", "--quiet"]
    flags += ["--checkpoint-every", "6"]
    for name, more, graph in (("a", [], True), ("b", ["--no-cuda-graph"], False)):
        assert main(["train", "--out", str(tmp_path / name), *flags, *more]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["cuda_graph"] is graph
    again = ["train", "--out", str(tmp_path / "a"), "--resume", "6", "--device", "cpu", "--quiet"]
    assert main(again) == 0
    assert not json.loads((tmp_path / "a" / "results.json").read_text())["cuda_graph"]


def test_layers_that_are_computed_again_are_captured() -> None:
    config = TitanMACConfig.preset("demo", activation_checkpointing=True)
    model = create_titanmac_model(config, seed=0, device="cuda")
    trainer = Trainer(model, TrainingConfig(**SETTINGS, precision="bf16", cuda_graph=True))
    assert train(trainer).final_loss < 5.0
    assert trainer._runner._graphed.num_graphs >= 2
