# mypy: ignore-errors
"""Triton kernels of a matrix memory, backward. Legend as in `_chunk_kernels`.

A gradient is named after what it is a gradient of: `d_M` of M. With E = Z R, R = V - K~ X:
d_R = Z^T d_E is the gradient of the values, and d_A = -d_R E^T that of the lower matrix.
"""

import triton
import triton.language as tl

from ._chunk_kernels import load_gates, ratios, start_of


@triton.jit
def gates_backward(
    faded,  # [B]
    fades,  # [B, B]
    renewed,  # keep_t reach_{t-1}
    keep,
    carried,  # keep_t carry_{t-1}
    d_made,
    d_kept,
    d_carried,
    d_fade,
    d_decay,
    t,
    i,
    PRECISION: tl.constexpr,
):
    """Gradients of log keep and log eta.

    reach_t = keep_t reach_{t-1} + fade_t, and so the other factors: gradients of what was made at
    token t gather what all later tokens make of it.
    """
    d_log_keep = d_kept * keep + tl.sum(d_made * renewed, 1) + d_carried * carried
    d_faded = tl.dot(tl.trans(fades), d_made, input_precision=PRECISION) + d_fade
    d_decayed = tl.sum(fades * d_carried[:, None], 0) + d_decay
    d_log_eta = tl.sum(tl.where(t > i, d_faded * fades, 0.0), 1) + d_decayed * tl.exp(faded)
    return d_log_keep, d_log_eta


@triton.jit
def _memory_answer_backward(
    tokens_ptr,  # [S, T, 3, H, D]
    gates_ptr,  # [3, N, T]
    factors_ptr,  # [N, n, FACTORS, b]
    errors_ptr,  # [N, T, D]
    states_ptr,  # [N, n, 2, D, D]
    d_answers_ptr,  # [S, T, H, D]
    d_retrieved_ptr,  # [S, T, H, D], or None
    d_errors_ptr,  # [N, T, D], or None
    d_tokens_ptr,  # [S, T, 3, H, D]: all is written; the values' part is d_E
    d_gates_ptr,  # [3, N, T]
    N,
    T,
    b,
    per_segment,
    width,  # D, at run time: a loop over it stays one
    H: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients as far as they come from the answers of a chunk: of queries all there is."""
    program, chunk, n = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, column = tl.arange(0, B), tl.arange(0, DP)
    token = chunk * b + row
    inside = (row < b) & (token < T)
    t, i = row[:, None], row[None, :]
    factors = factors_ptr + (program * n + chunk) * 5 * b + row
    keep = tl.load(factors, row < b, other=0.0)
    carry = tl.load(factors + b, row < b, other=0.0)
    known = inside[:, None] & (column[None, :] < D)
    tokens = tokens_ptr + start_of(0, 3, T, H, D)
    place = token[:, None] * (3 * H * D) + column[None, :]
    query = tl.load(tokens + place, known, other=0.0)

    own, d_values = start_of(0, 1, T, H, D), d_tokens_ptr + start_of(2, 3, T, H, D)
    d_query = tl.zeros((B, DP), tl.float32)
    d_keep = tl.zeros((B,), tl.float32)
    d_carry = tl.zeros((B,), tl.float32)
    d_within = tl.zeros((B, B), tl.float32)
    for first in range(0, width, BV):
        out = first + tl.arange(0, BV)
        mask = inside[:, None] & (out[None, :] < D)
        flat = token[:, None] * (H * D) + out[None, :]
        d_answer = tl.load(d_answers_ptr + own + flat, mask, other=0.0)
        of_error = program * T * D + (token[:, None] * D + out[None, :])
        error = tl.load(errors_ptr + of_error, mask, other=0.0)
        d_within += tl.dot(d_answer, tl.trans(error), input_precision=PRECISION)
        # states transposed: [BV, DP]
        square = (column[None, :] < D) & (out[:, None] < D)
        entry = column[None, :] * D + out[:, None]
        state = states_ptr + (program * n + chunk) * 2 * D * D + entry
        M = tl.load(state, square, other=0.0)
        read = tl.dot(d_answer, M, input_precision=PRECISION)
        d_keep += tl.sum(read * query, 1)
        d_query += keep[:, None] * read
        S = tl.load(state + D * D, square, other=0.0)
        read = tl.dot(d_answer, S, input_precision=PRECISION)
        d_carry += tl.sum(read * query, 1)
        d_query += carry[:, None] * read
        if d_retrieved_ptr is not None:
            start = chunk // per_segment * per_segment
            d_retrieved = tl.load(d_retrieved_ptr + own + flat, mask, other=0.0)
            before_segment = tl.load(
                states_ptr + (program * n + start) * 2 * D * D + entry, square, other=0.0
            )
            d_query += tl.dot(d_retrieved, before_segment, input_precision=PRECISION)

    # within = reach scores step
    log_keep, log_eta, step = load_gates(gates_ptr, N, T, token, inside)
    kept, faded = tl.cumsum(log_keep, 0), tl.cumsum(log_eta, 0)
    keeps = ratios(kept[:, None], kept[None, :], t >= i)
    fades = ratios(faded[:, None], faded[None, :], t >= i)
    reach = tl.dot(keeps, fades, input_precision=PRECISION)
    key = tl.load(tokens + H * D + place, known, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    within = reach * scores * step[None, :]
    d_within = tl.where(t >= i, d_within, 0.0)
    d_step = tl.sum(d_within * reach * scores, 0)
    d_scores = d_within * reach * step[None, :]
    d_query += tl.dot(d_scores, key, input_precision=PRECISION)
    d_tokens = d_tokens_ptr + start_of(0, 3, T, H, D)
    tl.store(d_tokens + place, d_query, known)
    d_key = tl.dot(tl.trans(d_scores), query, input_precision=PRECISION)
    tl.store(d_tokens + H * D + place, d_key, known)
    for first in range(0, width, BV):
        out = first + tl.arange(0, BV)
        mask = inside[:, None] & (out[None, :] < D)
        flat = token[:, None] * (H * D) + out[None, :]
        d_answer = tl.load(d_answers_ptr + own + flat, mask, other=0.0)
        d_error = tl.dot(tl.trans(within), d_answer, input_precision=PRECISION)
        if d_errors_ptr is not None:
            of_error = program * T * D + (token[:, None] * D + out[None, :])
            d_error += tl.load(d_errors_ptr + of_error, mask, other=0.0)
        of_value = token[:, None] * (3 * H * D) + out[None, :]
        tl.store(d_values + of_value, d_error, mask)

    # once more, rather than held all the time
    d_reach = d_within * scores * step[None, :]
    log_keep, log_eta, step = load_gates(gates_ptr, N, T, token, inside)
    kept, faded = tl.cumsum(log_keep, 0), tl.cumsum(log_eta, 0)
    keeps = ratios(kept[:, None], kept[None, :], t >= i)
    d_made = tl.dot(tl.trans(keeps), d_reach, input_precision=PRECISION)
    d_kept = tl.sum(keeps * d_keep[:, None], 0)
    d_carried = tl.sum(keeps * d_carry[:, None], 0)
    fades = ratios(faded[:, None], faded[None, :], t >= i)
    d_log_keep, d_log_eta = gates_backward(
        faded,
        fades,
        reach - fades,
        keep,
        carry - tl.exp(faded),
        d_made,
        d_kept,
        d_carried,
        0.0,
        0.0,
        t,
        i,
        PRECISION,
    )
    gate = d_gates_ptr + program * T + token
    third = N.to(tl.int64) * T
    tl.store(gate, d_log_keep, inside)
    tl.store(gate + third, d_log_eta, inside)
    tl.store(gate + 2 * third, d_step, inside)


@triton.jit
def _memory_scan_backward(
    tokens_ptr,  # [S, T, 3, H, D]
    factors_ptr,  # [N, n, FACTORS, b]
    inverse_ptr,  # [N, n, b, b]
    d_answers_ptr,  # [S, T, H, D]
    d_retrieved_ptr,  # [S, T, H, D], or None
    d_segment_ptr,  # [N, D, D], of M before the last segment, or None
    d_memory_ptr,  # [N, D, D], of M after the last token, or None
    d_momentum_ptr,  # [N, D, D], of S after the last token, or None
    d_tokens_ptr,  # [S, T, 3, H, D]: the values' part holds d_E of the answers, and becomes d_R
    d_states_ptr,  # [N, n + 1, 2, D, D], of X after chunk - 1
    T,
    b,
    n,
    per_segment,
    H: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From chunk to chunk, the last one first; for BV of the state's columns."""
    program, slab = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column, out = tl.arange(0, B), tl.arange(0, DP), slab * BV + tl.arange(0, BV)
    square = (column[:, None] < D) & (out[None, :] < D)
    entry = column[:, None] * D + out[None, :]
    tokens = tokens_ptr + start_of(0, 3, T, H, D)
    own, d_values = start_of(0, 1, T, H, D), d_tokens_ptr + start_of(2, 3, T, H, D)
    d_M = tl.zeros((DP, BV), tl.float32)
    d_S = tl.zeros((DP, BV), tl.float32)
    d_segment = tl.zeros((DP, BV), tl.float32)
    if d_memory_ptr is not None:
        d_M += tl.load(d_memory_ptr + program * D * D + entry, square, other=0.0)
    if d_momentum_ptr is not None:
        d_S += tl.load(d_momentum_ptr + program * D * D + entry, square, other=0.0)
    for index in range(n):
        chunk = n - 1 - index
        token = chunk * b + row
        inside = (row < b) & (token < T)
        known = inside[:, None] & (column[None, :] < D)
        place = token[:, None] * (3 * H * D) + column[None, :]
        query = tl.load(tokens + place, known, other=0.0)
        key = tl.load(tokens + H * D + place, known, other=0.0)
        start = (program * n + chunk) * b * b
        inverse = tl.load(  # transposed
            inverse_ptr + start + row[None, :] * b + row[:, None],
            (row < b)[:, None] & (row < b)[None, :],
            other=0.0,
        )
        factors = factors_ptr + (program * n + chunk) * 5 * b
        last = tl.minimum(b, T - chunk * b) - 1
        keeps = tl.load(factors + row, row < b, other=0.0)
        carries = tl.load(factors + b + row, row < b, other=0.0)
        keep_before = tl.load(factors + row - 1, (row > 0) & (row < b), other=1.0)
        carry_before = tl.load(factors + b + row - 1, (row > 0) & (row < b), other=0.0)
        in_memory = tl.load(factors + 3 * b + row, row < b, other=0.0)
        in_momentum = tl.load(factors + 4 * b + row, row < b, other=0.0)
        keep, carry = tl.load(factors + last), tl.load(factors + b + last)
        decay = tl.load(factors + 2 * b + last)
        mask = inside[:, None] & (out[None, :] < D)
        place = token[:, None] * (H * D) + out[None, :]
        d_answer = tl.load(d_answers_ptr + own + place, mask, other=0.0)
        of_value = d_values + (token[:, None] * (3 * H * D) + out[None, :])
        d_error = tl.load(of_value, mask, other=0.0)
        state = d_states_ptr + (program * (n + 1) + chunk + 1) * 2 * D * D + entry
        tl.store(state, d_M, square)
        tl.store(state + D * D, d_S, square)

        d_error += in_memory[:, None] * tl.dot(key, d_M, input_precision=PRECISION)
        d_error += in_momentum[:, None] * tl.dot(key, d_S, input_precision=PRECISION)
        d_right = tl.dot(inverse, d_error, input_precision=PRECISION)
        tl.store(of_value, d_right, mask)
        d_S = carry * d_M + decay * d_S
        d_S += tl.dot(tl.trans(query * carries[:, None]), d_answer, input_precision=PRECISION)
        d_S -= tl.dot(tl.trans(key * carry_before[:, None]), d_right, input_precision=PRECISION)
        d_M = keep * d_M
        d_M += tl.dot(tl.trans(query * keeps[:, None]), d_answer, input_precision=PRECISION)
        d_M -= tl.dot(tl.trans(key * keep_before[:, None]), d_right, input_precision=PRECISION)
        if d_retrieved_ptr is not None:
            d_retrieved = tl.load(d_retrieved_ptr + own + place, mask, other=0.0)
            d_segment += tl.dot(tl.trans(query), d_retrieved, input_precision=PRECISION)
            first = (chunk % per_segment) == 0
            d_M += tl.where(first, d_segment, 0.0)
            d_segment = tl.where(first, 0.0, d_segment)
            if d_segment_ptr is not None:
                latest = square & (chunk == (n - 1) // per_segment * per_segment)
                d_M += tl.load(d_segment_ptr + program * D * D + entry, latest, other=0.0)
    state = d_states_ptr + program * (n + 1) * 2 * D * D + entry
    tl.store(state, d_M, square)
    tl.store(state + D * D, d_S, square)


@triton.jit
def _memory_error_backward(
    tokens_ptr,  # [S, T, 3, H, D]
    gates_ptr,  # [3, N, T]
    factors_ptr,  # [N, n, FACTORS, b]
    errors_ptr,  # [N, T, D]
    states_ptr,  # [N, n, 2, D, D]
    d_states_ptr,  # [N, n + 1, 2, D, D]
    d_tokens_ptr,  # [S, T, 3, H, D]: the values' part is read, the keys' added to
    d_gates_ptr,  # [3, N, T]: added to
    N,
    T,
    b,
    width,  # D, at run time: a loop over it stays one
    H: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients that come from a chunk's errors and the state after it, once those are known."""
    program, chunk, n = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, column = tl.arange(0, B), tl.arange(0, DP)
    token = chunk * b + row
    inside = (row < b) & (token < T)
    t, i = row[:, None], row[None, :]
    factors = factors_ptr + (program * n + chunk) * 5 * b + row
    keep_before = tl.load(factors - 1, (row > 0) & (row < b), other=1.0)
    carry_before = tl.load(factors + b - 1, (row > 0) & (row < b), other=0.0)
    in_memory = tl.load(factors + 3 * b, row < b, other=0.0)
    in_momentum = tl.load(factors + 4 * b, row < b, other=0.0)
    known = inside[:, None] & (column[None, :] < D)
    tokens = tokens_ptr + start_of(0, 3, T, H, D)
    place = token[:, None] * (3 * H * D) + column[None, :]
    key = tl.load(tokens + H * D + place, known, other=0.0)

    d_values = d_tokens_ptr + start_of(2, 3, T, H, D)
    d_key = tl.zeros((B, DP), tl.float32)
    d_keep_before = tl.zeros((B,), tl.float32)
    d_carry_before = tl.zeros((B,), tl.float32)
    d_in_memory = tl.zeros((B,), tl.float32)
    d_in_momentum = tl.zeros((B,), tl.float32)
    d_lower = tl.zeros((B, B), tl.float32)
    d_keep_last, d_carry_last, d_decay_last = 0.0, 0.0, 0.0
    for first in range(0, width, BV):
        out = first + tl.arange(0, BV)
        mask = inside[:, None] & (out[None, :] < D)
        # states and their gradients transposed: [BV, DP]
        square = (column[None, :] < D) & (out[:, None] < D)
        entry = column[None, :] * D + out[:, None]
        state = states_ptr + (program * n + chunk) * 2 * D * D + entry
        d_state = d_states_ptr + (program * (n + 1) + chunk + 1) * 2 * D * D + entry
        of_error = errors_ptr + program * T * D + (token[:, None] * D + out[None, :])
        error = tl.load(of_error, mask, other=0.0)
        of_value = token[:, None] * (3 * H * D) + out[None, :]
        d_right = tl.load(d_values + of_value, mask, other=0.0)
        d_lower -= tl.dot(d_right, tl.trans(error), input_precision=PRECISION)
        M = tl.load(state, square, other=0.0)
        read = tl.dot(d_right, M, input_precision=PRECISION)
        d_keep_before -= tl.sum(read * key, 1)
        d_key -= keep_before[:, None] * read
        S = tl.load(state + D * D, square, other=0.0)
        read = tl.dot(d_right, S, input_precision=PRECISION)
        d_carry_before -= tl.sum(read * key, 1)
        d_key -= carry_before[:, None] * read
        d_M = tl.load(d_state, square, other=0.0)
        d_keep_last += tl.sum(d_M * M)
        d_carry_last += tl.sum(d_M * S)
        written = tl.dot(error, d_M, input_precision=PRECISION)
        d_in_memory += tl.sum(written * key, 1)
        d_key += in_memory[:, None] * written
        d_S = tl.load(d_state + D * D, square, other=0.0)
        d_decay_last += tl.sum(d_S * S)
        written = tl.dot(error, d_S, input_precision=PRECISION)
        d_in_momentum += tl.sum(written * key, 1)
        d_key += in_momentum[:, None] * written

    # lower = reach_before likeness step
    log_keep, log_eta, step = load_gates(gates_ptr, N, T, token, inside)
    kept, faded = tl.cumsum(log_keep, 0), tl.cumsum(log_eta, 0)
    before = ratios((kept - log_keep)[:, None], kept[None, :], t > i)
    fades = ratios(faded[:, None], faded[None, :], t >= i)
    reach = tl.dot(before, fades, input_precision=PRECISION)
    likeness = tl.dot(key, tl.trans(key), input_precision=PRECISION)
    d_lower = tl.where(t > i, d_lower, 0.0)
    d_step = tl.sum(d_lower * reach * likeness, 0)
    d_likeness = d_lower * reach * step[None, :]
    d_key += tl.dot(d_likeness, key, input_precision=PRECISION)
    d_key += tl.dot(tl.trans(d_likeness), key, input_precision=PRECISION)
    d_keys = d_tokens_ptr + start_of(1, 3, T, H, D) + place
    tl.store(d_keys, d_key + tl.load(d_keys, known, other=0.0), known)

    # once more, rather than held all the time
    d_reach = d_lower * likeness * step[None, :]
    log_keep, log_eta, step = load_gates(gates_ptr, N, T, token, inside)
    kept, faded = tl.cumsum(log_keep, 0), tl.cumsum(log_eta, 0)
    last = tl.minimum(b, T - chunk * b) - 1
    kept_last = tl.sum(tl.where(row == last, kept, 0.0), 0)
    keeps_last = ratios(kept_last, kept, row <= last)
    before = ratios((kept - log_keep)[:, None], kept[None, :], t > i)
    d_made = tl.dot(tl.trans(before), d_reach, input_precision=PRECISION)
    d_made += keeps_last[:, None] * (d_in_memory * step)[None, :]
    d_kept = tl.sum(before * d_keep_before[:, None], 0) + keeps_last * d_keep_last
    d_carried = tl.sum(before * d_carry_before[:, None], 0) + keeps_last * d_carry_last
    fades = ratios(faded[:, None], faded[None, :], t >= i)
    fade_last = tl.sum(tl.where(t == last, fades, 0.0), 0)
    reach_last = tl.sum(keeps_last[:, None] * fades, 0)
    d_step += d_in_memory * reach_last + d_in_momentum * fade_last
    share = tl.exp(log_keep)
    d_log_keep, d_log_eta = gates_backward(
        faded,
        fades,
        share[:, None] * reach,
        tl.exp(kept),
        share * carry_before,
        d_made,
        d_kept,
        d_carried,
        fade_last[:, None] * (d_in_momentum * step)[None, :],
        fade_last * d_decay_last,
        t,
        i,
        PRECISION,
    )
    gate = d_gates_ptr + program * T + token
    third = N.to(tl.int64) * T
    tl.store(gate, d_log_keep + tl.load(gate, inside, other=0.0), inside)
    tl.store(gate + third, d_log_eta + tl.load(gate + third, inside, other=0.0), inside)
    d_step += tl.load(gate + 2 * third, inside, other=0.0)
    tl.store(gate + 2 * third, d_step, inside)
