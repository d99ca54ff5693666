"""The JSON files that benchmarks write, and how several of `benchmarks.report` become one."""

import json
from pathlib import Path

from meloformer.errors import UserError
from meloformer.files import write_atomic

FORMAT = 1


def save(result: dict, path: Path) -> None:
    """Writes it whole or not at all, so that an interrupted run leaves the rows before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write(path: Path, text: str) -> None:
    """Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def load(path: Path, form: int | str = FORMAT, maker: str = "benchmarks.report") -> dict:
    """A result of format `form`. Raises UserError if it cannot be read, or is another file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON") from None
    if not isinstance(result, dict) or result.get("format") != form:
        raise UserError(f"{path}: is not a result of {maker} (format {form})")
    return result


def merge(results: list[dict], names: list[str]) -> dict:
    """All rows in one result, its `machines` a list. Of equal rows the columns of later files count.

    Raises:
        UserError: they were measured on different GPUs, or with different shapes.
    """
    first, rows = results[0], {}
    for result, name in zip(results, names):
        for key, mine, its in (
            ("settings", first["settings"], result["settings"]),
            ("GPU", first["machine"]["gpu"], result["machine"]["gpu"]),
        ):
            if mine != its:
                raise UserError(f"{name} and {names[0]} differ in {key} ({its} and {mine}): no page of both")
        for row in result["rows"]:
            earlier = rows.get(row_key(row), {"columns": {}})
            rows[row_key(row)] = row | {"columns": earlier["columns"] | row["columns"]}
    machines = [result["machine"] for result in results]
    return {"settings": first["settings"], "machines": machines, "rows": list(rows.values())}


def row_key(row: dict) -> tuple:
    return row["name"], row["tokens"]
