"""The files that benchmarks write: results as JSON, and pages of text."""

import json
from pathlib import Path

from meloformer.errors import UserError
from meloformer.files import parse_json, write_atomic


def save(result: dict, path: Path) -> None:
    """Writes `result` as JSON, atomically: an interrupted run leaves the file of the rows before.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write(path: Path, text: str) -> None:
    """Writes text, making the folder. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def load(path: Path, form: int | str, maker: str) -> dict:
    """Reads the result of a benchmark.

    Args:
        form: the value that `format` must have in the file.
        maker: the benchmark that writes this format, for the message.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        result = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON") from None
    if not isinstance(result, dict) or result.get("format") != form:
        raise UserError(f"{path}: is not a result of {maker} (format {form})")
    return result
