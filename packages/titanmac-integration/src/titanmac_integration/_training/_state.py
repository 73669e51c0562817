"""Everything that continuing a training to the bit needs, besides the model."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from titanmac_integration._seeding import stream

from ._checkpoint import TrainingCheckpoint
from ._config import FREE_FIELDS
from ._processes import gather_bytes, rank, world_size
from ._random import global_random_state, set_global_random_state
from ._tree import (
    decode_tree,
    encode_tree,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
)

if TYPE_CHECKING:
    from ._trainer import Trainer

EXTRA = "_extra_state"
_FORMS = ("capturable", "foreach", "fused")


def trainer_state(trainer: "Trainer") -> dict[str, Any]:
    """Optimizer, topology, data position, randomness, progress. All processes must call this."""
    drives = trainer._optimizer_drives
    return {
        "step": trainer.step,
        "nonfinite": trainer._nonfinite,
        "data": trainer._data.get_state(),
        "optimizer": optimizer_state_by_name(trainer.optimizer, _names(trainer)),
        # an optimizer that drives the topology keeps its state, too
        "topology": None if drives or trainer.manager is None else trainer.manager.state_dict(),
        "scaler": trainer._runner.scaler.state_dict() if trainer._runner.scaler else None,
        "phase": trainer._phase.state_dict() if trainer._phase else None,
        "callbacks": {
            name: callback.state_dict() for name, callback in _callbacks(trainer).items()
        },
        "processes": _gather({"random": global_random_state(trainer.device), **_extra(trainer)}),
    }


def load_trainer_state(trainer: "Trainer", checkpoint: TrainingCheckpoint) -> None:
    """Put back what :func:`trainer_state` returned, and the model.

    Raises:
        ValueError: the checkpoint belongs to another configuration; names every differing field.
    """
    _check_configuration(trainer, checkpoint.info)
    state = checkpoint.state
    trainer.model.load_state_dict(checkpoint.model)
    forms = [_form(group) for group in trainer.optimizer.param_groups]
    load_optimizer_state_by_name(trainer.optimizer, state["optimizer"], _names(trainer))
    for group, form in zip(trainer.optimizer.param_groups, forms, strict=True):
        rate = float(group["lr"])
        group.update(form)
        group["lr"] = form["lr"].fill_(rate) if isinstance(form["lr"], Tensor) else rate
    if trainer.manager is not None and state["topology"] is not None:
        trainer.manager.load_state_dict(state["topology"])
    if trainer._runner.scaler is not None and state["scaler"] is not None:
        trainer._runner.scaler.load_state_dict(state["scaler"])
    for name, callback in _callbacks(trainer).items():
        if name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][name])
    trainer.step, trainer._nonfinite = state["step"], state["nonfinite"]
    trainer._resumed = state["phase"]
    trainer._data.set_state(state["data"])
    _load_processes(trainer, state["processes"])


def _form(group: Mapping[str, Any]) -> dict[str, Any]:
    """How an optimizer computes: a choice of the run that goes on, not of the one that was saved.

    Its rate is among it, for where that lies, not for its value.
    """
    return {key: group[key] for key in (*_FORMS, "lr") if key in group}


def _load_processes(trainer: "Trainer", processes: list[dict[str, Any]]) -> None:
    """What each process has of its own; with another number of them, means and new streams."""
    if len(processes) == world_size():
        extra = processes[rank()]["extra"]
    else:
        names = processes[0]["extra"]
        extra = {n: torch.stack([p["extra"][n] for p in processes]).mean(dim=0) for n in names}
    modules = dict(trainer.model.named_modules())
    for name, value in extra.items():
        modules[name.removesuffix(EXTRA).removesuffix(".")].set_extra_state(value)
    if rank() < len(processes):
        set_global_random_state(processes[rank()]["random"], trainer.device)
    else:
        name = f"process {rank()} from step {trainer.step}"
        torch.manual_seed(stream(trainer.config.seed, name).initial_seed())


def _extra(trainer: "Trainer") -> dict[str, Any]:
    """Statistics that every process collects from its own tokens."""
    extra = {k: v for k, v in trainer.model.state_dict().items() if k.endswith(EXTRA)}
    return {"extra": extra}


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """``own`` of every process, on every process."""
    if world_size() == 1:
        return [own]
    plain, tensors = encode_tree(own)
    device = _collective_device()
    texts = gather_bytes(json.dumps(plain).encode(), device)
    blobs = gather_bytes(save(tensors), device)
    return [
        decode_tree(json.loads(text), load(blob)) for text, blob in zip(texts, blobs, strict=True)
    ]


def _collective_device() -> torch.device:
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _names(trainer: "Trainer") -> dict[Tensor, str]:
    return {parameter: name for name, parameter in trainer.model.named_parameters()}


def _callbacks(trainer: "Trainer") -> dict[str, Any]:
    """The callbacks that have a state, by position and class."""
    return {
        f"{i} {type(callback).__name__}": callback
        for i, callback in enumerate(trainer.callbacks)
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
    }


def _check_configuration(trainer: "Trainer", info: Mapping[str, Any]) -> None:
    differences = []
    for what, config in (("model", trainer.model.config), ("training", trainer.config)):
        differences += differing_fields(type(config).from_dict(info[what]).to_dict(), config)
    if differences:
        raise ValueError(
            "the checkpoint belongs to another configuration: " + "; ".join(differences) + "."
        )


def differing_fields(saved: Mapping[str, Any], config: Any) -> list[str]:
    """The fields in which ``config`` differs from a saved one, those that matter, with values."""
    mine = config.to_dict()
    return [
        f"{name} is {saved[name]!r} in the checkpoint and {mine[name]!r} here"
        for name in mine
        if name not in FREE_FIELDS and saved.get(name) != mine[name]
    ]
