"""The report as a Markdown page, and the table of the README, from results alone."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.attention import metrics
from benchmarks.attention.metrics import LABELS, PASSES, measured, milliseconds
from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, escape, table
from benchmarks.common.readme_section import update_section

MEANINGS = """\
- **Row**: one row of tokens. A packed row holds songs back to back as documents, repeated when there are
  not enough, and cut at its length; the others are one song each.
- **Triton**: this project's kernels. **FlexAttention**: PyTorch's, compiled, with the same mask;
  **sorted**: with the tokens sorted by document, instrument, kind and position beforehand (the sorting is
  not timed); **fp32**: in song order and float32, as the scheme was first tried. Rows of other lengths are
  padded for FlexAttention to a multiple of {flex_length:,} tokens ({short_flex_length:,} for short ones),
  for it compiles anew for every length. **Dense**: causal attention over the same length without any mask
  of ours, by PyTorch's `scaled_dot_product_attention` with the backend named.
- **Update** is the phase in which the tokens attend, **summarize** the one in which the bars' summaries do.
  All times are of update unless they say otherwise.
- **Visible**: pairs of query and key that the mask of update allows, over the causal pairs of the same
  length.
- **Limit**: the time of dense causal attention with cuDNN, forward and backward, at the same length in the
  same run, times *visible*: what would remain if only the visible pairs were computed, at that rate.
- **Times** are medians on the GPU between two events, with a cold L2 cache and the host ahead of the GPU;
  long ones are repeated less often. The forward is that of training. **Host** is what the host takes to
  launch.
- **TFLOP/s** count matrix products: 2 per pair forward and 5 backward, each 2 x channels operations per
  head. *Useful* counts the visible pairs, *computed* all pairs of the tiles that were computed.
- **Extra memory**: peak during forward and backward beyond inputs, output and gradients (the plan apart).
- **Worst error**: the largest error of the output or a gradient against float64, as a multiple of that of
  plain dense attention in the same precision, on the first {checked:,} tokens. Triton is not timed if an
  output errs more than {output:g} times as much, or a gradient {gradient:g} times.
- **Plan**: what is made once per batch and serves all layers: block lists and bits for Triton, the block
  masks of both phases for FlexAttention. *Wall* is until the GPU is done, *GPU* is between events on it.
- **First call**: plan, forward and backward for the first time, in the row where that took longest: it
  holds the compilation, less what caches on disk saved.
"""


def page(result: dict, pictures: list[str], sources: list[str]) -> str:
    """The report.

    Args:
        result: what `results_file.merge` returns.
        pictures: file names of pictures beside the page.
        sources: file names of the results.
    """
    from benchmarks.attention import measure  # knows what the figures were measured by; imports torch

    rows, settings = result["rows"], result["settings"]
    meanings = MEANINGS.format(
        flex_length=measure.FLEX_LENGTH,
        short_flex_length=measure.SHORT_FLEX_LENGTH,
        checked=measure.CHECKED_TOKENS,
        **measure.ALLOWED_ERROR,
    )
    origin = [f"- `{name}`: {provenance(m)}.\n" for name, m in zip(sources, result["machines"])]
    parts = [
        "# Attention of one layer, measured\n",
        f"{settings['heads']} heads of {settings['dim']} channels, {settings['dtype']}, one row of tokens, "
        f"on {result['machines'][0]['gpu'] or 'a CPU'}. [What is what](#what-is-what).\n",
        *(f"![{Path(name).stem}]({name})\n" for name in pictures),
        "## Against the limit\n",
        against_limit(rows),
        "## Milliseconds, forward + backward\n",
        latency(rows),
        "## Times as long as Triton, forward and backward\n",
        speedups(rows),
        "## Rates, memory, errors\n",
        details(rows, settings),
        "## Plan\n",
        plans(rows),
        "## First call\n",
        first_calls(rows),
        "## Not measured\n",
        not_measured(rows),
        "## What is what\n",
        meanings,
        "## Where from\n",
        "".join(origin) + "\nMade by `python -m benchmarks.report --from` of these files.\n",
    ]
    return "\n".join(parts)


def _both(entry: dict | None, phase: str = "update", key: str = "ms") -> str:
    if entry is None or phase not in entry:
        return "-"
    return " + ".join(milliseconds(entry[phase][which][key]) for which in PASSES)


def against_limit(rows: list[dict]) -> str:
    """The rows, and how near `triton` comes to the limit."""
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
            cell(ours and ours * 1e6 / row["tokens"], "{:.0f}"),
            cell(metrics.summarize_share(row), "{:.0%}"),
        ])  # fmt: skip
    return table(heads, lines)


def latency(rows: list[dict]) -> str:
    columns = metrics.columns_of(rows)
    lines = [[escape(row["name"]), *(_both(measured(row, c)) for c in columns)] for row in rows]
    return table(["row", *(LABELS[c] for c in columns)], lines)


def speedups(rows: list[dict]) -> str:
    columns = [c for c in metrics.columns_of(rows) if c != "triton"]
    lines = [
        [escape(row["name"]), *(cell(metrics.speedup(row, c), "{:.1f}x") for c in columns)] for row in rows
    ]
    return table(["row", *(LABELS[c] for c in columns)], lines)


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
    return "".join(lines) or "Everything that was asked for was measured.\n"


def _entries(rows: list[dict]) -> list[tuple[dict, str, dict]]:
    return [
        (row, column, row["columns"][column])
        for row in rows
        for column in metrics.columns_of([row])
        if measured(row, column)
    ]


def readme_body(result: dict, page_path: str, picture: str | None) -> str:
    """The table and picture between the README's markers; paths as seen from it."""
    others = ["dense_cudnn", "dense_flash", "flex", "flex_sorted"]
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("song or row", lambda row: escape(row["name"])),
        ("tokens", lambda row: f"{row['tokens']:,}"),
        ("visible", lambda row: f"{metrics.visible_share(row):.1%}"),
        ("forward + backward, ms", lambda row: _both(measured(row, "triton"))),
        ("x limit", lambda row: cell(metrics.times_limit(row), "{:.2f}")),
        *(
            (f"over {LABELS[c]}", lambda row, c=c: cell(metrics.speedup(row, c), "{:.1f}x"))
            for c in metrics.columns_of(result["rows"])
            if c in others
        ),
    ]
    rows = [row for row in result["rows"] if measured(row, "triton")]
    lines = [[make(row) for _, make in columns] for row in rows]
    settings, machine = result["settings"], result["machines"][0]
    parts = [
        *([f"![Attention: time of one layer by song]({picture})\n"] if picture else []),
        table([head for head, _ in columns], lines),
        f"One layer, {settings['heads']} heads of {settings['dim']}, {settings['dtype']}, "
        f"{machine['gpu']}, {machine['date']}: [all figures and what they mean]({page_path}).",
    ]
    return "\n".join(parts)


def update_readme(
    path: Path, result: dict, sources: list[Path], page_path: Path, picture: Path | None
) -> None:
    """Puts `readme_body` between the markers of a README. Raises UserError if it has none."""
    update_section(
        path,
        "attention",
        sources,
        lambda seen: readme_body(result, seen(page_path), seen(picture) if picture else None),
    )
