"""Measures and the tokenizer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titanmac_integration import ByteTokenizer, bits_per_byte, exact_match, relative_forgetting


def test_exact_match_counts_whole_rows() -> None:
    expected = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]])
    predicted = torch.tensor([[1, 2, 3], [4, 5, 0], [0, 8, 9], [1, 1, 1]])
    assert exact_match(predicted, expected) == 0.5
    with pytest.raises(ValueError, match=r"predicted \(shape \(4, 3\)\) must be \[rows, positions"):
        exact_match(predicted, expected[:2])
    with pytest.raises(ValueError, match="with at least one row"):
        exact_match(predicted[:0], expected[:0])


def test_bits_per_byte() -> None:
    targets = torch.tensor([[3, 7, 1]])
    assert bits_per_byte(torch.zeros(1, 3, 256), targets) == pytest.approx(8.0)
    certain = torch.full((1, 3, 256), -1000.0).scatter(2, targets[..., None], 1000.0)
    assert bits_per_byte(certain, targets) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("before", "after", "chance", "expected"),
    [
        (1.0, 1.0, 0.01, 0.0),
        (1.0, 0.01, 0.01, 1.0),
        (0.9, 0.5, 0.1, 0.5),
        (0.9, 1.0, 0.1, -0.125),
        (2.0, 5.0, 8.0, 0.5),  # bits per byte: chance lies above
        (2.0, 8.0, 8.0, 1.0),
        (0.1, 0.1, 0.1, None),
        (math.nan, 0.5, 0.1, None),
        (0.5, math.inf, 0.1, None),
    ],
)
def test_relative_forgetting(
    before: float, after: float, chance: float, expected: float | None
) -> None:
    value = relative_forgetting(before, after, chance)
    assert value == (None if expected is None else pytest.approx(expected))


@given(st.text())
def test_the_tokenizer_round_trips(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_the_tokenizer_forgives_bytes_and_refuses_other_numbers() -> None:
    assert ByteTokenizer().decode([0xFF, 65]) == "\ufffdA"
    with pytest.raises(ValueError, match=r"tokens \(contains 256\) must be in \[0, 256\)"):
        ByteTokenizer().decode([256])
