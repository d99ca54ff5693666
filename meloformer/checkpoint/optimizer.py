"""Conversion of a torch optimizer's state to named tensors and JSON text, and back."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..files import to_json
from .files import damaged, storable


def flatten(state: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A torch optimizer's state dict as tensors `state.<parameter>.<name>`, and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"state.{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    groups = [
        {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
        for group in state["param_groups"]
    ]
    metadata = {"param_groups": to_json(groups).decode(), "values": to_json(values).decode()}
    return storable(tensors), metadata


def unflatten(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict:
    """The inverse of `flatten`.

    Raises:
        UserError: the file `path`, which they were read from, does not hold the state of an optimizer.
    """
    try:
        groups, values = json.loads(metadata["param_groups"]), json.loads(metadata["values"])
        state: dict[int, dict] = {int(index): dict(entries) for index, entries in values.items()}
        for key, tensor in tensors.items():
            _, index, name = key.split(".", 2)
            # A copy: the optimizer keeps the tensor, and loaded tensors may be memory-mapped.
            state.setdefault(int(index), {})[name] = tensor.clone()
        for group in groups:
            group["params"] = [int(index) for index in group["params"]]
            if "betas" in group:
                group["betas"] = tuple(group["betas"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise damaged(path, "it does not hold the state of an optimizer") from None
    return {"state": state, "param_groups": groups}


def fits(state: dict, optimizer: torch.optim.Optimizer) -> bool:
    """Whether saved groups and shapes match the optimizer's parameters."""
    saved = [group["params"] for group in state["param_groups"]]
    present = [group["params"] for group in optimizer.param_groups]
    if [len(group) for group in saved] != [len(group) for group in present]:
        return False
    shapes = {i: p.shape for old, new in zip(saved, present) for i, p in zip(old, new)}
    return set(state["state"]) <= set(shapes) and all(
        not isinstance(value, Tensor) or value.ndim == 0 or value.shape == shapes[index]
        for index, entries in state["state"].items()
        for value in entries.values()
    )


def shard_state(
    state: dict, optimizer: torch.optim.Optimizer, shard: Callable[[Tensor, Tensor], Tensor]
) -> dict:
    """A state that `fits`, with `shard(tensor, parameter)` in place of each tensor of a parameter's shape."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    indices = (index for group in state["param_groups"] for index in group["params"])
    sharded = {}
    for index, parameter in zip(indices, parameters):
        if index in state["state"]:
            sharded[index] = {
                name: shard(value, parameter) if isinstance(value, Tensor) and value.ndim else value
                for name, value in state["state"][index].items()
            }
    return {**state, "state": sharded}
