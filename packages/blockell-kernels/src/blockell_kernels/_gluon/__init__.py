"""Kernels in Gluon, for Hopper: shared memory, barriers and the work of each warp placed by hand.

Triton cannot index shared memory, nor give warps different work. Some of these kernels are
variants of the Triton ones behind the same launchers (`_triton/_grad_input.py`, ...), which take
them where a tiling asks for "gluon" or a path that begins so, and `runs_on` allows it; the others
(float32 as float16 halves, products by the whole weight, the MLP's products by turns) have rules of
their own.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""
