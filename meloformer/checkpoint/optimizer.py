"""Conversion of a torch optimizer's state to named tensors and JSON text, and back."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import parse_json, to_json
from .files import damaged, storable
from .tensors import Layout, load_tensors, read_header

_LARGEST = 1e6  # learning rate, weight decay or epsilon; far more than any that is of use
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names of the first and the second
# How the optimizer is implemented depends on the machine, not on the run that is resumed.
_MACHINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


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


def restore(
    path: Path,
    manifest: dict,
    optimizer: torch.optim.AdamW,
    shard: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Load the state in a file into `optimizer`; see `store.restore_optimizer`."""
    found, metadata = read_header(path, manifest)
    groups = _read_groups(path, metadata, optimizer)
    expected = _layout(optimizer) if found else {}  # AdamW has no state before its first step
    state = _unflatten(path, load_tensors(path, found, expected, "cpu"))
    for saved, present in zip(groups, optimizer.param_groups):
        saved.update({name: present[name] for name in _MACHINE_OPTIONS if name in present})
    optimizer.load_state_dict({"state": _sharded(state, optimizer, shard), "param_groups": groups})


def _read_groups(path: Path, metadata: dict[str, str], optimizer: torch.optim.Optimizer) -> list[dict]:
    """The saved groups of parameters with their options, which must be those that `optimizer` has.

    Raises:
        UserError: the header of the file `path` does not describe the state of such an optimizer, or that of
            other parameters.
    """
    present = optimizer.state_dict()["param_groups"]
    try:
        groups, values = (parse_json(metadata[name]) for name in ("param_groups", "values"))
        saved, now = ([group["params"] for group in of] for of in (groups, present))
        sound = values == {} and all(map(_is_sound, groups, present))
    except (KeyError, TypeError, ValueError):
        raise damaged(path, "it does not hold the state of an optimizer") from None
    if saved != now:
        raise UserError(f"{path} is the optimizer state of another model; resume with the same model options")
    if not sound:
        raise damaged(path, "the settings of its optimizer are not those of AdamW")
    for group in groups:
        group["betas"] = tuple(group["betas"])
    return groups


def _is_sound(group: dict, present: dict) -> bool:
    """Whether a group has the options that it should have, with possible values."""
    if group.keys() != present.keys():
        return False
    first, second = group["betas"]
    numbers = [group[name] for name, value in present.items() if isinstance(value, float)]
    others = group.keys() - {"params", "betas"} - {n for n, v in present.items() if isinstance(v, float)}
    return (
        0 <= first < 1
        and 0 <= second < 1
        and all(0 <= number <= _LARGEST for number in numbers)
        and all(type(group[name]) in (bool, type(None)) for name in others)
    )


def _layout(optimizer: torch.optim.AdamW) -> Layout:
    """Dtype and shape of each tensor of AdamW's state, once it has taken a step."""
    layout: Layout = {}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for index, parameter in enumerate(parameters):
        layout[f"state.{index}.step"] = torch.float32, ()
        for moment in _MOMENTS:
            layout[f"state.{index}.{moment}"] = parameter.dtype, tuple(parameter.shape)
    return layout


def _unflatten(path: Path, tensors: dict[str, Tensor]) -> dict[int, dict]:
    """What a parameter's state is, by its index, from tensors by the names in `_layout`."""
    state: dict[int, dict] = {}
    for key, tensor in tensors.items():
        _, index, name = key.split(".")
        if name != _MOMENTS[0] and (tensor < 0).any():
            raise damaged(path, f"{key} is negative")
        # A copy: the optimizer keeps the tensor, and loaded tensors may be memory-mapped.
        state.setdefault(int(index), {})[name] = tensor.clone()
    return state


def _sharded(
    state: dict[int, dict], optimizer: torch.optim.AdamW, shard: Callable[[Tensor, Tensor], Tensor]
) -> dict[int, dict]:
    """The state with `shard(tensor, parameter)` in the place of each tensor of a parameter's shape."""
    parameters = dict(
        enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])
    )
    return {
        index: {
            name: shard(value, parameters[index]) if name in _MOMENTS else value
            for name, value in entries.items()
        }
        for index, entries in state.items()
    }
