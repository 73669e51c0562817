# mypy: ignore-errors
"""Activation functions and their slopes inside Triton kernels, and the passes over memory alone.

Legend: h pre-activation, a = f(h), da and dh the gradients of a loss in a and h.

Everything is computed in float32 from h as it is stored. ARITHMETIC says how: "exact" for float32
results; "short" for 16-bit ones, with a polynomial for the error function; "ptx", the same with two
instructions of NVIDIA's that Triton does not emit itself. It matters: a tile of 128 x 128 outputs
takes a hundred cycles for every instruction per element, and a product 320 deep 2600.

The passes alone do not overlap with the launches around them: programs of a small product that
start early crowd on the multiprocessors that are free first, and a step of the MLP of 300 tokens
took 2 to 6% longer, of 128 tokens as long (H200, `h200-mlp-few.csv`).

Constants stand on the right: on the left the interpreter takes the product for a constant.
"""

import triton
import triton.language as tl

# Phi(h) - 1/2 = h*P(h^2) for |h| <= 4.25: minimax (Lawson's algorithm), Phi off by at most 3.3e-5
# and h*Phi(h) by 4.5e-5, a tenth of float16's spacing at 1. Beyond, the argument of P stays and the
# line h*P leaves [-1/2, 1/2], so that clamping makes Phi 0 or 1 exactly.
BOUND_SQUARED = tl.constexpr(4.25 * 4.25)
P0 = tl.constexpr(0.39881922)
P1 = tl.constexpr(-0.0661902823)
P2 = tl.constexpr(0.00971877971)
P3 = tl.constexpr(-0.00107907827)
P4 = tl.constexpr(8.84891916e-05)
P5 = tl.constexpr(-5.14751887e-06)
P6 = tl.constexpr(1.98616182e-07)
P7 = tl.constexpr(-4.51531251e-09)
P8 = tl.constexpr(4.54708405e-11)

SQRT_HALF = tl.constexpr(0.7071067811865476)
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
LOG2_OF_DENSITY_AT_0 = tl.constexpr(-1.3257480647361595)  # of 1 / sqrt(2 pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def normal_cdf(h, ARITHMETIC: tl.constexpr):
    """Phi(h), the distribution function of the standard normal distribution."""
    if ARITHMETIC == "exact":
        return 0.5 + 0.5 * tl.erf(h * SQRT_HALF)
    else:
        u = tl.minimum(h * h, BOUND_SQUARED)
        p = u * P8 + P7
        p = p * u + P6
        p = p * u + P5
        p = p * u + P4
        p = p * u + P3
        p = p * u + P2
        p = p * u + P1
        p = p * u + P0
        if ARITHMETIC == "ptx":
            return tl.inline_asm_elementwise(
                "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;",
                "=f,f,f",
                [h, p],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.minimum(tl.maximum(h * p + 0.5, 0.0), 1.0)


@triton.jit
def exp2(x, ARITHMETIC: tl.constexpr):
    """2^x. The short form takes what is too small for a normal number as 0."""
    if ARITHMETIC == "ptx":
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def logistic(z, ARITHMETIC: tl.constexpr):
    """1 / (1 + exp(-z)); tl.sigmoid cannot be called from here in the interpreter."""
    denominator = exp2(z * -LOG2_E, ARITHMETIC) + 1.0
    if ARITHMETIC == "ptx":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [denominator],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / denominator


@triton.jit
def activated(h, ACTIVATION: tl.constexpr, ARITHMETIC: tl.constexpr):
    """f(h), float32. A NaN stays one."""
    if ACTIVATION == "gelu":
        return h * normal_cdf(h, ARITHMETIC)
    elif ACTIVATION == "gelu_tanh":
        return h * logistic((h + h * h * h * CUBIC) * (2.0 * SQRT_2_OVER_PI), ARITHMETIC)
    elif ACTIVATION == "relu":
        return tl.where(h <= 0.0, 0.0, h)
    elif ACTIVATION == "silu":
        return h * logistic(h, ARITHMETIC)
    else:
        return h


@triton.jit
def activated_and_slope(h, ACTIVATION: tl.constexpr, ARITHMETIC: tl.constexpr):
    """(f(h), f'(h)), float32."""
    if ACTIVATION == "gelu":
        phi = normal_cdf(h, ARITHMETIC)
        density = exp2(h * h * (-0.5 * LOG2_E) + LOG2_OF_DENSITY_AT_0, ARITHMETIC)
        return h * phi, phi + h * density
    elif ACTIVATION == "gelu_tanh":
        s = logistic((h + h * h * h * CUBIC) * (2.0 * SQRT_2_OVER_PI), ARITHMETIC)
        inner = (h * h * (3.0 * CUBIC) + 1.0) * (2.0 * SQRT_2_OVER_PI)
        return h * s, s + h * s * (1.0 - s) * inner
    elif ACTIVATION == "relu":
        return tl.where(h <= 0.0, 0.0, h), tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = logistic(h, ARITHMETIC)
        return h * s, s + h * s * (1.0 - s)
    else:
        return h, h * 0.0 + 1.0


@triton.jit
def activate_elements(
    h_ptr,
    a_ptr,
    elements,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a = f(h) over contiguous tensors."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + i, i < elements, other=0.0).to(tl.float32)
    a = activated(h, ACTIVATION, ARITHMETIC)
    tl.store(a_ptr + i, a.to(a_ptr.dtype.element_ty), i < elements)


@triton.jit(do_not_specialize=["N"])
def gradient_tiles(
    da_ptr,  # [N, width]
    h_ptr,  # [N, width]
    dh_ptr,  # [N, width]
    a_ptr,  # [N, width] or None
    sums_ptr,  # float32 [token tiles, width] or None
    N,
    width,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """dh = da f'(h) of a tile, and if asked a = f(h) and the sums of dh over its tokens."""
    col_tiles = tl.cdiv(width, BW)  # along one axis: others end at 65535 programs
    token_tile = (tl.program_id(0) // col_tiles).to(tl.int64)
    cols = tl.program_id(0) % col_tiles * BW + tl.arange(0, BW)
    tokens = token_tile * BT + tl.arange(0, BT)
    inside = (tokens < N)[:, None] & (cols < width)[None, :]
    offsets = tokens[:, None] * width + cols[None, :]
    h = tl.load(h_ptr + offsets, inside, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + offsets, inside, other=0.0).to(tl.float32)
    a, slope = activated_and_slope(h, ACTIVATION, ARITHMETIC)
    dh = (da * slope).to(dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + offsets, dh, inside)
    if a_ptr is not None:
        tl.store(a_ptr + offsets, a.to(a_ptr.dtype.element_ty), inside)
    if sums_ptr is not None:
        row = sums_ptr + token_tile * width
        tl.store(row + cols, tl.sum(dh.to(tl.float32), axis=0), cols < width)
