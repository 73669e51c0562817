"""The neural memory: a small network per sequence that learns while the sequence is read."""

from ._gates import Gates, Kernel, momentum_kernel
from ._linear import linear_memory
from ._mlp import mlp_memory
from ._module import MemoryOutput, NeuralMemory
from ._state import MemoryState, Weights

__all__ = [
    "Gates",
    "Kernel",
    "MemoryOutput",
    "MemoryState",
    "NeuralMemory",
    "Weights",
    "linear_memory",
    "mlp_memory",
    "momentum_kernel",
]
