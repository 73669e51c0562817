"""Rotary positions: rotations of pairs, by angles that only differences of positions decide."""

import torch

from titanmac_integration._attention import rotary_table, rotate

LENGTH, HEADS, WIDTH, BASE = 7, 3, 8, 100.0


def test_halves_are_the_parts_of_complex_numbers() -> None:
    x = torch.randn(2, LENGTH, 2, HEADS, WIDTH, dtype=torch.float64)
    position = torch.arange(5, 5 + LENGTH, dtype=torch.float64)
    frequency = BASE ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    turn = torch.polar(torch.ones(LENGTH, WIDTH // 2).double(), position[:, None] * frequency)
    left, right = x.chunk(2, dim=-1)
    turned = torch.complex(left, right) * turn[:, None, None]
    got = rotate(x, *rotary_table(LENGTH, WIDTH, BASE, start=5))
    # the angles are single precision
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(WIDTH, generator=generator).expand(1, LENGTH, 1, 1, WIDTH) for _ in range(2)
    )
    scores = []
    for start in (0, 11):
        table = rotary_table(LENGTH, WIDTH, BASE, start=start)
        q, k = rotate(query, *table).squeeze(), rotate(key, *table).squeeze()
        scores.append(q @ k.T)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    next_one = scores[0].diagonal(1)
    torch.testing.assert_close(next_one, next_one[:1].expand_as(next_one), rtol=1e-4, atol=1e-4)
    assert (scores[0][0] - scores[0][0, 0]).abs().max() > 1e-3
