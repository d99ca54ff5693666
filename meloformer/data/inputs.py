"""The MIDI files that --input names, their order, and those that --val_list names."""

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
    return [_beside(name, beside) for name in _list(f"--input {source}", source, "a folder or a list")]


def named_files(path: str, source: str, files: list[str]) -> frozenset[str]:
    """Those of `files` that the list `path` (of --val_list) names.

    A line is a path relative to the folder `source`, or to the folder of the list `source`; or a path as it
    stands. What `files` itself says of a path, absolute or not, does not matter.

    Raises:
        UserError: the list cannot be read, is empty, or names a file that is not among `files`.
    """
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    names = _list(f"--val_list {path}", path, "a list")
    places = {
        name: [os.path.abspath(place) for place in (os.path.join(folder, name), name)] for name in names
    }
    wanted = {place for both in places.values() for place in both}
    there: dict[str, list[str]] = {}
    for file in files:
        if (place := os.path.abspath(file)) in wanted:
            there.setdefault(place, []).append(file)
    named = []
    for name, both in places.items():
        found = next((there[place] for place in both if place in there), None)
        if found is None:
            raise UserError(f"--val_list {path}: {name!r} is not among the {len(files)} files of --input")
        named += found
    return frozenset(named)


def _list(flag: str, path: str, wanted: str) -> list[str]:
    """The lines of a list file, in their order; `flag` names it in errors."""
    try:
        with open(path, "rb") as lines:
            names = list(_names(flag, lines, wanted))
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror})") from None
    if not names:
        raise UserError(f"{flag}: the list is empty")
    return names


def _names(flag: str, lines: Iterable[bytes], wanted: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        if b"\0" in line:
            raise UserError(f"{flag}: is not a text file; give {wanted} of paths")
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
