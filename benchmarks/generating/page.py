"""The page of `benchmarks.generate`, from result files alone."""

from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, table
from meloformer.errors import UserError

MEANINGS = """\
- **cache**: as `generate` does it. **recompute**: a pass over the whole song for each token. **dense**: a
  dense model of as many parameters, with a cache. **graphs**, **dense_graphs**: by CUDA graphs, whose
  tokens come {block} steps at a time, after what is recorded once for each number of songs. **fp8_graphs**,
  **int8**: as `generate --cache_dtype fp8` and `generate --int8` do it.
- **Songs** are written side by side. Weights are random, and the tokens of composed songs follow whatever
  is drawn, so that bars have the length of songs. **Prompts** end at a bar line.
- **Tokens/s** are counted from the second token on, by graphs from the third block on, over all songs.
  **First token** includes reading the prompts. **CPU seconds** are those of all threads: on a machine that
  other work shares they say more than the time that passed.
- **MB a song**: memory of the caches of one song, with the room they have to grow.
- **MB a step**: what a step must read, on average: the weights of the streams that are in use, in their
  dtype; keys and values of each place that a song's token sees, counted by the rule of visibility; by
  graphs the lists of these places. A token is a step; by graphs the summary of a bar is another. The
  formula is `StepBytes` in `benchmarks/generating/bandwidth.py`.
- **Share of bandwidth**: these bytes over the time of the steps, over what a plain pass over a big buffer
  read or copied in a second in the same run, the faster of both: so of what the machine reaches, not of its
  data sheet. The caches of a processor can make it more than 100 %. There is none for *recompute*, whose
  passes are bound by arithmetic, nor where a song outgrows what the model sees at once, or memory does not
  suffice for all songs side by side.
- **Waiting** is with one song, once the model is loaded. *First time* is the first with this size in the
  process, without warm-up: kernels are compiled or taken from caches on disk. *Later* is the median of later
  times. By graphs the first token includes recording the graph and comes with the others of its block.
  Reading a prompt is the pass over it that fills the caches. A whole song is written from nothing, with the
  room that `generate` gives it.
- **Kernels of a step** are those by CUDA graphs, by the profiler over two blocks of steps. Where a kernel
  begins while the one before it ends, the time of both counts, so that together they may exceed the step.
"""
KEY = ("size", "method", "context", "batch")


def joined(results: list[dict], sources: list[str]) -> dict:
    """One result with the rows of all; of equal ones (`KEY`, and the size of what is waited for) the last.

    Args:
        sources: names of the files, for messages.

    Raises:
        UserError: they were measured on different devices, in different dtypes or with other threads.
    """

    def facts(result: dict) -> dict[str, object]:
        return {"device": device_of(result), "dtype": result["dtype"], "threads": result["threads"]}

    for result, source in zip(results, sources):
        for name, first in facts(results[0]).items():
            if (other := facts(result)[name]) != first:
                raise UserError(
                    f"{source} and {sources[0]} differ in {name} ({other} and {first}): no page of both"
                )
    rows = {tuple(row[key] for key in KEY): row for result in results for row in result["rows"]}
    waits = {wait["size"]: wait for result in results for wait in result.get("waits", [])}
    return {**results[0], "rows": list(rows.values()), "waits": list(waits.values())}


def device_of(result: dict) -> str:
    """The GPU that was used, else the processor."""
    on_cpu = result.get("device", "cpu") == "cpu"
    return result["machine"]["processor" if on_cpu else "gpu"]


def page(results: list[dict], sources: list[str], picture: str | None, block: int) -> str:
    """The Markdown page of all results.

    Args:
        picture: file name of the chart beside it, if there is one.
        block: steps between two looks of the host.
    """
    result = joined(results, sources)
    parts = [
        "# Speed of generation\n",
        f"![Tokens per second by method and number of songs]({picture})\n" if picture else "",
        f"{device_of(result)}, {result['dtype']}, {result['threads']} CPU thread(s).\n",
        _speed(result["rows"]),
        _peaks(results, sources),
        _waits(result["waits"]),
        *map(_kernels, (row for row in result["rows"] if "kernels" in row)),
        "## How to read the tables\n",
        MEANINGS.format(block=block),
        *(_made(of_file, source) for of_file, source in zip(results, sources)),
    ]
    return "\n".join(part for part in parts if part)


def _speed(rows: list[dict]) -> str:
    heads = [
        "size", "method", "prompt", "songs", "first token, s", "tokens/s", "tokens per CPU second",
        "MB a song", "MB a step", "share of bandwidth",
    ]  # fmt: skip
    lines = []
    for row in rows:
        step = row.get("step_bytes")
        lines.append([
            row["size"],
            row["method"],
            f"{row['prompt']:,}",
            f"{row['batch']}",
            f"{row['first_token_s']:.2f}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['tokens_per_cpu_s']:,.1f}",
            cell(row["cache_bytes"] / 1e6 if row["cache_bytes"] else None, "{:,.1f}"),
            cell(step and step / 1e6, "{:,.1f}"),
            cell(row.get("bandwidth_share"), "{:.0%}"),
        ])  # fmt: skip
    return "## Speed\n\n" + table(heads, lines, left=2)


def _peaks(results: list[dict], sources: list[str]) -> str:
    """What the device can read, and where it was not measured."""
    lines = []
    for result, source in zip(results, sources):
        if peak := result.get("peak"):
            read, copy = (f"{peak[name] / 1e9:,.0f} GB/s" for name in ("read", "copy"))
            said = f"{read} by a sum of it, {copy} by a copy, reading and writing"
        else:
            said = "not measured, so that rows of this file have no share of it"
        lines.append(f"Bandwidth of a big buffer (`{source}`): {said}.\n")
    return "\n".join(lines)


def _waits(waits: list[dict]) -> str:
    lines = [
        [
            wait["size"],
            wait["method"],
            row["what"],
            f"{row['tokens']:,}",
            f"{row['first_s']:.3f}",
            f"{row['again_s']:.3f}",
        ]
        for wait in waits
        for row in wait["rows"]
    ]
    heads = ["size", "method", "what", "tokens", "first time, s", "later, s"]
    return "## Waiting\n\n" + table(heads, lines, left=3) if lines else ""


def _kernels(row: dict) -> str:
    launches, us = (sum(one[name] for one in row["kernels"]) for name in ("launches", "us"))
    lines = [
        [f"`{_short(one['kernel'])}`", f"{one['launches']:.1f}", f"{one['us']:.1f}", f"{one['us'] / us:.0%}"]
        for one in row["kernels"]
    ]
    lines.append(["together", f"{launches:.1f}", f"{us:.1f}", ""])
    songs = "1 song" if row["batch"] == 1 else f"{row['batch']} songs"
    songs += "" if row["method"] == "graphs" else f", {row['method']}"
    return f"## Kernels of a step: {row['size']}, prompt of {row['prompt']:,}, {songs}\n\n" + table(
        ["kernel", "launches", "microseconds", "share"], lines
    )


def _short(name: str) -> str:
    """The name of a kernel, without what would end its cell."""
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= 60 else name[:59] + "…"


def _made(result: dict, source: str) -> str:
    return f"`{source}`: by `python -m benchmarks.generate` on {provenance(result['machine'])}.\n"
