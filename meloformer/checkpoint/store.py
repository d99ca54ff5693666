"""Checkpoints: weights, configuration and optimizer state as safetensors and JSON, never pickled.

A checkpoint is a folder `step-00001234`, which gets this name only when it is complete:

    model.safetensors       the weights
    optimizer.safetensors   the optimizer's tensors and, in its header, its other settings (may be absent)
    config.json             the model configuration
    tokenizer.json          the vocabulary that the weights were trained on
    trainer.json            step, epoch, seed, ...: the state that a resumed run needs
    manifest.json           size and SHA-256 of all of these

A file is verified against the manifest before it is used.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import check_can_write, sync_folder, to_json
from ..model.transformer import ModelConfig
from .files import (
    CONFIG,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    TOKENIZER,
    TRAINER,
    VERSION,
    NewerFormatError,
    check_size,
    damaged,
    load_json,
    naming_what_cannot_be_read,
    one_line,
    read_manifest,
    seal,
    storable,
    verify,
)
from .model import check_tokenizer, read_config, read_weights
from .optimizer import flatten, restore
from .run_state import RunState, read_run_state

_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_REPLACED = ".replaced"  # a complete checkpoint while another of the same step replaces it
_TEMPORARY = ".incomplete-"
_SPARE_BYTES = 16 << 20  # for the text files, the log and the file system, in addition to the tensors


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        step: the optimizer step after which it was saved.
        weights: the model's state dict, on the device asked for.
        config: the model configuration.
        tokenizer_json: `vocab.to_json()`, the same when it was saved as now.
        trainer: the state of the training run, as JSON.
        has_optimizer: whether training can resume from it.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    config: ModelConfig
    tokenizer_json: dict
    trainer: dict
    has_optimizer: bool

    @property
    def max_seq_len(self) -> int:
        """Length of a row in training, in tokens.

        Raises:
            UserError: the checkpoint does not record it.
        """
        identity = self.trainer.get("identity")
        length = identity.get("max_seq_len") if isinstance(identity, dict) else None
        if type(length) is not int or length < 1:
            raise damaged(self.path / TRAINER, "it lacks max_seq_len")
        return length

    def run_state(self) -> RunState:
        """The state of the training run.

        Raises:
            UserError: the checkpoint holds none, or one with missing or impossible parts.
        """
        if not self.has_optimizer:
            raise UserError(
                f"{self.path} holds no optimizer state, so training cannot resume from it; --init_from "
                "begins a new run with its weights"
            )
        return read_run_state(self.trainer, self.step, self.path / TRAINER)


def save_checkpoint(
    root: str | os.PathLike,
    step: int,
    *,
    model_state: dict[str, Tensor],
    config: dict,
    tokenizer_json: dict,
    optimizer_state: dict | None,
    trainer: dict,
    keep_last: int,
    val_loss: float | None = None,
) -> Path:
    """Write `root/step-<step>` atomically, then delete the oldest checkpoints beyond `keep_last`.

    The checkpoint of the lowest validation loss is kept in addition. Earlier checkpoints survive a full disk
    and a process that is killed at any moment. Only one process may save into a root at a time; leftovers of
    an interrupted save are removed.

    Args:
        root: folder of the checkpoints of one run; created if missing.
        step: optimizer steps so far; an existing checkpoint of this step is replaced. Checkpoints of
            later steps are deleted: the run that saves now skipped them as damaged.
        model_state: `model.state_dict()`. A tensor listed under several names is stored under each.
        config: JSON values.
        tokenizer_json: `vocab.to_json()`.
        optimizer_state: `optimizer.state_dict()`, or None for a checkpoint that cannot be resumed.
        trainer: JSON values.
        keep_last: how many checkpoints to keep, at least 1.
        val_loss: validation loss of these weights, if known.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: the disk is full, or `root` cannot be written.
        ValueError: `keep_last` or `step` is out of range.
        TypeError: `config`, `trainer` or an optimizer setting is not a JSON value.
    """
    if keep_last < 1 or step < 0:
        raise ValueError(f"keep_last must be at least 1 and step at least 0, not {keep_last} and {step}")
    root = Path(root)
    documents = {CONFIG: config, TOKENIZER: tokenizer_json, TRAINER: {**trainer, "step": step}}
    texts = {name: to_json(value) for name, value in documents.items()}
    tensors = {MODEL: (storable(model_state), None)}
    if optimizer_state is not None:
        tensors[OPTIMIZER] = flatten(optimizer_state)
    target = root / f"step-{step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob(f"{_TEMPORARY}*"):
            _delete(path)
        for path in root.glob(f"step-*{_REPLACED}"):  # an earlier save was killed between its two renames
            if not (own := path.with_name(path.name.removesuffix(_REPLACED))).exists():
                path.rename(own)
        _write_folder(target, step, val_loss, texts, tensors)
        _remove_old(root, target, keep_last)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot save a checkpoint in {root}: {one_line(error)}") from error
    return target


def export_model(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Copy the checkpoint `path` into a new `folder`, without its training state.

    Raises:
        UserError: the checkpoint cannot be loaded, `folder` exists, is named as a checkpoint, or cannot be
            written.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: choose another name")
    if _NAME.fullmatch(folder.name):  # a run beside it would take it for its newest checkpoint
        raise UserError(f"{folder}: a checkpoint of a run has such a name: choose another one")
    check_can_write(folder.parent)
    checkpoint = load_checkpoint(path)
    trainer = {"step": checkpoint.step, "identity": {"max_seq_len": checkpoint.max_seq_len}}
    documents = {CONFIG: asdict(checkpoint.config), TOKENIZER: checkpoint.tokenizer_json, TRAINER: trainer}
    texts = {name: to_json(value) for name, value in documents.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_folder(folder, checkpoint.step, None, texts, {MODEL: (checkpoint.weights, None)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {one_line(error)}") from error


def _write_folder(
    target: Path,
    step: int,
    val_loss: float | None,
    texts: dict[str, bytes],
    tensors: dict[str, tuple[dict[str, Tensor], dict[str, str] | None]],
) -> None:
    """Create `target` atomically, with text files and files of tensors (with their metadata)."""
    temporary = target.parent / f"{_TEMPORARY}{target.name}"
    needed = sum(tensor.nbytes for values, _ in tensors.values() for tensor in values.values())
    free = shutil.disk_usage(target.parent).free
    if needed + _SPARE_BYTES > free:
        raise OSError(
            f"it needs {(needed + _SPARE_BYTES) / 1e9:.2f} GB of disk, and {free / 1e9:.2f} are free"
        )
    try:
        if os.path.lexists(temporary):  # an export of this name was killed
            _delete(temporary)
        temporary.mkdir()
        for name, text in texts.items():
            (temporary / name).write_bytes(text)
        for name, (values, metadata) in tensors.items():
            save_file(values, temporary / name, metadata)
            shutil.copymode(temporary / CONFIG, temporary / name)  # else its owner alone could read it
        files = {path.name: seal(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "val_loss": val_loss, "files": files}
        (temporary / MANIFEST).write_bytes(to_json(manifest))
        seal(temporary / MANIFEST)
        sync_folder(temporary)
        if target.exists():
            _step_aside(target)
        temporary.rename(target)
        sync_folder(target.parent)
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise


def _step_aside(target: Path) -> None:
    """Free the name `target`, keeping an intact checkpoint of its step under another name."""
    replaced = target.with_name(target.name + _REPLACED)
    if replaced.exists():  # an earlier save was killed before it had removed this one
        if not _is_whole(target):
            _remove(target)
            return
        _remove(replaced)
    target.rename(replaced)


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except UserError:
        return False
    return True


def _remove(path: Path) -> None:
    # A folder under its own name is always complete.
    doomed = path.with_name(f"{_TEMPORARY}{path.name}.removed")
    path.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():  # a checkpoint may have been moved to another disk and linked
        path.unlink()
    else:
        shutil.rmtree(path)


@naming_what_cannot_be_read("the checkpoint")
def load_checkpoint(path: str | os.PathLike, device: str | torch.device = "cpu") -> Checkpoint:
    """Read and verify a checkpoint folder, without the optimizer's state.

    The weights are those of the model that the configuration describes, and finite. Nothing larger than the
    files is made, whatever they say.

    Args:
        path: the folder of one checkpoint (see `find_checkpoint`).
        device: where the weights are loaded.

    Raises:
        UserError: it is missing, unreadable, incomplete, damaged, of another version, or was trained on
            another vocabulary.
    """
    path = Path(path)
    manifest = read_manifest(path)
    has_optimizer = OPTIMIZER in manifest["files"]
    if has_optimizer:  # it is not read here, so only its size is checked
        check_size(path / OPTIMIZER, manifest)
    config_json, tokenizer_json, trainer = (
        load_json(path / name, manifest) for name in (CONFIG, TOKENIZER, TRAINER)
    )
    check_tokenizer(path / TOKENIZER, tokenizer_json)
    check_size(path / MODEL, manifest)
    weight_bytes = (path / MODEL).stat().st_size
    config = read_config(config_json, path / CONFIG, weight_bytes)
    weights = read_weights(config, path / CONFIG, path / MODEL, manifest, device)
    return Checkpoint(path, manifest["step"], weights, config, tokenizer_json, trainer, has_optimizer)


@naming_what_cannot_be_read("the checkpoint")
def restore_optimizer(
    path: str | os.PathLike,
    optimizer: torch.optim.AdamW,
    shard: Callable[[Tensor, Tensor], Tensor] = lambda tensor, parameter: tensor,
) -> None:
    """Load the optimizer state of a checkpoint into `optimizer`.

    Its parameters must be those of the run that saved it, in the same order and groups. Its options fused,
    foreach and capturable are kept.

    Args:
        shard: from a full tensor and its parameter, the part of the tensor that this process holds.

    Raises:
        UserError: the checkpoint has no optimizer state, is damaged, or is of other parameters.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if OPTIMIZER not in manifest["files"]:
        raise UserError(f"{path} holds no optimizer state, so training cannot resume from it")
    restore(path / OPTIMIZER, manifest, optimizer, shard)


@naming_what_cannot_be_read("the checkpoints")
def has_checkpoints(root: str | os.PathLike) -> bool:
    """Whether `root` holds any checkpoint, intact or damaged."""
    return bool(_by_step(Path(root)))


@naming_what_cannot_be_read("the checkpoints")
def latest_checkpoint(root: str | os.PathLike) -> Path | None:
    """The checkpoint of the highest step in `root` whose files all verify; None if there is no checkpoint.

    Damaged checkpoints are skipped, each with one line on stderr that names it and what is wrong.

    Raises:
        UserError: there are checkpoints, but none is intact; or a later one is of a newer version, which a
            run that went on from an earlier one would delete.
    """
    problems = []
    for path in reversed(_by_step(Path(root))):
        try:
            verify(path)
            break
        except NewerFormatError:
            raise
        except UserError as error:
            problems.append(error)
    else:
        if problems:
            raise UserError(f"no whole checkpoint in {root}: {problems[0]}")
        return None
    for problem in problems:
        print(f"passing over a checkpoint: {problem}", file=sys.stderr)
    return path


@naming_what_cannot_be_read("the checkpoints")
def best_checkpoint(root: str | os.PathLike) -> Path | None:
    """The checkpoint of the lowest validation loss in `root`, the latest of equals; None if none has one."""
    best = None
    for path in _by_step(Path(root)):
        loss = _val_loss(path)
        if loss is not None and not path.name.endswith(_REPLACED) and (best is None or loss <= best[0]):
            best = loss, path
    return best and best[1]


@naming_what_cannot_be_read("the checkpoint")
def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint at `path`: itself, the latest in it, or the latest in its subfolder `checkpoints`.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    if (path / MANIFEST).exists() or _NAME.fullmatch(path.name):
        return path
    found = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
    if found is None:
        raise UserError(
            f"no whole checkpoint in {path}: give a step-... folder or the folder that holds them"
        )
    return found


def _val_loss(path: Path) -> float | None:
    try:
        return read_manifest(path)["val_loss"]
    except (UserError, KeyError):
        return None


def _by_step(root: Path) -> list[Path]:
    """The checkpoint folders in `root`, intact or not, oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found)]


def _remove_old(root: Path, newest: Path, keep_last: int) -> None:
    found = [path for path in _by_step(root) if not path.name.endswith(_REPLACED)]
    kept = {*found[: found.index(newest) + 1][-keep_last:], best_checkpoint(root)}
    for path in _by_step(root):
        if path not in kept:
            _remove(path)
