"""DeepNestedOptimizer on a CUDA device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from titanmac_integration import (
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    LearningRateController,
    TitanMACConfig,
    create_titanmac_model,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).cuda()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).cuda()
        (model(x) - x.cos()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"foreach": True},
        {"fused": True},
        {"capturable": True},
        {"fused": True, "amsgrad": True},
    ],
    ids=str,
)
def test_with_everything_off_it_is_adamw_bit_for_bit(settings: dict[str, Any]) -> None:
    mine, theirs = make_net(), make_net()
    train(mine, DeepNestedOptimizer(mine.parameters(), lr=0.01, **settings), range(20))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, **settings), range(20))
    assert_same(mine, theirs)


OPTIONS: dict[str, Any] = {
    "cms": lambda: {"cms": ContinuumMemorySystem((1, 2, 4), {"2.*": 1}), "fused": True},
    "capturable": lambda: {
        "cms": ContinuumMemorySystem((1, 2, 4), {"2.*": 2}),
        "capturable": True,
    },
    "nested": lambda: {
        "deep_momentum": True,
        "controller": LearningRateController(period=2),
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_resume_between_updates_is_exact(option: str) -> None:
    model = make_net()
    optimizer = DeepNestedOptimizer(model, lr=0.01, **OPTIONS[option]())
    train(model, optimizer, range(7))
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(7, 14))
    other = make_net(3)
    resumed = DeepNestedOptimizer(other, lr=0.3, **OPTIONS[option]())
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(other, resumed, range(7, 14))
    assert_same(model, other)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_a_scaler_and_a_topology(fused: bool) -> None:
    config = TitanMACConfig(
        d_model=64, n_heads=2, n_layers=2, d_ff=128, max_seq_len=32, window_size=16,
        use_block_sparse=True, block_sparse_layers=None, block_sparse_swap_threshold=1.0,
    )  # fmt: skip
    model = create_titanmac_model(config, device="cuda").train()
    levels = {"blocks.1.mlp.*": 1}
    optimizer = DeepNestedOptimizer(
        model, lr=3e-3, fused=fused, cms=ContinuumMemorySystem((1, 5, 10), levels)
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=20)
    tokens = torch.randint(16, (8, 32), generator=torch.Generator().manual_seed(0)).cuda()
    losses, skipped = [], 0
    for _ in range(80):
        with torch.autocast("cuda", torch.float16):
            loss = model(tokens, tokens)["loss"]
        scaler.scale(loss).backward()
        skipped += scaler.step(optimizer) is None
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert skipped > 0
    assert optimizer.global_step == 80 - skipped
    assert optimizer.swap_rate is not None
    assert losses[-1] < losses[0] - 0.5


def test_meta_update_on_the_device() -> None:
    config = TitanMACConfig(
        d_model=64, n_heads=2, n_layers=1, d_ff=128, max_seq_len=32, window_size=16,
        use_block_sparse=True, block_sparse_layers=None,
    )  # fmt: skip
    model = create_titanmac_model(config, device="cuda").train()
    optimizer = DeepNestedOptimizer(model, deep_momentum=True, controller=True)
    tokens = torch.randint(256, (2, 32)).cuda()
    model(tokens, tokens)["loss"].backward()
    optimizer.step()
    report = optimizer.meta_update((tokens, tokens), [(tokens, tokens)] * 2)
    assert all(norm > 0 for norm in report.gradient_norms.values())
