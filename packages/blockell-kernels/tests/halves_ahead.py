"""Compiles the Gluon kernels of float32 for Hopper, without a GPU; prints one JSON line per kernel.

Run as `python halves_ahead.py` in a process of its own, like `gluon_ahead.py`.
"""

from __future__ import annotations

import json
import sys

from gluon_ahead import compile_one, spilled_bytes
from triton.experimental.gluon.language import NVMMASharedLayout

from blockell_kernels._gluon import _halves
from blockell_kernels._gluon._halves_kernels import product_of_halves
from blockell_kernels._gluon._halves_values_kernels import grad_values_of_halves
from blockell_kernels._triton._tilings_halves import DEPTH, tiling


def box(dtype, bits, shape):
    """The type of a descriptor."""
    layout = NVMMASharedLayout(min(128, shape[-1] * bits // 8), bits, len(shape))
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}],{layout!r}>"


def product_case(B, BN, forward, dense, activation="none"):
    constants = _halves.constants(B, BN, tiling("forward", "halves", BN), forward, dense)
    constants |= {"HAS_BIAS": forward, "ACTIVATION": activation, "KEEP_PRE": activation != "none"}
    types = dict.fromkeys(("y_ptr", "pre_ptr", "factors_ptr", "lifts_ptr", "bias_ptr"), "*fp32")
    types |= dict.fromkeys(("list_ptr", "col_start_ptr"), "*i32")
    weight = box("fp16", 16, (BN, DEPTH) if forward else (DEPTH, BN))
    types |= {"x_desc": box("fp32", 32, (64, min(B, 32))), "wh_desc": weight, "wl_desc": weight}
    return compile_one(product_of_halves, constants, types, {"num_warps": 4})


def gradient_case(B, dense):
    way = tiling("grad_values", "halves", 128)
    constants = _halves.gradient_constants(B, way, dense)
    types = {
        "dy_desc": box("fp32", 32, (way.BK, 64)),
        "x_desc": box("fp32", 32, (way.BK, min(B, 32))),
        "cols_ptr": "*i32",
        "out_ptr": "*fp32",
    }
    return compile_one(grad_values_of_halves, constants, types, {"num_warps": 4})


def report(name, compiled):
    ptx = compiled.asm["ptx"]
    facts = {"name": name, "shared": compiled.metadata.shared, "per_multiprocessor": 1}
    facts |= {"wgmma": ptx.count("wgmma.mma_async"), "tma": ptx.count("cp.async.bulk.tensor")}
    facts |= {"spilled": spilled_bytes(compiled.asm["cubin"])}
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main():
    for case in (
        (16, 128, True, False),
        (128, 128, True, False, "relu"),
        (64, 128, True, True),
        (32, 32, False, False),
        (128, 128, False, False),
        (64, 128, False, True),
    ):
        report(f"product of halves {case}", product_case(*case))
    for case in ((16, False), (128, False), (64, True)):
        report(f"gradient of halves {case}", gradient_case(*case))


if __name__ == "__main__":
    main()
