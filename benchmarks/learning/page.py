"""What `benchmarks.learning` gathered as a Markdown page, from results alone."""

import math
from itertools import combinations

from benchmarks.common.attention_label import attention_label
from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, escape, table
from benchmarks.learning.curves import first_reached
from benchmarks.learning.run_folder import SLOW
from benchmarks.learning.verdict import best, groups, hardest_shared_loss, kinds_of, of_run, verdict

MEANINGS = f"""\
- **Losses** are those of the validation songs in nats per token, none of which is trained on. *Best* is the
  lowest of a run, *last* that after its last step.
- **Equal**: the runs differ in attention, kind rule and seed alone. Those of one seed see the same rows in
  the same order and are validated after the same tokens.
- **A word after the attention** is the kind rule (`--kind_rule`), where it is not the original one.
- **dense** is a plain causal Transformer without summaries, of as many parameters within 2 %.
- **Tokens** are counted without padding, over all epochs.
- **Time** is that of the steps by the clock, from the end of the first step on; validating, sampling and
  saving are not in it, and neither are slow steps.
- **Slow steps** are the first one and those that took more than {SLOW} times the median step: as a
  rule they compile for a shape that is new. Their tokens count, their time stands apart.
- **Between validations** curves are read as straight lines, as they are drawn.
- **Clear** is a difference if the ranges of the seeds do not meet. It says nothing about other data, sizes,
  learning rates or lengths of training.
"""


def page(result: dict, picture: str, source: str) -> str:
    """The report.

    Args:
        result: what `learning.gather` returns.
        picture, source: file names of the picture and of the figures, beside the page.
    """
    runs = result["runs"]
    parts = [
        "# What is learned, by tokens and by time\n",
        f"![Validation loss by tokens and by time]({picture})\n",
        _setting(result),
        *_verdicts(runs),
        "## Runs\n",
        _runs(runs),
        "## Best point by kind of token, nats per token\n",
        _by_kind(runs),
        "## When a loss is reached\n",
        _reached(runs),
        "## What is what\n",
        MEANINGS,
        "## Where from\n",
        _origin(result, source),
    ]
    return "\n".join(parts)


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
        f"{settings['learning_rate']:g}, {settings['warmup_steps']:,} steps of warm-up.\n"
    )


def _verdicts(runs: list[dict]) -> list[str]:
    parts = []
    for (name, one), (other_name, other) in combinations(groups(runs).items(), 2):
        parts.append(f"## `{name}` against `{other_name}`\n")
        parts.append("".join(f"- {sentence}\n" for sentence in verdict(one, other)))
    return parts


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
            f"{run['validation']['val_loss'][best(run)]:.4f}",
            f"{run['validation']['step'][best(run)]:,}",
            f"{run['validation']['val_loss'][-1]:.4f}",
            f"{run['tokens_per_s']:,.0f}",
            f"{run['validation']['seconds'][-1]:,.1f}",
            f"{run['slow_steps']:,}",
            f"{run['slow_seconds']:,.1f}",
        ]
        for run in runs
    ]
    return table(heads, lines)


def _by_kind(runs: list[dict]) -> str:
    kinds = kinds_of(runs)
    lines = [
        [
            _name(run),
            *(
                f"{run['validation'][key][best(run)]:.4f}"
                for key in ["val_loss", *(f"val_loss_{k}" for k in kinds)]
            ),
        ]
        for run in runs
    ]
    return table(["run", "all", *kinds], lines)


def targets(runs: list[dict]) -> list[float]:
    """Losses that all runs come down to: the lowest such one, and up to three round ones above it."""
    lowest = hardest_shared_loss(runs)
    tenths = [math.floor(lowest * 10 + 1 + number) / 10 for number in range(3)]
    start = min(run["validation"]["val_loss"][0] for run in runs)
    return [lowest, *(tenth for tenth in tenths if tenth < start)]


def _reached(runs: list[dict]) -> str:
    found = targets(runs)
    heads = ["run", *(f"{loss:.4f}: {what}" for loss in found for what in ("million tokens", "s"))]
    lines = []
    for run in runs:
        cells = [_name(run)]
        for loss in found:
            cells.append(cell(first_reached(of_run(run, "tokens"), loss) / 1e6, "{:.2f}"))
            cells.append(cell(first_reached(of_run(run, "seconds"), loss), "{:.1f}"))
        lines.append(cells)
    return table(heads, lines)


def _origin(result: dict, source: str) -> str:
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
