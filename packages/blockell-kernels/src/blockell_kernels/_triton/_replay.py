"""Runs launches again without the code that decided on them.

What a launcher allocates and launches depends on its operands' shapes, strides, dtypes, alignment
and device, never on what they hold. So the second call of a kind is recorded (the first may be the
only one): its allocations, its compiled kernels, and which of their arguments are addresses of
operands and allocations. Later calls of that kind allocate and launch the same, and let go of
memory after its last use.

A call that does anything else, such as zeroing, copying or a dense product, or that uses memory
from elsewhere, is not replayed, and goes the long way every time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from blockell_kernels._backends import Pattern, arithmetic
from blockell_kernels._triton import _launch

MAX_RECORDINGS = 4096
MAX_HELD = 2**28
"""Bytes allocated by a call that is recorded: they are held to its end."""
_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default)
_VIEWS = (_aten.view.default, _aten.alias.default, _aten.detach.default)
_P = ParamSpec("_P")
_T = TypeVar("_T")
Operands = list[Tensor | None]


class Launch(NamedTuple):
    """A launch but for its addresses. Operands, then allocations, go by number."""

    made: list[tuple[torch.Size, torch.dtype, torch.device]]
    """Allocations before it."""
    run: Callable[..., None]
    grid: tuple[int, int, int]
    compiled: tuple[Any, Any]
    """Its function and metadata."""
    args: list[Any]
    """With None where an address is put."""
    pointers: list[tuple[int, int]]
    """(position in `args`, number)."""
    boxes: list[tuple[int, int, type, dict[str, Any]]]
    """(position, number, kind of descriptor, its facts but for the tensor)."""
    unused: list[int]
    """What is not needed any more after it."""


class Recording(NamedTuple):
    """What a call of one kind does."""

    device: int
    launches: list[Launch]
    results: list[int | None]
    kind: type | None
    """Of the tuple or list that holds the results; None: there is one."""


class Recorder(TorchDispatchMode):
    """Notes what happens inside. `sound`: whether that is all there was."""

    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self.operands = list(operands)
        held = [t for t in operands if t is not None]
        self.known = {t.data_ptr(): i for i, t in enumerate(operands) if t is not None}
        self.ambiguous = len(self.known) < len(held)
        """Of two operands at one address nobody could tell which is meant."""
        self.sound = 0 not in self.known  # none is empty
        self.made: list[Tensor] = []
        self.launches: list[tuple[int, Launch]] = []
        """With the number of allocations before each."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and self.sound:
            self.sound = out.is_contiguous() and out.data_ptr() & 15 == 0
            if out.numel():
                self.known[out.data_ptr()] = len(self.operands) + len(self.made)
            self.made.append(out)
            if sum(t.nbytes for t in self.made) > MAX_HELD:
                self.give_up()
        elif func not in _VIEWS:
            self.give_up()
        return out

    def __enter__(self) -> Recorder:
        _launch.recording.by = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _launch.recording.by = None
        super().__exit__(*error)

    def give_up(self) -> None:
        """Something happened that is not recorded."""
        self.sound = False
        self.made.clear()
        self.operands = []

    def _number(self, t: Tensor) -> int:
        found = self.known.get(t.data_ptr())
        if found is None:
            self.give_up()
            return 0
        return found

    def launched(
        self,
        compiled: Any,
        grid: tuple[int, int, int],
        args: tuple[Any, ...],
        trailing: tuple[Any, ...],
    ) -> None:
        """Note a launch."""
        if not self.sound:
            return
        values: list[Any] = [*args, *trailing]
        pointers, boxes = [], []
        for at, arg in enumerate(args):
            if isinstance(arg, Tensor):
                values[at] = 0 if arg.numel() == 0 else None
                if arg.numel():
                    pointers.append((at, self._number(arg)))
            elif hasattr(arg, "block_shape"):
                facts = {name: fact for name, fact in vars(arg).items() if name != "base"}
                boxes.append((at, self._number(arg.base), type(arg), facts))
                values[at] = None
        found = compiled.function, compiled.packed_metadata
        launch = Launch([], compiled.run, grid, found, values, pointers, boxes, [])
        self.launches.append((len(self.made), launch))

    def finished(self, out: Any, device: int) -> Recording | None:
        """The recording; None if it does not tell all."""
        several = isinstance(out, (tuple, list))
        first, shapes = len(self.operands), [t.shape for t in self.made]
        results: list[int | None] = []
        for t in out if several else [out]:
            number = None if t is None else self._number(t)
            if not self.sound:
                return None
            if number is not None and number < first:
                self.sound = t is self.operands[number]
            elif number is not None:
                made = self.made[number - first]
                same = t.numel() == made.numel() and t.dtype is made.dtype and t.is_contiguous()
                self.sound = same and number not in results
                shapes[number - first] = t.shape
            results.append(number)
        if not self.sound:
            return None
        begun = 0
        last: dict[int, Launch] = {}
        for count, launch in self.launches:
            for shape, t in zip(shapes[begun:count], self.made[begun:count], strict=True):
                launch.made.append((shape, t.dtype, t.device))
            begun = count
            numbers = [at[1] for at in launch.pointers] + [at[1] for at in launch.boxes]
            last |= dict.fromkeys(numbers, launch)
        if begun < len(self.made):  # something that no kernel wrote
            return None
        for number, launch in last.items():
            if number not in results:
                launch.unused.append(number)
        launches = [launch for _, launch in self.launches]
        return Recording(device, launches, results, type(out) if several else None)


_recordings: dict[tuple[Any, ...], Recording | None] = {}
_UNKNOWN: Any = object()
_SEEN: Any = object()


def forget() -> None:
    """Decide anew from here on."""
    _recordings.clear()


def _gpu_of(t: Any) -> int | None:
    """Its index."""
    return t.device.index if t.is_cuda else None


def _device_for(t: Any) -> int | None:
    """The index of the GPU to replay on; None: not now."""
    device = _gpu_of(t)
    if (
        device is None
        or device != driver.active.get_current_device()
        or _launch.recording.by is not None
        or _launch.watched()
    ):
        return None
    return device


def replayed(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Replay a launcher. Its first argument is a tensor; others may be tensors and patterns.

    What it does must depend on nothing else than facts of these, its other arguments, which are
    hashable, and torch's TF32 setting. It returns a tensor, None, or a tuple of these.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        first: Any = args[0]
        device = _device_for(first)
        if device is None:
            return function(*args, **kwargs)
        key: list[Any] = [function, device, arithmetic(first.dtype), *kwargs]
        operands: Operands = []
        addresses: list[int] = []
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, Tensor):
                operands.append(arg)
                addresses.append(address := arg.data_ptr())
                key += (arg.shape, arg.stride(), arg.dtype, address & 15)
            elif type(arg) is Pattern:
                cols, C, B, row_group, num_live, order, start = arg
                operands += (cols, order, start)
                addresses.append(address := cols.data_ptr())
                key += (cols.shape, cols.stride(), address & 15, C, B, row_group, num_live)
                for part in (order, start):
                    addresses.append(address := 0 if part is None else part.data_ptr())
                    key.append(address & 15 if address else None)
            else:
                key.append(arg)
        return _run(tuple(key), operands, addresses, device, lambda: function(*args, **kwargs))

    return run


def call(kind: tuple[Any, ...], operands: Operands, function: Callable[[Operands], _T]) -> _T:
    """`function(operands)`, replayed: it returns a tensor, None, or a tuple or list of these.

    Args:
        kind: all that it depends on besides facts of the operands and torch's TF32 setting.
        operands: the first is a tensor. They may be emptied, so that memory is free after its last
            use.
        function: what to do.
    """
    first: Any = operands[0]
    device = _device_for(first)
    if device is None:
        return function(operands)
    key: list[Any] = [kind, device, arithmetic(first.dtype)]
    addresses: list[int] = []
    for t in operands:
        if t is None:
            addresses.append(0)
            key.append(None)
        else:
            addresses.append(address := t.data_ptr())
            key += (t.shape, t.stride(), t.dtype, address & 15)
    return _run(tuple(key), operands, addresses, device, lambda: function(operands))


def _run(
    key: tuple[Any, ...],
    operands: Operands,
    addresses: list[int],
    device: int,
    function: Callable[[], _T],
) -> _T:
    recording = _recordings.get(key, _UNKNOWN)
    if recording is None:
        return function()
    if recording is _UNKNOWN:
        if len(_recordings) >= MAX_RECORDINGS:
            _recordings.clear()
        _recordings[key] = _SEEN
        return function()
    if recording is not _SEEN:
        result: _T = replay(recording, operands, addresses)
        return result
    recorder = Recorder(operands)
    if recorder.ambiguous:
        return function()
    with recorder:
        out = function()
    _recordings[key] = recorder.finished(out, device)
    return out


def replay(recording: Recording, tensors: Operands, addresses: list[int]) -> Any:
    """The results of a recorded call with these operands, at these addresses."""
    stream = driver.active.get_current_stream(recording.device)
    for made, run, (x, y, z), (
        function,
        metadata,
    ), values, pointers, boxes, unused in recording.launches:
        for shape, dtype, device in made:
            t = torch.empty(shape, dtype=dtype, device=device)
            tensors.append(t)
            addresses.append(t.data_ptr())
        args = values.copy()
        for at, number in pointers:
            args[at] = addresses[number]
        for at, number, kind, facts in boxes:
            box: Any = object.__new__(kind)
            box.__dict__.update(facts)
            box.base = tensors[number]
            args[at] = box
        run(x, y, z, stream, function, metadata, None, None, None, *args)
        for number in unused:
            tensors[number] = None
    results = [None if number is None else tensors[number] for number in recording.results]
    if recording.kind is None:
        return results[0]
    if recording.kind in (tuple, list):
        return recording.kind(results)
    return recording.kind(*results)
