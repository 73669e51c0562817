"""`consolidate`: one look at a task before its data are let go.

Legend: N tokens of a pass, n inputs and m outputs of a layer.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology._retention._capture import captured, undisturbed
from cms_topology._retention._consolidation import Consolidation
from cms_topology._retention._names import parameter_names, sparse_by_values, unwrap
from cms_topology._retention._probes import LogitsFn, Probes, default_logits, known_answers
from cms_topology._retention._product import Product, flat
from cms_topology._retention._sensitivity import measure_sensitivity
from cms_topology._retention._statistics import TaskStatistics
from cms_topology._retention._touched import given_to_functions, parameters_behind

LossFn = Callable[[nn.Module, Any], Any]
UNKNOWN = "an operation that is not shown"
USAGES = ("loss", "sampled", "none")


def consolidate(
    model: nn.Module,
    batches: Iterable[Any],
    task: str = "task",
    *,
    loss_fn: LossFn | None = None,
    previous: Consolidation | None = None,
    weight: float = 1.0,
    generator: torch.Generator | None = None,
    usage: str = "loss",
    influence: bool = False,
    outputs_fn: LossFn | None = None,
    rank: int | None = None,
    sensitivity_batches: int = 4,
    probes: Probes | None = None,
    logits_fn: LogitsFn = default_logits,
    dtype: torch.dtype = torch.float32,
) -> Consolidation:
    """Keep of a task what later training must respect: statistics of its inputs, no data.

    Runs the model over `batches` in evaluation mode and accumulates, for every weight matrix that
    is multiplied with inputs (`nn.Linear`, `CMSBlockLinear`, any `functional.linear` or
    `x @ weight`, so also a head that is tied to the embedding; convolutions, whose tokens are the
    positions of their output; recurrent layers, whose tokens are the steps), the covariance of
    the inputs; which embedding rows are looked up; from the gradients of the loss, the usage of
    every block; and which parameters were used at all: others, such as a head for a new task, train
    freely later (with usage="none" that is not known, and all stay). Weights, gradients, modes and
    random number generators are left as they were. Under torch.distributed every rank passes its
    own batches and all get the same result.

    Args:
        model: wrapped by DDP or torch.compile or not.
        batches: a little of the task's training data; some thousand tokens are enough.
        task: its name.
        loss_fn: (model, batch) -> scalar, the mean over tokens in nats. Default:
            `model(**batch)["loss"]` for a dict or the like, else `model(*batch)`. Modules that it
            uses beside the model are not guarded.
        previous: what was kept of earlier tasks; the result holds them too.
        weight: how much this task counts beside the others.
        generator: source of the random perturbations and sampled labels, on the CPU; default: one
            of a fixed seed.
        usage: where the error signals come from. "loss": the loss itself (its labels).
            "sampled": labels drawn from the model's own predictions, which is the Fisher
            information proper (Kunstner et al. 2019). "none": forward passes only.
        influence: weight each token by the squared sensitivity of the outputs that matter to it,
            under a random projection; tokens that the answers do not depend on then count less.
        outputs_fn: (model, batch) -> tensor [..., classes], the outputs that matter. Default: all
            logits, `model(**batch)["logits"]`.
        rank: keep only that many eigenvectors of every covariance.
        sensitivity_batches: batches on which to measure how much drift the loss bears, which
            sets the drift budget of `RetentionGuard` (at most; 0: no measurement). Needs a loss.
        probes: inputs on which `RetentionGuard` watches the drift, from `make_probes`; best made up
            by the model itself. Answers that follow symbols the task never uses are left out.
        logits_fn: (model, probe inputs) -> [..., V]; default: the model's result or its "logits".
        dtype: of the stored covariances. The sums are float64.

    Returns:
        What is kept; pass it to `RetentionGuard`.

    Raises:
        ValueError: no batches, a loss that is not a scalar, inputs or gradients that are not
            finite, a setting outside its range, or a model whose parameters no product uses.
    """
    if usage not in USAGES:
        raise ValueError(f"usage (={usage!r}) must be one of {', '.join(map(repr, USAGES))}.")
    if not weight > 0:
        raise ValueError(f"weight (={weight}) must be greater than 0.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank (={rank}) must be at least 1, or None to keep everything.")
    if influence and outputs_fn is not None and probes is not None:
        raise ValueError(
            "influence (=True) with an outputs_fn of your own must not be combined with probes: "
            "they may watch answers that the weighting ignores, and no drift budget would help "
            "those. Leave out influence, outputs_fn or probes."
        )
    model = unwrap(model)
    loss_of = loss_fn if loss_fn is not None else default_loss
    outputs_of = outputs_fn if outputs_fn is not None else _default_logits
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    sparse = sparse_by_values(model)
    stats = TaskStatistics(parameter_names(model), sparse)
    kept: list[Any] = []
    with undisturbed(model):
        for batch in batches:
            if len(kept) < sensitivity_batches:
                kept.append(batch)
            _observe(model, batch, stats, loss_of, outputs_of, usage, influence, rng)
        stats.all_reduce()
        if not stats.layers:
            raise ValueError(
                f"batches (={len(kept)} seen) of task {task!r} reached no weight matrix of "
                f"{type(model).__name__}, of an nn.Linear, a CMSBlockLinear, a convolution, a "
                "recurrent layer or another functional.linear; pass at least one batch, and a "
                "loss_fn that calls the model it is given."
            )
        stats.check_finite(task)
        if stats.elsewhere:
            warnings.warn(
                f"the loss of task {task!r} depends on {len(stats.elsewhere)} parameters (first of "
                f"shape {tuple(next(iter(stats.elsewhere)).shape)}) that are none of "
                f"{type(model).__name__}'s, and no guard of it will hold them: pass one module "
                "that holds all that must be remembered, such as an nn.ModuleDict, or detach them.",
                stacklevel=2,
            )
        seen = (stats.layers.keys() | stats.rows.keys()) - stats.others.keys()
        memory = Consolidation(
            {
                name: layer.memory(weight, stats.live(name), usage != "none", dtype)
                for name, layer in stats.layers.items()
                if name in seen
            },
            {name: used for name, used in stats.rows.items() if name in seen},
            [task],
            [weight],
            # without a graph a parameter may have been used unseen
            touched=None if usage == "none" else sorted(stats.touched),
            unseen={
                name: stats.others.get(name, UNKNOWN)
                for name in sorted(stats.touched)
                if name not in seen and stats.parameters[name].ndim >= 2
            },
        )
        if probes is not None:
            used = {p: stats.rows[name] for p, name in stats.names.items() if name in stats.rows}
            memory.probes = [known_answers(model, probes, used, logits_fn)]
        if kept and usage != "none":
            memory.drift_levels, memory.drift_rises = measure_sensitivity(
                model, kept, loss_of, memory, rng
            )
    if rank is not None:
        memory = memory.low_rank(rank)
    return memory if previous is None else previous.plus(memory)


def default_loss(model: nn.Module, batch: Any) -> Any:
    """The loss a model computes by itself; see `consolidate`."""
    if isinstance(batch, Mapping):  # also that of a tokenizer, which is no dict
        return model(**batch)["loss"]
    arguments = batch if isinstance(batch, (tuple, list)) else (batch,)
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"batch (={type(batch).__name__} of {len(arguments)}) must fit {type(model).__name__}."
            f"forward ({error}), whose result is then taken for the loss; pass loss_fn, such as "
            "lambda model, batch: cross_entropy(model(batch[0]), batch[1])."
        ) from error
    return model(*arguments)


def _default_logits(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        logits: Tensor = model(**batch)["logits"]
        return logits
    raise ValueError(
        f"batch (={type(batch).__name__}) must be a dict for the model to be asked for its logits; "
        "pass outputs_fn(model, batch) -> [..., classes]."
    )


def _observe(
    model: nn.Module,
    batch: Any,
    stats: TaskStatistics,
    loss_of: LossFn,
    outputs_of: LossFn,
    usage: str,
    influence: bool,
    generator: torch.Generator,
) -> None:
    """One batch: covariances, embedding rows, and error signals if asked for."""

    def projected() -> Tensor:
        result = outputs_of(model, batch)
        draws = torch.randn(result.shape, generator=generator, device=generator.device)
        return (result * draws.to(result)).sum()

    def loss() -> Tensor:
        if usage == "sampled":
            return _sampled_loss(outputs_of(model, batch), generator)
        return check_scalar(loss_of(model, batch))

    if influence:
        for product, x, gradient in _products(model, stats, projected, differentiate=True):
            if gradient is not None:
                layer, groups = stats.of(product)
                layer.add_inputs(x, groups, gradient)
    if usage == "none":
        if not influence:
            forward = lambda: loss_of(model, batch)  # noqa: E731
            for product, x, _ in _products(model, stats, forward, differentiate=False):
                layer, groups = stats.of(product)
                layer.add_inputs(x, groups)
        return
    for product, x, gradient in _products(model, stats, loss, differentiate=True):
        layer, groups = stats.of(product)
        if not influence:
            layer.add_inputs(x, groups)
        if gradient is not None:
            # the loss is a mean over tokens: times N it is the sum of the tokens' own losses
            layer.add_errors(x, gradient * x.shape[0], groups)


def _products(
    model: nn.Module, stats: TaskStatistics, run: Callable[[], Any], *, differentiate: bool
) -> Iterator[tuple[Product, Tensor, Tensor | None]]:
    """Every product of one pass, its input [N, n] or [N, g, n], and the gradient [N, g m] by its
    output."""
    products: list[Product] = []
    edges: list[Any] = []
    nothing = torch.empty(0, device="cpu")

    def on_product(product: Product) -> None:
        x, y = product.input, product.output
        if product.weight not in stats.names or x.numel() == 0:  # a parameter from elsewhere
            return
        if x.is_complex() or y.is_complex():
            stats.use_otherwise({product.weight: "a product of complex numbers"})
            return
        products.append(product._replace(input=x.detach(), output=nothing))
        # the edge, not the tensor: what follows may change it in place; none under no_grad
        known = differentiate and y.requires_grad
        edges.append(torch.autograd.graph.get_gradient_edge(y) if known else None)

    grad = torch.set_grad_enabled(differentiate)
    with grad, captured(model, on_product, stats.use_rows, stats.use) as uses:
        result = run()
    stats.use_otherwise(uses.others)
    found: Sequence[Tensor | None] = ()
    if differentiate:
        for leaf in parameters_behind(result):
            stats.use_leaf(leaf)
        hidden = {
            leaf: name for leaf, name in given_to_functions(result) if leaf not in stats.sparse
        }
        stats.use_otherwise(hidden)
        # outside the capture: recomputation (activation checkpointing) must not count twice
        asked = [edge for edge in edges if edge is not None]
        found = torch.autograd.grad(result, asked, allow_unused=True) if asked else ()
    gradients = iter(found)
    for product, edge in zip(products, edges, strict=True):
        g = None if edge is None else next(gradients)
        yield product, product.rows(product.input), None if g is None else flat(g)


def _sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross entropy against labels drawn from the predictions themselves."""
    flat = logits.flatten(0, -2).float()
    draws = torch.rand(flat.shape, generator=generator, device=generator.device).to(flat)
    # Gumbel's trick: the largest of log p - log(-log u) is a sample of p
    labels = (flat.detach() - (-draws.clamp(min=1e-20).log()).clamp(min=1e-20).log()).argmax(-1)
    return nn.functional.cross_entropy(flat, labels)


def check_scalar(loss: Any) -> Tensor:
    """The loss itself, or an error that says what to pass."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn's result (={shape}) must be a scalar tensor, the mean loss over tokens; pass "
            "loss_fn(model, batch), or usage='none' to do without error signals."
        )
    return loss.reshape(())
