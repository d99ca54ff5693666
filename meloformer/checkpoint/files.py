"""The files of a checkpoint folder: each is hashed when it is written and verified before it is used."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..files import parse_json_object, sha256_of_file

FORMAT = "meloformer-checkpoint"
VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CONFIG, TOKENIZER, TRAINER, MANIFEST = "config.json", "tokenizer.json", "trainer.json", "manifest.json"
_REQUIRED = (MODEL, CONFIG, TOKENIZER, TRAINER)


def seal(path: Path) -> dict:
    """Flush a written file to the disk; returns its entry in the manifest."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)[0]}


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory with each other, as safetensors requires."""
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return stored


def damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged: {what}; use another checkpoint of the run, or copy this one again")


def one_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def read_manifest(path: Path) -> dict:
    """The manifest of the checkpoint folder `path`, with the types of its fields checked."""
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
        and type(manifest.get("val_loss")) in (float, type(None))
    )
    if not sound:
        raise damaged(file, "its list of files is not one that MeloFormer writes")
    return manifest


def check_size(file: Path, manifest: dict) -> None:
    if not file.is_file():
        raise damaged(file, "it is missing")
    size, expected = file.stat().st_size, manifest["files"][file.name]["bytes"]
    if size != expected:
        raise damaged(file, f"it has {size} bytes instead of {expected}")


# Files that were verified, by path, file status and hash: a checkpoint is verified when it is chosen, and its
# files must not be hashed again when it is loaded.
_verified: set[tuple] = set()


def _check_content(file: Path, manifest: dict) -> None:
    check_size(file, manifest)
    expected = manifest["files"][file.name]["sha256"]
    now = file.stat()
    state = (file, now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, expected)
    if state in _verified:
        return
    digest, _ = sha256_of_file(file)
    if digest != expected:
        raise damaged(file, f"its SHA-256 is not the one in {MANIFEST}")
    _verified.add(state)


def verify(path: Path) -> dict:
    """Verify every file of a checkpoint; returns its manifest.

    Raises:
        UserError: it is incomplete, or a file differs from what was written.
    """
    manifest = read_manifest(path)
    for name in manifest["files"]:  # sizes first: they cost nothing
        check_size(path / name, manifest)
    for name in manifest["files"]:
        _check_content(path / name, manifest)
    return manifest


def load_json(file: Path, manifest: dict) -> dict:
    _check_content(file, manifest)
    return _read_json(file)


def _read_json(file: Path) -> dict:
    try:
        return parse_json_object(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from None
    except ValueError as error:
        raise damaged(file, f"it {error}") from None


def load_tensors(
    file: Path, manifest: dict, device: str | torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the text metadata of a safetensors file."""
    _check_content(file, manifest)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(file, str(device)), metadata
    except (OSError, SafetensorError) as error:
        raise damaged(file, one_line(error)) from None
