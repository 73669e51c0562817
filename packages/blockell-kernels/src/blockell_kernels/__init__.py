"""Block-sparse linear kernels for Block-ELL weights, forward and backward, with a reference."""

from blockell_kernels import _flops as _flops  # for torch's counter
from blockell_kernels._fisher import block_fisher
from blockell_kernels._functional import (
    Explanation,
    block_ell_linear,
    block_grad_norms,
    explain,
)
from blockell_kernels._mlp import block_ell_mlp
from blockell_kernels._mlp_explain import MLPExplanation, explain_mlp
from blockell_kernels._stats import probe_size
from blockell_kernels._transforms import transforms_active
from blockell_kernels._validation import check_topology

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "MLPExplanation",
    "block_ell_linear",
    "block_ell_mlp",
    "block_fisher",
    "block_grad_norms",
    "check_topology",
    "explain",
    "explain_mlp",
    "probe_size",
    "transforms_active",
]
