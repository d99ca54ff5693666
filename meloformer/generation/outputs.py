"""Where a new song and its picture go: tried before the work begins, so that no song is lost at the end."""

import os
import stat
from pathlib import Path

from ..errors import UserError
from ..files import temporary_of

# What is written on trial: most songs and pictures are smaller.
TRIAL_BYTES = 1 << 20


def require_outputs(outputs: dict[str, str], inputs: dict[str, str | None], overwrite: bool) -> None:
    """Check that every output can be written and is no file that must stay; leaves nothing behind.

    Args:
        outputs: paths by the flags that name them.
        inputs: files that are never replaced, by their flags; None for a flag without one.
        overwrite: whether other existing files may be.

    Raises:
        UserError: an output cannot be written, exists, is an input or is another output. The message names
            flag and path.
    """
    kept = {flag: [Path(path)] for flag, path in inputs.items() if path is not None}
    for flag, path in outputs.items():
        try:
            if "\0" in path:
                raise ValueError("embedded null byte")
            _require_place(flag, path)
            target = Path(path)
            names = [target, temporary_of(target)]  # it is written under the second and then renamed
            for other, others in kept.items():
                if any(_same_file(name, taken) for name in names for taken in others):
                    raise UserError(f"{flag} {path}: is the same file as {other}, or is written through it")
            kept[flag] = names
            _require_free(flag, path, names, overwrite)
            _try_to_write(names[1])
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{flag} {path!r}: cannot be written ({reason})") from None


def _require_place(flag: str, path: str) -> None:
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{flag} {path}: is a folder, not the name of a file")
    if not target.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {target.parent}")
    # Writing replaces what is there: of a device or a pipe, that would be the device itself.
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise UserError(f"{flag} {path}: exists and is not a regular file")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)  # hard links, too
    except OSError:  # one does not exist yet
        return os.path.realpath(one) == os.path.realpath(other)


def _require_free(flag: str, path: str, names: list[Path], overwrite: bool) -> None:
    for name in names:
        if os.path.lexists(name) and not overwrite:
            raise UserError(f"{flag} {path}: {name} exists already: choose another name, or add --overwrite")


def _try_to_write(temporary: Path) -> None:
    """Write and delete `temporary`. A file of that name is left over from a killed process, and replaced."""
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())  # some file systems notice only here that they are full
    finally:
        temporary.unlink(missing_ok=True)
