"""Weights, configuration and optimizer state on disk: safetensors and JSON, never a pickle.

A checkpoint is a folder `step-00001234` that appears under its name only when it is whole:

    model.safetensors       the weights
    optimizer.safetensors   the optimizer's tensors and, in its header, its other settings (may be absent)
    config.json             the model configuration
    tokenizer.json          the vocabulary the weights were trained on
    trainer.json            step, epoch, seed, ...: what a resumed run needs
    manifest.json           size and SHA-256 of all of these

A file is verified against the manifest before any of it is used.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import vocab
from .errors import UserError
from .shards import sync_folder

FORMAT = "meloformer-checkpoint"
VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CONFIG, TOKENIZER, TRAINER, MANIFEST = "config.json", "tokenizer.json", "trainer.json", "manifest.json"
_REQUIRED = (MODEL, CONFIG, TOKENIZER, TRAINER)
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_REPLACED = ".replaced"  # a whole checkpoint while another of its step takes its place
_TEMPORARY = ".incomplete-"
# How an optimizer computes is a matter of the machine it runs on, not of the run it continues.
_MACHINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        step: the optimizer step after which it was saved.
        weights: the model's state dict, on the device asked for.
        config: the model configuration.
        tokenizer_json: what `vocab.to_json()` gave when it was saved, and gives now.
        trainer: the state of the training run.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    config: dict
    tokenizer_json: dict
    trainer: dict


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
) -> Path:
    """Write `root/step-<step>`, whole or not at all, then delete the oldest beyond `keep_last`.

    A process that is killed at any moment leaves the earlier checkpoints as they were. One process
    may save into a root at a time: what an interrupted save left there is removed.

    Args:
        root: folder of the checkpoints of one run; made if missing.
        step: optimizer steps so far; an existing checkpoint of this step is replaced.
        model_state: `model.state_dict()`. A tensor listed under several names is stored under each.
        config: JSON values.
        tokenizer_json: `vocab.to_json()`.
        optimizer_state: `optimizer.state_dict()`, or None for a checkpoint that only generates.
        trainer: JSON values.
        keep_last: how many checkpoints stay, at least 1.

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
    texts = {name: _to_json(value) for name, value in documents.items()}
    tensors = {MODEL: (_storable(model_state), None)}
    if optimizer_state is not None:
        tensors[OPTIMIZER] = _flatten_optimizer(optimizer_state)

    target = root / f"step-{step:08d}"
    temporary = root / f"{_TEMPORARY}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary.mkdir()
        for name, text in texts.items():
            (temporary / name).write_bytes(text)
        for name, (values, metadata) in tensors.items():
            save_file(values, temporary / name, metadata)
        files = {path.name: _seal(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
        (temporary / MANIFEST).write_bytes(_to_json(manifest))
        _seal(temporary / MANIFEST)
        sync_folder(temporary)
        if target.exists():
            target.rename(root / (target.name + _REPLACED))
        temporary.rename(target)
        sync_folder(root)
        _remove_old(root, target, keep_last)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise UserError(f"cannot save a checkpoint in {root}: {_one_line(error)}") from error
    return target


def load_checkpoint(path: str | os.PathLike, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint folder, all but the optimizer's state, and verify what is read.

    Args:
        path: the folder of one checkpoint (see `find_checkpoint`).
        device: where the weights go.

    Raises:
        UserError: it is missing, incomplete, damaged, or was trained on another vocabulary.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    if OPTIMIZER in manifest["files"]:  # of the two large files, the one that is not read here
        _check_size(path / OPTIMIZER, manifest)
    config, tokenizer_json, trainer = (
        _load_json(path / name, manifest) for name in (CONFIG, TOKENIZER, TRAINER)
    )
    if tokenizer_json != vocab.to_json():
        raise UserError(
            f"{path / TOKENIZER}: this checkpoint was trained on another token vocabulary;"
            " use the version of MeloFormer that wrote it"
        )
    weights, _ = _load_tensors(path / MODEL, manifest, device)
    return Checkpoint(path, manifest["step"], weights, config, tokenizer_json, trainer)


def restore_optimizer(path: str | os.PathLike, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` the state it had when the checkpoint was saved.

    Its parameters must be those of the run that saved it, in the same order and groups. Whether it
    runs fused, foreach or capturable stays as it is.

    Raises:
        UserError: the checkpoint has no optimizer state, is damaged, or is of other parameters.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    if OPTIMIZER not in manifest["files"]:
        raise UserError(f"{path} holds no optimizer state, so training cannot resume from it")
    state = _unflatten_optimizer(path / OPTIMIZER, *_load_tensors(path / OPTIMIZER, manifest, "cpu"))
    if not _fits(state, optimizer):
        raise UserError(
            f"{path / OPTIMIZER} is the optimizer state of another model; resume with the same model options"
        )
    for saved, present in zip(state["param_groups"], optimizer.param_groups):
        saved.update({name: present[name] for name in _MACHINE_OPTIONS if name in present})
    optimizer.load_state_dict(state)


def latest_checkpoint(root: str | os.PathLike) -> Path | None:
    """The checkpoint of the highest step in `root` whose files are all there in full size.

    None if there is no checkpoint at all. Passing over a damaged one is said by a warning. Hashes are
    not read here; `load_checkpoint` does that.

    Raises:
        UserError: there are checkpoints, but not one is whole.
    """
    problems = []
    for path in reversed(_by_step(Path(root))):
        try:
            manifest = _read_manifest(path)
            for name in manifest["files"]:
                _check_size(path / name, manifest)
        except UserError as error:
            problems.append(error)
            continue
        if problems:
            warnings.warn(f"going back to {path}: {problems[0]}", stacklevel=2)
        return path
    if problems:
        raise UserError(f"no whole checkpoint in {root}: {problems[0]}")
    return None


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint that `path` means: itself, the latest in it, or the latest in its `checkpoints`.

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


def _by_step(root: Path) -> list[Path]:
    """The checkpoint folders in `root`, whole or not, oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found)]


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _remove_old(root: Path, newest: Path, keep_last: int) -> None:
    others = [path for path in _by_step(root) if path != newest]
    kept = [path for path in others if not path.name.endswith(_REPLACED)][::-1][: keep_last - 1]
    for path in others:
        if path not in kept:
            doomed = root / f"{_TEMPORARY}{path.name}"  # a folder under its own name is always whole
            path.rename(doomed)
            shutil.rmtree(doomed)


def _seal(path: Path) -> dict:
    """Force a written file to the disk; its entry in the manifest."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory with one another, as the file format asks."""
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return stored


def _flatten_optimizer(state: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
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
    metadata = {"param_groups": _to_json(groups).decode(), "values": _to_json(values).decode()}
    return _storable(tensors), metadata


def _unflatten_optimizer(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict:
    try:
        groups, values = json.loads(metadata["param_groups"]), json.loads(metadata["values"])
        state: dict[int, dict] = {int(index): dict(entries) for index, entries in values.items()}
        for key, tensor in tensors.items():
            _, index, name = key.split(".", 2)
            # A copy, for the optimizer keeps what it is given, and loaded tensors may map the file.
            state.setdefault(int(index), {})[name] = tensor.clone()
        for group in groups:
            group["params"] = [int(index) for index in group["params"]]
            if "betas" in group:
                group["betas"] = tuple(group["betas"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _damaged(path, "it does not hold the state of an optimizer") from None
    return {"state": state, "param_groups": groups}


def _fits(state: dict, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the saved groups and shapes are those of the optimizer's parameters."""
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


def _to_json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged: {what}; use another checkpoint of the run, or copy this one again")


def _one_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _read_manifest(path: Path) -> dict:
    """The manifest, with every field of the type it should have."""
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f"{path} is not a whole checkpoint: it has no {MANIFEST}")
    manifest = _read_json(file)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of a MeloFormer checkpoint")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{file} has version {manifest.get('version')!r}; this MeloFormer reads version {VERSION}"
        )
    files = manifest.get("files")
    sound = (
        type(manifest.get("step")) is int
        and isinstance(files, dict)
        and set(_REQUIRED) <= set(files) <= {*_REQUIRED, OPTIMIZER}
        and all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values())
    )
    if not sound:
        raise _damaged(file, "its list of files is not one that MeloFormer writes")
    return manifest


def _check_size(file: Path, manifest: dict) -> None:
    if not file.is_file():
        raise _damaged(file, "it is missing")
    size, expected = file.stat().st_size, manifest["files"][file.name]["bytes"]
    if size != expected:
        raise _damaged(file, f"it has {size} bytes instead of {expected}")


def _check_content(file: Path, manifest: dict) -> None:
    _check_size(file, manifest)
    try:
        digest = _sha256(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {_one_line(error)}") from None
    if digest != manifest["files"][file.name]["sha256"]:
        raise _damaged(file, f"its SHA-256 is not the one in {MANIFEST}")


def _load_json(file: Path, manifest: dict) -> dict:
    _check_content(file, manifest)
    return _read_json(file)


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {_one_line(error)}") from None
    except (ValueError, RecursionError):
        raise _damaged(file, "it is not JSON") from None
    if not isinstance(value, dict):
        raise _damaged(file, "it does not hold a JSON object")
    return value


def _load_tensors(
    file: Path, manifest: dict, device: str | torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the text metadata of a safetensors file."""
    _check_content(file, manifest)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(file, str(device)), metadata
    except (OSError, SafetensorError) as error:
        raise _damaged(file, _one_line(error)) from None
