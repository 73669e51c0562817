"""TitanMAC: a causal transformer whose linear layers may be block-sparse.

Legend: S batch, P persistent tokens, T tokens of the sequence, L = P + T, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import CMSBlockLinear, sparse_layers

from ._attention import CausalWindowAttention, attention_mask, rotary_table
from ._config import TitanMACConfig
from ._linear import init_linear
from ._mlp import TitanMLP

EMBEDDING_STD = 0.02
IGNORE_INDEX = -100


class TitanBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: TitanMACConfig, layer: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = CausalWindowAttention(config, layer, generator=generator)
        self.norm_mlp = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = TitanMLP(config, layer, generator=generator)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """``x`` [S, L, d_model] -> [S, L, d_model]."""
        x = x + self.dropout(self.attention(self.norm_attention(x), mask, rotary))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class TitanMAC(nn.Module):
    """The language model. Causal: no logit depends on a later token, exactly.

    Args:
        config: shape of the model.
        generator: source of all initial weights and topologies; None takes torch's global one.
    """

    def __init__(self, config: TitanMACConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD, generator=generator)
        self.persistent = nn.Parameter(torch.empty(config.n_persistent, config.d_model))
        nn.init.normal_(self.persistent, std=EMBEDDING_STD, generator=generator)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TitanBlock(config, layer, generator=generator) for layer in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head: nn.Linear | None = None
        """None when the head is the embedding matrix, so that no state is stored twice."""
        if not config.tie_weights:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            init_linear(self.head, generator)

    @property
    def block_sparse_layers(self) -> dict[str, CMSBlockLinear]:
        """The block-sparse layers by module name; empty for a dense model."""
        return sparse_layers(self)

    @property
    def num_parameters(self) -> int:
        """Number of trainable values; blocks that are absent do not count."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the loss when labels are given.

        Args:
            input_ids: integer [S, T], values in [0, vocab_size).
            labels: int64 [S, T], usually ``input_ids``; the shift by one happens inside.
                Positions with -100 do not count.

        Returns:
            ``logits`` [S, T, V] and, with labels, ``loss``: mean cross entropy in nats, NaN when
            no position counts.

        Raises:
            ValueError: wrong shape or dtype, a sequence longer than ``max_seq_len``, or (looked
                for on the CPU only, where it is free) a token outside the vocabulary.
        """
        config = self.config
        self._check_input(input_ids, labels)
        n_tokens = input_ids.shape[1]
        x = self.embedding(input_ids)
        if config.n_persistent:
            persistent = self.persistent.to(x.dtype).expand(input_ids.shape[0], -1, -1)
            x = torch.cat((persistent, x), dim=1)
        # Built per call and shared by all layers: kept in a buffer they would have to survive
        # meta devices, loading and compilation.
        mask = attention_mask(
            n_tokens,
            window_size=config.window_size,
            n_persistent=config.n_persistent,
            device=x.device,
        )
        rotary = rotary_table(
            config.n_persistent + n_tokens,
            config.d_model // config.n_heads,
            config.rope_base,
            device=x.device,
        )
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask, rotary)
        x = self.norm(x[:, config.n_persistent :])
        if self.head is None:
            logits = functional.linear(x, self.embedding.weight)
        else:
            logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        predictions = logits[:, :-1].flatten(0, 1).float()
        loss = functional.cross_entropy(
            predictions, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        return {"logits": logits, "loss": loss}

    def _check_input(self, input_ids: Tensor, labels: Tensor | None) -> None:
        config = self.config
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids (shape {tuple(input_ids.shape)}, {input_ids.dtype}) must be an integer "
                "tensor [batch, sequence]; for a single sequence use input_ids[None]."
            )
        if input_ids.shape[1] > config.max_seq_len:
            raise ValueError(
                f"input_ids (sequence of {input_ids.shape[1]} tokens) must not be longer than "
                f"max_seq_len (={config.max_seq_len}); cut it or raise max_seq_len."
            )
        if labels is not None and (labels.shape != input_ids.shape or labels.dtype != torch.int64):
            raise ValueError(
                f"labels (shape {tuple(labels.shape)}, {labels.dtype}) must be int64 with the "
                f"shape of input_ids {tuple(input_ids.shape)}; the shift happens inside."
            )
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            for name, tokens, allowed in (("input_ids", input_ids, 0), ("labels", labels, -100)):
                if tokens is not None and tokens.numel():
                    self._check_vocabulary(name, tokens, allowed)

    def _check_vocabulary(self, name: str, tokens: Tensor, ignored: int) -> None:
        outside = (tokens >= self.config.vocab_size) | ((tokens < 0) & (tokens != ignored))
        if bool(outside.any()):
            raise ValueError(
                f"{name} (contains {int(tokens[outside][0])}) must be in [0, vocab_size "
                f"(={self.config.vocab_size})); use the tokenizer that the model was made for."
            )


def create_titanmac_model(
    config: TitanMACConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TitanMAC:
    """A model with weights and topology drawn from ``seed``, the same on every device.

    On device "meta" nothing is allocated; useful to count parameters.
    """
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            model = TitanMAC(config)
    else:
        # torch's modules draw default weights first; global randomness shall not notice
        with torch.random.fork_rng(devices=[]):
            model = TitanMAC(config, generator=torch.Generator().manual_seed(seed))
    return model.to(device=device, dtype=dtype)
