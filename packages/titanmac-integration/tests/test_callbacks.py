"""The topology under Hugging Face's and Lightning's trainers, with the real libraries."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager
from titanmac_integration import DeepNestedOptimizer, TitanMACConfig, create_titanmac_model

STEPS, TAKEN, PERIODS = 12, 6, (1, 2, 4)
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def sparse_model() -> nn.Sequential:
    torch.manual_seed(0)
    scoring = ScoringConfig(max_swap_frac=0.2, max_row_swap_frac=0.5, swap_threshold=1.0)
    shape = {"tile_size": 8, "row_group": 1, "scoring": scoring}
    return nn.Sequential(
        CMSBlockLinear(32, 64, **shape), nn.GELU(), CMSBlockLinear(64, 32, **shape)
    )


def data(rows: int = 96) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(rows, 32, generator=generator) * torch.linspace(0.2, 2, 32))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.roll(1, -1)).square().mean()


def by_hand(batch_size: int) -> tuple[nn.Module, TopologyManager]:
    """The loop that the trainers are to do."""
    model = sparse_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    # decisions depend on the layers' names
    named = nn.ModuleDict({"inner": model})
    manager = TopologyManager(named, optimizer, periods=PERIODS, seed=3)
    rows = data()
    for step in range(STEPS):
        x = torch.stack(rows[step * batch_size : (step + 1) * batch_size])
        loss_of(model, x).backward()
        optimizer.step()
        manager.step()
        optimizer.zero_grad()
    return model, manager


def assert_same(left: nn.Module, right: nn.Module) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


# -- Hugging Face ----------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model as transformers wants it: returns a dict with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sparse_model()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(self.inner, x)}


class Adapter(nn.Module):
    """TitanMAC for transformers, whose trainer would write into a `config` that it finds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model(input_ids, labels)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_hugging_face(tmp_path: Path, accumulation: int, caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    from titanmac_integration.callbacks import HuggingFaceTopologyCallback

    def trainer() -> tuple:
        model = Wrapped()
        callback = HuggingFaceTopologyCallback(periods=PERIODS, seed=3)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="adamw_torch",
            save_steps=TAKEN,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )

        class InOrder(transformers.Trainer):
            def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
                return torch.utils.data.SequentialSampler(rows)

        rows = [{"x": row} for row in data()]
        made = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        return made, model, callback

    first, model, callback = trainer()
    first.train()
    assert callback.manager.global_step == STEPS
    assert callback.manager.swap_rate > 0.0
    if accumulation == 1:
        expected, manager = by_hand(8)
        assert_same(model.inner, expected)
        assert callback.manager.state_dict()["step"] == manager.state_dict()["step"]
    again, second, resumed = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{TAKEN}"))
    assert resumed.manager.global_step == STEPS
    assert_same(second, model)
    state = tmp_path / f"checkpoint-{TAKEN}" / "topology_manager.json"
    state.unlink()  # a checkpoint from before the callback was there
    again, _, resumed = trainer()
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=str(state.parent))
    assert "no topology state in" in caplog.text
    assert resumed.manager.global_step == STEPS
    state.write_text("{")
    with pytest.raises(ValueError, match=r"topology_manager\.json cannot be read"):
        trainer()[0].train(resume_from_checkpoint=str(state.parent))


def test_hugging_face_trains_titanmac(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from titanmac_integration.callbacks import HuggingFaceTopologyCallback

    config = TitanMACConfig(
        d_model=32, n_heads=4, n_layers=1, d_ff=64, max_seq_len=16, window_size=8,
        use_block_sparse=True, block_sparse_layers=None, block_sparse_row_group=1,
        block_sparse_tile_size=8,
    )  # fmt: skip
    tokens = torch.randint(256, (16, 16), generator=torch.Generator().manual_seed(0))
    callback = HuggingFaceTopologyCallback(periods=(1, 1, 2))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    transformers.Trainer(
        model=Adapter(create_titanmac_model(config)),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[callback],
    ).train()
    assert callback.manager.global_step == 4
    assert callback.manager.swap_rate is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: DeepNestedOptimizer(m), r"\(=DeepNestedOptimizer\) drives the topology already"),
        (lambda m: torch.optim.LBFGS(m.parameters()), r"\(=LBFGS\) must step without a closure"),
    ],
)
def test_hugging_face_with_optimizers_that_do_not_fit(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer], message: str
) -> None:
    transformers = pytest.importorskip("transformers")
    from titanmac_integration.callbacks import HuggingFaceTopologyCallback

    model = Wrapped()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"x": row} for row in data(8)],
        optimizers=(make(model), None),
        callbacks=[HuggingFaceTopologyCallback()],
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


# -- Lightning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning(tmp_path: Path, accumulation: int) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from titanmac_integration.callbacks import LightningTopologyCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sparse_model()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return loss_of(self.inner, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)

    class Driven(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return DeepNestedOptimizer(self)

    def fit(steps: int, checkpoint: Path | None = None, kind: type = Module) -> tuple:
        module, callback = kind(), LightningTopologyCallback(periods=PERIODS, seed=3)
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[callback],
            accumulate_grad_batches=accumulation,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader(data(), batch_size=8 // accumulation)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer, module, callback

    _, module, callback = fit(STEPS)
    assert callback.manager.global_step == STEPS
    assert callback.manager.swap_rate > 0.0
    if accumulation == 1:
        expected, _ = by_hand(8)
        assert_same(module.inner, expected)
    half, _, _ = fit(TAKEN)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, _, callback = fit(STEPS, tmp_path / "half.ckpt")
    assert callback.manager.global_step == STEPS
    with pytest.raises(ValueError, match=r"topology already, .* leave the callback out"):
        fit(1, kind=Driven)


# -- neither ---------------------------------------------------------------------------------------


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from titanmac_integration import callbacks

    for module in ("_callbacks._hf", "_callbacks._lightning"):
        monkeypatch.delitem(sys.modules, f"titanmac_integration.{module}", raising=False)
    for library in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r"needs transformers, .*titanmac-integration\[hf\]"):
        callbacks.HuggingFaceTopologyCallback  # noqa: B018
    with pytest.raises(ImportError, match=r"needs lightning, .*titanmac-integration\[lightning\]"):
        callbacks.LightningTopologyCallback  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'KerasCallback'"):
        callbacks.KerasCallback  # noqa: B018
