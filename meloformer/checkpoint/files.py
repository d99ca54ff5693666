"""The files of a checkpoint folder: each is hashed when it is written and verified before it is used."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..files import open_to_read, parse_json_object, sha256_of_file

FORMAT = "meloformer-checkpoint"
VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CONFIG, TOKENIZER, TRAINER, MANIFEST = "config.json", "tokenizer.json", "trainer.json", "manifest.json"
_REQUIRED = (MODEL, CONFIG, TOKENIZER, TRAINER)
MAX_TEXT = 16 << 20  # bytes of a JSON file, or of the header of a file of tensors: ten times what they have


class NewerFormatError(UserError):
    """A checkpoint of a later version than this program knows: it is whole, and no reason to take another."""


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


@contextlib.contextmanager
def naming_what_cannot_be_read(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of the file system into UserErrors that name the file, or `path` where they do not."""
    try:
        yield
    except OSError as error:
        name = path if error.filename is None else error.filename
        raise UserError(f"cannot read {name}: {one_line(error)}") from None


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
    version = manifest.get("version")
    if type(version) is int and version > VERSION:
        raise NewerFormatError(
            f"{file}: this checkpoint was written by a newer MeloFormer, in version {str(version)[:20]} of "
            f"the format; this one reads version {VERSION}: update it"
        )
    if version != VERSION or type(version) is not int:
        raise damaged(file, f"its version is not {VERSION}")
    files = manifest.get("files")
    sound = (
        type(manifest.get("step")) is int
        and 0 <= manifest["step"] < 2**63
        and isinstance(files, dict)
        and set(_REQUIRED) <= set(files) <= {*_REQUIRED, OPTIMIZER}
        and all(map(_is_entry, files.values()))
        and type(manifest.get("val_loss")) in (float, type(None))
        and math.isfinite(manifest["val_loss"] or 0)
    )
    if not sound:
        raise damaged(file, "its list of files is not one that MeloFormer writes")
    return manifest


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
    )


def check_size(file: Path, manifest: dict) -> None:
    if not file.is_file():
        raise damaged(file, "it is missing")
    size, expected = file.stat().st_size, manifest["files"][file.name]["bytes"]
    if size != expected:
        raise damaged(file, f"it has {size} bytes instead of {str(expected)[:20]}")


# Files that were verified, by path, file status and hash: a checkpoint is verified when it is chosen, and its
# files must not be hashed again when it is loaded.
_verified: set[tuple] = set()


def check_content(file: Path, manifest: dict) -> None:
    """UserError if size or SHA-256 of a file are not those in the manifest."""
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
        check_content(path / name, manifest)
    return manifest


def load_json(file: Path, manifest: dict) -> dict:
    check_content(file, manifest)
    return _read_json(file)


def _read_json(file: Path) -> dict:
    try:
        with open_to_read(file) as opened:
            content = opened.read(MAX_TEXT + 1)
        if len(content) > MAX_TEXT:
            raise damaged(file, f"it has more than {MAX_TEXT >> 20} MB")
        return parse_json_object(content)
    except OSError as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from None
    except ValueError as error:
        raise damaged(file, f"it {error}") from None
