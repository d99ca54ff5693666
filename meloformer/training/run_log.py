"""The log of a run: `log.jsonl` always, TensorBoard and Weights & Biases on request. Only rank 0 has one."""

import importlib
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..files import parse_json_object, write_atomic

LOG = "log.jsonl"
DAMAGED = LOG + ".damaged"
_AXES = ("step", "epoch")
_NUMBERS = ("loss", "val_loss", "lr", "tokens", "tokens_per_s")  # what the summary and the curve are made of


class RunLog:
    """Writes records, each of which has a `step`.

    Args:
        folder: the output folder of the run.
        last_step: the step that the run resumes after. Records of later steps, left by an interrupted run,
            are removed: these steps will be repeated. Damaged lines are moved to `DAMAGED`, and it is said.
        settings: of the run, for Weights & Biases.
        repeated: names of entries. Records of `last_step` that have one are removed, too: what wrote them
            comes after the checkpoint of that step, and will be done again.
        tensorboard: whether to write `folder/tensorboard`.
        wandb: project of Weights & Biases, or None.

    Raises:
        UserError: the package of a requested logger is not installed.
    """

    def __init__(
        self,
        folder: Path,
        last_step: int,
        settings: dict,
        *,
        repeated: tuple[str, ...] = (),
        tensorboard: bool = False,
        wandb: str | None = None,
    ):
        self._boards: list[tuple[Callable[[dict, int], None], Callable[[], None]]] = []
        path = folder / LOG
        kept, damaged = _lines_until(path, last_step, repeated)
        if tensorboard:
            # It can forget whole steps only: the records that stay of the last one are shown again.
            records = map(_record, kept) if repeated else ()
            again = [record for record in records if record["step"] == last_step]
            self._boards.append(_tensorboard(folder, last_step if repeated else last_step + 1))
            for record in again:
                self._show(record)
        if wandb is not None:
            self._boards.append(_wandb(folder, settings, wandb))
        if damaged:
            with (folder / DAMAGED).open("ab") as file:
                file.write(damaged)
            count = damaged.count(b"\n")
            print(f"{path}: {count} damaged line(s) moved to {folder / DAMAGED}", file=sys.stderr)
        write_atomic(path, b"".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._show(record)

    def _show(self, record: dict) -> None:
        values = {
            name: value
            for name, value in record.items()
            if name not in _AXES and isinstance(value, (int, float)) and value is not None
        }
        for log, _ in self._boards:
            log(values, record["step"])

    def sync(self) -> None:
        """Flush the records to the disk, so that no checkpoint is ahead of the log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for _, close in self._boards:
            close()


def read_log(path: Path) -> list[dict]:
    """The records of a JSONL file. Damaged lines are skipped.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the training log {path}: {error.strerror or error}") from None
    return [record for record in map(_record, lines) if record is not None]


def _lines_until(path: Path, last_step: int, repeated: tuple[str, ...]) -> tuple[list[bytes], bytes]:
    """The lines of steps up to `last_step`, without what will be repeated; and the damaged ones."""
    kept, damaged = [], []
    if path.exists():
        *lines, last = path.read_bytes().split(b"\n")
        for line in [*lines, last] if last else lines:  # the last may lack its end, or be cut short
            record = _record(line)
            if record is None:
                damaged.append(line + b"\n")
            elif record["step"] < last_step or (
                record["step"] == last_step and record.keys().isdisjoint(repeated)
            ):
                kept.append(line + b"\n")
    return kept, b"".join(damaged)


def _record(line: bytes) -> dict | None:
    """The record of a line; None if it holds none."""
    try:
        record = parse_json_object(line)
    except ValueError:
        return None
    return record if type(record.get("step")) is int and all(map(_is_sound, record.items())) else None


def _is_sound(entry: tuple[str, object]) -> bool:
    name, value = entry
    if name in _NUMBERS and not (value is None or type(value) in (int, float)):
        return False
    return type(value) is not int or abs(value) < 2**63


def _import(module: str, flag: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"--{flag} needs a package that is not installed: pip install {package}") from None


def _tensorboard(folder: Path, purge_step: int):
    module = _import("torch.utils.tensorboard", "tensorboard", "tensorboard")
    writer = module.SummaryWriter(folder / "tensorboard", purge_step=purge_step)

    def log(values: dict, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(folder: Path, settings: dict, project: str):
    wandb = _import("wandb", "wandb", "wandb")
    identity = folder / "wandb_id.txt"  # so that a resumed run goes on with its own curves
    if not identity.exists():
        write_atomic(identity, uuid.uuid4().hex.encode())
    run = wandb.init(
        project=project,
        dir=str(folder),
        id=identity.read_text(),
        resume="allow",
        config=settings,
        name=folder.name,
    )
    return lambda values, step: run.log(values, step=step), run.finish
