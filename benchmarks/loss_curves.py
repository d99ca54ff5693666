"""`python -m benchmarks.loss_curves RUN RUN`: the difference between the losses of two training runs.

Reads `log.jsonl` of each run folder, and writes both curves and their difference as JSON and as a chart: two
attention backends on the same data and seed must agree within rounding.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common.machine import describe
from meloformer import cli
from meloformer.errors import UserError
from meloformer.plots.style import INK, save_figure, style_axes
from meloformer.training.run_log import LOG, read_log


def losses(run: Path) -> dict[int, float]:
    """Training loss in nats per token, by step."""
    found = {r["step"]: r["loss"] for r in read_log(run / LOG) if "loss" in r}
    if not found:
        raise UserError(f"{run}: its log holds no step")
    return found


def compare(first: dict[int, float], second: dict[int, float]) -> dict:
    """Both curves over the steps that both have, and their difference relative to the loss."""
    steps = sorted(first.keys() & second.keys())
    if not steps:
        raise UserError("the two runs share no step")
    a, b = (np.array([curve[step] for step in steps]) for curve in (first, second))
    apart = np.abs(a - b) / np.abs(b)
    return {
        "steps": steps,
        "losses": [a.tolist(), b.tolist()],
        "relative_difference": {"mean": float(apart.mean()), "max": float(apart.max())},
        "at_the_end": float(apart[-20:].mean()),
    }


def draw(result: dict, names: list[str], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for name, curve, style in zip(names, result["losses"], ("-", "--")):
        axes.plot(result["steps"], curve, style, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(frameon=False, labelcolor=INK)
    style_axes(axes)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.loss_curves", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs=2, type=Path, help="folders of training runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; its chart goes beside it")
    arguments = parser.parse_args(argv)
    result = compare(*map(losses, arguments.runs))
    names = [run.name for run in arguments.runs]
    result |= {"runs": names, "machine": describe()}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, names, arguments.output.with_suffix(".png"))
    difference = result["relative_difference"]
    print(
        f"{len(result['steps'])} steps: losses differ by {difference['mean']:.2e} of the loss on average, "
        f"{difference['max']:.2e} at most, {result['at_the_end']:.2e} over the last twenty"
    )


if __name__ == "__main__":
    cli.run(main)
