"""JSON objects as dataclasses: every field is there, none besides, and each has the type that is declared.

What a checkpoint's files hold is declared once, as the dataclass that the program works with.
"""

import dataclasses
import types
from pathlib import Path
from typing import TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from .files import damaged

Declared = TypeVar("Declared")
_SHOWN = 60  # characters of a value or of a list of names in a message


def read_dataclass(cls: type[Declared], values: dict, file: Path) -> Declared:
    """The dataclass `cls` with the given values.

    Fields may be declared as bool, int, float, str, dict, tuples, unions and other dataclasses. A float may
    be written as a whole number, and must be finite.

    Args:
        values: an object as JSON has it.
        file: where it was read, for messages.

    Raises:
        UserError: a field is missing, unknown or of another type.
        ValueError: the dataclass does not take the values.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := values.keys() - names:
        raise UserError(
            f"{file} has {brief(*sorted(unknown))}, which this version of MeloFormer does not know: it was "
            "written by a newer version, or is damaged; update MeloFormer, or use another checkpoint"
        )
    if lacking := names - values.keys():
        raise UserError(
            f"{file} lacks {brief(*sorted(lacking))}: it was written by an older version of MeloFormer, or "
            "is damaged; use the version that wrote it, or train again"
        )
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _is_a(value, hints[name]):
            raise damaged(file, f"{name} is {brief(value)}, not of type {_name(hints[name])}")
    return _build(cls, values)


def brief(*values: object) -> str:
    """Values in a line that is not too long, whatever they are."""
    text = ", ".join(repr(value)[: _SHOWN + 1] for value in values[:_SHOWN])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _name(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _is_a(value: object, hint: object) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, list):
            return False
        if arguments[-1] is not ...:
            return len(value) == len(arguments) and all(map(_is_a, value, arguments))
        return all(_is_a(entry, arguments[0]) for entry in value)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return (
            isinstance(value, dict)
            and value.keys() == hints.keys()
            and all(_is_a(value[name], hints[name]) for name in hints)
        )
    if hint is float:
        return type(value) in (int, float) and abs(value) <= 1e300  # nor if it is nan
    return type(value) is hint


def _build(cls: type[Declared], values: dict) -> Declared:
    hints = get_type_hints(cls)
    return cls(**{name: _built(value, hints[name]) for name, value in values.items()})


def _built(value: object, hint: object) -> object:
    if isinstance(value, list):
        return tuple(value)
    for cls in (hint, *get_args(hint)):
        if dataclasses.is_dataclass(cls) and isinstance(value, dict):
            return _build(cls, value)
    return value
