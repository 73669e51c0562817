"""Compiles every Gluon kernel for Hopper, without a GPU; prints one JSON line per kernel.

Run as `python gluon_ahead.py` in a process of its own, like `triton_ahead.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from blockell_kernels._gluon import (
    _forward,
    _grad_input,
    _grad_values,
    _mlp,
    _streamed_values,
    _whole,
    _whole_values,
)
from blockell_kernels._gluon._descriptors import rearranged
from blockell_kernels._gluon._forward_kernels import forward_by_pieces
from blockell_kernels._gluon._grad_input_kernels import grad_input_by_units
from blockell_kernels._gluon._grad_values_kernels import grad_values_by_items
from blockell_kernels._gluon._mlp_kernels import forward_by_turns, middle_by_turns
from blockell_kernels._gluon._streamed_values_kernels import grad_values_streamed
from blockell_kernels._gluon._whole_kernels import whole_weight
from blockell_kernels._gluon._whole_values_kernels import whole_values
from blockell_kernels._triton._tiling import Tiling


def box(dtype, shape, swizzle_bytes):
    """The type of a descriptor."""
    layout = NVMMASharedLayout(swizzle_bytes, 16, len(shape))
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}],{layout!r}>"


def compile_one(kernel, constants, types, options):
    if "OVERLAPS" in kernel.arg_names:
        constants, options = constants | {"OVERLAPS": True}, options | {"launch_pdl": True}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr")
    }
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled_bytes(cubin):
    """Bytes of a thread's stack, by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def block_box(dtype, rows, B):
    """The type of a descriptor of whole blocks."""
    if rearranged(B):
        return box(dtype, (rows, B * B // 256, 256), 0)
    return box(dtype, (rows, B, min(B, 64)), 2 * min(B, 64))


def forward_case(dtype, B, tokens, outputs=128, path="gluon"):
    tiling = Tiling(path=path, BM=tokens, BN=outputs, BK=64)
    rows, panel = max(1, outputs // B), min(B, 64)
    lines, part = box(dtype, (64, panel), 2 * panel), (rows, min(B, outputs), panel)
    whole = box(dtype, (rows, B * B // 256, 256), 0)
    types = {
        "x_desc": box(dtype, (64 * B // 256, 256), 0) if path == "gluon packed" else lines,
        "w_desc": whole if _forward.swizzles(B, tiling) else box(dtype, part, 2 * panel),
        "y_desc": box(dtype, (64, outputs), 128),
        "cols_ptr": "*i32",
        "bias_ptr": f"*{dtype}",
    }
    constants = _forward.constants(B, tiling, True)
    return compile_one(forward_by_pieces, constants, types, {"num_warps": 4})


def grad_input_case(dtype, B, columns, depth):
    tiling = Tiling(path="gluon", BM=128, BN=columns, BK=depth)
    constants = _grad_input.constants(B, tiling, 0.5)
    types = {
        "dy_desc": box(dtype, (64, depth), 128),
        "w_desc": block_box(dtype, depth // B, B),
        "dx_desc": box(dtype, (64, B), 2 * B),
        "order_ptr": "*i32",
        "col_start_ptr": "*i32",
    }
    return compile_one(grad_input_by_units, constants, types, {"num_warps": 4})


def values_boxes(dtype, B, packed):
    """Types of the weight gradient's operands."""
    lines = (64, min(B, 64)), 2 * min(B, 64)
    x = box(dtype, (B // 4, 256), 0) if packed else box(dtype, *lines)
    return {"dy_desc": box(dtype, (64, 64), 128), "x_desc": x, "cols_ptr": "*i32"}


def grad_values_case(dtype, B, outputs, columns, packed):
    types = values_boxes(dtype, B, packed) | {"out_ptr": f"*{dtype}", "work_ptr": "*fp32"}
    constants = _grad_values.constants(B, outputs, columns, packed)
    return compile_one(grad_values_by_items, constants, types, {"num_warps": 4})


def streamed_case(dtype, B, outputs, columns, packed):
    constants = _streamed_values.constants(B, outputs, columns, packed)
    blocks = (64, constants["WIDTH"]) if B == 128 else (B, B)
    types = values_boxes(dtype, B, packed)
    types |= {"out_desc": box(dtype, blocks, min(128, 2 * B))}
    return compile_one(grad_values_streamed, constants, types, {"num_warps": 4})


def activated_forward_case(dtype, B, keep_pre):
    constants = _mlp.forward_constants(B, keep_pre)
    constants |= {"HAS_BIAS": True, "ACTIVATION": "gelu", "ARITHMETIC": "ptx"}
    types = {
        "x_desc": box(dtype, (64, min(B, 64)), 2 * min(B, 64)),
        "w_desc": block_box(dtype, 128 // B, B),
        "y_desc": box(dtype, (64, 128), 128),
        "pre_desc": box(dtype, (64, 128), 128),
        "cols_ptr": "*i32",
        "bias_ptr": f"*{dtype}",
    }
    return compile_one(forward_by_turns, constants, types, {"num_warps": 4})


def middle_case(dtype, dense, keep_a):
    constants = _mlp.middle_constants(dense, 20, keep_a)
    constants |= {"NEED_SUMS": True, "ACTIVATION": "gelu", "ARITHMETIC": "ptx"}
    types = dict.fromkeys(("dh_desc", "pre_desc", "a_desc"), box(dtype, (64, 128), 128))
    types |= {
        "dy_desc": box(dtype, (64, 64), 128),
        "w_desc": box(dtype, (64, 128), 128),
        "sums_ptr": "*fp32",
        "order_ptr": "*i32",
        "col_start_ptr": "*i32",
    }
    return compile_one(middle_by_turns, constants, types, {"num_warps": 4})


def whole_case(dtype, B, forward, cut):
    constants = _whole.constants(B, forward, _whole.Cut(*cut), forward)
    types = {
        "a_desc": box(dtype, (64, 64), 128),
        "w_desc": box(dtype, _whole.box(B, forward), min(128, 2 * B)),
        "y_desc": box(dtype, (64, 128), 128),
        "parts_ptr": "*fp32",
        "place_ptr": "*i32",
        "bias_ptr": f"*{dtype}",
    }
    return compile_one(whole_weight, constants, types, {"num_warps": 4})


def whole_values_case(dtype, B):
    types = {
        "dy_desc": box(dtype, (64, 64), 128),
        "x_desc": box(dtype, (64, 128), 128),
        "out_desc": box(dtype, (min(B, 64), B), min(128, 2 * B)),
        "place_ptr": "*i32",
    }
    constants = {"B": B, "STAGES": _whole_values.STAGES, "GROUP": 8}
    return compile_one(whole_values, constants, types, {"num_warps": 4})


def all_cases():
    """(name, function that compiles, arguments) of every kernel."""
    for dtype, B, columns, depth in (
        ("bf16", 16, 256, 128),
        ("fp16", 32, 256, 128),
        ("bf16", 64, 320, 64),
    ):
        name = f"grad_input {dtype} tile {B}, {columns} columns, {depth} deep"
        yield name, grad_input_case, (dtype, B, columns, depth)
    for B, *cut in (
        (16, 320),
        (64, 192),
        (128, 64, 64),
        (16, 320, 128, "gluon packed"),
        (32, 256, 128, "gluon direct"),
    ):
        yield f"forward tile {B}, {cut}", forward_case, ("bf16", B, *cut)
    for B, keep_pre in ((16, True), (128, False)):
        yield f"forward with f, tile {B}, {keep_pre}", activated_forward_case, ("bf16", B, keep_pre)
    for dense, keep_a in ((False, True), (True, False)):
        yield f"middle, dense {dense}, {keep_a}", middle_case, ("fp16", dense, keep_a)
    for B, forward, cut in ((16, True, (4, 1)), (32, False, (4, 3)), (128, False, (5, 1))):
        yield f"whole, tile {B}, {forward}, {cut}", whole_case, ("bf16", B, forward, cut)
    for B in (16, 128):
        yield f"whole grad_values, tile {B}", whole_values_case, ("bf16", B)
    for B, outputs, columns, packed in ((16, 128, 256, True), (64, 64, 640, False)):
        name = f"grad_values tile {B}, {outputs} x {columns}"
        yield name, grad_values_case, ("bf16", B, outputs, columns, packed)
    for B, *cut in ((16, 128, 256, True), (64, 64, 256, False), (128, 128, 192, False)):
        yield f"grad_values streamed, tile {B}, {cut}", streamed_case, ("bf16", B, *cut)


def main():
    for name, compile_case, arguments in all_cases():
        compiled = compile_case(*arguments)
        ptx = compiled.asm["ptx"]
        facts = {"name": name, "shared": compiled.metadata.shared}
        facts |= {"wgmma": ptx.count("wgmma.mma_async"), "tma": ptx.count("cp.async.bulk.tensor")}
        facts |= {"spilled": spilled_bytes(compiled.asm["cubin"])}
        facts |= {"per_multiprocessor": 1}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
