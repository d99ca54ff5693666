"""Metrics derived from the measured figures of a row; None where a column they need was not measured."""

LABELS = {
    "triton": "Triton",
    "dense_cudnn": "dense, cuDNN",
    "dense_flash": "dense, flash",
    "documents_cudnn": "dense by document, cuDNN",
    "documents_flash": "dense by document, flash",
    "flex": "FlexAttention",
    "flex_sorted": "FlexAttention, sorted",
    "flex_fp32": "FlexAttention, fp32",
    "reference": "reference",
}
PASSES = ("forward", "backward")
_MATRIX_PRODUCTS = {"forward": 2, "backward": 5}  # QK', PV; and QK', dO V', P'dO, dS K, dS'Q


def measured(row: dict, column: str) -> dict | None:
    """The figures of a column, None if it failed, was skipped or was not requested."""
    entry = row["columns"].get(column)
    return entry if entry and "update" in entry else None


def columns_of(rows: list[dict]) -> list[str]:
    """The columns that at least one row has, in the order of `LABELS`."""
    return [column for column in LABELS if any(column in row["columns"] for row in rows)]


def milliseconds(value: float) -> str:
    """Three significant digits, and none below a microsecond."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def total_ms(row: dict, column: str, phase: str = "update") -> float | None:
    """Median milliseconds of forward and backward together."""
    entry = measured(row, column)
    return sum(entry[phase][p]["ms"] for p in PASSES) if entry and phase in entry else None


def best_dense(row: dict) -> str | None:
    """The column of the fastest dense attention that respects the documents of a row; None if none did.

    Where each row of the batch is one document, nothing has to be kept apart.
    """
    apart = row["documents"] > row.get("rows", 1)
    columns = [c for c in LABELS if c.startswith("documents_" if apart else "dense_")]
    times = {column: ms for column in columns if (ms := total_ms(row, column)) is not None}
    return min(times, key=times.__getitem__) if times else None


def visible_share(row: dict) -> float:
    """Visible pairs of the update phase as a share of the causal pairs of the same rows."""
    return row["visible_pairs"] / row["causal_pairs"]


def limit_ms(row: dict) -> float | None:
    """Milliseconds for the visible pairs at the rate of dense causal attention with cuDNN, both passes."""
    dense = total_ms(row, "dense_cudnn")
    return None if dense is None else dense * visible_share(row)


def times_limit(row: dict, column: str = "triton") -> float | None:
    ours, limit = total_ms(row, column), limit_ms(row)
    return None if ours is None or limit is None else ours / limit


def speedup(row: dict, column: str | None, summarize: bool = False) -> float | None:
    """Time of a column over that of `triton`, forward and backward.

    Args:
        column: None if there is none, and then no speedup.
        summarize: whether `triton` is given the time of its other phase, too.
    """
    ours, other = total_ms(row, "triton"), None if column is None else total_ms(row, column)
    if summarize and ours is not None:
        more = total_ms(row, "triton", "summarize")
        ours = None if more is None else ours + more
    return None if ours is None or other is None else other / ours


def summarize_share(row: dict, column: str = "triton") -> float | None:
    """Time of summarize over time of update."""
    ours, update = total_ms(row, column, "summarize"), total_ms(row, column)
    return None if ours is None or update is None else ours / update


def tflops(row: dict, column: str, which: str, pairs: str, settings: dict) -> float | None:
    """TFLOP/s of one pass of the update: only matrix products count, two operations per multiply-add.

    Args:
        which: "forward" or "backward".
        pairs: "useful" counts the visible pairs, "computed" those of all tiles that were computed.
    """
    entry = measured(row, column)
    count = row["visible_pairs"] if pairs == "useful" else (entry or {}).get("computed_pairs")
    if entry is None or count is None:
        return None
    operations = 2 * _MATRIX_PRODUCTS[which] * count * settings["heads"] * settings["dim"]
    return operations / entry["update"][which]["ms"] / 1e9


def worst_error(row: dict, column: str) -> float | None:
    entry = measured(row, column)
    return max(entry["errors"].values()) if entry else None
