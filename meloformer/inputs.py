"""Which MIDI files a command was given, and in which order it takes them."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import UserError

SUFFIXES = (".mid", ".midi", ".kar", ".rmi")  # in any case


def find_files(source: str) -> list[str]:
    """Paths named by `--input`: a folder (searched through, sorted) or a list file (in its order).

    Every line of a list is taken literally, blank lines apart: a file may be called '# 1.mid'. A path
    that is not there is tried beside the list file.

    Raises:
        UserError: there is no such folder or list, or it names no file.
    """
    if os.path.isdir(source):
        files = sorted(_walk(source))
        if not files:
            raise UserError(f"{source}: holds no MIDI files ({', '.join(SUFFIXES)})")
        return files
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"--input {source}: cannot be read ({error.strerror})") from None
    if b"\0" in data:
        raise UserError(f"--input {source}: is not a text file; give a folder or a list of paths")
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    names = [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]
    if not names:
        raise UserError(f"--input {source}: the list is empty")
    beside = os.path.dirname(source)
    return [_beside(name, beside) for name in names]


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if name.lower().endswith(SUFFIXES):
                yield os.path.join(parent, name)


def _beside(name: str, folder: str) -> str:
    candidate = os.path.join(folder, name)
    return candidate if not os.path.exists(name) and os.path.exists(candidate) else name


def in_order(files: list[str], seed: int, limit: int | None) -> list[str]:
    """The first `limit` of `files`, shuffled by `seed`."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(files))[:limit]
    return [files[i] for i in order]


def hash_of_names(files: list[str]) -> str:
    """SHA-256 (64 hex digits) of the names in their order."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()
