"""Atomic writes, SHA-256, JSON and locks of files, for all of meloformer.

Free of torch, since worker processes import it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

_MAX_DEPTH = 50  # our deepest JSON has six levels
TEMPORARY = ".tmp"  # suffix of files that are being written


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` so far survive a power cut, on systems that open folders (not Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_of(path: Path) -> Path:
    """The file that the content of `path` is written to before it is renamed."""
    return path.with_name(path.name + TEMPORARY)


def put_in_place(file: BinaryIO, path: Path) -> None:
    """Flush a file open at `temporary_of(path)` to the disk, close it and rename it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    file.close()  # Windows does not rename open files
    os.replace(temporary_of(path), path)
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to. It replaces `path` at the end; if anything fails, `path` is untouched.

    Raises:
        OSError: the disk is full, there is no permission, and the like; it names the file.
    """
    path = Path(path)
    try:
        with open(temporary_of(path), "wb") as file:
            yield file
            put_in_place(file, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary_of(path).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a failed write Python does not know it
            error.filename = os.fspath(path)
        raise


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(data)


def to_json(value: object) -> bytes:
    """Canonical JSON: equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_json(path: str | os.PathLike, value: object) -> None:
    """`write_atomic` of canonical JSON."""
    write_atomic(path, to_json(value))


def parse_json(data: bytes | str) -> object:
    """The value of JSON text that may be anybody's; ValueError, with what is wrong, if it has none.

    Text that is nested deeper than any of ours is refused, even where Python parses it: to compare or print
    such a value may exceed the recursion limit.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise ValueError("is nested too deeply")


def _inside(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_json_object(data: bytes) -> dict:
    """The object in JSON text; ValueError, with what is wrong, if there is none."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("does not hold a JSON object")
    return value


def open_to_read(path: Path) -> BinaryIO:
    """The file, open; UserError if it cannot be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError if there is none."""
    try:
        with open_to_read(path) as file:
            return parse_json_object(file.read())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def sha256_of_file(path: Path) -> tuple[str, int]:
    """SHA-256 (64 hex digits) and size in bytes of a file; UserError if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    with open_to_read(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def check_can_write(folder: Path) -> None:
    """Check, without making it, that `folder` can be written, or made and then written.

    Raises:
        UserError: it is a file or lies below one, or there is no permission to write there.
    """
    if "\0" in str(folder):  # a settings file may hold it
        raise UserError(f"cannot write to {str(folder)!r}: no name holds a null character")
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission in {existing}")


def require_locks() -> None:
    """UserError on platforms whose files cannot be locked as `exclusive_lock` does (Windows)."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise UserError(
            "this command needs the file locks of Linux and macOS: this platform is not supported "
            "(on Windows, use WSL)"
        ) from None


@contextlib.contextmanager
def exclusive_lock(path: Path, taken: str) -> Iterator[None]:
    """Hold an exclusive lock on a folder, or on a file, which is created if missing.

    The system releases it if this process dies.

    Args:
        path: of the folder or file.
        taken: the error message if another process holds the lock.

    Raises:
        UserError: another process holds the lock, or the platform has none.
    """
    require_locks()
    import fcntl

    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        yield
    finally:
        os.close(handle)
