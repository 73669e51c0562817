"""The gate: no logit depends on a later token, exactly, in any configuration."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titanmac_integration import TitanMACConfig, create_titanmac_model
from titanmac_integration._window import attention_mask

LENGTH = 24
SPARSE = [
    {"use_block_sparse": False},
    {"use_block_sparse": True},
    {"use_block_sparse": True, "block_sparse_components": ("mlp", "attention")},
    {"use_block_sparse": True, "block_sparse_components": ("attention",)},
]
CONFIGURATIONS = [
    {"n_persistent": p, "window_size": w, "tie_weights": tie, "dropout": dropout, **sparse}
    for p, w, tie, dropout, sparse in itertools.product(
        (0, 4), (1, 5, LENGTH, 100), (True, False), (0.0, 0.3), SPARSE
    )
]


@pytest.mark.parametrize("changes", CONFIGURATIONS, ids=lambda c: "-".join(map(str, c.values())))
def test_later_tokens_change_no_earlier_logit(
    changes: dict, tiny_config: Callable[..., TitanMACConfig]
) -> None:
    model = create_titanmac_model(tiny_config(**changes), seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (2, LENGTH), generator=generator)
    with torch.no_grad():
        before = model(tokens)["logits"]
        for t in (1, 4, 5, 13, LENGTH - 1):
            changed = tokens.clone()
            changed[:, t:] = torch.randint(256, (2, LENGTH - t), generator=generator)
            changed[:, t] = (tokens[:, t] + 1) % 256
            after = model(changed)["logits"]
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("changes", [{}, {"n_persistent": 0, "window_size": 64}])
def test_a_prefix_has_the_logits_of_the_whole(
    changes: dict, tiny_config: Callable[..., TitanMACConfig]
) -> None:
    model = create_titanmac_model(tiny_config(**changes)).eval()
    tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)["logits"]
        for t in (1, 7, LENGTH):
            torch.testing.assert_close(model(tokens[:, :t])["logits"], whole[:, :t])


def test_no_gradient_flows_from_a_logit_to_a_later_token(
    tiny_config: Callable[..., TitanMACConfig],
) -> None:
    model = create_titanmac_model(tiny_config(use_block_sparse=True, tie_weights=False))
    captured = {}

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        captured["embedded"] = output

    model.embedding.register_forward_hook(keep)
    tokens = torch.randint(256, (1, LENGTH))
    model(tokens)["logits"][0, 9].sum().backward()
    touched = captured["embedded"].grad[0].abs().sum(-1) > 0
    assert touched[:10].any()
    assert not touched[10:].any()


def test_a_leak_would_be_seen(
    tiny_config: Callable[..., TitanMACConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate can fail: let persistent tokens see the sequence, as a known implementation did."""

    def leaking(n_tokens: int, *, window_size: int, n_persistent: int, device: object) -> object:
        mask = attention_mask(
            n_tokens, window_size=window_size, n_persistent=n_persistent, device=None
        )
        mask[:n_persistent] = True
        return mask

    monkeypatch.setattr("titanmac_integration._window.attention_mask", leaking)
    model = create_titanmac_model(tiny_config()).eval()
    tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % 256
    with torch.no_grad():
        assert not torch.equal(model(tokens)["logits"][:, :-1], model(changed)["logits"][:, :-1])


@settings(max_examples=60, deadline=None)
@given(n_tokens=st.integers(1, 40), window=st.integers(1, 50), persistent=st.integers(0, 5))
def test_the_mask_is_what_the_loops_say(n_tokens: int, window: int, persistent: int) -> None:
    mask = attention_mask(n_tokens, window_size=window, n_persistent=persistent)
    total = persistent + n_tokens
    if mask is None:
        assert persistent == 0
        assert window >= n_tokens
        return
    assert mask.shape == (total, total)
    for row in range(total):
        for column in range(total):
            if column < persistent:
                allowed = True
            elif row < persistent:
                allowed = False
            else:
                allowed = column <= row < column + window
            assert bool(mask[row, column]) == allowed
