"""The result files of `benchmarks.report`: their format, and how several become one."""

from pathlib import Path

from benchmarks.common import results_file
from meloformer.errors import UserError

FORMAT = 1


def load(path: Path) -> dict:
    """Raises UserError if the file cannot be read, or is not a result of `benchmarks.report`."""
    return results_file.load(path, FORMAT, "benchmarks.report")


def merge(results: list[dict], names: list[str]) -> dict:
    """One result with the rows of all; `machines` lists where each was measured.

    Rows of equal `row_key` become one; where both have a column, that of the later file is kept.

    Args:
        names: of the files, for messages.

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
    """What makes a row the same one in another file: its name and its length in tokens."""
    return row["name"], row["tokens"]
