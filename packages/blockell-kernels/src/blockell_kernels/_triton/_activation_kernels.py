# mypy: ignore-errors
"""Activation functions and their slopes inside Triton kernels, and the passes over memory alone.

Legend: h pre-activation, a = f(h), da and dh the gradients of a loss in a and h.

Everything is computed in float32 from h as it is stored. Constants stand on the right: on the left
the interpreter takes the product for a constant. FAST, for 16-bit results, replaces the
error function by a polynomial: libdevice's takes as long, over a tile of 128 outputs, as a product
300 deep.
"""

import triton
import triton.language as tl

# Phi(t) - 1/2 = t*P(t^2) for |t| <= 4.25: minimax (Lawson's algorithm), Phi off by at most 3.3e-5
# and h*Phi(h) by 4.5e-5, a tenth of float16's spacing at 1. Beyond, Phi is 0 or 1.
BOUND = tl.constexpr(4.25)
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
ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def normal_cdf(h, FAST: tl.constexpr):
    """Phi(h), the distribution function of the standard normal distribution."""
    if FAST:
        t = tl.minimum(tl.maximum(h, -BOUND), BOUND)
        u = t * t
        p = u * P8 + P7
        p = p * u + P6
        p = p * u + P5
        p = p * u + P4
        p = p * u + P3
        p = p * u + P2
        p = p * u + P1
        p = p * u + P0
        phi = t * p + 0.5
        phi = tl.where(h > BOUND, 1.0, phi)
        return tl.where(h < -BOUND, 0.0, phi)
    else:
        return 0.5 + 0.5 * tl.erf(h * SQRT_HALF)


@triton.jit
def logistic(z):
    """1 / (1 + exp(-z)); tl.sigmoid cannot be called from here in the interpreter."""
    return 1.0 / (1.0 + tl.exp2(z * -LOG2_E))


@triton.jit
def activated(h, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """f(h), float32. A NaN stays one."""
    if ACTIVATION == "gelu":
        return h * normal_cdf(h, FAST)
    elif ACTIVATION == "gelu_tanh":
        return h * logistic((h + h * h * h * CUBIC) * (2.0 * SQRT_2_OVER_PI))
    elif ACTIVATION == "relu":
        return tl.where(h <= 0.0, 0.0, h)
    elif ACTIVATION == "silu":
        return h * logistic(h)
    else:
        return h


@triton.jit
def activated_and_slope(h, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """(f(h), f'(h)), float32."""
    if ACTIVATION == "gelu":
        phi = normal_cdf(h, FAST)
        density = tl.exp2(h * h * (-0.5 * LOG2_E)) * ONE_OVER_SQRT_2_PI
        return h * phi, phi + h * density
    elif ACTIVATION == "gelu_tanh":
        s = logistic((h + h * h * h * CUBIC) * (2.0 * SQRT_2_OVER_PI))
        inner = (h * h * (3.0 * CUBIC) + 1.0) * (2.0 * SQRT_2_OVER_PI)
        return h * s, s + h * s * (1.0 - s) * inner
    elif ACTIVATION == "relu":
        return tl.where(h <= 0.0, 0.0, h), tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = logistic(h)
        return h * s, s + h * s * (1.0 - s)
    else:
        return h, h * 0.0 + 1.0


@triton.jit
def activate_elements(
    h_ptr, a_ptr, elements, ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr
):
    """a = f(h) over contiguous tensors."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + i, i < elements, other=0.0).to(tl.float32)
    a = activated(h, ACTIVATION, FAST)
    tl.store(a_ptr + i, a.to(a_ptr.dtype.element_ty), i < elements)


@triton.jit
def gradient_elements(
    da_ptr,
    h_ptr,
    dh_ptr,
    a_ptr,  # or unused
    elements,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    RECOMPUTE: tl.constexpr,  # write a = f(h), too
    BLOCK: tl.constexpr,
):
    """dh = da f'(h) over contiguous tensors."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + i, i < elements, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + i, i < elements, other=0.0).to(tl.float32)
    a, slope = activated_and_slope(h, ACTIVATION, FAST)
    tl.store(dh_ptr + i, (da * slope).to(dh_ptr.dtype.element_ty), i < elements)
    if RECOMPUTE:
        tl.store(a_ptr + i, a.to(a_ptr.dtype.element_ty), i < elements)
