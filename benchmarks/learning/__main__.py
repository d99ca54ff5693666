"""`python -m benchmarks.learning RUN RUN ...`: validation loss of several models by tokens and by time.

Reads the folders of finished training runs that differ in attention, kind rule and seed alone, and writes
their validation losses to a JSON file, with a chart and a page of tables; such a file may stand among the
folders for the runs in it. `--from` makes chart and page again from one. See docs/benchmarks.md.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from benchmarks.common.attention_label import attention_label
from benchmarks.common.machine import describe
from benchmarks.common.readme_section import update_section
from benchmarks.common.results_file import load, save, write
from benchmarks.learning.chart import draw
from benchmarks.learning.page import page, readme_body
from benchmarks.learning.run_folder import read_run
from benchmarks.learning.toy import measure
from meloformer import cli
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError

FORMAT = "meloformer learning 1"


def gather(sources: list[Path]) -> dict:
    """The runs in these folders, and of these results, as one result; the toy is that of the first with one.

    Raises:
        UserError: a run has not finished, or they cannot be compared: they must differ in attention, kind
            rule or seed, and in nothing else.
    """
    runs, toy = [], None
    for source in sources:
        if source.is_file():
            result = load(source, FORMAT, "benchmarks.learning")
            shared = {"settings": result["settings"], "origin": result["origin"]}
            runs += [run | shared for run in result["runs"]]
            toy = toy or result.get("toy")
        else:
            runs.append(read_run(source))
    first, *others = runs
    for run in others:
        for name, mine, its in _differences(first, run):
            raise UserError(
                f"{run['name']} and {first['name']} cannot be compared: they differ in {name} "
                f"({its!r} and {mine!r})"
            )
    for one, other in combinations(runs, 2):
        if one["seed"] != other["seed"]:
            continue
        names = f"{one['name']} and {other['name']}"
        if attention_label(one) == attention_label(other):
            raise UserError(
                f"{names} are both {attention_label(one)} of seed {one['seed']}: give one of them"
            )
        if any(one["validation"][key] != other["validation"][key] for key in ("step", "tokens")):
            raise UserError(f"{names} have the same seed, but were not validated after equal tokens")
    if len({*map(attention_label, runs)}) < 2:
        raise UserError(f"all runs are {attention_label(first)}: there is nothing to compare")
    return {
        "format": FORMAT,
        "machine": describe(),
        "settings": first["settings"],
        "origin": first["origin"],
        "runs": [{k: v for k, v in run.items() if k not in ("settings", "origin")} for run in runs],
        **({"toy": toy} if toy else {}),
    }


def toy_of(result: dict, folder: Path) -> dict:
    """What the toys need on the validation songs of the runs in `result`.

    Raises:
        UserError: the folder holds other songs than those of the runs.
    """
    shards, trained_on = ShardSet(folder), result["origin"]["data"]
    if shards.sha256() != trained_on["sha256"]:
        raise UserError(f"--data {folder}: holds other songs than those that the runs were trained on")
    return measure(shards, result["settings"].get("max_bars"))


def _differences(one: dict, other: dict) -> Iterator[tuple[str, object, object]]:
    for part in ("origin", "settings"):
        for name in sorted(one[part].keys() | other[part].keys()):
            mine, its = one[part].get(name), other[part].get(name)
            if mine != its:
                yield name, mine, its


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folders of finished runs, or results of earlier ones",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/learning.md"),
        metavar="PAGE.md",
        help="the page to write, with its chart and JSON file beside it",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the songs of the runs, as preprocessed: adds what a toy that copies and counts needs for INST "
        "and CHORD",
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="source",
        metavar="JSON",
        help="make the page from this result alone",
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="also update the table between the markers of this file"
    )
    args = parser.parse_args(argv)
    if args.output.suffix != ".md":
        raise UserError(f"--output {args.output}: must end in .md")
    if (args.source is None) == (not args.runs):
        raise UserError("give folders of runs, or --from with a result file")
    if args.source and args.data:
        raise UserError("--data: the result file of --from has the toy's figures, or was made without")
    source = args.source or args.output.with_suffix(".json")
    if args.source:
        result = load(source, FORMAT, "benchmarks.learning")
    else:
        result = gather(args.runs)
        if args.data:
            result["toy"] = toy_of(result, args.data)
        save(result, source)
    picture = args.output.with_suffix(".png")
    text = page(result, picture.name, source.name)
    write(args.output, text)
    draw(result, picture)
    print(text)
    if args.readme:
        update_section(args.readme, "learning", [source], lambda seen: readme_body(result, seen(args.output)))


if __name__ == "__main__":
    cli.run(main)
