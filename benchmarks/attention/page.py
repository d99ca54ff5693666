"""The page of `benchmarks.report`, from result files alone."""

from pathlib import Path

from benchmarks.attention import metrics
from benchmarks.attention.metrics import LABELS, PASSES, measured, milliseconds
from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, escape, table

MEANINGS = """\
- **Row**: one row of tokens, a batch of one, or a batch of as many as its name says. A packed row holds
  several songs back to back as documents, repeated where there are too few, and is cut at its length; every
  other row is one whole song.
- **Triton**: the kernels of this project. **FlexAttention**: PyTorch's, compiled, with the same mask;
  **sorted**: with the tokens sorted by document, instrument, kind and position beforehand (sorting is not
  timed); **fp32**: in song order and float32, as the scheme was first tried. For FlexAttention rows are
  padded to a multiple of {flex_length:,} tokens ({short_flex_length:,} for short ones), since it is compiled
  for each length. **Dense**: causal attention over the same length without a mask, by PyTorch's
  `scaled_dot_product_attention` with the backend named. **Dense by document**: inside each document of the
  row alone, as a dense model is trained; cuDNN is called for each, FlashAttention-2 once for all.
- **Best dense**: the faster of cuDNN and flash, forward and backward together: by document where a row holds
  several, since they must not see each other; over the whole length where it is one song.
- **Update** is the phase in which tokens attend, **summarize** the one in which the summary tokens do. Times
  are those of update unless noted.
- **Visible**: pairs of query and key that the mask of update allows, over the causal pairs of the same
  length.
- **Limit**: the time of dense causal attention with cuDNN, forward and backward, at the same length in the
  same run, times *visible*: what attention would take if only visible pairs were computed at that rate.
- **Times** are medians on the GPU between two events, with a cold L2 cache and the host running ahead of the
  GPU; long calls are repeated less often. The forward is that of training, which keeps what the backward
  needs. **Host** is the time the host takes to launch.
- **TFLOP/s** count matrix products: 2 per pair forward and 5 backward, each 2 x channels operations per
  head. *Useful* counts the visible pairs, *computed* all pairs of the tiles that are computed.
- **Extra memory**: peak during forward and backward beyond inputs, output and gradients, without the plan.
- **Worst error**: the largest error of the output or a gradient against float64, as a multiple of the error
  of plain dense attention in the same precision, on the first {checked:,} tokens. Triton is not timed if an
  output exceeds {output:g} times that error, or a gradient {gradient:g} times.
- **Plan**: what is built once per batch and used by all layers: block lists and mask bits for Triton, the
  block masks of both phases for FlexAttention. *Wall* is until the GPU is done, *GPU* between events on it.
- **First call**: plan, forward and backward for the first time, in the row where that took longest. It
  includes compilation, as far as caches on disk did not save it.
"""

RULE_MEANING = """\
- **Behind the name of a row** stands the kind rule of its mask where it is not the default one; *alike* is
  the original scheme, whose near bars are 0, 1, 2 and 4. Dense attention has no rule.
"""


def page(result: dict, pictures: list[str], sources: list[str]) -> str:
    """The Markdown page.

    Args:
        result: what `results.merge` returns.
        pictures: file names of the charts beside the page.
        sources: file names of the results.
    """
    from benchmarks.attention import measure  # here because it imports torch

    rows, settings = result["rows"], result["settings"]
    meanings = MEANINGS.format(
        flex_length=measure.FLEX_LENGTH,
        short_flex_length=measure.SHORT_FLEX_LENGTH,
        checked=measure.CHECKED_TOKENS,
        **measure.ALLOWED_ERROR,
    )
    origin = [f"- `{name}`: {provenance(m)}.\n" for name, m in zip(sources, result["machines"])]
    parts = [
        "# Speed of one attention layer\n",
        f"{settings['heads']} heads of {settings['dim']} channels, {settings['dtype']}, one row of tokens, "
        f"on {result['machines'][0]['gpu'] or 'a CPU'}. [How to read the tables](#how-to-read-the-tables).\n",
        *(f"![{Path(name).stem}]({name})\n" for name in pictures),
        "## Against the limit\n",
        against_limit(rows),
        "## Time in ms, forward + backward\n",
        latency(rows),
        "## Time relative to Triton, forward and backward\n",
        speedups(rows),
        "## Rates, memory, errors\n",
        details(rows, settings),
        "## Plan\n",
        plans(rows),
        "## First call\n",
        first_calls(rows),
        "## Not measured\n",
        not_measured(rows),
        "## How to read the tables\n",
        meanings + (RULE_MEANING if any("kind_rule" in row for row in rows) else ""),
        "## Provenance\n",
        "".join(origin) + "\nMade by `python -m benchmarks.report --from` of these files.\n",
    ]
    return "\n".join(parts)


def _both(entry: dict | None, phase: str = "update", key: str = "ms") -> str:
    if entry is None or phase not in entry:
        return "-"
    return " + ".join(milliseconds(entry[phase][which][key]) for which in PASSES)


def against_limit(rows: list[dict]) -> str:
    """The rows, and how close `triton` comes to the limit."""
    heads = [
        "row", "tokens", "songs", "visible", "limit, ms", "Triton, ms", "forward + backward", "x limit",
        "share of limit", "ns per token", "summarize / update",
    ]  # fmt: skip
    lines = []
    for row in rows:
        ours, times = metrics.total_ms(row, "triton"), metrics.times_limit(row)
        lines.append([
            escape(row["name"]),
            f"{row['tokens']:,}",
            str(row["documents"]),
            f"{metrics.visible_share(row):.1%}",
            cell(metrics.limit_ms(row), "{:.3f}"),
            cell(ours, "{:.2f}"),
            _both(measured(row, "triton")),
            cell(times, "{:.2f}"),
            cell(times and 1 / times, "{:.0%}"),
            cell(ours and ours * 1e6 / (row["tokens"] * row.get("rows", 1)), "{:.0f}"),
            cell(metrics.summarize_share(row), "{:.0%}"),
        ])  # fmt: skip
    return table(heads, lines)


def latency(rows: list[dict]) -> str:
    columns = metrics.columns_of(rows)
    lines = []
    for row in rows:
        best = metrics.best_dense(row)
        times = [measured(row, c) for c in (*columns, best)]
        lines.append([escape(row["name"]), *map(_both, times), "-" if best is None else LABELS[best]])
    return table(["row", *(LABELS[c] for c in columns), "best dense", "which is"], lines)


def speedups(rows: list[dict]) -> str:
    columns = [c for c in metrics.columns_of(rows) if c != "triton"]
    lines = [
        [
            escape(row["name"]),
            cell(metrics.speedup(row, metrics.best_dense(row)), "{:.2f}x"),
            cell(metrics.speedup(row, metrics.best_dense(row), summarize=True), "{:.2f}x"),
            *(cell(metrics.speedup(row, c), "{:.1f}x") for c in columns),
        ]
        for row in rows
    ]
    heads = ["row", "best dense", "best dense, summarize counted", *(LABELS[c] for c in columns)]
    return table(heads, lines)


def details(rows: list[dict], settings: dict) -> str:
    heads = [
        "row", "column", "useful TFLOP/s", "computed TFLOP/s", "extra memory, MB", "worst error",
        "host, ms", "repeats",
    ]  # fmt: skip
    lines = []
    for row, column, entry in _entries(rows):

        def rates(pairs: str, row=row, column=column) -> str:
            found = [metrics.tflops(row, column, which, pairs, settings) for which in PASSES]
            return " + ".join(cell(rate, "{:.0f}") for rate in found)

        lines.append([
            escape(row["name"]),
            LABELS[column],
            rates("useful"),
            rates("computed"),
            cell(entry["update"]["extra_mb"], "{:.1f}"),
            cell(metrics.worst_error(row, column), "{:.2f}"),
            _both(entry, key="host_ms"),
            _repeats(entry["update"]),
        ])  # fmt: skip
    return table(heads, lines)


def _repeats(times: dict) -> str:
    return " + ".join(str(times[which]["repeats"]) for which in PASSES)


def plans(rows: list[dict]) -> str:
    lines = [
        [
            escape(row["name"]),
            LABELS[column],
            milliseconds(entry["plan"]["wall_ms"]),
            milliseconds(entry["plan"]["ms"]),
            cell(entry.get("plan_bytes") and entry["plan_bytes"] / 1e6, "{:.1f}"),
        ]
        for row, column, entry in _entries(rows)
        if "plan" in entry
    ]
    return table(["row", "column", "wall, ms", "GPU, ms", "MB"], lines)


def first_calls(rows: list[dict]) -> str:
    longest: dict[str, float] = {}
    for _, column, entry in _entries(rows):
        longest[column] = max(longest.get(column, 0.0), entry["first_call_s"])
    return table(["column", "seconds"], [[LABELS[c], f"{s:.1f}"] for c, s in longest.items()])


def not_measured(rows: list[dict]) -> str:
    lines = [
        f"- {escape(row['name'])}, {LABELS[column]}: {why}: {escape(row['columns'][column][why])}\n"
        for row in rows
        for column in metrics.columns_of([row])
        for why in ("failed", "skipped")
        if why in row["columns"][column]
    ]
    return "".join(lines) or "Everything requested was measured.\n"


def _entries(rows: list[dict]) -> list[tuple[dict, str, dict]]:
    return [
        (row, column, row["columns"][column])
        for row in rows
        for column in metrics.columns_of([row])
        if measured(row, column)
    ]
