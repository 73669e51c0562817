"""Compiles the package's Triton kernels for one GPU architecture, without a GPU.

Run as `python triton_ahead.py 90` in a process of its own: the test process may run the
interpreter, which replaces the compiler. Prints a line per kernel.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titanmac_integration._attention import _segment_kernels, _window_kernels
from titanmac_integration._layers import (
    _loss_kernels,
    _norm_kernels,
    _project_kernels,
    _rotary_kernels,
    _tied_kernels,
)
from titanmac_integration._memory import (
    _answer_kernels,
    _chunk_backward_kernels,
    _chunk_kernels,
    _chunk_launch,
    _solve_kernels,
    _token_kernels,
)

FLOATS = dict.fromkeys(("eps", "z_weight", "scale", "natural", "max_step"), "fp32")
ALIGNED = {"stride", "V", *(f"{x}_{of}" for x in "xyqkvogd" for of in ("batch", "row", "head"))}
BF16, FP32, INT64 = "*bf16", "*fp32", "*i64"


def compile_for(arch, kernel, pointers, constants, warps=4):
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, FLOATS.get(name, "i32"))
        for name in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name in pointers or name in ALIGNED
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def cases():
    """Name, kernel, types of its pointers, constants, warps; d_model 640, 10 heads."""
    for sign in (1, -1):
        names = [f"{tensor}{part}_ptr" for tensor in "xy" for part in ("0", "1", "_last")]
        pointers = dict.fromkeys(names, BF16) | {"cos_ptr": FP32, "sin_ptr": FP32}
        constants = {"HALF": 32, "SIGN": sign, "ROWS": _rotary_kernels.ROWS, "BLOCK": 32}
        yield f"turn sign={sign}", _rotary_kernels._rotary_turn, pointers, constants, 4
    for adds in (False, True):
        constants = {"D": 640, "BLOCK": 1024}
        pointers = {"x_ptr": FP32, "weight_ptr": FP32, "y_ptr": BF16, "scale_ptr": FP32}
        terms = {"added_ptr": BF16, "bias_ptr": FP32, "sum_ptr": FP32}
        forward = (
            (pointers | terms, constants) if adds else (pointers, constants | dict.fromkeys(terms))
        )
        yield f"norm adds={adds}", _norm_kernels._norm_forward, *forward, 4
        pointers = {"grad_ptr": BF16, "x_ptr": FP32, "weight_ptr": FP32, "scale_ptr": FP32}
        pointers |= {"grad_x_ptr": FP32, "parts_ptr": FP32}
        constants = constants | {"SUMS": adds}
        terms = {"past_ptr": FP32, "grad_added_ptr": BF16}
        backward = (
            (pointers | terms, constants) if adds else (pointers, constants | dict.fromkeys(terms))
        )
        yield f"norm, backward adds={adds}", _norm_kernels._norm_backward, *backward, 8
    pointers = {"logits_ptr": BF16, "targets_ptr": INT64, "log_sums_ptr": FP32}
    constants = {"IGNORED": -100, "GRADIENT": True, "BLOCK": _loss_kernels.BLOCK}
    yield "loss", _loss_kernels._softmax_gradient, pointers, constants, 16
    pointers = {"x_ptr": BF16, "parts_ptr": FP32}
    names = ("ROWS", "COLUMNS", "TILES")
    constants = {name: getattr(_project_kernels, name) for name in names}
    yield "bias", _project_kernels._bias_gradient, pointers, constants, 4
    pointers = {"parts_ptr": FP32, "total_ptr": FP32}
    constants = {"ROWS": _project_kernels.PART_ROWS, "COLUMNS": _project_kernels.PART_COLUMNS}
    yield "parts", _project_kernels._sum_parts, pointers, constants, 8
    pointers = {"table_ptr": FP32, "rows_ptr": FP32, "sorted_ptr": INT64, "order_ptr": INT64}
    names = ("ROWS", "COLUMNS")
    yield (
        "tied",
        _tied_kernels._add_rows,
        pointers,
        {n: getattr(_tied_kernels, n) for n in names},
        4,
    )
    pointers = {"lower_ptr": FP32, "inverse_ptr": FP32}
    for size, warps in ((64, 4), (128, 8)):
        yield f"inverse {size}", _solve_kernels._invert_unit_lower, pointers, {"SIZE": size}, warps
    tensors = ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")
    window = {f"{name}_ptr": BF16 for name in tensors} | {"log_ptr": FP32, "delta_ptr": FP32}
    window |= {"cos_ptr": FP32, "sin_ptr": FP32}
    for name in ("FORWARD", "GRAD_QUERY", "GRAD_KEY"):
        tiles = dict(getattr(_window_kernels, name))
        kernel = getattr(_window_kernels, f"_window_{name.lower()}")
        sizes = {"M": tiles["M"], "N": tiles["N"], "D": 64}
        for turn in ({},) if name == "FORWARD" else ({"TURN": False}, {"TURN": True}):
            yield f"{name} {turn}", kernel, window, sizes | turn, tiles["num_warps"]
    yield from segment_cases()
    yield from memory_cases()


def segment_cases():
    """Heads of width 64."""
    for name in ("FORWARD", "GRAD_QUERY", "GRAD_KEY"):
        tiles = getattr(_segment_kernels, name)
        kernel = getattr(_segment_kernels, f"_segment_{name.lower()}")
        singles = ("log_ptr", "delta_ptr")
        pointers = {
            x: FP32 if x in singles else BF16 for x in kernel.arg_names if x.endswith("_ptr")
        }
        sizes = {"M": tiles["M"], "N": tiles["N"], "D": 64}
        yield f"segment {name}", kernel, pointers, sizes, tiles["num_warps"]


def memory_cases():
    """Four memories of width 64 that read 768 channels; chunks also of width 128."""
    for width in (64, 128):
        tuned = _chunk_launch.launch("tf32", width)
        sizes = {"H": 4, "D": width, "B": tuned.chunk, "DP": width, "PRECISION": "tf32"}
        for module in (_chunk_kernels, _chunk_backward_kernels):
            for name in vars(module):
                if not name.startswith("_memory_"):
                    continue
                kernel = getattr(module, name)
                columns = min(tuned.scan_columns) if "scan" in name else tuned.columns
                constants = sizes | ({"BV": columns} if "BV" in kernel.arg_names else {})
                pointers = {x: FP32 for x in kernel.arg_names if x.endswith("_ptr")}
                yield f"{name} {width}", kernel, pointers, constants, tuned.chunks["num_warps"]
    channels = {"H": 4, "D": 64, "DP": 64, "TAPS": 4, "ROWS": _token_kernels.ROWS}
    gates = {"H": 4, "HP": 4, "C": 768, "ROWS": _token_kernels.ROWS, "PAD": 4}
    gates |= {name: getattr(_token_kernels, name) for name in ("MAX_ALPHA", "MIN_LOG_ETA")}
    rows = {"D": 64, "DP": 64, "ROWS": _answer_kernels.ROWS}
    rows["COLUMNS"] = _answer_kernels.COLUMNS
    shortest = {"SHORTEST": _token_kernels.SHORTEST}
    half = (
        "flat_ptr",
        "past_ptr",
        "d_flat_ptr",
        "d_past_ptr",
        "d_mixed_ptr",
        "y_ptr",
        "grad_ptr",
        "beside_ptr",
    )
    for module, named in (
        (_token_kernels, channels | shortest | gates),
        (_answer_kernels, rows),
    ):
        for name in vars(module):
            if name.startswith("_memory_"):
                kernel = getattr(module, name)
                constants = {x: value for x, value in named.items() if x in kernel.arg_names}
                pointers = {
                    x: BF16 if x in half else FP32 for x in kernel.arg_names if x.endswith("_ptr")
                }
                yield name, kernel, pointers, constants, 4


for name, kernel, pointers, constants, warps in cases():
    compiled = compile_for(int(sys.argv[1]), kernel, pointers, constants, warps)
    sys.stdout.write(f"{name} {len(compiled.asm['cubin']) > 0}\n")
