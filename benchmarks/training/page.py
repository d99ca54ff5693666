"""The page of `benchmarks.train` and the table of the README, from result files alone."""

from collections.abc import Callable

from benchmarks.common.attention_label import attention_label
from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, escape, table
from benchmarks.training.kernel_times import KINDS, OTHERS
from meloformer.errors import UserError

MEANINGS = """\
- **Tokens/s**: real tokens, without padding, per second of wall time of whole training steps, data loading
  included; with several GPUs, of all of them together.
- **Behind the attention** stand the kind rule (`--kind_rule`) and the near bars (`--near_bars`) where they
  are not those of the original scheme, `alike` and 0,1,2,4.
- **no musical inputs**: the model reads of a token its id and its instrument alone, at its index
  (`--inputs tokens`).
- **Times dense, times flex**: tokens/s over those of dense, and of flex with the same kind rule, at the same
  size, length, number of GPUs and recomputation; over the fastest of them if there are several batch sizes.
- **Rows per batch** are per GPU. Where memory is short, half as many are tried, and so on.
- **Recomputed**: what the backward pass computes again instead of keeping it (`--checkpoint_activations`).
- **MFU**: useful operations (matrix products over visible pairs, forward and backward, without padding and
  recomputation) over the peak of the GPUs; the formula is in `meloformer/training/flops.py`.
- **Data wait**: share of the time in which process 0 waited for the loader.
- **Memory**: peak of what PyTorch allocated on the GPU of process 0, weights and optimizer included.
- **First step**: from building the model to the end of the first step. It includes compilation, as far as
  caches on disk did not save it. **Warm-up** ends when nothing new was compiled for some steps.
- **Graphs, kernels**: how many were compiled, over all processes, in the warm-up and in the measured steps.
  PyTorch compiles its graphs for each row of the table; kernels of attention, once compiled by Triton, serve
  later rows too.
- **Step by part**: measured separately, waiting for the device after each part. *Data* is all that the loader
  does, *prepare* the copies to the device, the plan of the attention and what the model reads of tokens
  before any weight (before commit 5a7998e in *forward*). Training overlaps both with the
  other parts, so the sum exceeds a step.
- **GPU time**: by the profiler over a few further steps, of each kernel from its start to its end, waiting
  for others included. *Total* counts the time of parallel kernels once. *Without attention* is the sum of all
  others but the plan: about what would remain if attention took no time. *Plan* includes sorts for other
  parts. The JSON files list each kernel of more than half a per cent.
- **dense**: a plain causal Transformer without summary tokens, of the same number of parameters; its MFU
  counts its own, larger number of operations. Its attention is the fastest that PyTorch has for the documents
  of the rows, measured at the start and named by `dense_way` in the JSON files; in files without that it is
  FlashAttention-2 over all documents in one call.
- Batches are full: the rows of one epoch, repeated. In training the last step of an epoch has padding.
"""
SONGS_MEANING = """\
- **Songs**: the collection that was trained on, and the median length of its songs in tokens. Rows of several
  collections are never set beside each other: times dense is over dense on the same songs, and so on.
"""
# Settings that all files of a page share.
COMMON = ("precision", "compile", "gradient_accumulation_steps")
# What makes rows the same one; `data` is the setting of the file, the rest are the row's own.
KEYS = ("data", "size", "attention", "tokens_per_row", "checkpoint_activations", "gpus", "rows_per_batch")
NAMES = ["size", "attention", "tokens per row", "recomputed", "GPUs", "rows per batch"]


def joined(results: list[dict], sources: list[str]) -> list[dict]:
    """The rows of all results. Of rows with equal `KEYS` the last is kept, and a failed one is dropped if a
    later one differs from it only in the rows per batch.

    Args:
        sources: names of the files, for messages.

    Raises:
        UserError: they were measured on different GPUs, with different settings, or on different songs that
            not all of them name.
    """
    settings, machine = results[0]["settings"], results[0]["machine"]
    songs = _songs(results)
    for result, source in zip(results, sources):
        pairs = [("GPU", machine["gpu"], result["machine"]["gpu"])]
        unnamed = settings["data"] not in songs or result["settings"]["data"] not in songs
        common = ("data", *COMMON) if unnamed else COMMON
        pairs += [(name, settings[name], result["settings"][name]) for name in common]
        for name, first, other in pairs:
            if first != other:
                raise UserError(
                    f"{source} and {sources[0]} differ in {name} ({other} and {first}): no page of both"
                )
    every = []
    for result in results:
        data = result["settings"]["data"]
        every += [_named(row) | {"data": data, "songs": songs.get(data)} for row in result["rows"]]
    rows = list({tuple(row[key] for key in KEYS): row for row in every}.values())
    return [row for i, row in enumerate(rows) if "failed" not in row or not _repeated(row, rows[i + 1 :])]


def _songs(results: list[dict]) -> dict[str, dict]:
    """`name` and `median` length of the songs, by the setting `data`; results of before they were named have
    none."""
    return {
        settings["data"]: {"name": settings["songs_name"], "median": settings["song_tokens"]["median"]}
        for settings in (result["settings"] for result in results)
        if "songs_name" in settings
    }


def songs_label(songs: dict) -> str:
    """Of the `songs` of a row that names them."""
    return f"{songs['name']}, {songs['median']:,} tokens"


def measured_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "failed" not in row]


def page(results: list[dict], sources: list[str], picture: str | None = None) -> str:
    """The Markdown page of all results, see `joined`, with a chart of the file name `picture`."""
    settings, machine = results[0]["settings"], results[0]["machine"]
    rows = joined(results, sources)
    measured = measured_rows(rows)
    parts = [
        "# Speed and memory of training\n",
        f"![Tokens per second by size]({picture})\n" if picture else "",
        f"{machine['gpu'] or 'CPU'}; steps of {settings['gradient_accumulation_steps']} batch(es) of "
        f"{_collections(results)}; layers {_compiled(settings['compile'])}.\n",
        _speed(measured),
        _memory(measured),
        _scaling(measured),
        _compilation(measured),
        _parts(measured),
        _gpu_time(measured),
        _failed(rows),
        "## How to read the tables\n",
        MEANINGS + (SONGS_MEANING if _songs(results) else ""),
        *(_made(result, source) for result, source in zip(results, sources)),
    ]
    return "\n".join(part for part in parts if part)


def readme_body(results: list[dict], sources: list[str], page_path: str) -> str:
    """Table for the README: how fast training is on one GPU, at the length of the first row and without
    recomputation. Where the songs are named, a line for each collection and attention, of the size of the
    first row; else one for each size, its first sparse row, and dense appears only as a ratio.

    Args:
        page_path: relative to the README.
    """
    every = measured_rows(joined(results, sources))
    alike = {"gpus": 1, "checkpoint_activations": "none", "tokens_per_row": every[0]["tokens_per_row"]}
    rows: dict[tuple, dict] = {}
    if every[0]["songs"]:
        alike["size"] = every[0]["size"]
        what = f"the {alike['size']} model of {every[0]['parameters'] / 1e6:.0f}M parameters, "
        first = [
            ("songs", lambda row: escape(row["songs"]["name"])),
            ("song length, tokens", lambda row: f"{row['songs']['median']:,}"),
            (
                "attention",
                lambda row: row["attention"] + (f", {way}" if (way := row.get("dense_way")) else ""),
            ),
        ]
    else:
        what = ""
        first = [
            ("size", lambda row: row["size"]),
            ("parameters", lambda row: f"{row['parameters'] / 1e6:.0f}M"),
            ("attention", lambda row: row["attention"]),
        ]
    for row in every:
        if alike.items() <= row.items():
            if row["songs"]:
                rows.setdefault((row["data"], row["attention"]), row)
            elif row["attention"] not in ("dense", "flex"):
                rows.setdefault((row["size"],), row)
    columns: list[tuple[str, Callable[[dict], str]]] = [
        *first,
        ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
        ("times dense", lambda row: cell(_times(row, every, "dense"), "{:.2f}")),
        ("MFU", lambda row: cell(row["mfu"], "{:.1%}")),
        ("memory, GB", lambda row: cell(row["peak_gb"], "{:.1f}")),
    ]
    lines = [[make(row) for _, make in columns] for row in rows.values()]
    machine = results[0]["machine"]
    return "\n".join([
        table([head for head, _ in columns], lines),
        f"One {machine['gpu'] or 'CPU'}, {what}rows of {alike['tokens_per_row']:,} tokens, "
        f"{machine['date']}: [all figures and what they mean]({page_path}).",
    ])  # fmt: skip


def _named(row: dict) -> dict:
    """The row with the label of the attention that "auto" chose."""
    used = row | {"attention": row.get("attention_used", row["attention"])}
    return used | {"attention": attention_label(used)}


def _collections(results: list[dict]) -> str:
    """The songs of all results, with what is known of them."""
    found = {}
    for settings in (result["settings"] for result in results):
        if "songs_name" in settings:
            lengths = settings["song_tokens"]
            found[settings["data"]] = (
                f"{escape(settings['songs_name'])} ({settings['data']}; median {lengths['median']:,} and "
                f"mean {lengths['mean']:,} tokens)"
            )
        else:
            found.setdefault(settings["data"], settings["data"])
    return ", of ".join(found.values())


def _compiled(flag: bool | None) -> str:
    if flag is None:
        return "compiled where training compiles by default"
    return "compiled" if flag else "not compiled"


def _made(result: dict, source: str) -> str:
    settings = result["settings"]
    turns = settings.get("turns", 1)  # files of before did not have them
    fastest = f" (the fastest of {turns} turns of all rows)" if turns > 1 else ""
    steps = f"{settings['steps']} steps measured after {settings['warmup']} or more of warm-up{fastest}"
    return f"`{source}`: {steps}, by `python -m benchmarks.train` on {provenance(result['machine'])}.\n"


def _speed(rows: list[dict]) -> str:
    heads = [
        *NAMES, "parameters", "precision", "tokens/s", "times dense", "times flex", "MFU", "memory, GB",
        "data wait", "step, ms",
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
    """Configurations that were measured with more than one kind of recomputation."""
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
    heads = [*NAMES, "memory, GB", "relative to none", "tokens/s", "relative to none"]
    return "## Memory and speed by recomputation\n\n" + _table(heads, lines) if lines else ""


def _scaling(rows: list[dict]) -> str:
    """Rows on several GPUs, compared with one GPU at the same configuration."""
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
    return "## Step by part\n\n" + _table(heads, lines)


def _gpu_time(rows: list[dict]) -> str:
    rows = [row for row in rows if row["gpu_time"]]
    kinds = [kind for kind in (*KINDS, OTHERS) if any(kind in row["gpu_time"]["kinds"] for row in rows)]
    lines = [
        [
            *_names(row),
            *(cell(row["gpu_time"]["kinds"].get(kind), "{:.1f}") for kind in kinds),
            f"{row['gpu_time']['busy_ms']:.1f}",
            f"{_without_attention(row['gpu_time']['kinds']):.1f}",
        ]
        for row in rows
    ]
    heads = [*NAMES, *kinds, "total", "without attention"]
    return "## GPU time of a step, ms\n\n" + _table(heads, lines) if rows else ""


def _without_attention(kinds: dict[str, float]) -> float:
    return sum(ms for kind, ms in kinds.items() if kind != "plan" and not kind.startswith("attention"))


def _failed(rows: list[dict]) -> str:
    lines = [[*_names(row), row["failed"].replace("|", "\\|")] for row in rows if "failed" in row]
    return "## Not measured\n\n" + _table([*NAMES, "why"], lines) if lines else ""


def _repeated(row: dict, later: list[dict]) -> bool:
    """Whether a later row differs from it only in the rows per batch."""
    return bool(_others(row, later, free=("rows_per_batch",)))


def _names(row: dict) -> list[str]:
    named = [escape(songs_label(row["songs"]))] if row["songs"] else []
    return named + [f"{row[key]:,}" if isinstance(row[key], int) else row[key] for key in KEYS[1:]]


def _others(row: dict, rows: list[dict], free: tuple[str, ...]) -> list[dict]:
    """Rows equal to it in all of `KEYS` except those in `free`, itself included."""
    return [other for other in rows if all(other[key] == row[key] for key in KEYS if key not in free)]


def _one(rows: list[dict], rows_per_batch: int) -> dict | None:
    """The row with `rows_per_batch` rows per batch, else the fastest."""
    return max(
        rows, key=lambda row: (row["rows_per_batch"] == rows_per_batch, row["tokens_per_s"]), default=None
    )


def _times(row: dict, rows: list[dict], attention: str) -> float | None:
    """Its tokens/s over the best of the rows with `attention` and an otherwise equal configuration."""
    others = _others(row, rows, free=("attention", "rows_per_batch"))
    speeds = [other["tokens_per_s"] for other in others if other["attention"] == attention]
    return row["tokens_per_s"] / max(speeds) if speeds else None


def _table(heads: list[str], lines: list[list[str]]) -> str:
    """A table whose lines begin with `_names`: without songs `heads` is all of them, else they come first."""
    if lines and len(lines[0]) > len(heads):
        heads = ["songs", *heads]
    return table(heads, lines, left=heads.index("attention") + 1)
