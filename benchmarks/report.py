"""`python -m benchmarks.report`: the attention kernels compared with FlexAttention and dense attention.

Measures on a GPU and writes a JSON file after every row. Makes a page and charts from such files, which needs
no GPU (`--from`), and compares two of them (`--compare`). See docs/benchmarks.md.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.attention import measure, metrics
from benchmarks.attention.compare import compare
from benchmarks.attention.page import page
from benchmarks.attention.results import FORMAT, load, merge
from benchmarks.common.attention_label import ORIGINAL_RULE
from benchmarks.common.failures import check_gpu, free_memory, one_line
from benchmarks.common.machine import describe
from benchmarks.common.results_file import save, write
from benchmarks.common.timing import Timer
from benchmarks.songs.loading import read_songs
from benchmarks.songs.structures import causal_pairs, document_lengths, pack, visible_pairs
from meloformer import cli
from meloformer.errors import UserError
from meloformer.kernels.structure import KIND_RULE, KIND_RULES, NEAR_BARS

LENGTHS = (1024, 2048, 4096, 8192, 16384, 24576, 49152, 98304)
DEFAULT_COLUMNS = ("triton", *measure.DENSE, *measure.DOCUMENTS, "flex", "flex_sorted", "flex_fp32")
DTYPES = ("bfloat16", "float16", "float32")
# The original scheme is measured with its own near bars, every other rule with those of the default one.
NEAR_BARS_OF = dict.fromkeys(KIND_RULES, NEAR_BARS) | {
    ORIGINAL_RULE["kind_rule"]: tuple(map(int, ORIGINAL_RULE["near_bars"].split(",")))
}


def longest(column: str, args: argparse.Namespace) -> int | None:
    """The maximum length in tokens of the rows that a column is measured on; None if there is none."""
    if column == "flex_fp32":
        return args.flex_fp32_up_to
    return args.flex_up_to if measure.BACKENDS.get(column) == "flex" else None


class Batch(NamedTuple):
    """What a row of the report is measured on; length None is the length of the song itself.

    Every kind rule but the default one is part of the name, so that files and pages keep its rows apart.
    """

    name: str
    documents: list[np.ndarray]
    length: int | None
    rows: int = 1
    kind_rule: str = KIND_RULE

    def by_rule(self, kind_rule: str) -> "Batch":
        if kind_rule == KIND_RULE:
            return self
        return self._replace(name=f"{self.name}, {kind_rule}", kind_rule=kind_rule)


def batches_of(found: dict[str, np.ndarray], args: argparse.Namespace) -> list[Batch]:
    """Of every row of the report."""
    lengths = args.lengths or ([] if args.whole else LENGTHS)
    whole = [Batch(name, [ids], None) for name, ids in found.items()] if args.whole else []
    songs = list(found.values())
    packed = [
        Batch(f"{'' if rows == 1 else f'{rows} rows '}packed to {n:,}", songs, n, rows)
        for rows in args.rows
        for n in lengths
    ]
    return [batch.by_rule(rule) for batch in whole + packed for rule in args.kind_rules]


def measure_row(batch: Batch, args: argparse.Namespace, timer: Timer) -> dict:
    """One row of the report as JSON values; each figure is also printed as soon as it is known."""
    begun = time.perf_counter()
    name, documents, length, rows, kind_rule = batch
    near_bars = NEAR_BARS_OF[kind_rule]
    structure = pack(documents, length, rows, near_bars, kind_rule).to(args.device)
    row = {
        "name": name,
        "packed": length is not None,
        "rows": rows,
        "documents": len(document_lengths(structure)),
        "tokens": structure.doc.shape[1],
        "summaries": structure.summary_doc.shape[1],
        "visible_pairs": visible_pairs(structure),
        "causal_pairs": causal_pairs(structure),
        "columns": {},
    }
    if kind_rule != KIND_RULE:
        row |= {"kind_rule": kind_rule, "near_bars": ",".join(map(str, near_bars))}
    print(f"{name}: {row['tokens']:,} tokens, {metrics.visible_share(row):.1%} visible", flush=True)
    alone = row["documents"] == rows
    shape = measure.Shape(args.heads, args.dim, getattr(torch, args.dtype))
    for column in args.columns:
        most = longest(column, args)
        if most is not None and row["tokens"] > most:
            row["columns"][column] = {"skipped": f"slow, so not measured beyond {most:,} tokens"}
        elif column in measure.DOCUMENTS and alone:
            row["columns"][column] = {"skipped": "each row is one document: the same as dense"}
        else:
            row["columns"][column] = attempt(column, structure, shape, timer)
        print(f"  {metrics.LABELS[column]:22}{_outcome(row, column)}", flush=True)
    row["seconds"] = time.perf_counter() - begun
    times, gain = metrics.times_limit(row), metrics.speedup(row, metrics.best_dense(row), summarize=True)
    print(
        f"  {'' if times is None else f'{times:.2f} x the limit; '}"
        f"{'' if gain is None else f'{gain:.2f} x as fast as the best dense; '}"
        f"row took {row['seconds']:.1f} s",
        flush=True,
    )
    return row


def attempt(column: str, structure, shape: measure.Shape, timer: Timer) -> dict:
    """The figures of a column, or the reason why it failed: the other columns go on."""
    try:
        return measure.measure(column, structure, shape, timer)
    except Exception as error:
        reason = one_line(error)
    free_memory()
    return {"failed": reason}


def _outcome(row: dict, column: str) -> str:
    entry = row["columns"][column]
    if not metrics.measured(row, column):
        return " ".join(f"{why}: {text}" for why, text in entry.items())
    forward, backward = (entry["update"][which]["ms"] for which in metrics.PASSES)
    return f"{forward:9.3f} + {backward:.3f} ms, worst error {metrics.worst_error(row, column):.2f}"


def measure_all(args: argparse.Namespace, path: Path) -> dict:
    """Measures every row, and writes all rows so far to `path` after each."""
    found = read_songs(args.midi)
    timer = Timer(args.device)
    settings = {"heads": args.heads, "dim": args.dim, "dtype": args.dtype}
    result = {"format": FORMAT, "machine": describe(), "settings": settings, "rows": []}
    batches = batches_of(found, args)
    for number, batch in enumerate(batches, 1):
        print(f"[{number}/{len(batches)}] ", end="")
        result["rows"].append(measure_row(batch, args, timer))
        save(result, path)
        check_gpu(path)
    return result


def write_pages(args: argparse.Namespace, results: list[dict], sources: list[Path], target: Path) -> None:
    result = merge(results, [str(source) for source in sources])
    drawn = []
    if find_spec("matplotlib"):
        from benchmarks.attention.charts import draw

        drawn = draw(result, target)
    else:
        print("no charts: matplotlib is not installed; --from draws them where it is", file=sys.stderr)
    write(target, page(result, drawn, [source.name for source in sources]))
    print(f"wrote {', '.join([str(target), *drawn])}")


def numbers(text: str) -> list[int]:
    return [cli.positive_int(part) for part in text.split(",")]


def names_among(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the names `known`, separated by commas, each once."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return list(dict.fromkeys(text.split(",")))

    return parse


def parser() -> cli.Parser:
    p = cli.Parser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    p.add_argument(
        "--midi",
        nargs="+",
        default=[],
        metavar="PATH",
        help="MIDI files, .npy files of token ids, or folders of either; default: composed songs",
    )
    p.add_argument(
        "--lengths",
        type=numbers,
        metavar="N,N",
        help="measure packed rows of these lengths in tokens (default without --whole: 1k to 98k)",
    )
    p.add_argument(
        "--rows",
        type=numbers,
        default="1",
        metavar="B,B",
        help="measure batches of so many packed rows, each of which begins with another song",
    )
    p.add_argument("--whole", action="store_true", help="measure each song by itself, at its own length")
    p.add_argument(
        "--columns",
        type=names_among(measure.COLUMNS),
        default=",".join(DEFAULT_COLUMNS),
        metavar="A,B",
        help=f"what to measure, among {', '.join(measure.COLUMNS)}",
    )
    p.add_argument(
        "--kind_rules",
        type=names_among(KIND_RULES),
        default=KIND_RULE,
        metavar="A,B",
        help=f"measure every row by each of these kind rules, among {', '.join(KIND_RULES)}; "
        f"{ORIGINAL_RULE['kind_rule']} with near bars {ORIGINAL_RULE['near_bars']}, as the original scheme",
    )
    p.add_argument("--heads", type=cli.positive_int, default=8, help="attention heads")
    p.add_argument("--dim", type=cli.positive_int, default=64, help="channels per head")
    p.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of queries, keys and values")
    for flag, most, what in (("--flex-up-to", 49_152, ""), ("--flex-fp32-up-to", 24_576, " in float32")):
        help = f"measure FlexAttention{what} only on rows of at most N tokens"
        p.add_argument(flag, type=cli.positive_int, default=most, metavar="N", help=help)
    p.add_argument(
        "--output",
        type=Path,
        metavar="PAGE.md",
        help="the page to write, with its charts and JSON file beside it (default: runs/attention.md; "
        "--compare only prints)",
    )
    instead = p.add_mutually_exclusive_group()
    instead.add_argument(
        "--from",
        nargs="+",
        type=Path,
        dest="sources",
        metavar="JSON",
        help="make the page from these results instead of measuring",
    )
    instead.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="print what changed between two results instead of measuring",
    )
    return p  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.compare:
        text = compare(*map(load, args.compare))
        print(text, end="")
        if args.output:
            write(args.output, text)
        return
    target = args.output or Path("runs/attention.md")
    if target.suffix != ".md":
        raise UserError(f"--output {target}: must end in .md")
    if args.sources:
        write_pages(args, [load(source) for source in args.sources], args.sources, target)
        return
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    needing = [column for column in args.columns if column not in measure.ANYWHERE]
    if args.device == "cpu" and needing:
        raise UserError(
            f"no CUDA device: cannot measure {', '.join(needing)} (--columns {','.join(measure.ANYWHERE)} "
            "runs anywhere; --from makes pages of old results)"
        )
    path = target.with_suffix(".json")
    result = measure_all(args, path)
    write_pages(args, [result], [path], target)
    print(target.read_text(encoding="utf-8"))


if __name__ == "__main__":
    cli.run(main)
