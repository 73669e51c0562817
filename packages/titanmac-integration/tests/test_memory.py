"""The neural memory against its formulas, token by token in double precision."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from titanmac_integration import TitanMACConfig
from titanmac_integration._memory import Gates, NeuralMemory, linear_memory, mlp_memory
from titanmac_integration._memory._gates import MAX_ALPHA, START_ALPHA, START_ETA, START_STEP
from titanmac_integration._memory._reference import reference_memory

Make = Callable[..., TitanMACConfig]
S, H, D, E = 2, 3, 5, 7
NAMES = ["query", "key", "value", "keep", "eta", "step"]


def inputs(tokens: int, depth: int, max_step: float = 1.0) -> tuple:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = (functional.normalize(draw(S, H, tokens, D), dim=-1) for _ in range(2))
    gates = Gates.from_logits(3 * draw(3, S, H, tokens), max_step)
    shapes = [(D, D)] if depth == 1 else [(D, E), (E, D)]
    weights, momentum = (tuple(draw(S, H, *shape) for shape in shapes) for _ in range(2))
    leaves = (query, key, draw(S, H, tokens, D), *gates, *weights, *momentum)
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def split(leaves: tuple, depth: int) -> tuple:
    query, key, value, *rest = leaves
    return query, key, value, Gates(*rest[:3]), tuple(rest[3 : 3 + depth]), tuple(rest[3 + depth :])


def gradients(answers: torch.Tensor, weights: tuple, momentum: tuple, leaves: tuple) -> tuple:
    generator = torch.Generator().manual_seed(1)
    parts = (answers, *weights, *momentum)
    total = sum(
        (part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum()
        for part in parts
    )
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("tokens", [1, 7, 16, 21])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_a_matrix_memory_is_exactly_sequential(tokens: int, chunk: int) -> None:
    """Whatever the chunk: the gradient is taken at the memory of the token before."""
    leaves = inputs(tokens, 1)
    query, key, value, gates, weights, momentum = split(leaves, 1)
    answers, errors, starts, new, speed = linear_memory(
        query, key, value, gates, weights, momentum, chunk
    )
    expected, *states = reference_memory(query, key, value, gates, weights, momentum)
    torch.testing.assert_close(answers, expected)
    torch.testing.assert_close((new, speed), tuple(states))
    assert starts[0].shape == (S, H, -(-tokens // chunk), D, D)
    torch.testing.assert_close(starts[0][:, :, 0], weights[0])
    torch.testing.assert_close(errors[:, :, 0], (value - key @ weights[0])[:, :, 0])
    got = gradients(answers, new, speed, leaves)
    wanted = gradients(expected, *states, leaves)
    for name, a, b in zip([*NAMES, "M", "S"], got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (7, 4), (12, 4), (9, 16), (5, 1)])
def test_an_mlp_memory_takes_its_gradients_at_the_start_of_the_chunk(
    tokens: int, chunk: int
) -> None:
    leaves = inputs(tokens, 2, max_step=0.3)
    query, key, value, gates, weights, momentum = split(leaves, 2)
    answers, _, starts, new, speed, _ = mlp_memory(
        query, key, value, gates, weights, momentum, weights, chunk, 0
    )
    expected, *states = reference_memory(query, key, value, gates, weights, momentum, chunk)
    torch.testing.assert_close(answers, expected)
    torch.testing.assert_close((new, speed), tuple(states))
    assert starts[1].shape == (S, H, -(-tokens // chunk), E, D)
    got = gradients(answers, new, speed, leaves)
    wanted = gradients(expected, *states, leaves)
    names = [*NAMES, "A", "B", "S of A", "S of B"]
    for name, a, b in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_gates_at_their_ends_give_finite_gradients() -> None:
    """A closed gate is a factor of 0 for everything before it; a division by it would be NaN."""
    logits = torch.tensor([-200.0, 0.0, 200.0], dtype=torch.float64).repeat(3, S, H, 4)
    logits.requires_grad_()
    query, key, value, _, weights, momentum = split(inputs(12, 1), 1)
    gates = Gates.from_logits(logits, 1.0)
    answers, _, _, new, _ = linear_memory(query, key, value, gates, weights, momentum, 8)
    expected, states, _ = reference_memory(query, key, value, gates, weights, momentum)
    torch.testing.assert_close(answers, expected)
    torch.testing.assert_close(new, states)
    (gradient,) = torch.autograd.grad(answers.sum(), logits)
    assert gradient.isfinite().all()


def module(make: Make, depth: int = 1, **changes: object) -> NeuralMemory:
    config = make(
        use_neural_memory=True,
        memory_depth=depth,
        memory_heads=2,
        memory_width=8,
        **{"segment_size": 8, "memory_chunk_size": 4, **changes},
    )
    return NeuralMemory(config, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [1, 2])
def test_gates_start_where_they_should_and_stay_in_bounds(tiny_config: Make, depth: int) -> None:
    memory = module(tiny_config, depth)
    with torch.no_grad():
        logits = memory.gates(torch.randn(1, 100, 32))
    logits = logits.unflatten(-1, (3, 2)).movedim(-2, 0)
    gates = Gates.from_logits(logits, memory.max_step)
    alpha = -gates.log_keep.expm1()
    assert alpha.min() > START_ALPHA / 2
    assert alpha.max() < 2 * START_ALPHA
    assert gates.log_eta.exp().mean() == pytest.approx(START_ETA, abs=0.05)
    assert gates.step.mean() == pytest.approx(START_STEP * memory.max_step, rel=0.1)
    extreme = Gates.from_logits(torch.full((3, 1), 1e4), 1.0)
    assert -extreme.log_keep.expm1().item() == pytest.approx(MAX_ALPHA)
    assert extreme.log_eta.item() <= 0.0
    assert extreme.step.item() == 1.0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_memory_neither_vanishes_nor_explodes(tiny_config: Make, depth: int) -> None:
    """4000 tokens, random and all alike (the worst case for steps taken from one point)."""
    memory = module(tiny_config, depth, titans_variant="MAG", memory_chunk_size=64)
    random = torch.randn(1, 4000, 32, generator=torch.Generator().manual_seed(0))
    for x in (random, random[:, :1].expand(1, 4000, 32)):
        with torch.no_grad():
            out = memory(x)
        norms = [float(matrix.norm()) for matrix in out.state.weights]
        assert all(0.01 < norm < 100.0 for norm in norms), norms
        assert out.read.isfinite().all()
        assert out.loss < 10.0


def test_a_steep_mlp_memory_does_not_diverge(tiny_config: Make) -> None:
    """Training may make the initial matrices large; a step's length answers to that."""
    memory = module(tiny_config, 2, titans_variant="MAL", memory_chunk_size=16)
    x = torch.randn(1, 2000, 32, generator=torch.Generator().manual_seed(0))
    for tokens in (x, x[:, :1].expand(1, 2000, 32)):
        with torch.no_grad():
            for matrix in memory.initial:
                matrix.mul_(10.0)
            out = memory(tokens)
        assert out.read.isfinite().all()
        start = max(float(matrix.detach().norm()) for matrix in memory.initial)
        assert max(float(matrix.norm()) for matrix in out.state.weights) < 10 * start


def test_a_pair_is_remembered_after_others(tiny_config: Make) -> None:
    """One write with step 1, then tokens with other keys: the value comes back."""
    key = torch.eye(8, dtype=torch.float64)[None, None]
    value = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    gates = Gates(
        torch.zeros(1, 1, 8, dtype=torch.float64),
        torch.full((1, 1, 8), -50.0, dtype=torch.float64),
        torch.ones(1, 1, 8, dtype=torch.float64),
    )
    nothing = (torch.zeros(1, 1, 8, 8, dtype=torch.float64),)
    _, _, _, weights, _ = linear_memory(key, key, value, gates, nothing, nothing, 4)
    torch.testing.assert_close(key @ weights[0], value)


@pytest.mark.parametrize("depth", [1, 2])
def test_reading_writes_into_no_parameter_and_sequences_do_not_mix(
    tiny_config: Make, depth: int
) -> None:
    memory = module(tiny_config, depth).double()
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    x = torch.randn(3, 21, 32, dtype=torch.float64)
    with torch.no_grad():
        together = memory(x)
        alone = memory(x[1:2])
    torch.testing.assert_close(together.read[1:2], alone.read)
    torch.testing.assert_close(together.retrieved[1:2], alone.retrieved)
    assert not torch.equal(together.state.weights[0][0], together.state.weights[0][1])
    assert all(torch.equal(before[name], t) for name, t in memory.state_dict().items())


@pytest.mark.parametrize("depth", [1, 2])
def test_mac_retrieves_from_the_memory_before_the_segment(tiny_config: Make, depth: int) -> None:
    """The second segment's retrieval ignores what the second segment says, but not the first's."""
    memory = module(tiny_config, depth).double()
    x = torch.randn(1, 24, 32, dtype=torch.float64)
    other = x.clone()
    other[:, 9] += 1.0  # token 9 is in segment 1; the convolution reaches tokens 9 to 12
    with torch.no_grad():
        a, b = memory(x).retrieved, memory(other).retrieved
    assert torch.equal(a[:, :9], b[:, :9])
    assert torch.equal(a[:, 13:16], b[:, 13:16])
    assert not torch.equal(a[:, 9], b[:, 9])
    assert (a[:, 16:] != b[:, 16:]).any(-1).all()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sizes", [(1,) * 13, (3, 5, 5), (8, 5), (2, 6, 5)])
def test_tokens_in_pieces_are_tokens_in_one_go(
    tiny_config: Make, depth: int, sizes: tuple[int, ...]
) -> None:
    memory = module(tiny_config, depth).double()
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    whole = memory(x)
    state, position, read, retrieved = None, 0, [], []
    for piece in x.split(sizes, dim=1):
        out = memory(piece, state, position)
        state, position = out.state, position + piece.shape[1]
        read.append(out.read)
        retrieved.append(out.retrieved)
    torch.testing.assert_close(torch.cat(read, dim=1), whole.read)
    torch.testing.assert_close(torch.cat(retrieved, dim=1), whole.retrieved)
    for got, wanted in zip(state, whole.state, strict=True):
        torch.testing.assert_close(got, wanted)


def test_half_precision_inputs_are_added_up_in_single(tiny_config: Make) -> None:
    memory = module(tiny_config)
    x = torch.randn(1, 30, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = memory(x)
    assert all(t.dtype == torch.float32 for t in (*out.state.weights, *out.state.momentum))
    torch.testing.assert_close(out.read.float(), memory(x).read, rtol=0.1, atol=0.05)
