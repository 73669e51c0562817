"""TitanMAC: a causal transformer with neural memory whose linear layers may be block-sparse.

Legend: S batch, P persistent tokens, T tokens of the sequence, L = P + T, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cms_topology import CMSBlockLinear, sparse_layers
from titanmac_integration._attention._attention import Pass
from titanmac_integration._attention._window import plan_segments, plan_window
from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._inputs import check_inputs
from titanmac_integration._layers._linear import init_linear
from titanmac_integration._layers._losses import language_model_loss
from titanmac_integration._layers._project import has_hooks
from titanmac_integration._layers._rotary import rotary_table
from titanmac_integration._layers._tied import look_up, takes_table
from titanmac_integration._state import ModelState

from ._block import Addend, TitanBlock
from ._generation import generate

EMBEDDING_STD = 0.02


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

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        state: ModelState | None = None,
        *,
        return_state: bool = False,
        return_logits: bool = True,
    ) -> dict[str, Any]:
        """Logits, the loss when labels are given, the state when it is asked for.

        Args:
            input_ids: integer [S, T], values in [0, vocab_size), T at least 1.
            labels: int64 [S, T], usually ``input_ids``; the shift by one happens inside.
                Positions with -100 do not count.
            state: what an earlier call returned: ``input_ids`` are the tokens that follow. The
                logits are those that the whole sequence would have here. Gradients flow through
                the state unless it is detached (``state.detach()``).
            return_state: whether to return the state; with ``state`` it is returned always.
            return_logits: False, together with labels, computes the loss without ever holding all
                logits: faster, and with a large vocabulary a fraction of the memory. The result is
                the same but for rounding, and can be differentiated once. The head is not called
                as a module then, unless it has hooks; where it has, its logits are computed at
                once, but not returned.

        Returns:
            ``logits`` [S, T, V], unless turned off. With labels ``loss`` (nats; NaN when no
            position counts) and its parts, cut off from the graph: ``cross_entropy``, with
            ``z_loss_weight`` also ``z_loss``; with a neural memory ``memory_loss``, the mean inner
            loss, for watching only. On request ``state``.

        Raises:
            ValueError: wrong shape or dtype, no token, a sequence longer than ``max_seq_len``, a
                state of another model or batch, neither logits nor a loss, or (looked for on the
                CPU only, where it is free) a token outside the vocabulary.
        """
        check_inputs(self.config, input_ids, labels, state)
        if labels is None and not return_logits:
            raise ValueError(
                "return_logits (=False) must be True without labels, or there is nothing to "
                "compute; pass labels for a loss without logits."
            )
        keep_state = return_state or state is not None
        embedded, table = None, None
        weight = self.embedding.weight
        alone = not return_logits and state is None and self.head is None
        if alone and takes_table(weight) and not has_hooks(self.embedding):
            embedded, table = look_up(input_ids, weight)
        hidden, memory_loss, new_state = self.hidden(
            input_ids, state, keep_state=keep_state, embedded=embedded
        )
        output: dict[str, Any] = {"logits": self.logits(hidden)} if return_logits else {}
        if labels is not None:
            if return_logits:
                z_weight = self.config.z_loss_weight
                parts = language_model_loss(output["logits"], labels, z_weight)
            else:
                parts = self.loss(hidden, labels, table)
            # not `update`: torch's compiler, which does not see where `parts` come from, warns
            output = {**output, **parts}
            if memory_loss is not None:
                output["memory_loss"] = memory_loss
        if keep_state:
            output["state"] = new_state
        return output

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``prompt`` [S, T] by ``max_new_tokens``: [S, T + max_new_tokens].

        Keys and values of the window and the memories are carried from token to token, so that a
        token costs the same wherever it stands; the result is that of full recomputation. Runs in
        eval mode, without gradients.

        Args:
            temperature: 0 takes the most probable token; above, tokens are drawn.
            top_k: draw from the k most probable tokens only.
            generator: source of the draws, on the model's device; None takes torch's global one.

        Raises:
            ValueError: a bad argument, or a result that would be longer than ``max_seq_len``.
        """
        return generate(
            self,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d_model] -> [..., V]."""
        if self.head is not None:
            # called as a module, so that hooks on the head see it
            output: Tensor = self.head(hidden)
            return output
        return functional.linear(hidden, self.embedding.weight)

    def loss(
        self, hidden: Tensor, labels: Tensor, table: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``loss`` and its parts of [S, T, d_model] and labels [S, T], a chunk of logits a time.

        ``table`` stands for the embedding matrix where the head is that.
        """
        # here, since torch.compiler.disable imports Dynamo: one second, for who wants only --help
        from titanmac_integration._layers._linear_loss import linear_loss

        weight = self.config.z_loss_weight
        if self.head is None:
            table = self.embedding.weight if table is None else table
            return linear_loss(hidden, table, labels, weight)
        if type(self.head) is nn.Linear and not has_hooks(self.head):
            return linear_loss(hidden, self.head.weight, labels, weight)
        return language_model_loss(self.head(hidden), labels, weight)

    def hidden(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        *,
        keep_state: bool = False,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, ModelState | None]:
        """What the head reads [S, T, d_model], the mean inner loss of the memories, the state.

        ``embedded`` [S, T, d_model] without a state: what the embedding says to ``input_ids``.
        """
        config = self.config
        if state is None or config.titans_variant != "MAC" or not config.use_neural_memory:
            return self._piece(input_ids, state, keep_state, embedded)
        # after a state, MAC's layers take tokens of one segment at a time
        position, total = state.position, input_ids.shape[1]
        sizes = [min(total, config.segment_size - position % config.segment_size)]
        while sum(sizes) < total:
            sizes.append(min(config.segment_size, total - sum(sizes)))
        hidden, losses = [], []
        for piece in input_ids.split(sizes, dim=1):
            rows, loss, state = self._piece(piece, state, True)
            hidden.append(rows)
            losses.append(loss * piece.shape[1] / total if loss is not None else None)
        known = [loss for loss in losses if loss is not None]
        return torch.cat(hidden, dim=1), torch.stack(known).sum() if known else None, state

    def _piece(
        self,
        input_ids: Tensor,
        state: ModelState | None,
        keep_state: bool,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, ModelState | None]:
        config = self.config
        x = self.embedding(input_ids) if embedded is None else embedded
        if state is None and config.n_persistent:
            persistent = self.persistent.to(x.dtype).expand(input_ids.shape[0], -1, -1)
            x = torch.cat((persistent, x), dim=1)
        run = self._pass(input_ids.shape[1], state, keep_state, x.device)
        recompute = config.activation_checkpointing and self.training and torch.is_grad_enabled()
        x = self.dropout(x)
        layers, losses = [], []
        added: Addend | None = None
        for index, block in enumerate(self.blocks):
            past = None if state is None else state.layers[index]
            if recompute:
                # one tensor is kept per layer, not two
                x, added = x if added is None else added.plus(x), None
                x, added, loss, layer = checkpoint(
                    block,
                    x,
                    run,
                    past,
                    use_reentrant=False,
                    # without dropout nothing is drawn, and a CUDA graph cannot hold the question
                    preserve_rng_state=self.config.dropout > 0,
                )
            else:
                x, added, loss, layer = block(x, run, past, added)
            layers.append(layer)
            if loss is not None:
                losses.append(loss)
        x = x if added is None else added.plus(x)
        if state is None:
            x = x[:, config.n_persistent :]
        new = ModelState(run.position + input_ids.shape[1], tuple(layers)) if keep_state else None
        return self.norm(x), torch.stack(losses).mean() if losses else None, new

    def _pass(
        self, n_tokens: int, state: ModelState | None, keep_state: bool, device: torch.device
    ) -> Pass:
        """Masks and angles, built per call and shared by the layers.

        Kept in buffers they would have to survive meta devices, loading and compilation.
        """
        config = self.config
        shape: dict[str, Any] = {
            "window_size": config.window_size,
            "n_persistent": config.n_persistent,
            "device": device,
        }
        memories = [config.has_memory(layer) for layer in range(config.n_layers)]
        in_segments = config.titans_variant == "MAC" and any(memories)
        window = segments = None
        if state is None:
            if in_segments:
                segments = plan_segments(n_tokens, segment_size=config.segment_size, **shape)
            if not in_segments or not all(memories):
                window = plan_window(n_tokens, **shape)
        rows = n_tokens if state is not None else config.n_persistent + n_tokens
        position = 0 if state is None else state.position
        rotary = rotary_table(
            rows,
            config.d_model // config.n_heads,
            config.rope_base,
            device=device,
            start=0 if state is None else config.n_persistent + position,
        )
        return Pass(rotary, window, segments, position, keep_state)


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
