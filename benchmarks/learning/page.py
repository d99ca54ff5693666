"""The page of `benchmarks.learning`: tables of validation losses, from its result file alone."""

import math

from benchmarks.common.attention_label import attention_label
from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, escape, table
from benchmarks.learning.curves import Curve, first_reached, lowest_until
from benchmarks.learning.run_folder import SLOW

MEANINGS = f"""\
- **Loss**: cross entropy over the validation songs, none of which is trained on, in nats per token. *Best* is
  the lowest of a run, *last* the one after its last step.
- **What the runs share**: they differ in attention, kind rule and seed alone. Runs of one seed see the same
  rows of tokens in the same order, and are validated after the same numbers of tokens.
- **Behind the attention** stand the kind rule (`--kind_rule`) and the near bars (`--near_bars`) where they
  are not those of the original scheme, `alike` and 0,1,2,4.
- **no summaries, no own past**: a part of the attention is left out, see `benchmarks/learning/ablation.py`:
  no token sees a summary; or it sees its own instrument in near bars only, as the others.
- **dense**: a plain causal Transformer without summary tokens, its number of parameters within 2 %.
- **At equal tokens, at equal time**: the lowest loss that each run reached within what the shortest run took.
  The range is that over the seeds. Read a difference only where two ranges do not overlap, and then for
  these data, this model size and this length of training; with one seed there is no range to judge it by.
- **By family**: nats per token to be predicted of that family, and below, *given the family*, the same if it
  is known that a token of that family comes. *Per note* is the nats of all tokens by the number of notes.
- **toy**: what copying and counting needs on the same validation songs, given the family; see
  `benchmarks/learning/toy.py`. *Fixed* mixes its guesses by weights set by hand, *fitted* learns from the
  training songs.
- **Tokens** do not include padding; a token is counted in every epoch.
- **Time**: wall time of the steps from the end of the first one. Validation, sampling and saving are not
  included, nor are slow steps, except where the table says *slow steps included*.
- **Slow steps**: the first one, and those of more than {SLOW} times the median step, mostly because they
  compiled something. Their tokens are counted; their time has a column of its own.
- **Between two validations** losses are interpolated linearly, as in the chart.
"""
_REACHED = {"tokens": ("million tokens", 1e6, "{:.2f}"), "seconds": ("s", 1, "{:.1f}")}  # by axis


def page(result: dict, picture: str, source: str) -> str:
    """The Markdown page.

    Args:
        result: what `__main__.gather` returns.
        picture, source: file names of the chart and of the result file, both beside the page.
    """
    runs = result["runs"]
    parts = [
        "# Validation loss by tokens and by time\n",
        f"![Validation loss by tokens and by time]({picture})\n",
        _setting(result),
        "## Models at equal tokens and at equal time\n",
        _by_model(runs),
        "## Runs\n",
        _runs(runs),
        "## Loss by family of tokens, each run at its best point\n",
        _by_family(runs, result.get("toy")),
        "## When a loss is first reached\n",
        _reached(runs),
        "## How to read the tables\n",
        MEANINGS,
        "## Provenance\n",
        _provenance(result, source),
    ]
    return "\n".join(parts)


def targets(runs: list[dict]) -> list[float]:
    """Losses that every run reaches: the lowest such one, and up to three multiples of 0.1 above it."""
    lowest = max(min(run["validation"]["val_loss"]) for run in runs)
    tenths = [math.floor(lowest * 10 + 1 + number) / 10 for number in range(3)]
    start = min(run["validation"]["val_loss"][0] for run in runs)
    return [lowest, *(tenth for tenth in tenths if tenth < start)]


def _setting(result: dict) -> str:
    settings, data = result["settings"], result["origin"]["data"]
    amounts = {
        name: f"{data[name]['songs']:,} songs ({data[name]['tokens']:,} tokens)"
        for name in ("training", "validation")
    }
    rows = settings["batch_size"] * settings["gradient_accumulation_steps"] * result["origin"]["processes"]
    return (
        f"The {settings['model_size']} model on {amounts['training']}, validated on {amounts['validation']}; "
        f"{rows:,} row(s) of {settings['max_seq_len']:,} tokens per step, learning rate "
        f"{settings['learning_rate']:g}, {settings['warmup_steps']:,} warm-up steps.\n"
    )


def _curve(run: dict, axis: str) -> Curve:
    """Validation loss by "tokens", "seconds" or "all_seconds"."""
    return run["validation"][axis], run["validation"]["val_loss"]


def _best(run: dict) -> int:
    """The index of the validation with the lowest loss."""
    losses = run["validation"]["val_loss"]
    return losses.index(min(losses))


def readme_body(result: dict, page_path: str) -> str:
    """Table for the README: the speed of each model, and its losses at equal tokens and at equal time.

    Args:
        page_path: relative to the README.
    """
    runs, data = result["runs"], result["origin"]["data"]
    ends = {axis: end for axis, end in _ends(runs).items() if axis != "all_seconds"}
    heads = ["attention", "seeds", "trained at, tokens/s", *_within(ends)]
    lines = []
    for name, seeds in _models(runs):
        cells = [name, str(len(seeds)), _mean_speed(seeds)]
        for axis, end in ends.items():
            mean, spread = _mean_and_range([lowest_until(_curve(run, axis), end) for run in seeds])
            cells.append(mean if spread == "-" else f"{mean} ({spread})")
        lines.append(cells)
    return "\n".join(
        [
            table(heads, lines),
            f"Validation loss in nats per token, mean and range over the seeds: the "
            f"{result['settings']['model_size']} model, {data['training']['songs']:,} songs to train on, "
            f"{data['validation']['songs']:,} to validate, {result['origin']['device']}: "
            f"[all figures and what they mean]({page_path}).",
        ]
    )


def _ends(runs: list[dict]) -> dict[str, float]:
    """Where the shortest run ends, by axis: what all runs are compared within."""
    axes = ("tokens", "seconds", "all_seconds")
    return {axis: min(run["validation"][axis][-1] for run in runs) for axis in axes}


def _within(ends: dict[str, float]) -> list[str]:
    """The head of a column of losses for each of `_ends`."""
    forms = {
        "tokens": lambda end: f"loss within {end / 1e6:,.2f}M tokens",
        "seconds": lambda end: f"loss within {end:,.1f} s",
        "all_seconds": lambda end: f"loss within {end:,.1f} s, slow steps included",
    }
    return [forms[axis](end) for axis, end in ends.items()]


def _models(runs: list[dict]) -> list[tuple[str, list[dict]]]:
    """The runs of each attention and kind rule, by its label."""
    models: dict[str, list[dict]] = {}
    for run in runs:
        models.setdefault(escape(attention_label(run)), []).append(run)
    return list(models.items())


def _mean_speed(runs: list[dict]) -> str:
    return f"{sum(run['tokens_per_s'] for run in runs) / len(runs):,.0f}"


def _by_model(runs: list[dict]) -> str:
    """A row for each attention and kind rule: its speed, and its losses over the seeds."""
    ends = _ends(runs)
    heads = ["model", "seeds", "tokens/s"]
    for text in _within(ends):
        heads += [text, "range"]
    lines = []
    for name, seeds in _models(runs):
        cells = [name, str(len(seeds)), _mean_speed(seeds)]
        for axis, end in ends.items():
            cells += _mean_and_range([lowest_until(_curve(run, axis), end) for run in seeds])
        lines.append(cells)
    return table(heads, lines)


def _mean_and_range(losses: list[float | None]) -> list[str]:
    """Two cells; dashes where a run was not validated in time, and for the range of one seed."""
    if None in losses:
        return ["-", "-"]
    spread = f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else "-"
    return [f"{sum(losses) / len(losses):.4f}", spread]


def _name(run: dict) -> str:
    return f"{escape(attention_label(run))}, seed {run['seed']}"


def _runs(runs: list[dict]) -> str:
    heads = [
        "run", "parameters", "tokens", "epochs", "steps", "skipped", "best loss", "at step", "last loss",
        "tokens/s", "time, s", "slow steps", "their time, s",
    ]  # fmt: skip
    lines = [
        [
            _name(run),
            f"{run['parameters'] / 1e6:.2f}M",
            f"{run['tokens']:,}",
            f"{run['epochs']:,}",
            f"{run['steps']:,}",
            f"{run['skipped_steps']:,}",
            f"{run['validation']['val_loss'][_best(run)]:.4f}",
            f"{run['validation']['step'][_best(run)]:,}",
            f"{run['validation']['val_loss'][-1]:.4f}",
            f"{run['tokens_per_s']:,.0f}",
            f"{run['validation']['seconds'][-1]:,.1f}",
            f"{run['slow_steps']:,}",
            f"{run['slow_seconds']:,.1f}",
        ]
        for run in runs
    ]
    return table(heads, lines)


def _by_family(runs: list[dict], toy: dict | None) -> str:
    """A column for each `val_loss_FAMILY` that all runs have; rows of losses given the family, if known."""
    shared = [key for key in runs[0]["validation"] if all(key in run["validation"] for run in runs)]
    families = [key.removeprefix("val_loss_") for key in shared if key.startswith("val_loss_")]
    keys = [key for key in ("val_nats_per_note", "val_loss") if key in shared]
    names = {"val_nats_per_note": "per note", "val_loss": "all"}
    heads = ["run", *(names[key] for key in keys), *families]
    lines = []
    for run in runs:
        figures, best = run["validation"], _best(run)
        columns = [*keys, *(f"val_loss_{family}" for family in families)]
        lines.append([_name(run), *(cell(figures[key][best], "{:.4f}") for key in columns)])
        given = [figures.get(f"val_within_{family}") for family in families]
        if any(given):
            of_families = [cell(values and values[best], "{:.4f}") for values in given]
            lines.append([f"{_name(run)}, given the family", *["-"] * len(keys), *of_families])
    for kind in ("fixed", "fitted") if toy else ():
        of_families = [cell(toy[kind].get(family), "{:.4f}") for family in families]
        lines.append([f"toy, {kind}, given the family", *["-"] * len(keys), *of_families])
    return table(heads, lines)


def _reached(runs: list[dict]) -> str:
    found = targets(runs)
    heads = ["run", *(f"{loss:.4f}: {what}" for loss in found for what, *_ in _REACHED.values())]
    lines = []
    for run in runs:
        cells = [_name(run)]
        for loss in found:
            for axis, (_, unit, form) in _REACHED.items():
                cells.append(cell(first_reached(_curve(run, axis), loss) / unit, form))
        lines.append(cells)
    return table(heads, lines)


def _provenance(result: dict, source: str) -> str:
    origin = result["origin"]
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value is not None)
    return (
        f"- Trained in {origin['precision']} by {origin['processes']} process(es) on {origin['device']}, "
        f"{versions}.\n"
        f"- Settings of all runs: {settings}.\n"
        f"- `{source}`: gathered from their folders by `python -m benchmarks.learning`, "
        f"{provenance(result['machine'])}.\n"
    )
