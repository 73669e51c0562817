"""Dense to block-sparse and back: outputs, configuration and state stay honest."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titanmac_integration import (
    TitanMACConfig,
    create_titanmac_model,
    load_checkpoint,
    save_checkpoint,
    to_block_sparse,
    to_dense,
)

Make = Callable[..., TitanMACConfig]
BOTH = ("mlp", "attention")
TOKENS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)["logits"]


@pytest.mark.parametrize("components", [("mlp",), ("attention",), BOTH])
def test_at_density_one_nothing_changes(tiny_config: Make, components: tuple[str, ...]) -> None:
    config = tiny_config(use_neural_memory=True, segment_size=64, memory_width=8)
    model = create_titanmac_model(config, dtype=torch.float64)
    sparse = to_block_sparse(model, block_sparse_density=1.0, block_sparse_components=components)
    assert len(sparse.block_sparse_layers) == 4 * len(components)
    assert sparse.config.use_block_sparse
    assert sparse.config.block_sparse_components == components
    assert not model.config.use_block_sparse
    assert model.block_sparse_layers == {}
    torch.testing.assert_close(logits(sparse), logits(model))
    back = to_dense(sparse)
    assert back.config == model.config.replace(
        block_sparse_density=1.0, block_sparse_components=components
    )
    for (name, wanted), (other, got) in zip(
        model.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(wanted, got)


def test_the_strongest_blocks_stay(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(), dtype=torch.float64)
    sparse = to_block_sparse(model, block_sparse_density={0: 0.25, 1: 0.5})
    layer, dense = sparse.blocks[0].mlp.fc1, model.blocks[0].mlp.fc1.weight
    assert layer.density == 0.25
    assert sparse.blocks[1].mlp.fc2.density == 0.5
    norms = dense.detach().unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).square().sum((1, 3))
    assert torch.equal(layer.col_indices[:, 0].long(), norms.argmax(1))
    kept = layer.to_dense() != 0
    assert torch.equal(layer.to_dense()[kept], dense[kept])
    torch.testing.assert_close(logits(to_dense(sparse)), logits(sparse))


def test_the_copy_is_the_model_that_its_configuration_makes(
    tiny_config: Make, tmp_path: Path
) -> None:
    """A checkpoint of it loads, it trains, and from sparse to sparse is possible, too."""
    model = create_titanmac_model(tiny_config(use_block_sparse=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    sparse = to_block_sparse(
        model,
        block_sparse_density=0.5,
        block_sparse_max_density=0.75,
        block_sparse_tile_size=16,
        block_sparse_row_group=2,
        block_sparse_swap_threshold=1.25,
        block_sparse_min_swap_frac=0.02,
        block_sparse_keep_score="taylor",
        block_sparse_birth="kaiming",
        block_sparse_layers=(1,),
    )
    assert torch.equal(state, torch.random.get_rng_state()), "global randomness was touched"
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    layer = sparse.blocks[1].mlp.fc1
    assert (layer.B, layer.row_group, layer.num_live, layer.K) == (16, 2, 1, math.ceil(0.75 * 2))
    assert layer.scorer.config.swap_threshold == 1.25
    assert layer.scorer.config.min_swap_frac == 0.02
    assert layer.scorer.config.keep_score == "taylor"
    assert layer.scorer.config.birth == "kaiming"
    fresh = create_titanmac_model(sparse.config)
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {
        n: t.shape for n, t in sparse.state_dict().items()
    }
    save_checkpoint(sparse, tmp_path)
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(sparse))
    sparse.train()(TOKENS, TOKENS)["loss"].backward()
    assert all(p.grad is not None for p in sparse.parameters())


def test_wrong_changes_are_refused(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config())
    with pytest.raises(ValueError, match=r"changes \(=d_model\) must be fields that start with"):
        to_block_sparse(model, d_model=64)
    with pytest.raises(ValueError, match=r"block_sparse_density \(=0.01\) must be in"):
        to_block_sparse(model, block_sparse_density=0.01)
    with pytest.raises(ValueError, match=r"d_model \(=32\) must be a multiple"):
        to_block_sparse(model, block_sparse_tile_size=64)
