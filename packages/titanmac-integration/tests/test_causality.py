"""The gate: no logit depends on a later token, exactly, in any configuration."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from titanmac_integration import TitanMACConfig, create_titanmac_model
from titanmac_integration._attention._window import attention_mask, plan_window, window_attention
from titanmac_integration._memory import Gates, Kernel, NeuralMemory, momentum_kernel

LENGTH = 24
BLOCKS = 300
"""Long enough for attention in blocks: more than one of them, the last one not full."""
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
MEMORY = {"use_neural_memory": True, "memory_heads": 2, "memory_width": 8, "memory_chunk_size": 4}
WITH_MEMORY = [
    {"titans_variant": variant, "memory_depth": depth, **changes, **MEMORY}
    for variant, depth, changes in itertools.product(
        ("MAC", "MAG", "MAL"),
        (1, 2),
        (
            {"segment_size": 8},
            {"segment_size": 8, "window_size": 5, "n_persistent": 0},
            {"segment_size": 64, "window_size": 64, "dropout": 0.3},
            {"segment_size": 4, "window_size": 1, "tie_weights": False},
            {"segment_size": 12, "memory_layers": (1,), "use_block_sparse": True},
            {"segment_size": 8, "activation_checkpointing": True, "z_loss_weight": 1e-4},
        ),
    )
]
IN_BLOCKS = [
    {"window_size": 40},
    {"window_size": 80, "n_persistent": 0},
    {"window_size": 299},
    *({"titans_variant": v, "segment_size": 64, **MEMORY} for v in ("MAC", "MAG", "MAL")),
]


def shown(changes: dict) -> str:
    return "-".join(map(str, changes.values()))


def check_causality(model: torch.nn.Module, length: int, times: tuple[int, ...]) -> None:
    """Tokens from t on are changed: no logit before t may change, the one at t must."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (2, length), generator=generator)
    with torch.no_grad():
        before = model(tokens)["logits"]
        for t in times:
            changed = tokens.clone()
            changed[:, t:] = torch.randint(256, (2, length - t), generator=generator)
            changed[:, t] = (tokens[:, t] + 1) % 256
            after = model(changed)["logits"]
            assert torch.equal(before[:, :t], after[:, :t]), f"token {t} changed the past"
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("changes", CONFIGURATIONS + WITH_MEMORY, ids=shown)
def test_later_tokens_change_no_earlier_logit(
    changes: dict, tiny_config: Callable[..., TitanMACConfig]
) -> None:
    model = create_titanmac_model(tiny_config(**changes), seed=1).eval()
    check_causality(model, LENGTH, (1, 4, 5, 13, LENGTH - 1))


@pytest.mark.parametrize("changes", IN_BLOCKS, ids=shown)
def test_later_tokens_change_no_earlier_logit_in_blocks(
    changes: dict, tiny_config: Callable[..., TitanMACConfig]
) -> None:
    config = tiny_config(max_seq_len=BLOCKS, **changes)
    model = create_titanmac_model(config, seed=1).eval()
    check_causality(model, BLOCKS, (1, 40, 64, 80, 130, 257, BLOCKS - 1))


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

    monkeypatch.setattr("titanmac_integration._attention._window.attention_mask", leaking)
    model = create_titanmac_model(tiny_config()).eval()
    tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % 256
    with torch.no_grad():
        assert not torch.equal(model(tokens)["logits"][:, :-1], model(changed)["logits"][:, :-1])


def leak_through_the_segment(
    self: NeuralMemory, query: torch.Tensor, starts: tuple, state: object, position: int
) -> tuple[torch.Tensor, object]:
    """Retrieves from the memory after the segment."""
    pairs = zip(starts, state.weights, strict=True)
    late = tuple(torch.cat((m[:, :, 1:], n[:, :, None]), 2) for m, n in pairs)
    return RETRIEVE(self, query, late, state, position)


def leak_through_the_step(gates: Gates) -> Kernel:
    """A token's answer includes the step of the token after it."""
    kernel = KERNEL(gates)
    late = torch.cat((kernel.reach[..., 1:, :], kernel.reach[..., -1:, :]), dim=-2)
    return kernel._replace(reach=late)


RETRIEVE = NeuralMemory._before_segment
KERNEL = momentum_kernel
LEAKS = [
    ("MAC", "_memory._module.NeuralMemory._before_segment", leak_through_the_segment),
    ("MAC", "_memory._linear.momentum_kernel", leak_through_the_step),
    ("MAG", "_memory._linear.momentum_kernel", leak_through_the_step),
    ("MAL", "_memory._linear.momentum_kernel", leak_through_the_step),
]


@pytest.mark.parametrize(("variant", "place", "leak"), LEAKS)
def test_a_leaking_memory_would_be_seen(
    variant: str,
    place: str,
    leak: Callable,
    tiny_config: Callable[..., TitanMACConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gate can fail: answer from a memory that has learned from tokens still to come."""
    changes = {"titans_variant": variant, "segment_size": 4, **MEMORY}
    model = create_titanmac_model(tiny_config(**changes)).eval()
    check_causality(model, LENGTH, (3, 6))
    monkeypatch.setattr(f"titanmac_integration.{place}", leak)
    with pytest.raises(AssertionError, match="changed the past"):
        check_causality(model, LENGTH, (3, 6))


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize(("tokens", "window"), [(300, 40), (257, 100), (320, 64), (513, 256)])
def test_attention_in_blocks_is_attention_with_the_whole_mask(
    tokens: int, window: int, persistent: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(
        3, 2, 2, persistent + tokens, 8, generator=generator, dtype=torch.float64
    )
    plan = plan_window(tokens, window_size=window, n_persistent=persistent)
    assert plan.rest is not None
    assert plan.rest.shape[1] < tokens + persistent
    mask = attention_mask(tokens, window_size=window, n_persistent=persistent)
    torch.testing.assert_close(
        window_attention(query, key, value, plan, 0.0),
        scaled_dot_product_attention(query, key, value, attn_mask=mask),
    )


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
