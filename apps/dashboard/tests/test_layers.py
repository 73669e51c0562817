"""Names of layers."""

from __future__ import annotations

import pytest

from blockell_dashboard.layers import layer_label, layer_order


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("blocks.3.mlp.fc1", "Block 3 · fc1"),
        ("model.layers.10.attention.proj", "Block 10 · attention.proj"),
        ("h.0.mlp", "Block 0 · mlp"),
        ("fc1", "fc1"),
        ("layers.0", "layers.0"),
        ("2", "Layer 2"),
    ],
)
def test_labels_name_block_and_part(name: str, label: str) -> None:
    assert layer_label(name) == label


def test_names_sort_by_number() -> None:
    names = ["blocks.10.fc1", "blocks.2.fc2", "blocks.2.fc1", "head", "0"]
    assert sorted(names, key=layer_order) == [
        "0",
        "blocks.2.fc1",
        "blocks.2.fc2",
        "blocks.10.fc1",
        "head",
    ]
