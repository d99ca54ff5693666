"""What `benchmarks.train` measured as a Markdown page, from results alone."""

from collections.abc import Callable

from benchmarks.common.attention_label import attention_label
from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, table
from benchmarks.training.kernel_times import KINDS, OTHERS
from meloformer.errors import UserError

MEANINGS = """\
- **Tokens/s** count real tokens: padding is none. They are of whole steps as training takes them, by the
  clock, with the loader at work beside; with several GPUs, of all of them together.
- **A word after the attention** is the kind rule (`--kind_rule`), where it is not the original one.
- **Times dense, times flex**: its tokens/s over those of dense, and of flex by the same kind rule, with the
  same size, length, GPUs and recomputation; if that was measured with several numbers of rows per batch,
  over its fastest.
- **Rows per batch** are those of each GPU. Where memory is short, half as many are tried, and so on.
- **Computed again**: what the backward computes anew instead of keeping it (`--checkpoint_activations`).
- **MFU**: useful operations (matrix products, visible pairs alone, forward and backward; no padding, nothing
  that is computed twice) over the GPUs' peak; the formula is in `meloformer/training/flops.py`.
- **Waiting**: share of the time in which process 0 waited for the loader.
- **Memory**: peak of what PyTorch allocated on the GPU of process 0, weights and optimizer included.
- **First step**: from nothing to the end of the first step; it holds the compilation, less what caches on
  disk saved. **Warm-up** goes on until nothing new was compiled for some steps.
- **Graphs, kernels**: how many were compiled, over all processes, before and during the steps that were
  measured: graphs by PyTorch, anew for each row; kernels (the attention's) by Triton, for later rows too.
- **Step by parts**: measured apart from the above, with the device waited for after each part: *data* is all
  that the loader does, *prepare* the copies to the device and the plan of the attention. In training both are
  hidden behind the parts that follow, so the sum is more than the step.
- **GPU time**: by the profiler over a few steps more; *in all* counts once what ran side by side.
  *Beside attention* is what would be left if attention took no time: no attention can make a step faster.
  The JSON files have every kernel of more than half a per cent.
- **dense** is a plain causal Transformer without summaries, of as many parameters; its MFU counts its own
  operations, of which it has more.
- Batches are full: the rows of one epoch over and over. In training the last step of an epoch has padding.
"""
COMMON = ("data", "precision", "compile", "gradient_accumulation_steps")  # settings of all files of a page
KEYS = ("size", "attention", "tokens_per_row", "checkpoint_activations", "gpus", "rows_per_batch")
NAMES = ["size", "attention", "tokens per row", "computed again", "GPUs", "rows per batch"]


def joined(results: list[dict], sources: list[str]) -> list[dict]:
    """The rows of all results; of equal ones the last counts. `sources` are the names of their files.

    Raises:
        UserError: they were measured on different GPUs, or with different settings or data.
    """
    settings, machine = results[0]["settings"], results[0]["machine"]
    for result, source in zip(results, sources):
        pairs = [("GPU", machine["gpu"], result["machine"]["gpu"])]
        pairs += [(name, settings[name], result["settings"][name]) for name in COMMON]
        for name, first, other in pairs:
            if first != other:
                raise UserError(
                    f"{source} and {sources[0]} differ in {name} ({other} and {first}): no page of both"
                )
    every = [_named(row) for result in results for row in result["rows"]]
    rows = list({tuple(row[key] for key in KEYS): row for row in every}.values())
    return [row for i, row in enumerate(rows) if "failed" not in row or not _repeated(row, rows[i + 1 :])]


def measured_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "failed" not in row]


def page(results: list[dict], sources: list[str], picture: str | None = None) -> str:
    """The report, see `joined`, with a picture of that name."""
    settings, machine = results[0]["settings"], results[0]["machine"]
    rows = joined(results, sources)
    measured = measured_rows(rows)
    parts = [
        "# Training, measured\n",
        f"![Tokens per second by size]({picture})\n" if picture else "",
        f"{machine['gpu'] or 'CPU'}; steps of {settings['gradient_accumulation_steps']} batch(es) of "
        f"{settings['data']}; layers {_compiled(settings['compile'])}.\n",
        _speed(measured),
        _memory(measured),
        _scaling(measured),
        _compilation(measured),
        _parts(measured),
        _gpu_time(measured),
        _failed(rows),
        "## What is what\n",
        MEANINGS,
        *(_made(result, source) for result, source in zip(results, sources)),
    ]
    return "\n".join(part for part in parts if part)


def readme_body(results: list[dict], sources: list[str], page_path: str, picture: str | None) -> str:
    """The picture and a table for a README; paths as seen from it. Dense rows are what others are beside."""
    every = measured_rows(joined(results, sources))
    plain = [row for row in every if row["checkpoint_activations"] == "none"]
    rows = [row for row in plain if row["attention"] != "dense"]
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("size", lambda row: row["size"]),
        ("attention", lambda row: row["attention"]),
        ("tokens per row", lambda row: f"{row['tokens_per_row']:,}"),
        ("GPUs", lambda row: str(row["gpus"])),
        ("rows per GPU", lambda row: str(row["rows_per_batch"])),
        ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
        ("times dense", lambda row: cell(_times(row, every, "dense"), "{:.2f}")),
        ("MFU", lambda row: cell(row["mfu"], "{:.1%}")),
        ("memory, GB", lambda row: cell(row["peak_gb"], "{:.1f}")),
    ]
    machine = results[0]["machine"]
    parts = [
        *([f"![Training: tokens per second by size]({picture})\n"] if picture else []),
        table([head for head, _ in columns], [[make(row) for _, make in columns] for row in rows], left=2),
        f"{machine['gpu'] or 'CPU'}, {machine['date']}: [all figures and what they mean]({page_path}).",
    ]
    return "\n".join(parts)


def _named(row: dict) -> dict:
    """The row with the name of its attention, which says what "auto" was."""
    used = row | {"attention": row.get("attention_used", row["attention"])}
    return used | {"attention": attention_label(used)}


def _compiled(flag: bool | None) -> str:
    if flag is None:
        return "compiled where training does by default"
    return "compiled" if flag else "not compiled"


def _made(result: dict, source: str) -> str:
    settings = result["settings"]
    return (
        f"`{source}`: {settings['steps']} steps measured after a warm-up of {settings['warmup']} or more, by "
        f"`python -m benchmarks.train` on {provenance(result['machine'])}.\n"
    )


def _speed(rows: list[dict]) -> str:
    heads = [
        *NAMES, "parameters", "precision", "tokens/s", "times dense", "times flex", "MFU", "memory, GB",
        "waiting", "step, ms",
    ]  # fmt: skip
    lines = [
        [
            *_names(row),
            f"{row['parameters'] / 1e6:.1f}M",
            row["precision"],
            f"{row['tokens_per_s']:,.0f}",
            cell(_times(row, rows, "dense"), "{:.2f}"),
            cell(_times(row, rows, attention_label(row | {"attention": "flex"})), "{:.2f}"),
            cell(row["mfu"], "{:.1%}"),
            cell(row["peak_gb"], "{:.1f}"),
            f"{row['data_wait']:.2%}",
            f"{row['step_ms']:.1f}",
        ]
        for row in rows
    ]
    return "## Speed\n\n" + _table(heads, lines)


def _memory(rows: list[dict]) -> str:
    """Rows that were measured with more than one kind of recomputation."""
    lines = []
    for row in rows:
        others = _others(row, rows, free=("checkpoint_activations", "rows_per_batch"))
        if len({other["checkpoint_activations"] for other in others}) < 2:
            continue
        plain = _one([x for x in others if x["checkpoint_activations"] == "none"], row["rows_per_batch"])
        memory = None
        if plain and row["peak_gb"] and plain["rows_per_batch"] == row["rows_per_batch"]:
            memory = row["peak_gb"] / plain["peak_gb"]
        speed = row["tokens_per_s"] / plain["tokens_per_s"] if plain else None
        lines.append(
            [
                *_names(row),
                cell(row["peak_gb"], "{:.1f}"),
                cell(memory, "{:.0%}"),
                f"{row['tokens_per_s']:,.0f}",
                cell(speed, "{:.0%}"),
            ]
        )
    heads = [*NAMES, "memory, GB", "of that of none", "tokens/s", "of those of none"]
    return "## Memory and speed by what is computed again\n\n" + _table(heads, lines) if lines else ""


def _scaling(rows: list[dict]) -> str:
    """Rows on several GPUs beside those that agree in everything else."""
    lines = []
    for row in rows:
        single = [other for other in _others(row, rows, free=("gpus",)) if other["gpus"] == 1]
        if row["gpus"] > 1:
            alone = single[0]["tokens_per_s"] if single else None
            times = row["tokens_per_s"] / alone if alone else None
            lines.append(
                [
                    *_names(row),
                    f"{row['tokens_per_s']:,.0f}",
                    cell(alone, "{:,.0f}"),
                    cell(times, "{:.2f}"),
                ]
            )
    heads = [*NAMES, "tokens/s", "tokens/s of one GPU", "times one GPU"]
    return "## Scaling\n\n" + _table(heads, lines) if lines else ""


def _compilation(rows: list[dict]) -> str:
    heads = [
        *NAMES, "first step, s", "steps of warm-up", "graphs in warm-up", "kernels in warm-up",
        "graphs later", "kernels later",
    ]  # fmt: skip
    lines = [
        [
            *_names(row),
            f"{row['first_step_s']:.1f}",
            str(row["warmup_steps"]),
            *(
                str(row[when][what])
                for when in ("compiled_in_warmup", "compiled_later")
                for what in row[when]
            ),
        ]
        for row in rows
    ]
    return "## Compilation\n\n" + _table(heads, lines) if lines else ""


def _parts(rows: list[dict]) -> str:
    if not rows:
        return ""
    parts = list(rows[0]["breakdown_ms"])
    heads = [*NAMES, *(f"{part}, ms" for part in parts)]
    lines = [[*_names(row), *(f"{row['breakdown_ms'][part]:.1f}" for part in parts)] for row in rows]
    return "## Step by parts\n\n" + _table(heads, lines)


def _gpu_time(rows: list[dict]) -> str:
    rows = [row for row in rows if row["gpu_time"]]
    kinds = [kind for kind in (*KINDS, OTHERS) if any(kind in row["gpu_time"]["kinds"] for row in rows)]
    lines = [
        [
            *_names(row),
            *(cell(row["gpu_time"]["kinds"].get(kind), "{:.1f}") for kind in kinds),
            f"{row['gpu_time']['busy_ms']:.1f}",
            f"{_beside_attention(row['gpu_time']['kinds']):.1f}",
        ]
        for row in rows
    ]
    heads = [*NAMES, *kinds, "in all", "beside attention"]
    return "## GPU time of a step, ms\n\n" + _table(heads, lines) if rows else ""


def _beside_attention(kinds: dict[str, float]) -> float:
    return sum(ms for kind, ms in kinds.items() if kind != "plan" and not kind.startswith("attention"))


def _failed(rows: list[dict]) -> str:
    lines = [[*_names(row), row["failed"].replace("|", "\\|")] for row in rows if "failed" in row]
    return "## Not measured\n\n" + _table([*NAMES, "why"], lines) if lines else ""


def _repeated(row: dict, later: list[dict]) -> bool:
    """Whether a later row is of the same, with however many rows per batch."""
    return bool(_others(row, later, free=("rows_per_batch",)))


def _names(row: dict) -> list[str]:
    return [f"{row[key]:,}" if isinstance(row[key], int) else row[key] for key in KEYS]


def _others(row: dict, rows: list[dict], free: tuple[str, ...]) -> list[dict]:
    """Rows that agree with it in all keys but those that are `free`, itself among them."""
    return [other for other in rows if all(other[key] == row[key] for key in KEYS if key not in free)]


def _one(rows: list[dict], rows_per_batch: int) -> dict | None:
    """That with so many rows per batch, else the fastest."""
    return max(
        rows, key=lambda row: (row["rows_per_batch"] == rows_per_batch, row["tokens_per_s"]), default=None
    )


def _times(row: dict, rows: list[dict], attention: str) -> float | None:
    """Its speed over the best of those with `attention` that agree with it else."""
    others = _others(row, rows, free=("attention", "rows_per_batch"))
    speeds = [other["tokens_per_s"] for other in others if other["attention"] == attention]
    return row["tokens_per_s"] / max(speeds) if speeds else None


def _table(heads: list[str], lines: list[list[str]]) -> str:
    return table(heads, lines, left=2)
