"""A captured step trains like a plain one, for methods that add to the gradients too."""

from typing import Any

import pytest
import torch

from titanmac_integration._protocol import _graphed
from titanmac_integration._protocol._cell import learn_first, run_cell
from titanmac_integration._protocol._methods import METHODS, Asked
from titanmac_integration._protocol._problems import from_pairs
from titanmac_integration._protocol._settings import SETTINGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "name",
    [
        "fine-tuning",
        "ewc",
        "kronecker-ewc",
        "self-rehearsal",
        "joint",
        "ours",
        "ours-grown",
        "ours-damped",
        "ours-rehearsing",
        "ours-recalling",
    ],
)
def test_captured_steps_train_like_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"d_model": 32, "n_heads": 4, "d_ff": 64, "n_layers": 1, "block_sparse_tile_size": 16}
    setting = SETTINGS["pilot"].changed(steps=(12, 24), batch_size=(4,), changes=small)
    pairs = [(f"{i:02d}+=", f"{99 - i:02d}") for i in range(60)]
    other = [(f"{i:02d}=+", f"{i:02d}"[::-1]) for i in range(60)]
    tasks: list[Any] = [from_pairs("complement", pairs), from_pairs("mirror", other)]
    device = torch.device("cuda")
    for key in ("ewc", "kronecker-ewc"):
        monkeypatch.setattr(METHODS[key], "rows", 4)
    monkeypatch.setattr(METHODS["self-rehearsal"], "rows", 8)
    start = learn_first(setting, tasks, METHODS[name].arch, 0, device)
    cell = Asked(name, METHODS[name].arch, None)
    graphed = run_cell(setting, tasks, cell, start, device)
    monkeypatch.setattr(_graphed.GraphedTrainer, "graphed", property(lambda self: False))
    plain = run_cell(setting, tasks, cell, start, device)
    assert graphed["failed"] is plain["failed"] is None
    moved = abs(plain["nats"][2][1] - plain["nats"][1][1])
    for task in (0, 1):
        assert graphed["nats"][2][task] == pytest.approx(plain["nats"][2][task], abs=0.05 * moved)
