"""The MIDI files that --input names, and their order."""

import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import UserError

SUFFIXES = (".mid", ".midi", ".kar", ".rmi")  # in any case


def find_files(source: str) -> list[str]:
    """Paths named by `--input`: a folder (searched through, sorted) or a list file (in its order).

    Links to folders are followed; a folder that is reachable by two paths is searched once.

    Every line of a list that is not blank is a path as it stands: there are no comments. A path that does
    not exist is tried relative to the list file.

    Raises:
        UserError: there is no such folder or list, or it names no file.
    """
    if os.path.isdir(source):
        files = sorted(_walk(source))
        if not files:
            raise UserError(f"{source}: holds no MIDI files ({', '.join(SUFFIXES)})")
        return files
    beside = os.path.dirname(source)
    try:
        with open(source, "rb") as lines:
            files = [_beside(name, beside) for name in _names(source, lines)]
    except OSError as error:
        raise UserError(f"--input {source}: cannot be read ({error.strerror})") from None
    if not files:
        raise UserError(f"--input {source}: the list is empty")
    return files


def _names(source: str, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines):
        if b"\0" in line:
            raise UserError(f"--input {source}: is not a text file; give a folder or a list of paths")
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield os.fsdecode(line.removesuffix(b"\n").removesuffix(b"\r"))


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    walked = set()  # links may form cycles, or lead to one folder twice
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in walked:
            folders.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        folders.sort()  # so that of two paths to a folder the same one is taken on every machine
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
    """SHA-256 (64 hex digits) of the absolute paths in their order, whatever the working folder."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(os.fsencode(os.path.abspath(name)) + b"\0")
    return digest.hexdigest()
