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

from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._layers._linear import init_linear
from titanmac_integration._layers._project import has_hooks, project_apart

from ._answers import gated, normalised
from ._chunked import kernels_take, read, recall_segments
from ._gates import MAX_ALPHA, MAX_STEP, START_ALPHA, START_ETA, START_STEP, Gates
from ._kernels import on_gpu
from ._linear import linear_memory
from ._mlp import mlp_memory
from ._state import MemoryState, Weights
from ._tokens import TAPS, at_least_single, tokens_and_gates

HIDDEN_FACTOR = 2


class MemoryOutput(NamedTuple):
    """What a memory says about some tokens."""

    answers: Tensor
    """[S, T, d_model]: M_t(q_t), not gated; token t itself is part of M_t."""
    gate: Tensor
    """[S, T, d_model], or more rows in front: logits of the gate that answers go through."""
    gate_bias: Tensor | None
    """[d_model], still to be added to ``gate``."""
    retrieved: Tensor | None
    """[S, T, d_model]: M(q_t) as M was before the segment of t; for MAC only."""
    loss: Tensor
    """Mean of ||M(k) - v||^2 over tokens and heads, cut off from the graph."""
    state: MemoryState
    """After the last token."""

    @property
    def read(self) -> Tensor:
        """[S, T, d_model]: the answers, gated."""
        return gated(self.answers, self.gate, self.gate_bias)

    def behind(self, skipped: int, beside: Tensor | None = None) -> Tensor:
        """`read` behind ``skipped`` rows of zeros, added to ``beside`` [S, L, d_model]."""
        return gated(self.answers, self.gate, self.gate_bias, skipped, beside)


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
        self.dropout = nn.Dropout(config.dropout)
        """Of what is read and what is answered. Behind the sum of attention and memory alone it
        does not keep a memory from learning a small text by heart (docs/titanmac.md)."""
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
        weights, nothing = self._initial(batch)
        past = self.taps.new_zeros(batch, TAPS - 1, 3 * self.heads * self.width)
        return MemoryState(weights, nothing, weights, weights, past)

    def _initial(self, batch: int) -> tuple[Weights, Weights]:
        weights = tuple(
            at_least_single(matrix).expand(batch, *matrix.shape) for matrix in self.initial
        )
        return weights, tuple(torch.zeros_like(matrix) for matrix in weights)

    def forward(
        self, x: Tensor, state: MemoryState | None = None, position: int = 0, skipped: int = 0
    ) -> MemoryOutput:
        """Read tokens, answer each.

        Args:
            x: [S, skipped + T, d_model], T at least 1.
            state: after the tokens before; None at the start.
            position: number of tokens before. With a state, MAC takes tokens of one segment only.
            skipped: rows of ``x`` in front that are none of the memory's tokens.

        Returns:
            :class:`MemoryOutput`; the memory computes in float32 at least, whatever autocast says.
        """
        device = x.device.type
        if on_gpu(x):  # once, not in every projection
            half = torch.is_autocast_enabled(device)
            x = x.to(torch.get_autocast_dtype(device) if half else x.dtype).contiguous()
        elif skipped:  # kernels pass over them
            x, skipped = x[:, skipped:], 0
        x = self.dropout(x)
        flat, bias = self._project(x)
        past = None if state is None else state.convolution
        with torch.autocast(device, enabled=False):
            tokens, gates = tokens_and_gates(
                flat, past, self.taps, bias, self.heads, self.width, self.max_step, skipped
            )
            latest = self._past(flat[:, skipped:], past)
            if state is None:
                weights, momentum = self._initial(x.shape[0])
                state = MemoryState(weights, momentum, weights, weights, latest)
            else:
                state = MemoryState(*state[:4], latest)
            answers, retrieved, loss, state = self._learn(
                tokens, gates, state, position, flat.dtype
            )
        if retrieved is not None:
            retrieved = self._merge(retrieved)
        return MemoryOutput(
            self._merge(answers), *project_apart(self.out_gate, x), retrieved, loss, state
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, T, 3 H D + 3 H or more]: query, key, value, logits of gates; a bias of these."""
        layers = (self.query, self.key, self.value, self.gates)
        apart = any(type(layer) is not nn.Linear or has_hooks(layer) for layer in layers)
        if apart or not on_gpu(x):
            return torch.cat([layer(x) for layer in layers], dim=-1), None
        weights = [layer.weight for layer in layers]
        rest = -sum(len(weight) for weight in weights) % 8  # products of odd widths are slow
        weights.append(weights[0].new_zeros(rest, x.shape[-1]))
        return functional.linear(x, torch.cat(weights)), self.gates.bias

    def _past(self, flat: Tensor, past: Tensor | None) -> Tensor:
        """What the convolution remembers after these tokens [S, TAPS - 1, 3 H D]."""
        latest = flat[:, -(TAPS - 1) :, : len(self.taps)]
        missing = TAPS - 1 - latest.shape[1]
        if not missing:
            return latest
        if past is None:
            return functional.pad(latest, (0, 0, missing, 0))
        return torch.cat((past[:, -missing:].to(latest.dtype), latest), dim=1)

    def _learn(
        self, tokens: Tensor, gates: Tensor, state: MemoryState, position: int, source: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor, MemoryState]:
        """Answers and retrieved answers [S, T, H, D], the loss, the state after the tokens."""
        if self.depth == 1 and kernels_take(tokens, self.chunk, source):
            return self._learn_by_kernels(tokens, gates, state, position, source)
        query, key, value = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        answers, errors, starts, state = self._learn_plainly(
            query, key, value, Gates(*gates.unbind(0)), state, position
        )
        retrieved = None
        if self.segment is not None:
            retrieved, state = self._before_segment(query, starts, state, position)
            retrieved = retrieved.transpose(1, 2)
        loss = errors.detach().square().sum(-1).mean()
        return answers.transpose(1, 2), retrieved, loss, state

    def _learn_by_kernels(
        self, tokens: Tensor, gates: Tensor, state: MemoryState, position: int, source: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor, MemoryState]:
        segment = self.segment if self.segment and position % self.segment == 0 else 0
        before = state.weights[0], state.momentum[0]
        said = read(tokens, gates, *before, self.chunk, segment, source)
        retrieved = said.retrieved
        if said.segment is not None:
            state = MemoryState(*state[:3], (said.segment,), state.convolution)
        elif self.segment is not None:
            asked, state = self._before_segment(
                tokens[:, :, 0].transpose(1, 2), (), state, position
            )
            retrieved = asked.transpose(1, 2)
        loss = said.squares * (3 * self.width / tokens.numel())
        weights = (said.weights,)
        after = MemoryState(weights, (said.momentum,), weights, *state[3:])
        return said.answers, retrieved, loss, after

    def _learn_plainly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Gates,
        state: MemoryState,
        position: int,
    ) -> tuple[Tensor, Tensor, Weights, MemoryState]:
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
                state.anchor,
                self.chunk,
                position % self.chunk,
            )
        after = MemoryState(weights, momentum, anchor, *state[3:])
        return answers, errors, starts, after

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
        retrieved = recall_segments(query, segments, self.segment)
        latest = tuple(matrix[:, :, -1] for matrix in segments)
        # not _replace, which torch.compile of torch 2.11 cannot trace
        return retrieved, MemoryState(*state[:3], latest, state.convolution)

    def _merge(self, answers: Tensor) -> Tensor:
        """[S, T, H, D] -> [S, T, d_model]."""
        output: Tensor = self.out(self.dropout(normalised(self.norm, answers).flatten(2)))
        return output
