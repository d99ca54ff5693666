"""`python -m benchmarks.attention_page RESULT.json ... > PAGE.md`: a page made of attention results.

Needs no GPU: every figure comes from files that `python -m benchmarks.attention --json` wrote.
"""

import json
import sys
from pathlib import Path

from benchmarks.machine import provenance
from meloformer import cli
from meloformer.errors import UserError

HEADER = (
    "| row | tokens | visible | dense cuDNN | dense flash | triton update | forward + backward | "
    "over cuDNN | x the limit | summarize | plan | worst error |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def total(timed: dict) -> float:
    """Median milliseconds of forward and backward together."""
    return timed["forward"][0] + timed["backward"][0]


def line(name: str, row: dict) -> str:
    update, summarize = row["triton"]["update"], row["triton"]["summarize"]
    cudnn, flash = total(row["dense_cudnn"]), total(row["dense_flash"])
    limit = cudnn * row["visible_share"]
    return (
        f"| {name} | {row['tokens']} | {row['visible_share']:.1%} | {cudnn:.2f} ms | {flash:.2f} ms | "
        f"{total(update):.2f} ms | {update['forward'][0]:.2f} + {update['backward'][0]:.2f} ms | "
        f"{cudnn / total(update):.2f}x faster | {total(update) / limit:.2f} | {total(summarize):.2f} ms | "
        f"{row['triton']['setup'][0]:.2f} ms | {max(row['errors'].values()):.2f} |\n"
    )


def page(results: list[dict]) -> str:
    arguments = results[0]["arguments"]
    rows = "".join(line(name, row) for result in results for name, row in result["rows"].items())
    return (
        "# Attention of one layer, forward and backward\n\n"
        f"{arguments['heads']} heads of {arguments['dim']}, {arguments['dtype']}; "
        "medians with a cold L2 cache.\n\n"
        f"{HEADER}{rows}\n"
        "- The limit is the time of dense causal attention (cuDNN) times the visible share of the causal\n"
        "  pairs.\n"
        "- The worst error is that of any output or gradient against float64, as a multiple of the error of\n"
        "  the dense reference in the same precision.\n"
        "- The plan is made once per batch and serves all layers.\n\n"
        f"Made by `python -m benchmarks.attention` and `python -m benchmarks.attention_page` on "
        f"{provenance(results[0]['machine'])}.\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.attention_page", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files written by benchmarks.attention --json")
    args = parser.parse_args(argv)
    try:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the results: {error}") from None
    sys.stdout.write(page(results))


if __name__ == "__main__":
    cli.run(main)
