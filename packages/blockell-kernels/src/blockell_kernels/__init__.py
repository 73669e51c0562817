"""Block-sparse linear kernels for Block-ELL weights, forward and backward, with a reference."""

__version__ = "0.1.0"
