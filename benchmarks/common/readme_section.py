"""Generated sections of a README, from `<!-- NAME: sources -->` to `<!-- end of NAME -->`."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from meloformer.errors import UserError

_BEGIN, _END = "<!-- {}: {} -->", "<!-- end of {} -->"


def marked(name: str, sources: list[str], body: str) -> str:
    """A section, markers included."""
    return "\n".join([_BEGIN.format(name, " ".join(sources)), body, _END.format(name)])


def update_section(
    readme: Path, name: str, sources: list[Path], make: Callable[[Callable[[Path], str]], str]
) -> None:
    """Replaces the section `name` of a README.

    Args:
        sources: the result files it is made from, named in the first marker.
        make: returns the new body; its argument makes a path relative to the README.

    Raises:
        UserError: the file cannot be read or written, or does not have the markers exactly once.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {readme}: {error.strerror}") from None

    def seen(path: Path) -> str:
        return Path(os.path.relpath(path, readme.parent)).as_posix()

    part = marked(name, list(map(seen, sources)), make(seen))
    old = re.compile(_BEGIN.format(name, "(.*?)") + "\n.*?" + _END.format(name), re.DOTALL)
    changed, count = old.subn(lambda _: part, text)
    if count != 1:
        raise UserError(
            f"{readme}: must have one part between '{_BEGIN.format(name, '...')}' and '{_END.format(name)}'"
        )
    try:
        readme.write_text(changed, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {readme}: {error.strerror}") from None
