"""When Triton kernels do a memory's work, and how their gradients are differentiated in turn."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titanmac_integration._layers._triton import has_triton

AVAILABLE = has_triton()


def on_gpu(x: Tensor, *, compiled: bool = False) -> bool:
    """Whether kernels take what is computed from ``x``.

    Compiled, torch fuses what it can, and only what is an operator (``compiled``) remains one.
    """
    if torch.compiler.is_compiling() and not compiled:
        return False
    return AVAILABLE and x.is_cuda and x.dtype != torch.float64


def largest_part(chunk: int, most: int) -> int:
    """The largest divisor of ``chunk`` up to ``most``: chunks change rounding only."""
    return max(size for size in range(1, min(chunk, most) + 1) if chunk % size == 0)


def precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies float32 numbers that come from projections in ``dtype``.

    What was rounded to half precision, or where torch may use TF32, is multiplied in TF32;
    otherwise by three products of TF32, which is as exact as float32.
    """
    matmul = torch.backends.cuda.matmul
    try:
        allowed = matmul.allow_tf32
    except RuntimeError:  # set by torch's newer name only
        allowed = matmul.fp32_precision == "tf32"
    return "tf32" if allowed or dtype in (torch.bfloat16, torch.float16) else "tf32x3"


def gradients_again(
    plain: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs`` that can be differentiated in turn: those of ``plain``, recomputed.

    ``plain`` maps ``inputs`` to as many outputs as there are ``grads``; None stands for nothing.
    """
    outputs = plain(*inputs)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad.to(output.dtype) for output, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
