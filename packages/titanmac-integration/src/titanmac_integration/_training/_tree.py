"""Nested state as JSON and tensors: what ``state_dict()`` returns, without pickle."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR, _ITEMS, _TUPLE = "$tensor", "$items", "$tuple"


def encode_tree(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested state into something for JSON and named CPU tensors for safetensors.

    Dicts (with keys that are strings, numbers, booleans or None), lists, tuples, strings, numbers,
    booleans, None and tensors come back from :func:`decode_tree` as they were, every float to the
    bit.

    Raises:
        TypeError: anything else, with its place.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, "", tensors), tensors


def decode_tree(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`encode_tree`.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(plain, list):
        return [decode_tree(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(decode_tree(value, tensors) for value in plain[_TUPLE])
    if _ITEMS in plain:
        return {key: decode_tree(value, tensors) for key, value in plain[_ITEMS]}
    return {key: decode_tree(value, tensors) for key, value in plain.items()}


def to_storable(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and no view into a larger storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


def _encode(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        storable = to_storable(tree)
        if any(storable.data_ptr() == t.data_ptr() for t in tensors.values() if t.numel()):
            storable = storable.clone()
        tensors[place] = storable
        return {_TENSOR: place}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Mapping):
        for key in tree:
            if key is not None and not isinstance(key, (bool, int, float, str)):
                raise TypeError(f"{place or 'state'} has a key (={key!r}) that JSON cannot hold.")
        children = {key: _encode(value, f"{place}/{key}", tensors) for key, value in tree.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in children):
            return children
        return {_ITEMS: [[key, value] for key, value in children.items()]}
    if isinstance(tree, (list, tuple)):
        values = [_encode(value, f"{place}/{i}", tensors) for i, value in enumerate(tree)]
        return {_TUPLE: values} if isinstance(tree, tuple) else values
    raise TypeError(
        f"{place or 'state'} (={type(tree).__name__}) must consist of dicts, lists, tuples, "
        "strings, numbers, booleans, None and tensors to be saved in a checkpoint."
    )


def optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Any]:
    """``optimizer.state_dict()`` with parameter names in place of numbers.

    ``names`` maps the model's parameters to their names; parameters it does not know (an optimizer
    may learn some of its own) are called by group and position.
    """
    state = dict(optimizer.state_dict())
    number_to_name = {}
    groups = []
    for g, (group, saved) in enumerate(
        zip(optimizer.param_groups, state["param_groups"], strict=True)
    ):
        own = []
        for p, (parameter, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            number_to_name[number] = names.get(parameter, f"group {g}, parameter {p}")
            own.append(number_to_name[number])
        groups.append({**saved, "params": own})
    state["state"] = {number_to_name.get(key, key): v for key, v in state["state"].items()}
    state["param_groups"] = groups
    return state


def load_optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], names: Mapping[Tensor, str]
) -> None:
    """The inverse of :func:`optimizer_state_by_name`.

    Raises:
        ValueError: another number of groups, a group with other parameters, or another kind of
            optimizer; names what differs.
    """
    ours = optimizer_state_by_name(optimizer, names)["param_groups"]
    theirs = state["param_groups"]
    if len(ours) != len(theirs):
        raise ValueError(
            f"the checkpoint's optimizer has {len(theirs)} parameter groups, this one "
            f"{len(ours)}; build the optimizer as it was."
        )
    for g, (mine, saved) in enumerate(zip(ours, theirs, strict=True)):
        missing = sorted(set(saved["params"]) - set(mine["params"]))
        unknown = sorted(set(mine["params"]) - set(saved["params"]))
        if missing or unknown:
            raise ValueError(
                f"parameter group {g} of the optimizer differs from the checkpoint's: only there "
                f"{missing[:5]}, only here {unknown[:5]}; build the optimizer as it was."
            )
    numbers: dict[str, int] = {}
    groups = []
    current = optimizer.state_dict()["param_groups"]
    for mine, saved, numbered in zip(ours, theirs, current, strict=True):
        numbers.update(zip(mine["params"], numbered["params"], strict=True))
        groups.append({**saved, "params": numbered["params"]})
    optimizer.load_state_dict(
        {
            **state,
            "state": {numbers.get(key, key): value for key, value in state["state"].items()},
            "param_groups": groups,
        }
    )
    for before, group in zip(current, optimizer.param_groups, strict=True):
        missing = sorted(before.keys() - group.keys())
        if missing:
            raise ValueError(
                f"the checkpoint's optimizer has no {', '.join(missing)}, which "
                f"{type(optimizer).__name__} needs; build the optimizer as it was."
            )
