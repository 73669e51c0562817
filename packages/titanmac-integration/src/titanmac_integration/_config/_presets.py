"""The named shapes of :meth:`TitanMACConfig.preset`."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "d_model": 96,
        "n_heads": 8,
        "n_layers": 2,
        "d_ff": 384,
        "max_seq_len": 256,
        "window_size": 32,
        "n_persistent": 2,
        "use_block_sparse": True,
        "block_sparse_layers": None,
        "block_sparse_row_group": 1,
        # Layers this small have few blocks to choose from, so their scores lie close together.
        "block_sparse_swap_threshold": 1.1,
    },
    "small": {
        "d_model": 384,
        "n_heads": 6,
        "n_layers": 6,
        "d_ff": 1536,
        "max_seq_len": 2048,
        "window_size": 256,
        "n_persistent": 8,
        "use_neural_memory": True,
        "titans_variant": "MAG",
        "segment_size": 256,
        "block_sparse_layers": None,
    },
    "titanmac-163m": {
        "vocab_size": 128_000,
        "d_model": 640,
        "n_heads": 10,
        "n_layers": 16,
        "d_ff": 2560,
        "tie_weights": True,
    },
    # 16 layers of width 640 have 163 million parameters whatever is asked of them. To reach 237
    # million the width is 768, and the MLPs are 5.3 times as wide as that, in multiples of 128.
    "titanmac-237m": {
        "vocab_size": 128_000,
        "d_model": 768,
        "n_heads": 12,
        "n_layers": 16,
        "d_ff": 4096,
        "tie_weights": True,
    },
}
