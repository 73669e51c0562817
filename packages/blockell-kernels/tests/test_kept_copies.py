"""A dense copy of the weight is kept from forward to backward where a model's peak allows it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockell_kernels import _plan
from blockell_kernels._backends import Case


def peak(layers, weights, saved, copy, accumulates):
    """Of a step with AdamW of equal layers, in elements; weights, saved and copy are a layer's."""
    held = layers * weights * (4 if accumulates else 3)
    most = held + layers * (saved + copy)
    held = most
    for _ in range(layers):
        held += 0 if accumulates else weights
        held -= copy  # gone before the weight's gradient is computed
        most = max(most, held)
        held -= saved
    return most


@given(
    N=st.integers(1, 70000),
    R=st.integers(1, 200),
    C=st.integers(1, 200),
    K=st.integers(1, 200),
    B=st.sampled_from([8, 16, 128]),
    layers=st.integers(1, 50),
    around=st.floats(0, 1),
    accumulates=st.booleans(),
)
def test_never_above_a_dense_model(N, R, C, K, B, layers, around, accumulates):
    K = min(K, C)
    case = Case("forward", torch.device("cuda", 0), torch.bfloat16, N, R, C, K, B, 1)
    if case.density >= _plan.PROMISED_DENSITY or not _plan.may_keep(case):
        return
    weight, saved = R * C * B * B, N * C * B
    saved += around * (2 * N * (R + C) * B - saved)
    ours = peak(layers, case.density * weight, saved, weight, accumulates)
    assert ours <= peak(layers, weight, saved, 0, accumulates) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("N", "K", "keeps"),
    [(512, 12, True), (5000, 12, False), (5000, 10, True), (1, 13, False), (1, 15, True)],
)
def test_by_density_and_tokens(N, K, keeps):
    case = Case("forward", torch.device("cuda", 0), torch.bfloat16, N, 32, 16, K, 128, 1)
    assert _plan.may_keep(case) == keeps
