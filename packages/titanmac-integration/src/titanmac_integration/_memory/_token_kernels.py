# mypy: ignore-errors
"""Triton kernels between the projections and a memory: convolution, SiLU, normalisation; gates.

Legend: S sequences, T tokens, H heads, D width; C = 3 H D channels, W features of a projection:
C channels, then 3 H logits of gates, then nothing. Projections have A rows ahead of the tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanmac_integration._layers._project_kernels import sum_parts

from ._gates import MAX_ALPHA, MIN_LOG_ETA

ROWS = 64
SHORTEST = 1e-12
"""A query or key is divided by its length, or by this; as `torch.nn.functional.normalize`."""


@triton.jit
def first_token(flat_ptr, sequence, T, W, ahead):
    """Where the tokens of a sequence begin in [S, A + T, W]."""
    return flat_ptr + (sequence * (ahead + T) + ahead) * W


@triton.jit
def load_row(flat, past_ptr, sequence, at, channel, inside, T, W, C, TAPS: tl.constexpr):
    """Inputs of tokens ``at`` [rows, channels], 0 where there are none."""
    there = inside & (at < T)
    x = tl.load(flat + (at * W + channel), there & (at >= 0), other=0.0).to(tl.float32)
    if past_ptr is not None:
        place = sequence * (TAPS - 1) * C + ((at + TAPS - 1) * C + channel)
        before = there & (at < 0) & (at > -TAPS)
        x += tl.load(past_ptr + place, before, other=0.0).to(tl.float32)
    return x


@triton.jit
def mix(flat, past_ptr, taps_ptr, sequence, t, channel, known, T, W, C, TAPS: tl.constexpr):
    """The convolution: inputs of a token and of the TAPS - 1 before it, weighted."""
    mixed = tl.zeros((t.shape[0], channel.shape[0]), tl.float32)
    inside = known[None, :] & (t < T)
    for tap in tl.static_range(TAPS):
        weight = tl.load(taps_ptr + channel * TAPS + tap, known, other=0.0)
        at = t - (TAPS - 1) + tap
        x = load_row(flat, past_ptr, sequence, at, channel[None, :], inside, T, W, C, TAPS)
        mixed += x * weight[None, :]
    return mixed


@triton.jit
def _memory_tokens(
    flat_ptr,  # [S, A + T, W]
    past_ptr,  # [S, TAPS - 1, C], or None
    taps_ptr,  # [C, TAPS]
    tokens_ptr,  # float32 [S, T, C]
    T,
    W,
    ahead,  # A
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TAPS: tl.constexpr,
    SHORTEST: tl.constexpr,
    ROWS: tl.constexpr,
):
    part, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    C: tl.constexpr = 3 * H * D
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, DP)
    channel = part * D + lane
    inside = (lane < D)[None, :] & (t < T)
    flat = first_token(flat_ptr, sequence, T, W, ahead)
    mixed = mix(flat, past_ptr, taps_ptr, sequence, t, channel, lane < D, T, W, C, TAPS)
    y = mixed * tl.sigmoid(mixed)
    length = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), SHORTEST)
    y = y / tl.where(part < 2 * H, length, 1.0)[:, None]
    tl.store(tokens_ptr + sequence * T * C + (t * C + channel[None, :]), y, inside)


@triton.jit
def _memory_mixed_backward(
    flat_ptr,  # [S, A + T, W]
    past_ptr,  # [S, TAPS - 1, C], or None
    taps_ptr,  # [C, TAPS]
    d_tokens_ptr,  # float32 [S, T, C]
    d_mixed_ptr,  # [S, T, C]: of what the convolution gives, in the precision of flat
    T,
    W,
    ahead,  # A
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TAPS: tl.constexpr,
    SHORTEST: tl.constexpr,
    ROWS: tl.constexpr,
):
    block, part, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C: tl.constexpr = 3 * H * D
    t = (block * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, DP)
    channel = part * D + lane
    inside = (lane < D)[None, :] & (t < T)
    flat = first_token(flat_ptr, sequence, T, W, ahead)
    mixed = mix(flat, past_ptr, taps_ptr, sequence, t, channel, lane < D, T, W, C, TAPS)
    gate = tl.sigmoid(mixed)
    y = mixed * gate
    place = sequence * T * C + (t * C + channel[None, :])
    d_y = tl.load(d_tokens_ptr + place, inside, other=0.0)
    length = tl.sqrt(tl.sum(y * y, 1))
    divisor = tl.maximum(length, SHORTEST)[:, None]
    along = tl.sum(y * d_y, 1)[:, None] / (divisor * divisor)
    along = tl.where((length > SHORTEST)[:, None], along, 0.0)
    d_y = tl.where(part < 2 * H, (d_y - y * along) / divisor, d_y)
    d_mixed = d_y * gate * (1.0 + mixed * (1.0 - gate))
    tl.store(d_mixed_ptr + place, d_mixed.to(d_mixed_ptr.dtype.element_ty), inside)


@triton.jit
def _memory_flat_backward(
    flat_ptr,  # [S, A + T, W]
    past_ptr,  # [S, TAPS - 1, C], or None
    taps_ptr,  # [C, TAPS]
    d_mixed_ptr,  # [S, T, C]
    d_flat_ptr,  # [S, A + T, W]
    d_past_ptr,  # [S, TAPS - 1, C], or None
    parts_ptr,  # float32 [blocks S, C, TAPS]
    T,
    W,
    ahead,  # A
    first,  # token of the first row
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    block, part, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C: tl.constexpr = 3 * H * D
    t = (first + block * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, DP)
    channel = part * D + lane
    known = lane < D
    inside = known[None, :] & (t < T)
    flat = first_token(flat_ptr, sequence, T, W, ahead)
    x = load_row(flat, past_ptr, sequence, t, channel[None, :], inside, T, W, C, TAPS)
    parts = parts_ptr + (sequence * tl.num_programs(0) + block) * C * TAPS
    d_x = tl.zeros((ROWS, DP), tl.float32)
    # an input is part of its own token and of the TAPS - 1 that follow
    for later in tl.static_range(TAPS):
        at = t + later
        there = known[None, :] & (at >= 0) & (at < T)
        place = d_mixed_ptr + sequence * T * C + (at * C + channel[None, :])
        d_mixed = tl.load(place, there, other=0.0).to(tl.float32)
        tap = channel * TAPS + (TAPS - 1 - later)
        weight = tl.load(taps_ptr + tap, known, other=0.0)
        d_x += d_mixed * weight[None, :]
        tl.store(parts + tap, tl.sum(d_mixed * x, 0), known)
    place = first_token(d_flat_ptr, sequence, T, W, ahead) + (t * W + channel[None, :])
    tl.store(place, d_x.to(d_flat_ptr.dtype.element_ty), inside & (t >= 0))
    if d_past_ptr is not None:
        place = d_past_ptr + sequence * (TAPS - 1) * C + ((t + TAPS - 1) * C + channel[None, :])
        tl.store(place, d_x.to(d_past_ptr.dtype.element_ty), inside & (t < 0))


@triton.jit
def load_logits(logits_ptr, bias_ptr, head, inside, H: tl.constexpr):
    """Logits of one gate [tokens, heads]."""
    logits = tl.load(logits_ptr, inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + head, head < H, other=0.0).to(tl.float32)
    return logits


@triton.jit
def _memory_gates(
    flat_ptr,  # [S, A + T, W]
    bias_ptr,  # [3 H], added to the logits, or None
    gates_ptr,  # float32 [3, S, H, T]
    T,
    W,
    ahead,  # A
    max_step,
    H: tl.constexpr,
    HP: tl.constexpr,
    C: tl.constexpr,
    MAX_ALPHA: tl.constexpr,
    MIN_LOG_ETA: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence, count = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    head = tl.arange(0, HP)[None, :]
    inside = (t < T) & (head < H)
    logits = first_token(flat_ptr, sequence, T, W, ahead) + t * W + C + head
    place = gates_ptr + sequence * H * T + head * T + t
    third = count.to(tl.int64) * H * T
    alpha = MAX_ALPHA * tl.sigmoid(load_logits(logits, bias_ptr, head, inside, H))
    # log(1 - alpha) to all digits: the rounding of 1 - alpha is taken back
    rest = 1.0 - alpha
    lost = tl.where(rest == 1.0, 1.0, (1.0 - rest))
    log_keep = tl.where(rest == 1.0, -alpha, tl.log(rest) * (alpha / lost))
    tl.store(place, log_keep, inside)
    eta = load_logits(logits + H, bias_ptr, H + head, inside, 2 * H)
    log_eta = tl.minimum(eta, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(eta)))
    tl.store(place + third, tl.maximum(log_eta, MIN_LOG_ETA), inside)
    step = load_logits(logits + 2 * H, bias_ptr, 2 * H + head, inside, 3 * H)
    tl.store(place + 2 * third, max_step * tl.sigmoid(step), inside)


@triton.jit
def gate_sums(parts_ptr, grad, gate, head, H: tl.constexpr):
    """Store this program's share of the gradient of a gate's bias, if there is one."""
    if parts_ptr is not None:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        total = tl.sum(grad, 0)[None, :]
        tl.store(parts_ptr + program * 3 * H + gate * H + head, total, head < H)


@triton.jit
def _memory_gates_backward(
    flat_ptr,  # [S, A + T, W]
    bias_ptr,  # [3 H], or None
    d_gates_ptr,  # float32 [3, S, H, T]
    d_flat_ptr,  # [S, A + T, W]
    parts_ptr,  # float32 [blocks S, 3 H], or None without a bias
    T,
    W,
    ahead,  # A
    max_step,
    H: tl.constexpr,
    HP: tl.constexpr,
    C: tl.constexpr,
    MAX_ALPHA: tl.constexpr,
    MIN_LOG_ETA: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence, count = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    head = tl.arange(0, HP)[None, :]
    inside = (t < T) & (head < H)
    logits = first_token(flat_ptr, sequence, T, W, ahead) + t * W + C + head
    d_flat = first_token(d_flat_ptr, sequence, T, W, ahead)
    d_logits = d_flat + t * W + C + head
    place = d_gates_ptr + sequence * H * T + head * T + t
    third = count.to(tl.int64) * H * T
    dtype = d_flat_ptr.dtype.element_ty
    share = tl.sigmoid(load_logits(logits, bias_ptr, head, inside, H))
    slope = -MAX_ALPHA * share * (1.0 - share) / (1.0 - MAX_ALPHA * share)
    grad = tl.load(place, inside, other=0.0) * slope
    tl.store(d_logits, grad.to(dtype), inside)
    gate_sums(parts_ptr, grad, 0, head, H)
    eta = load_logits(logits + H, bias_ptr, H + head, inside, 2 * H)
    log_eta = tl.minimum(eta, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(eta)))
    slope = tl.where(log_eta >= MIN_LOG_ETA, tl.sigmoid(-eta), 0.0)
    grad = tl.load(place + third, inside, other=0.0) * slope
    tl.store(d_logits + H, grad.to(dtype), inside)
    gate_sums(parts_ptr, grad, 1, head, H)
    share = tl.sigmoid(load_logits(logits + 2 * H, bias_ptr, 2 * H + head, inside, 3 * H))
    grad = tl.load(place + 2 * third, inside, other=0.0) * max_step * share * (1.0 - share)
    tl.store(d_logits + 2 * H, grad.to(dtype), inside)
    gate_sums(parts_ptr, grad, 2, head, H)
    nothing = tl.arange(0, PAD)[None, :]
    rest = d_flat + t * W + C + 3 * H + nothing
    tl.store(rest, tl.zeros((ROWS, PAD), dtype), (t < T) & (C + 3 * H + nothing < W))


def _shapes(
    flat: Tensor, heads: int, width: int, taps: Tensor, skipped: int
) -> tuple[int, int, int, dict, dict]:
    S, T, W = flat.shape[0], flat.shape[1] - skipped, flat.shape[2]
    C = 3 * heads * width
    of_tokens = {"H": heads, "D": width, "DP": triton.next_power_of_2(width), "ROWS": ROWS}
    of_tokens |= {"TAPS": taps.shape[1], "SHORTEST": SHORTEST}
    of_gates = {"H": heads, "HP": triton.next_power_of_2(heads), "C": C, "ROWS": ROWS}
    of_gates |= {"MAX_ALPHA": MAX_ALPHA, "MIN_LOG_ETA": MIN_LOG_ETA}
    return S, T, W, of_tokens, of_gates


def tokens_and_gates(
    flat: Tensor,
    past: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    heads: int,
    width: int,
    max_step: float,
    skipped: int,
) -> tuple[Tensor, Tensor]:
    """Tokens [S, T, 3, H, D] and gates [3, S, H, T], float32, out of projections [S, A + T, W].

    A rows are ``skipped``.
    """
    S, T, W, of_tokens, of_gates = _shapes(flat, heads, width, taps, skipped)
    tokens = flat.new_empty(S, T, 3, heads, width, dtype=torch.float32)
    gates = flat.new_empty(3, S, heads, T, dtype=torch.float32)
    blocks = triton.cdiv(T, ROWS)
    _memory_tokens[(blocks, 3 * heads, S)](flat, past, taps, tokens, T, W, skipped, **of_tokens)
    _memory_gates[(blocks, S)](flat, bias, gates, T, W, skipped, max_step, **of_gates)
    return tokens, gates


def tokens_and_gates_backward(
    flat: Tensor,
    past: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    d_tokens: Tensor,
    d_gates: Tensor,
    max_step: float,
    skipped: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of ``flat``, ``past``, ``taps`` and ``bias``; all contiguous."""
    _, _, _, heads, width = d_tokens.shape
    S, T, W, of_tokens, of_gates = _shapes(flat, heads, width, taps, skipped)
    blocks = triton.cdiv(T, ROWS)
    d_mixed = torch.empty_like(d_tokens, dtype=flat.dtype)
    _memory_mixed_backward[(blocks, 3 * heads, S)](
        flat, past, taps, d_tokens, d_mixed, T, W, skipped, **of_tokens
    )
    first = 0 if past is None else 1 - taps.shape[1]
    rows = triton.cdiv(T - first, ROWS)
    d_flat = torch.empty_like(flat)
    d_flat[:, :skipped].zero_()
    d_past = None if past is None else torch.empty_like(past)
    parts = flat.new_empty(S * rows, *taps.shape, dtype=torch.float32)
    del of_tokens["SHORTEST"]
    _memory_flat_backward[(rows, 3 * heads, S)](
        flat, past, taps, d_mixed, d_flat, d_past, parts, T, W, skipped, first, **of_tokens
    )
    d_taps = sum_parts(parts.flatten(1)).view_as(taps).to(taps.dtype)
    rest = max(1, W - 3 * heads * (width + 1))
    parts = None if bias is None else flat.new_empty(S * blocks, 3 * heads, dtype=torch.float32)
    _memory_gates_backward[(blocks, S)](
        flat,
        bias,
        d_gates,
        d_flat,
        parts,
        T,
        W,
        skipped,
        max_step,
        PAD=triton.next_power_of_2(rest),
        **of_gates,
    )
    return d_flat, d_past, d_taps, None if parts is None else sum_parts(parts).to(bias.dtype)
