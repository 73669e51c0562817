"""MAC, MAG and MAL as parts of a model: gradients, state, generation, ways to run it."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from titanmac_integration import TitanMAC, TitanMACConfig, create_titanmac_model

Make = Callable[..., TitanMACConfig]
VARIANTS = ["MAC", "MAG", "MAL"]
CASES = list(itertools.product([*VARIANTS, "none"], [1, 2]))[:-1]
SHORT, LONG = 5, 50  # tokens: less than a segment and a chunk, several of each


def memory_config(make: Make, variant: str, depth: int = 1, **changes: Any) -> TitanMACConfig:
    memory = {"use_neural_memory": True, "titans_variant": variant} if variant != "none" else {}
    sizes = {"memory_depth": depth, "memory_heads": 2, "memory_width": 8, "memory_chunk_size": 8}
    return make(**{**memory, **sizes, "segment_size": 16, **changes})


def some_tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_every_parameter_learns(tiny_config: Make, variant: str, depth: int, length: int) -> None:
    """Initial memory, all projections and each gate included, also in less than a segment."""
    model = create_titanmac_model(memory_config(tiny_config, variant, depth))
    tokens = some_tokens(length)
    model(tokens, tokens)["loss"].backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    names = {name for name, _ in model.named_parameters()}
    if variant != "none":
        wanted = "query.weight key.weight value.weight gates.weight gates.bias initial.0 taps"
        assert {f"blocks.1.memory.{name}" for name in wanted.split()} <= names
        for block in model.blocks:
            # rows: alpha, eta, theta of each head
            assert (block.memory.gates.weight.grad.abs().sum(1) > 0).all()
            assert (block.memory.gates.bias.grad != 0).all()


@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_a_state_continues_where_it_stopped(tiny_config: Make, variant: str, depth: int) -> None:
    config = memory_config(tiny_config, variant, depth)
    model = create_titanmac_model(config, dtype=torch.float64).eval()
    tokens = some_tokens(LONG)
    with torch.no_grad():
        whole = model(tokens)["logits"]
        for sizes in ([1] * LONG, [7, 9, 20, 14], [16, 34], [LONG]):
            state, logits = None, []
            for piece in tokens.split(sizes, dim=1):
                output = model(piece, state=state, return_state=True)
                state = output["state"]
                logits.append(output["logits"])
            assert state.position == LONG
            torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_generation_is_full_recomputation(tiny_config: Make, variant: str, depth: int) -> None:
    config = memory_config(tiny_config, variant, depth)
    model = create_titanmac_model(config, seed=2, dtype=torch.float64)
    prompt = some_tokens(13)
    written = model.generate(prompt, 30)
    assert model.training, "generate must leave the mode as it was"
    expected = prompt
    with torch.no_grad():
        for _ in range(30):
            following = model.eval()(expected)["logits"][:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
    assert torch.equal(written, expected)
    assert len(written.unique()) > 5, "a constant would prove little"


def test_drawn_tokens_follow_the_generator_and_top_k(tiny_config: Make) -> None:
    model = create_titanmac_model(memory_config(tiny_config, "MAC"), dtype=torch.float64).eval()
    prompt = some_tokens(4)

    def draw(seed: int, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 12, temperature=1.0, generator=generator, **options)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), model.generate(prompt, 12))
    assert torch.equal(draw(0, top_k=256), draw(0))
    among = draw(3, top_k=2)
    with torch.no_grad():
        best = model(among)["logits"][:, 3:-1].topk(2).indices
    assert (among[:, 4:, None] == best).any(-1).all()


def test_generate_refuses_what_it_cannot_do(tiny_config: Make) -> None:
    model = create_titanmac_model(memory_config(tiny_config, "MAC"))
    prompt = some_tokens(60)
    with pytest.raises(ValueError, match=r"max_seq_len \(=64\) together; ask for at most 4\."):
        model.generate(prompt, 5)
    assert model.generate(prompt, 4).shape == (2, 64)
    assert torch.equal(model.generate(prompt, 0), prompt)
    with pytest.raises(ValueError, match=r"max_new_tokens \(=-1\) must not be negative"):
        model.generate(prompt, -1)
    with pytest.raises(ValueError, match=r"temperature \(=-1.0\) must be 0"):
        model.generate(prompt, 1, temperature=-1.0)
    with pytest.raises(ValueError, match=r"top_k \(=0\) must be at least 1"):
        model.generate(prompt, 1, top_k=0)
    with pytest.raises(ValueError, match=r"sequence of 0 tokens\) must hold at least one token"):
        model.generate(prompt[:, :0], 1)
    with pytest.raises(ValueError, match="contains 300"):
        model.generate(torch.tensor([[300]]), 1)


def test_a_state_that_does_not_fit_is_refused(tiny_config: Make) -> None:
    model = create_titanmac_model(memory_config(tiny_config, "MAG"))
    state = model(some_tokens(60), return_state=True)["state"]
    with pytest.raises(
        ValueError, match=r"5 tokens after 60\) must not be longer than max_seq_len"
    ):
        model(some_tokens(5), state=state)
    with pytest.raises(ValueError, match=r"state \(of 2 sequences, 2 layers\) must fit input_ids"):
        model(some_tokens(2)[:1], state=state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_the_state_until_it_is_detached(
    tiny_config: Make, variant: str
) -> None:
    model = create_titanmac_model(memory_config(tiny_config, variant, memory_layers=(1,)))
    first, second = some_tokens(20), some_tokens(12, seed=1)
    grads = []
    for detach in (False, True):
        model.zero_grad()
        state = model(first, return_state=True)["state"]
        model(second, second, state=state.detach() if detach else state)["loss"].backward()
        grads.append(model.embedding.weight.grad.clone())
    assert not torch.equal(*grads)
    assert grads[1].isfinite().all()


@pytest.mark.parametrize("variant", ["MAC", "MAG", "MAL"])
def test_dropout_reaches_what_a_memory_reads_and_answers(tiny_config: Make, variant: str) -> None:
    """Without it `small` learned its text by heart where a GPT with the same dropout did not."""
    model = create_titanmac_model(memory_config(tiny_config, variant, dropout=0.3))
    seen: dict[str, torch.Tensor] = {}
    memory = model.blocks[-1].memory
    for name in ("key", "out_gate", "out"):
        getattr(memory, name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0]})
        )
    for training in (True, False):
        model.train(training)(some_tokens(LONG))
        shares = {name: (x == 0).float().mean().item() for name, x in seen.items()}
        expected = 0.3 if training else 0.0
        assert all(abs(share - expected) < 0.05 for share in shares.values()), shares


@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_checkpointing_changes_nothing_but_memory(
    tiny_config: Make, variant: str, depth: int
) -> None:
    config = memory_config(tiny_config, variant, depth, dropout=0.2, use_block_sparse=True)
    tokens = some_tokens(LONG)
    results = []
    for recompute in (False, True):
        model = create_titanmac_model(config.replace(activation_checkpointing=recompute))
        torch.manual_seed(0)
        loss = model(tokens, tokens)["loss"]
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


@pytest.mark.parametrize(
    ("variant", "depth", "backend"),
    [("MAC", 1, "aot_eager"), ("MAC", 2, "eager"), ("MAG", 1, "eager"), ("MAL", 1, "eager")],
)
def test_compiles_without_graph_breaks(
    tiny_config: Make, variant: str, depth: int, backend: str
) -> None:
    torch._dynamo.reset()  # or sizes that differ from an earlier test's become symbols, slowly
    model = create_titanmac_model(memory_config(tiny_config, variant, depth, n_layers=1))
    tokens = some_tokens(11)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got, expected = compiled(tokens, tokens), model(tokens, tokens)
    torch.testing.assert_close(got["logits"], expected["logits"])
    got["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision(tiny_config: Make, variant: str) -> None:
    model = create_titanmac_model(memory_config(tiny_config, variant))
    tokens = some_tokens(LONG)
    expected = model(tokens, tokens)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, tokens)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0.01)
    pure = create_titanmac_model(model.config, dtype=torch.bfloat16)(tokens, tokens)["loss"]
    torch.testing.assert_close(pure, expected, rtol=0.02, atol=0.02)


def test_parts_of_the_loss(tiny_config: Make) -> None:
    tokens = some_tokens(20)
    labels = tokens.clone()
    labels[:, :6] = -100
    plain = create_titanmac_model(memory_config(tiny_config, "none"))(tokens, labels)
    assert set(plain) == {"logits", "loss", "cross_entropy"}
    assert torch.equal(plain["loss"].detach(), plain["cross_entropy"])
    config = memory_config(tiny_config, "MAG", z_loss_weight=0.01)
    output = create_titanmac_model(config)(tokens, labels)
    assert set(output) == {"logits", "loss", "cross_entropy", "z_loss", "memory_loss"}
    assert not any(output[part].requires_grad for part in ("cross_entropy", "z_loss"))
    squares = output["logits"][:, 5:-1].logsumexp(-1).square().mean()
    torch.testing.assert_close(output["z_loss"], squares.detach())
    expected = output["cross_entropy"] + 0.01 * output["z_loss"]
    torch.testing.assert_close(output["loss"].detach(), expected)
    assert output["memory_loss"] > 0


@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_no_sequence_at_all(tiny_config: Make, variant: str, depth: int) -> None:
    model = create_titanmac_model(memory_config(tiny_config, variant, depth, max_seq_len=300))
    for length in (LONG, 300):
        nothing = torch.zeros(0, length, dtype=torch.long)
        assert model(nothing)["logits"].shape == (0, length, 256)


def test_memory_in_some_layers_only(tiny_config: Make) -> None:
    model: TitanMAC = create_titanmac_model(memory_config(tiny_config, "MAC", memory_layers=(1,)))
    assert not hasattr(model.blocks[0], "memory")
    assert model.blocks[1].memory.depth == 1
    tokens = some_tokens(LONG)
    assert model(tokens)["logits"].shape == (2, LONG, 256)


def test_memory_reaches_beyond_the_window(tiny_config: Make) -> None:
    """Without a memory the first token is out of reach; with one it is not."""
    for variant, seen in (("none", False), *((v, True) for v in VARIANTS)):
        config = memory_config(tiny_config, variant, window_size=4)
        model = create_titanmac_model(config, dtype=torch.float64).eval()
        tokens = some_tokens(LONG)
        other = tokens.clone()
        other[:, 0] = (other[:, 0] + 1) % 256
        with torch.no_grad():
            same = torch.equal(model(tokens)["logits"][:, -1], model(other)["logits"][:, -1])
        assert same is not seen, variant
