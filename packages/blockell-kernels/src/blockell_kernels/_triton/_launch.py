"""Launches kernels with little Python: what a launch looks up is looked up once.

`kernel[grid](...)` binds names, classifies every argument, and looks the compiled kernel up by a
string, some 20 us a launch. Here a call's own key finds the compiled kernel, which is then run
directly. The key is never coarser than what Triton specialises a kernel on: type, and for integers
being 1, a multiple of 16 or beyond 32 bits, for pointers dtype and alignment.

A kernel with a constant `OVERLAPS` waits, before it touches memory, until the one before it has
ended (`gdc_wait`). On GPUs that can, it is therefore launched while that one ends, by programmatic
dependent launch: its own start then costs next to nothing. Such kernels let the next one start as
soon as all of their own programs have (`gdc_launch_dependents`).
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from blockell_kernels._triton._device import INTERPRETED, overlaps

_ready: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_LARGE = 2**31


class _Recording(threading.local):
    by: Any = None
    """Who notes the launches of this thread; see `_replay`."""


recording = _Recording()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`.

    Args:
        kernel: a jitted function, Triton's or Gluon's.
        grid: programs along up to three axes.
        args: tensors, descriptors, integers, floats: the leading parameters, in order.
        constants: compile-time parameters and launch options (num_warps, ...), all hashable.
    """
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    if watched():
        if recording.by is not None:
            recording.by.give_up()
        kernel[grid](*args, **constants, **_overlap(kernel, device, constants))
        return
    key: list[Any] = [id(kernel), device, *constants, *constants.values()]
    for arg in args:
        kind = type(arg)
        if kind is int:
            # other, multiple of 16, 1; and whether 32 bits hold it
            key.append(2 if arg == 1 else (arg & 15 == 0) + (4 if arg >= _LARGE else 0))
        elif kind is TensorDescriptor:
            key.append((arg.base.dtype, *arg.block_shape))
        elif isinstance(arg, Tensor):
            key.append((arg.dtype, arg.data_ptr() & 15 == 0))
        else:
            key.append(_key_of(arg))
    found = _ready.get(tuple(key))
    if found is None:
        constants |= _overlap(kernel, device, constants)
        compiled = kernel[grid](*args, **constants)
        trailing = _trailing(kernel, len(args), constants)
        _ready[tuple(key)] = compiled, trailing
        if recording.by is not None:
            recording.by.launched(compiled, (*grid, 1, 1)[:3], args, trailing)
        return
    compiled, trailing = found
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if recording.by is not None:
        recording.by.launched(compiled, (x, y, z), args, trailing)
    stream = active.get_current_stream(device)
    # The documented way around the launcher, `compiled[grid](...)`, without its closure.
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *args, *trailing,
    )  # fmt: skip


def _overlap(kernel: Any, device: int, given: dict[str, Any]) -> dict[str, bool]:
    """Constants that launch a kernel while the one before it ends, if it is written to wait.

    None where the launcher has decided: `OVERLAPS=False` waits for the end.
    """
    waits = any(parameter.name == "OVERLAPS" for parameter in kernel.params)
    waits = waits and "OVERLAPS" not in given
    return {"OVERLAPS": True, "launch_pdl": True} if waits and overlaps(device) else {}


def watched() -> bool:
    """Whether a profiler wants to hear of launches; it then hears of them in Triton's own way."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _key_of(arg: Any) -> tuple[Any, ...]:
    """The class of an argument of another kind: Gluon's descriptors, floats, None, booleans."""
    if hasattr(arg, "block_shape"):
        return type(arg), arg.base.dtype, tuple(arg.block_shape), getattr(arg, "layout", None)
    return type(arg), arg if arg is None or isinstance(arg, bool) else None


def _trailing(kernel: Any, given: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """What the compiled kernel's launcher takes after the leading arguments."""
    values = []
    for parameter in kernel.params[given:]:
        if not parameter.is_constexpr:
            raise TypeError(f"{kernel.__name__}: argument {parameter.name} must be positional.")
        values.append(constants.get(parameter.name, parameter.default))
    return tuple(values)


def descriptor(t: Tensor, box: list[int]) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor`, unchecked: for operands that are `describable`."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = t, t.shape, t.stride(), box
    made.padding = "zero"
    return made
