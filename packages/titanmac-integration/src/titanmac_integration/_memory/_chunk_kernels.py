# mypy: ignore-errors
"""Triton kernels of a matrix memory, forward: chunks in parallel, their states one after another.

Legend: N sequences times heads, T tokens, b chunk, n chunks, D width; B, DP the powers of two that
hold b and D. Formulas and names are those of `_linear` and `_gates`; M and S lie one after the
other as X [2, D, D]. Tokens come as [S, T, 3, H, D]: query, key, value.
"""

import triton
import triton.language as tl

FACTORS = 5
"""Vectors over a chunk: keep, carry, decay, and what a step weighs in M and in S at its end."""


@triton.jit
def start_of(which, parts, T, H: tl.constexpr, D: tl.constexpr):
    """Where part ``which`` of [S, T, parts, H, D] starts for a program's sequence and head.

    Distances within a sequence fit into 32 bits, which saves half of the registers of pointers.
    """
    program = tl.program_id(0)
    sequence, head = (program // H).to(tl.int64), program % H
    return sequence * T * (parts * H * D) + (which * H + head) * D


@triton.jit
def load_gates(gates_ptr, N, T, token, inside):
    """log keep, log eta, step of tokens; those outside neither forget nor learn."""
    place = gates_ptr + tl.program_id(0).to(tl.int64) * T + token
    third = N.to(tl.int64) * T
    log_keep = tl.load(place, inside, other=0.0)
    log_eta = tl.load(place + third, inside, other=0.0)
    step = tl.load(place + 2 * third, inside, other=0.0)
    return log_keep, log_eta, step


@triton.jit
def ratios(ends, starts, after):
    """exp(ends - starts) where ``after``, else 0: masked first, or it would overflow."""
    return tl.exp(tl.where(after, ends - starts, float("-inf")))


@triton.jit
def invert_unit_lower(lower, t, i, B: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 [B, B] of ``lower`` L, zero on and above its diagonal; B at most 64.

    Blocks of 16 on the diagonal by substitution, all at once: D. What is below them, N, by
    (D^-1 + N)^-1 = (I + D N)^-1 D, a series that ends with the third power of X = D N.
    """
    blocks: tl.constexpr = B // 16
    same = t // 16 == i // 16
    row, one = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    # [blocks, 16, 16]: the blocks on the diagonal alone
    diagonal = tl.sum(tl.reshape(tl.where(same, lower, 0.0), (blocks, 16, blocks, 16)), 2)
    inverse = (row == one).to(tl.float32) + tl.zeros((blocks, 16, 16), tl.float32)
    for step in range(1, 16):
        weights = tl.sum(tl.where(row == step, diagonal, 0.0), 1)
        known = tl.sum(weights[:, :, None] * inverse, 1)
        inverse = tl.where(row == step, inverse - known[:, None, :], inverse)
    spread = inverse[:, :, None, :] + tl.zeros((blocks, 16, blocks, 16), tl.float32)
    inverse = tl.where(same, tl.reshape(spread, (B, B)), 0.0)
    if B > 16:
        X = tl.dot(inverse, tl.where(same, 0.0, lower), input_precision=PRECISION)
        square = tl.dot(X, X, input_precision=PRECISION)
        series = (t == i).to(tl.float32) - X + square
        series -= tl.dot(X, square, input_precision=PRECISION)
        inverse = tl.dot(series, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def _memory_prepare(
    tokens_ptr,  # [S, T, 3, H, D]
    gates_ptr,  # [3, N, T]
    inverse_ptr,  # [N, n, b, b]
    factors_ptr,  # [N, n, FACTORS, b]
    N,
    T,
    b,
    H: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk's tokens do to each other's errors, and the factors of its state."""
    program, chunk = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, B), tl.arange(0, DP)
    token = chunk * b + row
    inside = (row < b) & (token < T)
    log_keep, log_eta, step = load_gates(gates_ptr, N, T, token, inside)
    kept, faded = tl.cumsum(log_keep, 0), tl.cumsum(log_eta, 0)
    t, i = row[:, None], row[None, :]
    keeps = ratios(kept[:, None], kept[None, :], t >= i)
    fades = ratios(faded[:, None], faded[None, :], t >= i)
    decay = tl.exp(faded)
    carry = tl.sum(keeps * decay[None, :], 1)
    last = tl.minimum(b, T - chunk * b) - 1
    keeps_last = tl.sum(tl.where(t == last, keeps, 0.0), 0)
    fade_last = tl.sum(tl.where(t == last, fades, 0.0), 0)
    reach_last = tl.sum(keeps_last[:, None] * fades, 0)
    place = factors_ptr + (program.to(tl.int64) * tl.num_programs(1) + chunk) * 5 * b + row
    tl.store(place, tl.exp(kept), row < b)
    tl.store(place + b, carry, row < b)
    tl.store(place + 2 * b, decay, row < b)
    tl.store(place + 3 * b, step * reach_last, row < b)
    tl.store(place + 4 * b, step * fade_last, row < b)

    known = inside[:, None] & (column[None, :] < D)
    tokens = tokens_ptr + start_of(1, 3, T, H, D)
    key = tl.load(tokens + token[:, None] * (3 * H * D) + column[None, :], known, other=0.0)
    before = ratios((kept - log_keep)[:, None], kept[None, :], t > i)
    reach = tl.dot(before, fades, input_precision=PRECISION)
    lower = reach * tl.dot(key, tl.trans(key), input_precision=PRECISION) * step[None, :]
    inverse = invert_unit_lower(tl.where(t > i, lower, 0.0), t, i, B, PRECISION)
    start = (program.to(tl.int64) * tl.num_programs(1) + chunk) * b * b
    tl.store(inverse_ptr + start + t * b + i, inverse, (t < b) & (i < b))


@triton.jit
def _memory_scan(
    tokens_ptr,  # [S, T, 3, H, D]
    factors_ptr,  # [N, n, FACTORS, b]
    inverse_ptr,  # [N, n, b, b]
    memory_ptr,  # M before the first token
    momentum_ptr,  # S before the first token
    errors_ptr,  # [N, T, D]
    states_ptr,  # [N, n, 2, D, D]: X before each chunk
    final_ptr,  # [2, N, D, D]: X after the last
    squares_ptr,  # [N, programs]: sums of squared errors
    T,
    b,
    n,
    memory_batch,
    momentum_batch,
    H: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From chunk to chunk: errors, and the state; for BV of the state's columns."""
    program, slab = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, head = program // H, program % H
    row, column, out = tl.arange(0, B), tl.arange(0, DP), slab * BV + tl.arange(0, BV)
    square = (column[:, None] < D) & (out[None, :] < D)
    entry = column[:, None] * D + out[None, :]
    M = tl.load(memory_ptr + sequence * memory_batch + head * D * D + entry, square, other=0.0)
    S = tl.load(momentum_ptr + sequence * momentum_batch + head * D * D + entry, square, other=0.0)
    total = tl.zeros((B, BV), tl.float32)
    tokens = tokens_ptr + start_of(0, 3, T, H, D)
    for chunk in range(n):
        token = chunk * b + row
        inside = (row < b) & (token < T)
        known = inside[:, None] & (column[None, :] < D)
        mask = inside[:, None] & (out[None, :] < D)
        place = token[:, None] * (3 * H * D) + column[None, :]
        key = tl.load(tokens + H * D + place, known, other=0.0)
        place = token[:, None] * (3 * H * D) + out[None, :]
        value = tl.load(tokens + 2 * H * D + place, mask, other=0.0)
        start = (program * n + chunk) * b * b
        inverse = tl.load(
            inverse_ptr + start + row[:, None] * b + row[None, :],
            (row < b)[:, None] & (row < b)[None, :],
            other=0.0,
        )
        factors = factors_ptr + (program * n + chunk) * 5 * b
        last = tl.minimum(b, T - chunk * b) - 1
        keep_before = tl.load(factors + row - 1, (row > 0) & (row < b), other=1.0)
        carry_before = tl.load(factors + b + row - 1, (row > 0) & (row < b), other=0.0)
        in_memory = tl.load(factors + 3 * b + row, row < b, other=0.0)
        in_momentum = tl.load(factors + 4 * b + row, row < b, other=0.0)
        keep, carry = tl.load(factors + last), tl.load(factors + b + last)
        decay = tl.load(factors + 2 * b + last)
        state = states_ptr + (program * n + chunk) * 2 * D * D + entry
        tl.store(state, M, square)
        tl.store(state + D * D, S, square)

        right = value - keep_before[:, None] * tl.dot(key, M, input_precision=PRECISION)
        right -= carry_before[:, None] * tl.dot(key, S, input_precision=PRECISION)
        error = tl.dot(inverse, right, input_precision=PRECISION)
        place = token[:, None] * D + out[None, :]
        tl.store(errors_ptr + program * T * D + place, error, mask)
        total += error * error
        M = keep * M + carry * S
        M += tl.dot(tl.trans(key * in_memory[:, None]), error, input_precision=PRECISION)
        S = decay * S
        S += tl.dot(tl.trans(key * in_momentum[:, None]), error, input_precision=PRECISION)
    final = final_ptr + program * D * D + entry
    tl.store(final, M, square)
    tl.store(final + tl.num_programs(0).to(tl.int64) * D * D, S, square)
    tl.store(squares_ptr + program * tl.num_programs(1) + slab, tl.sum(total))


@triton.jit
def _memory_answer(
    tokens_ptr,  # [S, T, 3, H, D]
    gates_ptr,  # [3, N, T]
    errors_ptr,  # [N, T, D]
    states_ptr,  # [N, n, 2, D, D]
    answers_ptr,  # [S, T, H, D]
    retrieved_ptr,  # [S, T, H, D], or None
    N,
    T,
    b,
    per_segment,  # chunks of a segment
    width,  # D, at run time: a loop over it stays one
    H: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q_t M_t for the tokens of a chunk, and q_t M as M was before the segment."""
    program, chunk, n = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, column = tl.arange(0, B), tl.arange(0, DP)
    token = chunk * b + row
    inside = (row < b) & (token < T)
    log_keep, log_eta, step = load_gates(gates_ptr, N, T, token, inside)
    kept, faded = tl.cumsum(log_keep, 0), tl.cumsum(log_eta, 0)
    t, i = row[:, None], row[None, :]
    keeps = ratios(kept[:, None], kept[None, :], t >= i)
    fades = ratios(faded[:, None], faded[None, :], t >= i)
    keep = tl.exp(kept)
    carry = tl.sum(keeps * tl.exp(faded)[None, :], 1)
    reach = tl.dot(keeps, fades, input_precision=PRECISION)
    known = inside[:, None] & (column[None, :] < D)
    tokens = tokens_ptr + start_of(0, 3, T, H, D)
    place = token[:, None] * (3 * H * D) + column[None, :]
    query = tl.load(tokens + place, known, other=0.0)
    key = tl.load(tokens + H * D + place, known, other=0.0)
    own = start_of(0, 1, T, H, D)
    within = reach * tl.dot(query, tl.trans(key), input_precision=PRECISION) * step[None, :]
    for first in range(0, width, BV):
        out = first + tl.arange(0, BV)
        square = (column[:, None] < D) & (out[None, :] < D)
        entry = column[:, None] * D + out[None, :]
        state = states_ptr + (program * n + chunk) * 2 * D * D + entry
        M = tl.load(state, square, other=0.0)
        S = tl.load(state + D * D, square, other=0.0)
        mask = inside[:, None] & (out[None, :] < D)
        of_error = errors_ptr + program * T * D + (token[:, None] * D + out[None, :])
        error = tl.load(of_error, mask, other=0.0)
        answer = keep[:, None] * tl.dot(query, M, input_precision=PRECISION)
        answer += carry[:, None] * tl.dot(query, S, input_precision=PRECISION)
        answer += tl.dot(within, error, input_precision=PRECISION)
        flat = token[:, None] * (H * D) + out[None, :]
        tl.store(answers_ptr + own + flat, answer, mask)
        if retrieved_ptr is not None:
            start = chunk // per_segment * per_segment
            state = states_ptr + (program * n + start) * 2 * D * D + entry
            M = tl.load(state, square, other=0.0)
            tl.store(retrieved_ptr + own + flat, tl.dot(query, M, input_precision=PRECISION), mask)
