"""TitanMACConfig and TrainingConfig: what they accept, refuse and remember."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cms_topology import ScoringConfig
from titanmac_integration import TitanMACConfig, TrainingConfig
from titanmac_integration._config._checks import MAX_SWAP_FRAC


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, r"n_layers \(=0\) must be an integer of at least 1"),
        ({"vocab_size": 2.5}, r"vocab_size \(=2.5\) must be an integer"),
        ({"d_ff": True}, r"d_ff \(=True\) must be an integer"),
        ({"n_persistent": -1}, r"n_persistent \(=-1\) must be an integer of at least 0"),
        ({"d_model": 650}, r"d_model \(=650\) must be a multiple of 2 \* n_heads \(=20\)"),
        ({"d_model": 650}, r"nearest: 640 or 660"),
        ({"d_model": 4}, r"nearest: 20\."),
        ({"dropout": 1.0}, r"dropout \(=1.0\) must be in \[0, 1\)"),
        ({"dropout": "no"}, r"dropout \(='no'\) must be a finite number"),
        ({"norm_eps": 0.0}, r"norm_eps \(=0.0\) must be above 0; the default is 1e-06"),
        ({"rope_base": float("nan")}, r"rope_base \(=nan\) must be a finite number"),
        ({"tie_weights": 1}, r"tie_weights \(=1\) must be True or False"),
        ({"block_sparse_tile_size": 12}, r"block_sparse_tile_size \(=12\) must be one of 8, 16"),
        ({"block_sparse_density": 0.05}, r"block_sparse_density \(=0.05\) must be in \[0.1, 1.0\]"),
        ({"block_sparse_density": 1.5}, r"block_sparse_density \(=1.5\) must be in"),
        ({"block_sparse_density": "half"}, r"block_sparse_density \(='half'\) must be a finite"),
        ({"block_sparse_density": {0: 2.0}}, r"block_sparse_density\[0\] \(=2.0\) must be in"),
        ({"block_sparse_density": {"x": 0.5}}, r"key 'x'\) must be keyed by layer index"),
        ({"block_sparse_layers": 3}, r"block_sparse_layers \(=3\) must be a tuple"),
        ({"block_sparse_components": "mlp"}, r"block_sparse_components \(='mlp'\) must be a tuple"),
        ({"block_sparse_components": ("head",)}, r"must be out of mlp, attention; 'head' is not"),
        ({"block_sparse_components": ()}, r"must name at least one part"),
        ({"block_sparse_row_group": 0}, r"block_sparse_row_group \(=0\) must be an integer"),
        (
            {"use_block_sparse": True, "d_model": 96, "n_heads": 4, "block_sparse_row_group": 4},
            r"block_sparse_row_group \(=4\) must divide d_model / block_sparse_tile_size \(=6\)",
        ),
        ({"block_sparse_row_group": "all"}, r'must be "auto" or a positive integer'),
        ({"block_sparse_swap_threshold": 0.5}, r"swap_threshold \(=0.5\) must be at least 1"),
        ({"block_sparse_keep_score": "size"}, r"keep_score \(='size'\) must be one of magnitude"),
        ({"block_sparse_birth": "ones"}, r"birth \(='ones'\) must be one of zeros, kaiming"),
        ({"block_sparse_min_swap_frac": 0.06}, r"min_swap_frac \(=0.06\) must be in \[0, 0.05\]"),
        (
            {"block_sparse_max_density": 0.3},
            r"max_density \(=0.3\) must be at least block_sparse_d",
        ),
        ({"block_sparse_max_density": 2.0}, r"block_sparse_max_density \(=2.0\) must be in"),
        ({"titans_variant": "mac"}, r"titans_variant \(='mac'\) must be one of MAC, MAG, MAL"),
        ({"memory_depth": 3}, r"memory_depth \(=3\) must be 1 \(a matrix\) or 2"),
        ({"memory_depth": True}, r"memory_depth \(=True\) must be 1"),
        ({"memory_heads": 0}, r"memory_heads \(=0\) must be an integer of at least 1"),
        ({"memory_layers": 1}, r"memory_layers \(=1\) must be a tuple of layer indices or None"),
        ({"use_neural_memory": 1}, r"use_neural_memory \(=1\) must be True or False"),
        ({"activation_checkpointing": "yes"}, r"activation_checkpointing \(='yes'\) must be True"),
        ({"z_loss_weight": -1.0}, r"z_loss_weight \(=-1.0\) must be 0 \(off\) or more"),
        ({"block_sparse_candidate_score": "best"}, r"must be one of gradient, outer"),
    ],
)
def test_a_wrong_field_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TitanMACConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_sparse_layers": (16,)}, r"\(=\(16,\)\) must be below n_layers \(=16\); pass None"),
        ({"block_sparse_layers": (-1,)}, r"block_sparse_layers \(=-1\) must be an integer"),
        ({"block_sparse_layers": ()}, r"must name at least one layer"),
        ({"block_sparse_layers": (1, 1)}, r"must not repeat a layer"),
        ({"block_sparse_density": {8: 0.5}}, r"must name exactly the block-sparse layers \[8, 9"),
        ({"d_ff": 2568}, r"d_ff \(=2568\) must be a multiple of block_sparse_tile_size \(=16\)"),
        ({"d_ff": 2568}, r"nearest: 2560 or 2576"),
        ({"block_sparse_tile_size": 128, "d_model": 660, "n_heads": 10}, r"d_model \(=660\)"),
    ],
)
def test_a_wrong_block_sparse_model_is_refused(changes: dict[str, Any], message: str) -> None:
    TitanMACConfig(**changes)  # a dense model does not mind
    with pytest.raises(ValueError, match=message):
        TitanMACConfig(use_block_sparse=True, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_layers": (16,)}, r"memory_layers \(=\(16,\)\) must be below n_layers \(=16\)"),
        ({"memory_layers": (2, 2)}, r"memory_layers \(=\(2, 2\)\) must not repeat a layer"),
        ({"memory_layers": ()}, r"memory_layers \(=\(\)\) must name at least one layer"),
        ({"segment_size": 100}, r"segment_size \(=100\) must be a multiple of memory_chunk_size"),
        ({"segment_size": 100}, r"nearest: 64 or 128"),
    ],
)
def test_a_wrong_memory_is_refused(changes: dict[str, Any], message: str) -> None:
    TitanMACConfig(**changes)  # a model without memory does not mind
    with pytest.raises(ValueError, match=message):
        TitanMACConfig(use_neural_memory=True, **changes)


def test_segments_matter_to_mac_only() -> None:
    TitanMACConfig(use_neural_memory=True, titans_variant="MAG", segment_size=100)


def test_memory_fields_survive_json() -> None:
    config = TitanMACConfig(use_neural_memory=True, memory_layers=[1, 3], memory_depth=2)
    assert config.memory_layers == (1, 3)
    assert [config.has_memory(layer) for layer in range(4)] == [False, True, False, True]
    assert TitanMACConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert not TitanMACConfig(memory_layers=(1,)).has_memory(1)


def test_attention_alone_does_not_ask_the_width_of_the_mlp() -> None:
    TitanMACConfig(use_block_sparse=True, d_ff=2568, block_sparse_components=("attention",))


def test_it_is_frozen_and_keyword_only() -> None:
    config = TitanMACConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        TitanMACConfig(256)  # type: ignore[misc]


def test_presets() -> None:
    demo = TitanMACConfig.preset("demo", dropout=0.1)
    assert demo.use_block_sparse
    assert demo.dropout == 0.1
    large = TitanMACConfig.preset("titanmac-163m")
    assert (large.d_model, large.n_layers, large.vocab_size) == (640, 16, 128_000)
    with pytest.raises(
        ValueError, match=r"preset \(=.huge.\) must be one of demo, small, titanmac-163m"
    ):
        TitanMACConfig.preset("huge")
    with pytest.raises(ValueError, match=r"names \(='widht'\) must be fields of TitanMACConfig"):
        TitanMACConfig.preset("demo", widht=3)


def test_per_layer_density() -> None:
    config = TitanMACConfig(
        use_block_sparse=True, block_sparse_layers=[3, 1], block_sparse_density={3: 0.25, 1: 0.75}
    )
    assert config.density_of(3) == 0.25
    assert config.density_of(1) == 0.75
    assert config.block_sparse_layer_indices() == (3, 1)
    assert config.is_block_sparse(3, "mlp")
    assert not config.is_block_sparse(2, "mlp")
    assert not config.is_block_sparse(3, "attention")


DENSITY = st.floats(0.1, 1.0)


@settings(max_examples=50, deadline=None)
@given(
    layers=st.one_of(st.none(), st.sets(st.integers(0, 3), min_size=1)),
    density=st.one_of(DENSITY, st.lists(DENSITY, min_size=4, max_size=4)),
    tile=st.sampled_from([8, 16, 32]),
    components=st.sampled_from([("mlp",), ("attention",), ("mlp", "attention")]),
    group=st.sampled_from(["auto", 1, 2]),
)
def test_json_round_trip(
    layers: set[int] | None, density: Any, tile: int, components: Any, group: Any
) -> None:
    indices = range(4) if layers is None else layers
    if isinstance(density, list):
        density = {layer: density[layer] for layer in indices}
    config = TitanMACConfig(
        use_block_sparse=True,
        n_layers=4,
        block_sparse_layers=None if layers is None else tuple(layers),
        block_sparse_density=density,
        block_sparse_tile_size=tile,
        block_sparse_components=components,
        block_sparse_row_group=group,
    )
    back = TitanMACConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    assert config.replace(dropout=0.5) != config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(=0\) must be an integer of at least 1"),
        ({"seq_len": 1}, r"seq_len \(=1\) must be an integer of at least 2"),
        ({"seed": -1}, r"seed \(=-1\) must be an integer of at least 0"),
        ({"seed": 1 << 64}, r"seed \(=18446744073709551616\) must be below 2\*\*64"),
        ({"lr": 0.0}, r"lr \(=0.0\) must be a number above 0"),
        ({"lr": float("inf")}, r"lr \(=inf\) must be a number"),
        ({"lr": "fast"}, r"lr \(='fast'\) must be a number"),
        ({"beta2": 1.0}, r"beta2 \(=1.0\) must be a number in \[0, 1\)"),
        ({"decide_until": 1.5}, r"decide_until \(=1.5\) must be a number in \[0, 1\]"),
        ({"grad_clip": -1.0}, r"grad_clip \(=-1.0\) must be a number 0 \(off\) or more"),
        ({"level_periods": (1, 10)}, r"level_periods \(=\(1, 10\)\) must be three integers"),
        ({"level_periods": (1, 10, 25)}, r"then a multiple of that"),
        ({"level_periods": (2, 10, 20)}, r"level_periods \(=\(2, 10, 20\)\)"),
    ],
)
def test_wrong_training_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_training_settings_round_trip_and_fit() -> None:
    config = TrainingConfig(level_periods=(1, 5, 25), lr=2e-3)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"training settings \(='speed'\) must be fields"):
        TrainingConfig.from_dict({"speed": 1})
    with pytest.raises(ValueError, match=r"seq_len \(=128\) must not exceed .* max_seq_len \(=64"):
        config.check_fits(TitanMACConfig(max_seq_len=64))


def test_learning_rate_rises_then_falls() -> None:
    config = TrainingConfig(lr=1.0, warmup_steps=10, min_lr_frac=0.1)
    rates = [config.lr_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert rates.index(max(rates)) == 9
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1, rel=0.02)
    assert TrainingConfig(warmup_steps=0, lr=1.0).lr_at(0, 10) == 1.0


def test_the_largest_floor_is_the_scorers_cap() -> None:
    assert ScoringConfig().max_swap_frac == MAX_SWAP_FRAC
