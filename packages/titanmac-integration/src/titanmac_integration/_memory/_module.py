"""The neural memory as a module: projections, gates, and the memory that its tokens train.

Legend: S batch, T tokens, H memory heads, D memory width, E hidden width (depth 2).
Titans (Behrouz, Zhong, Mirrokni 2024), section 3; the projections are followed by a short causal
convolution, SiLU, and for keys and queries a normalisation, as in its section 4.4.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._config import TitanMACConfig
from .._linear import init_linear
from ._gates import MAX_ALPHA, MAX_STEP, START_ALPHA, START_ETA, START_STEP, Gates
from ._linear import linear_memory
from ._mlp import mlp_memory, recall
from ._state import MemoryState, Weights

TAPS = 4
"""Tokens that the short convolution sees: a token and the three before it."""
HIDDEN_FACTOR = 2


class MemoryOutput(NamedTuple):
    """What a memory says about some tokens."""

    read: Tensor
    """[S, T, d_model]: M_t(q_t), gated; token t itself is part of M_t."""
    retrieved: Tensor | None
    """[S, T, d_model]: M(q_t) as M was before the segment of t; for MAC only."""
    loss: Tensor
    """Mean of ||M(k) - v||^2 over tokens and heads, cut off from the graph."""
    state: MemoryState
    """After the last token."""


class NeuralMemory(nn.Module):
    """A memory per sequence and head, trained by every token that it reads.

    Nothing is written into parameters: the memory after some tokens is a :class:`MemoryState`,
    and the initial memory is a parameter that gradients reach through all its updates.

    Args:
        config: ``memory_*`` fields, ``titans_variant`` and ``segment_size``.
        generator: source of the initial weights.
    """

    def __init__(self, config: TitanMACConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        heads, width = config.memory_heads, config.memory_width
        self.heads, self.width, self.depth = heads, width, config.memory_depth
        self.chunk = config.memory_chunk_size
        self.segment = config.segment_size if config.titans_variant == "MAC" else None
        self.max_step = MAX_STEP if self.depth == 1 else MAX_STEP / self.chunk
        """Depth 2 adds up to a chunk of steps from one point, which must not overshoot together."""
        d_model, inner = config.d_model, heads * width
        self.query = nn.Linear(d_model, inner, bias=False)
        self.key = nn.Linear(d_model, inner, bias=False)
        self.value = nn.Linear(d_model, inner, bias=False)
        self.taps = nn.Parameter(torch.empty(3 * inner, TAPS))
        self.gates = nn.Linear(d_model, 3 * heads)
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.out = nn.Linear(inner, d_model, bias=False)
        self.out_gate = nn.Linear(d_model, d_model)
        hidden = HIDDEN_FACTOR * width
        shapes = [(width, width)] if self.depth == 1 else [(width, hidden), (hidden, width)]
        self.initial = nn.ParameterList(torch.empty(heads, *shape) for shape in shapes)
        """M before the first token: [H, D, D], or [H, D, E] and [H, E, D]."""
        self._reset(generator)

    @torch.no_grad()
    def _reset(self, generator: torch.Generator | None) -> None:
        for linear in (self.query, self.key, self.value, self.gates, self.out, self.out_gate):
            init_linear(linear, generator)
        bound = 1.0 / math.sqrt(TAPS)
        self.taps.uniform_(-bound, bound, generator=generator)
        starts = (START_ALPHA / MAX_ALPHA, START_ETA, START_STEP)
        biases = [torch.full((self.heads,), math.log(p / (1 - p))) for p in starts]
        self.gates.bias.copy_(torch.cat(biases))
        self.gates.weight.mul_(0.1)  # at the start the gates are near these values for any token
        for matrix in self.initial:
            spread = 1.0 / math.sqrt(matrix.shape[-2])
            matrix.normal_(std=0.1 * spread if self.depth == 1 else spread, generator=generator)

    def initial_state(self, batch: int) -> MemoryState:
        """The state before the first token of ``batch`` sequences."""
        weights = tuple(
            _at_least_single(matrix).expand(batch, *matrix.shape) for matrix in self.initial
        )
        past = self.taps.new_zeros(batch, TAPS - 1, 3 * self.heads * self.width)
        nothing = tuple(torch.zeros_like(matrix) for matrix in weights)
        return MemoryState(weights, nothing, weights, weights, past)

    def forward(
        self, x: Tensor, state: MemoryState | None = None, position: int = 0
    ) -> MemoryOutput:
        """Read tokens, answer each.

        Args:
            x: [S, T, d_model], T at least 1.
            state: after the tokens before; None at the start.
            position: number of tokens before. With a state, MAC takes tokens of one segment only.

        Returns:
            :class:`MemoryOutput`; the memory computes in float32 at least, whatever autocast says.
        """
        if state is None:
            state = self.initial_state(x.shape[0])
        query, key, value, past = self._project(x, state.convolution)
        logits = self.gates(x).unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)
        with torch.autocast(x.device.type, enabled=False):
            gates = Gates.from_logits(_at_least_single(logits), self.max_step)
            answers, errors, starts, state = self._learn(
                query, key, value, gates, state._replace(convolution=past), position
            )
            retrieved = None
            if self.segment is not None:
                retrieved, state = self._before_segment(query, starts, state, position)
            loss = errors.detach().square().sum(-1).mean()
        gate = torch.sigmoid(self.out_gate(x))
        read = gate * self._merge(answers)
        return MemoryOutput(
            read, None if retrieved is None else self._merge(retrieved), loss, state
        )

    def _project(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values [S, H, T, D] and what the convolution remembers."""
        flat = torch.cat((self.query(x), self.key(x), self.value(x)), dim=-1)
        flat = torch.cat((past.to(flat.dtype), flat), dim=1)
        # written out: a library's convolution may mix positions in rounding, and so the future in
        taps = self.taps.to(flat.dtype)
        tokens = x.shape[1]
        mixed = flat[:, TAPS - 1 :] * taps[:, -1]
        for i in range(TAPS - 1):
            mixed = torch.addcmul(mixed, flat[:, i : i + tokens], taps[:, i])
        heads = _at_least_single(functional.silu(mixed)).unflatten(-1, (3, self.heads, self.width))
        both, value = heads.permute(2, 0, 3, 1, 4).split((2, 1))
        query, key = functional.normalize(both, dim=-1).unbind(0)
        return query, key, value[0], flat[:, -(TAPS - 1) :]

    def _learn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Gates,
        state: MemoryState,
        position: int,
    ) -> tuple[Tensor, Tensor, Weights, MemoryState]:
        anchor = state.anchor
        if self.depth == 1:
            answers, errors, starts, weights, momentum = linear_memory(
                query, key, value, gates, state.weights, state.momentum, self.chunk
            )
            anchor = weights  # depth 1 needs none
        else:
            answers, errors, starts, weights, momentum, anchor = mlp_memory(
                query,
                key,
                value,
                gates,
                state.weights,
                state.momentum,
                anchor,
                self.chunk,
                position % self.chunk,
            )
        return (
            answers,
            errors,
            starts,
            state._replace(weights=weights, momentum=momentum, anchor=anchor),
        )

    def _before_segment(
        self, query: Tensor, starts: Weights, state: MemoryState, position: int
    ) -> tuple[Tensor, MemoryState]:
        """M(q_t) as M was before t's segment, [S, H, T, D]; and the state that remembers that M."""
        assert self.segment is not None
        tokens = query.shape[2]
        if position % self.segment:
            assert position % self.segment + tokens <= self.segment, "tokens of two segments"
            segments = tuple(matrix[:, :, None] for matrix in state.segment)
        else:
            segments = tuple(matrix[:, :, :: self.segment // self.chunk] for matrix in starts)
        size = min(self.segment, tokens)
        blocks = functional.pad(query, (0, 0, 0, -tokens % size)).unflatten(2, (-1, size))
        retrieved = recall(blocks, segments).flatten(2, 3)[:, :, :tokens]
        return retrieved, state._replace(segment=tuple(matrix[:, :, -1] for matrix in segments))

    def _merge(self, heads: Tensor) -> Tensor:
        """[S, H, T, D] -> [S, T, d_model]."""
        normed = self.norm(heads.to(self.norm.weight.dtype))
        output: Tensor = self.out(normed.transpose(1, 2).flatten(2))
        return output


def _at_least_single(x: Tensor) -> Tensor:
    """Half precision is not enough to add up thousands of small steps."""
    return x if x.dtype == torch.float64 else x.float()
