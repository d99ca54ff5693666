"""The parts of a README made from results: from `<!-- NAME: sources -->` to `<!-- end of NAME -->`."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from meloformer.errors import UserError

_BEGIN, _END = "<!-- {}: {} -->", "<!-- end of {} -->"


def marked(name: str, sources: list[str], body: str) -> str:
    """A part, markers included."""
    return "\n".join([_BEGIN.format(name, " ".join(sources)), body, _END.format(name)])


def update_section(
    readme: Path, name: str, sources: list[Path], make: Callable[[Callable[[Path], str]], str]
) -> None:
    """Puts a new body between the markers of `name`; `make` is told how the README sees a path.

    Raises:
        UserError: it cannot be read or written, or does not have the markers once.
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
