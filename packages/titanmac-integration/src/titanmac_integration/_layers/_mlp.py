"""TitanMAC's MLP: two linear layers with a GELU between them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import block_sparse_mlp, mlp_is_fused
from titanmac_integration._config._config import TitanMACConfig

from . import _project
from ._linear import make_linear
from ._project import has_hooks, project, project_apart


class TitanMLP(nn.Module):
    """fc1, GELU, fc2; both linear layers block-sparse when the configuration says so.

    Block-sparse ones run fused, unless hooks or the like hang on their being called.
    """

    def __init__(
        self, config: TitanMACConfig, layer: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.fc1 = make_linear(
            config, layer, "mlp", config.d_model, config.d_ff, generator=generator
        )
        self.fc2 = make_linear(
            config, layer, "mlp", config.d_ff, config.d_model, generator=generator
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., d_model] -> [..., d_model]."""
        if type(self.fc1) is nn.Linear and type(self.fc2) is nn.Linear:
            return project(self.fc2, functional.gelu(project(self.fc1, x)))
        return block_sparse_mlp(x, self.fc1, self.fc2, "gelu")

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same in two terms, the last one fc2's bias; None: the first is the whole."""
        if has_hooks(self):
            return self(x), None
        if type(self.fc1) is nn.Linear and type(self.fc2) is nn.Linear:
            return project_apart(self.fc2, functional.gelu(project(self.fc1, x)))
        if _project._on_gpu(x) and mlp_is_fused(self.fc1, self.fc2):
            bias = self.fc2.bias
            assert bias is None or isinstance(bias, Tensor)
            return block_sparse_mlp(x, self.fc1, self.fc2, "gelu", add_bias=False), bias
        return self(x), None
