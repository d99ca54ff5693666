"""What `benchmarks.train` measured as a Markdown page, from results alone."""

from benchmarks.machine import provenance

MEANINGS = """\
- **Tokens/s** count real tokens: padding is none. They are of whole steps as training takes them, by the
  clock, with the loader at work beside.
- **MFU**: useful operations (matrix products, visible pairs alone, forward and backward; no padding, nothing
  that is computed twice) over the GPU's peak; the formula is in `meloformer/flops.py`.
- **Waiting**: share of the time in which the process waited for the loader.
- **Memory**: peak of what PyTorch allocated, weights and optimizer included.
- **First step**: from nothing to the end of the first step; it holds the compilation, less what caches on
  disk saved.
- **Step by parts**: measured apart from the above, with the device waited for after each part: *data* is all
  that the loader does, *prepare* the copies to the device and the plan of the attention. In training both are
  hidden behind the parts that follow, so the sum is more than the step.
- **dense** is a plain causal Transformer without summaries, of as many parameters; its MFU counts its own
  operations, of which it has more.
"""


def page(results: list[dict], sources: list[str]) -> str:
    """The report; `sources` are the names of the files that hold the results."""
    parts = ["# Training, measured\n"]
    for result, source in zip(results, sources):
        settings, machine = result["settings"], result["machine"]
        parts += [
            f"## {machine['gpu'] or 'CPU'}: {settings['batch_size']} rows per batch\n",
            f"Steps of {settings['gradient_accumulation_steps']} batch(es) on {settings['data']}, "
            f"{settings['steps']} of them measured; layers {_compiled(settings['compile'])}, activations "
            f"computed again: {settings['checkpoint_activations']}.\n",
            _speed(result["rows"]),
            _parts(result["rows"]),
            _failed(result["rows"]),
            f"Made by `python -m benchmarks.train` on {provenance(machine)}; figures in `{source}`.\n",
        ]
    return "\n".join(part for part in [*parts, "## What is what\n", MEANINGS] if part)


def _compiled(flag: bool | None) -> str:
    return (
        "compiled where training does by default" if flag is None else "compiled" if flag else "not compiled"
    )


def _speed(rows: list[dict]) -> str:
    heads = [
        "size", "attention", "tokens per row", "parameters", "precision", "tokens/s", "times dense", "MFU",
        "memory, GB", "waiting", "step, ms", "first step, s",
    ]  # fmt: skip
    lines = [
        [
            *_names(row),
            f"{row['parameters'] / 1e6:.1f}M",
            row["precision"],
            f"{row['tokens_per_s']:,.0f}",
            _cell(_times_dense(row, rows), "{:.2f}"),
            _cell(row["mfu"], "{:.1%}"),
            _cell(row["peak_gb"], "{:.1f}"),
            f"{row['data_wait']:.2%}",
            f"{row['step_ms']:.1f}",
            f"{row['first_step_s']:.1f}",
        ]
        for row in rows
        if "failed" not in row
    ]
    return _table(heads, lines)


def _parts(rows: list[dict]) -> str:
    measured = [row for row in rows if "failed" not in row]
    if not measured:
        return ""
    parts = list(measured[0]["breakdown_ms"])
    heads = ["size", "attention", "tokens per row", *(f"{part}, ms" for part in parts)]
    lines = [[*_names(row), *(f"{row['breakdown_ms'][part]:.1f}" for part in parts)] for row in measured]
    return "Step by parts:\n\n" + _table(heads, lines)


def _failed(rows: list[dict]) -> str:
    lines = [[*_names(row), row["failed"].replace("|", "\\|")] for row in rows if "failed" in row]
    return (
        "Not measured:\n\n" + _table(["size", "attention", "tokens per row", "why"], lines) if lines else ""
    )


def _names(row: dict) -> list[str]:
    return [row["size"], row.get("attention_used", row["attention"]), f"{row['tokens_per_row']:,}"]


def _times_dense(row: dict, rows: list[dict]) -> float | None:
    """Its speed over that of the dense model of the same size and length, measured beside it."""
    for other in rows:
        same = all(other[key] == row[key] for key in ("size", "tokens_per_row"))
        if other["attention"] == "dense" and same and "failed" not in other:
            return row["tokens_per_s"] / other["tokens_per_s"]
    return None


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _table(heads: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return "Nothing was measured.\n"
    aligned = ["---"] * 2 + ["---:"] * (len(heads) - 2)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, aligned, *lines])
