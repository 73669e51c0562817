"""Models on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from titanmac_integration import (
    TitanMACConfig,
    create_titanmac_model,
    load_checkpoint,
    save_checkpoint,
)
from titanmac_integration._model import _checkpoint

Make = Callable[..., TitanMACConfig]
TOKENS = torch.arange(20)[None]


@pytest.mark.parametrize("changes", [{}, {"use_block_sparse": True}, {"tie_weights": False}])
def test_round_trip(tiny_config: Make, tmp_path: Path, changes: dict) -> None:
    config = tiny_config(**changes)
    model = create_titanmac_model(config, seed=3).eval()
    path = save_checkpoint(model, tmp_path / "run", info={"step": 5})
    back = load_checkpoint(tmp_path / "run").eval()
    assert back.config == config
    assert torch.equal(back(TOKENS)["logits"], model(TOKENS)["logits"])
    assert set(load_file(path)) == set(model.state_dict())
    assert json.loads((tmp_path / "run" / "model.json").read_text())["info"] == {"step": 5}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


def test_a_failed_write_leaves_the_old_file(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_titanmac_model(tiny_config(), seed=0)
    path = save_checkpoint(model, tmp_path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(create_titanmac_model(tiny_config(), seed=1), tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_bad_checkpoints_are_explained(tiny_config: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold a checkpoint, but has no model.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"directory \(=.*nowhere'\) must exist"):
        load_checkpoint(tmp_path / "nowhere")
    save_checkpoint(create_titanmac_model(tiny_config()), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "model.json"
    good_weights, good_config = weights.read_bytes(), config.read_text()

    for content in ("{", "[]", '{"format": "other"}', '{"format": "titanmac", "version": 2}'):
        config.write_text(content)
        with pytest.raises(ValueError, match=r"model.json cannot be read"):
            load_checkpoint(tmp_path)
    config.write_text(good_config.replace('"d_ff": 64', '"d_ff": -1'))
    with pytest.raises(ValueError, match=r"cannot be read: d_ff \(=-1\) must be"):
        load_checkpoint(tmp_path)
    config.write_text(good_config.replace('"d_ff": 64', '"d_ff": 128'))
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_checkpoint(tmp_path)
    config.write_text(good_config)
    for damage in (b"", b"garbage" * 10, good_weights[:-10]):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
            load_checkpoint(tmp_path)
