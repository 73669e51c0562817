"""Compiles every kernel for one GPU architecture, without a GPU; prints one JSON line per kernel.

Run as `python triton_ahead.py 90` in a process of its own: the test process may run the
interpreter, which replaces the compiler.
"""

from __future__ import annotations

import json
import sys

from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blockell_kernels._triton import _activation_kernels as activations
from blockell_kernels._triton import _block_kernels as blocks
from blockell_kernels._triton import _few_tokens_kernels as few
from blockell_kernels._triton import _halves_kernels as halves
from blockell_kernels._triton._fisher_kernels import token_square_sums
from blockell_kernels._triton._forward_kernels import (
    forward_descriptors,
    forward_packed,
    forward_pointers,
)
from blockell_kernels._triton._grad_input_kernels import (
    grad_input_descriptors,
    grad_input_pointers,
)
from blockell_kernels._triton._grad_values_kernels import (
    grad_values_descriptors,
    grad_values_pointers,
    reduce_parts,
)
from blockell_kernels._triton._mlp_kernels import grad_input_activated
from blockell_kernels._triton._place_kernels import note_places
from blockell_kernels._triton._sum_kernels import sum_rows
from blockell_kernels._triton._walk_kernels import (
    walk_forward,
    walk_grad_input,
    walk_grad_values,
)

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NO_ACTIVATION = {"ACTIVATION": "none", "KEEP_PRE": False, "ARITHMETIC": "exact"}
WITH_ACTIVATION = {"ACTIVATION": "gelu", "KEEP_PRE": True, "ARITHMETIC": "ptx"}


def compile_for(arch, kernel, constants, *, pointers=None, boxes=None, warps=4, stages=3):
    """Compile one kernel. Aligned pointers and strides are declared so, as a launch would."""
    pointers, boxes = pointers or {}, boxes or {}
    if "OVERLAPS" in kernel.arg_names:
        constants = constants | {"OVERLAPS": arch >= 90}
    if "FAR" in kernel.arg_names:
        constants = {"FAR": False} | constants
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in boxes:
            dtype, box = boxes[name]
            signature[name] = f"tensordesc<{dtype}[{','.join(map(str, box))}]>"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name.endswith(("_xk", "_dk", "stride_k")) and not constants.get("FAR"):
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if "stride" in name or "features" in name:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def precision(dtype, arch):
    return "tf32x3" if dtype == "fp32" and arch >= 80 else "ieee"


def forward_case(arch, dtype, path, B, BM, BN, BK, *, persistent=0, parts=1, **options):
    constants = {"B": B, "BM": BM, "BN": max(BN, 16), "BK": BK, "GROUP_M": 8, "HAS_BIAS": True}
    constants |= {"PRECISION": precision(dtype, arch), "UPCAST": False} | WITH_ACTIVATION
    pointers = {"cols_ptr": "i32", "bias_ptr": dtype}
    if path == "pointers":
        constants |= {"BN_LIVE": BN, "EVEN_K": BK <= B}
        pointers |= {"pre_ptr": dtype}
        pointers |= {"x_ptr": dtype, "values_ptr": dtype, "y_ptr": dtype}
        return compile_for(arch, forward_pointers, constants, pointers=pointers, **options)
    rows = max(1, BN // B)
    constants |= {"STORE_PARTS": parts, "PROGRAMS": persistent}
    boxes = {
        "x_desc": (dtype, (BM, BK)),
        "w_desc": (dtype, (rows, 1, BN // rows, BK)),
        "y_desc": (dtype, (BM, BN // parts)),
        "pre_desc": (dtype, (BM, BN // parts)),
    }
    return compile_for(
        arch, forward_descriptors, constants, pointers=pointers, boxes=boxes, **options
    )


def packed_case(arch, dtype, B, BM, BN, BK, *, parts=1, **options):
    constants = {"B": B, "BM": BM, "BN": BN, "BK": BK, "GROUP_M": 8, "HAS_BIAS": True}
    constants |= {"PRECISION": precision(dtype, arch), "UPCAST": False, "EVEN_K": False}
    constants |= {"STORE_PARTS": parts, "pre_desc": None} | NO_ACTIVATION
    pointers = {"cols_ptr": "i32", "bias_ptr": dtype, "x_ptr": dtype}
    boxes = {"w_desc": (dtype, (BN, BK)), "y_desc": (dtype, (BM, BN // parts))}
    return compile_for(arch, forward_packed, constants, pointers=pointers, boxes=boxes, **options)


def grad_input_case(
    arch, dtype, path, B, BM, BN, BK, *, persistent=0, parts=1, split=False, **options
):
    constants = {"B": B, "BM": BM, "BN": max(BN, 16), "BK": BK, "GROUP_M": 8}
    constants |= {"PRECISION": precision(dtype, arch), "UPCAST": False}
    pointers = {"order_ptr": "i32", "col_start_ptr": "i32"}
    if path == "pointers":
        constants |= {"BN_LIVE": BN, "EVEN_K": BK <= B, "COLUMNS": 32}
        pointers |= {"dy_ptr": dtype, "values_ptr": dtype, "dx_ptr": dtype}
        return compile_for(arch, grad_input_pointers, constants, pointers=pointers, **options)
    rows = max(1, BK // B)
    constants |= {"PROGRAMS": persistent, "STORE_PARTS": parts, "COLUMNS": 32, "PARTS": split}
    pointers |= {"parts_ptr": "fp32" if split else dtype}
    boxes = {
        "dy_desc": (dtype, (BM, BK)),
        "w_desc": (dtype, (rows, 1, BK // rows, BN)),
        "dx_desc": (dtype, (BM, BN // parts)),
    }
    return compile_for(
        arch, grad_input_descriptors, constants, pointers=pointers, boxes=boxes, **options
    )


def middle_case(arch, dtype, B, BM, BN, BK, *, parts=1, **options):
    constants = {"B": B, "BM": BM, "BN": BN, "BK": BK, "GROUP_M": 8, "COLUMNS": 32, "PROGRAMS": 0}
    constants |= {"PRECISION": precision(dtype, arch), "UPCAST": False, "STORE_PARTS": parts}
    constants |= {"ACTIVATION": "gelu", "ARITHMETIC": "ptx"}
    pointers = {"order_ptr": "i32", "col_start_ptr": "i32", "sums_ptr": "fp32"}
    rows, tile = max(1, BK // B), (dtype, (BM, BN // parts))
    boxes = {"dy_desc": (dtype, (BM, BK)), "w_desc": (dtype, (rows, 1, BK // rows, BN))}
    boxes |= dict.fromkeys(("dh_desc", "pre_desc", "a_desc"), tile)
    return compile_for(
        arch, grad_input_activated, constants, pointers=pointers, boxes=boxes, **options
    )


def grad_values_case(arch, dtype, path, B, BR, NB, BT, **options):
    constants = {"B": B, "BR": max(BR, 16), "NB": NB, "BT": BT}
    constants |= {"PRECISION": precision(dtype, arch), "UPCAST": False}
    pointers = {"cols_ptr": "i32", "out_ptr": "fp32"}
    if path == "pointers":
        constants |= {"BR_LIVE": BR}
        pointers |= {"dy_ptr": dtype, "x_ptr": dtype}
        return compile_for(arch, grad_values_pointers, constants, pointers=pointers, **options)
    boxes = {"dy_desc": (dtype, (BT, BR)), "x_desc": (dtype, (BT, B))}
    return compile_for(
        arch, grad_values_descriptors, constants, pointers=pointers, boxes=boxes, **options
    )


def block_cases(arch, dtype, B):
    tensors = {"values_ptr": dtype, "dense_ptr": dtype, "cols_ptr": "i32", "out_ptr": dtype}
    tensors |= {"dy_ptr": dtype, "x_ptr": dtype, "t_ptr": dtype, "parts_ptr": "fp32"}
    yield blocks.scatter_blocks, {"B": B, "LINES": 4, "KB": 1024 // B, "ZEROS": 4096}, tensors
    expanding = {"B": B, "LINES": min(B, 8), "CB": max(1, 512 // B), "KB": 256}
    yield blocks.expand_blocks, expanding, tensors | {"map_ptr": "i32"}
    indices = dict.fromkeys(("cols_ptr", "order_ptr", "col_start_ptr", "places_ptr"), "i32")
    noted = {"B": B, "ROWS": 128 // B, "DEEP": max(1, 64 // B), "FORWARD": False, "BLOCK": 256}
    yield note_places, noted, indices
    yield blocks.index_column, {"BLOCK": 1024}, indices
    yield blocks.gather_blocks, {"B": B, "KB": max(1, 4096 // B**2)}, tensors
    yield blocks.square_sums, {"B": B, "MB": max(1, 128 // B), "BT": 32}, tensors
    yield blocks.pack_rows, {"B": B, "KB": max(1, 4096 // B**2)}, tensors | {"packed_ptr": dtype}
    yield reduce_parts, {"BB": B * B, "PARTS": 8, "BLOCK": 512}, tensors
    yield token_square_sums, {"B": B, "MB": 256 // B, "BT": 32}, tensors | {"sums_ptr": "fp32"}
    exact = {"ACTIVATION": "silu", "ARITHMETIC": "exact"}
    names = dict.fromkeys(("h_ptr", "a_ptr", "da_ptr", "dh_ptr"), dtype) | {"sums_ptr": "fp32"}
    yield activations.activate_elements, exact | {"BLOCK": 16 * B}, names
    yield activations.gradient_tiles, exact | {"BT": 64, "BW": B}, names
    yield sum_rows, {"BT": 16, "BW": B, "TILES": 8}, tensors
    split = {"B": B, "LINES": 8, "KB": 512 // B}
    halves_of = {"high_ptr": "fp16", "low_ptr": "fp16", "values_ptr": dtype, "cols_ptr": "i32"}
    names = ("factors_ptr", "lifts_ptr", "peaks_ptr", "others_ptr", "rows_ptr", "columns_ptr")
    halves_of |= dict.fromkeys(names, "fp32")
    yield halves.row_peaks, split, halves_of
    yield halves.column_peaks, split, halves_of | {"peaks_ptr": "i32"}
    yield halves.split_blocks, split | {"BY_ROW": True, "SCATTERED": False}, halves_of
    norms = {"B": B, "RB": max(1, 64 // B), "CB": max(1, 64 // B), "BT": 32, "UPCAST": False}
    yield blocks.block_norms, norms | {"PRECISION": precision(dtype, arch)}, tensors


def few_cases(arch, dtype, B):
    """The kernels for few tokens; yields like `block_cases`."""
    names = ("x_ptr", "dy_ptr", "values_ptr", "bias_ptr", "out_ptr")
    tensors = dict.fromkeys(names, dtype) | {"parts_ptr": "fp32"}
    tensors |= dict.fromkeys(("cols_ptr", "order_ptr", "col_start_ptr"), "i32")
    common = {"B": B, "BM": 16, "PRECISION": precision(dtype, arch), "UPCAST": False}
    strip = common | {"BN": max(16, min(B, 32)), "BN_LIVE": min(B, 32), "BK": 128}
    for far in (False, True):
        yield few.few_forward, strip | {"EVEN": False, "HAS_BIAS": True, "FAR": far}, tensors
    yield few.few_grad_input, strip, tensors
    rows = {"BR": max(16, min(B, 32)), "BR_LIVE": min(B, 32), "KB": max(1, 512 // B)}
    yield few.few_grad_values, common | rows, tensors
    yield few.add_parts, {"PARTS": 8, "BLOCK": 512, "HAS_BIAS": True}, tensors


def walk_case(arch, dtype, kernel, B, BM, BN, BK, *, boxes, **options):
    constants = {"B": B, "BM": BM, "BN": BN, "CH": 8, "UPCAST": False}
    constants["PRECISION"] = precision(dtype, arch)
    pointers = dict.fromkeys(("cols_ptr", "order_ptr", "col_start_ptr", "map_ptr"), "i32")
    pointers |= dict.fromkeys(("values_ptr", "bias_ptr", "out_ptr"), dtype)
    if kernel is walk_grad_values:
        constants |= {"BT": BK, "GROUP": 8}
        described = {"dy_desc": (dtype, (BK, BM)), "x_desc": (dtype, (BK, BN))}
        return compile_for(arch, kernel, constants, pointers=pointers, boxes=described, **options)
    constants |= {"BK": BK, "GROUP_M": 8, "BOXES": boxes}
    if kernel is walk_forward:
        constants["HAS_BIAS"] = True
    name = "x" if kernel is walk_forward else "dy"
    described = {name: (dtype, (BM, BK))} if boxes else {}
    pointers |= {} if boxes else {name: dtype}
    return compile_for(arch, kernel, constants, pointers=pointers, boxes=described, **options)


def walk_cases(arch):
    """All tilings that the rules choose, for the tiles that stress them most."""
    deep, boxes = {"boxes": False, "stages": 3}, {"boxes": True, "stages": 4}
    for B in (8, 32):
        yield f"walk_forward tile {B}", (walk_forward, B, 32, 64, 128), deep
        wide = boxes | {"warps": 8}
        yield f"walk_forward by descriptors, tile {B}", (walk_forward, B, 128, 128, 64), wide
        yield (
            f"walk_grad_input tile {B}",
            (walk_grad_input, B, 32, 64, 64),
            boxes | {"boxes": False},
        )
        yield f"walk_grad_input by descriptors, tile {B}", (walk_grad_input, B, 128, 64, 64), boxes
        yield (
            f"walk_grad_values by descriptors, tile {B}",
            (walk_grad_values, B, 64, 128, 64),
            boxes,
        )
        widest = boxes | {"warps": 8, "stages": 3}
        yield (
            f"walk_grad_values by descriptors, wide, tile {B}",
            (walk_grad_values, B, 128, 256, 64),
            widest,
        )


def tiles(dtype, arch, path):
    """Tiles compiled: all by descriptors in bfloat16, a few elsewhere, for the time it takes."""
    if dtype == "bf16":
        return (16, 32, 64, 128) if path == "descriptors" else (8, 32, 128)
    return (16,) if arch < 80 or path == "pointers" else (16, 128)


def all_cases(arch):
    """(name, function that compiles) of every kernel that `arch` may run."""
    paths = ("pointers", "descriptors") if arch >= 90 else ("pointers",)
    for dtype in ("bf16", "fp32") if arch >= 80 else ("fp16", "fp32"):
        step = 64 if dtype != "fp32" else 32
        for path in paths:
            for B in tiles(dtype, arch, path):
                width, name = (128 if B > 8 else 8), f"{path} {dtype} tile {B}"
                BK = step if path == "pointers" else min(B, step)
                big = {"warps": 8, "stages": 3}
                yield f"forward {name}", forward_case, (arch, dtype, path, B, 128, width, BK), big
                arguments = (arch, dtype, path, B, 128, B, step)
                yield f"grad_input {name}", grad_input_case, arguments, big
                if path == "descriptors" and B >= 64 and dtype == "bf16":
                    split = {"warps": 4, "stages": 4, "split": True}
                    yield f"grad_input parts {name}", grad_input_case, arguments, split
                NB = 1 if path == "descriptors" else max(1, 128 // B)
                arguments = (arch, dtype, path, B, width, NB, step)
                yield f"grad_values {name}", grad_values_case, arguments, big
                if path == "descriptors" and B >= 64 and dtype == "bf16":
                    arguments = (arch, dtype, B, 128, B, 64)
                    yield f"middle {name}", middle_case, arguments, big | {"parts": 2}
                if path == "descriptors" and B <= 32:
                    arguments = (arch, dtype, B, 128, width, step)
                    yield f"forward packed {dtype} tile {B}", packed_case, arguments, big


def waits_first(ptx):
    """Whether a kernel touches memory only when the one before it has ended."""
    wait = ptx.find("griddepcontrol.wait")
    touches = [
        ptx.find(word) for word in ("ld.global", "st.global", "atom", "cp.async", "prefetch")
    ]
    return 0 <= wait < min((at for at in touches if at >= 0), default=len(ptx))


def report(name, compiled):
    ptx = compiled.asm["ptx"]
    facts = {"name": name, "shared": compiled.metadata.shared}
    facts |= {"wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync")}
    facts |= {"tma": ptx.count("cp.async.bulk.tensor"), "cp_async": ptx.count("cp.async.cg")}
    facts |= {"waits": waits_first(ptx)}
    sys.stdout.write(json.dumps(facts) + "\n")


def main(arch):
    for name, compile_one, arguments, options in all_cases(arch):
        report(name, compile_one(*arguments, **options))
    if arch == 90:  # elsewhere they are not taken
        for name, arguments, options in walk_cases(arch):
            report(name, walk_case(arch, "bf16", *arguments, **options))
    for B in (8, 128) if arch >= 80 else (8,):
        cases = [*block_cases(arch, "fp32", B), *few_cases(arch, "fp32", B)]
        for kernel, constants, tensors in cases:
            name = f"{kernel.fn.__name__} tile {B}"
            report(name, compile_for(arch, kernel, constants, pointers=tensors, warps=8))


if __name__ == "__main__":
    main(int(sys.argv[1]))
