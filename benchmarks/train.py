"""`python -m benchmarks.train`: speed and memory of training by size, attention, length, recomputation, GPUs.

Runs the steps of the training loop itself, and writes a JSON file after every combination and a page from it;
`--from` makes the page from earlier files. On several GPUs: `torchrun --nproc_per_node=2 -m
benchmarks.train`. See docs/benchmarks.md.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common.failures import check_gpu
from benchmarks.common.machine import describe
from benchmarks.common.readme_section import update_section
from benchmarks.common.results_file import load, save, write
from benchmarks.training import inputs
from benchmarks.training.chart import draw
from benchmarks.training.measure import attempt
from benchmarks.training.page import joined, measured_rows, page, readme_body
from meloformer import cli
from meloformer.data.shards import MANIFEST, ShardSet
from meloformer.errors import UserError
from meloformer.kernels import BACKENDS
from meloformer.kernels.structure import KIND_RULE, KIND_RULES
from meloformer.model.transformer import DENSE, RECOMPUTE, SIZES
from meloformer.training.config import PRECISIONS, TrainConfig
from meloformer.training.distributed import Job, start_job

FORMAT = "meloformer training 3"
COMPOSED_BARS = range(40, 201)  # varied, as in a real collection


def measure_all(args: argparse.Namespace, folder: Path, job: Job, path: Path) -> dict:
    """Measures every row; after each, process 0 writes all rows so far to `path`."""
    shards = ShardSet(folder)
    digest = shards.sha256()[:12]
    settings = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "precision": args.precision,
        "compile": args.compile,
        "data": f"{len(shards)} {'songs' if args.data_dir else 'composed songs'}, {digest}",
        "songs_name": args.songs_name
        or (args.data_dir.resolve().name if args.data_dir else "composed songs"),
        "song_tokens": {
            "median": round(float(np.median(shards.lengths))),
            "mean": round(float(shards.lengths.mean())),
        },
        "warmup": args.warmup,
        "steps": args.steps,
        "turns": args.turns,
    }
    result = {"format": FORMAT, "machine": describe(), "settings": settings, "rows": []}
    attentions = [
        (attention, rule)
        for attention in args.attention
        for rule in ([KIND_RULE] if attention == DENSE else args.kind_rules)
    ]
    axes = args.sizes, args.lengths, attentions, args.checkpoint_activations, args.inputs
    best: dict[tuple, dict] = {}
    for combination in [*itertools.product(*axes)] * args.turns:
        size, length, (attention, kind_rule), recompute, read = combination
        config = TrainConfig(
            data_dir=str(folder),
            model_size=size,
            attention=attention,
            kind_rule=kind_rule,
            max_seq_len=length,
            batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            device=args.device,
            precision=args.precision,
            compile=args.compile,
            checkpoint_activations=recompute,
        )
        row = {
            "size": size,
            "attention": attention,
            "kind_rule": kind_rule,
            "near_bars": config.near_bars,
            "tokens_per_row": length,
            "checkpoint_activations": recompute,
            "gpus": job.world,
        }
        if read in inputs.WITHOUT:
            row["without"] = inputs.WITHOUT[read]
        row |= attempt(config, shards, job, args.warmup, args.steps, read)
        if job.is_rank0:
            print(json.dumps(row), flush=True)
        if combination not in best or _speed(row) > _speed(best[combination]):
            best[combination] = row
        result["rows"] = [*best.values()]
        if job.is_rank0:
            save(result, path)
        check_gpu(path)
    return result


def _speed(row: dict) -> float:
    return row.get("tokens_per_s", 0.0)  # 0: it failed


def compose_shards(count: int, folder: Path) -> Path:
    """Shards of composed songs of 40 to 200 bars in `folder`, all for training; reused if they are there.

    Raises:
        UserError: those that are there are not `count` songs.
    """
    if (folder / "shards" / MANIFEST).is_file():  # else an earlier run was interrupted: preprocess resumes
        shards = ShardSet(folder / "shards")
        if len(shards) != count:
            raise UserError(f"{folder} has {len(shards)} composed songs: give --songs {len(shards)}")
        return folder / "shards"
    from meloformer.composer.compose import compose  # needs miditoolkit, shards do not
    from meloformer.data.build import preprocess

    (folder / "midi").mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        bars = COMPOSED_BARS[37 * seed % len(COMPOSED_BARS)]
        compose(seed, bars=bars).dump(folder / "midi" / f"{seed}.mid")
    preprocess(str(folder / "midi"), str(folder / "shards"), num_workers=2, shard_size=1000, val_split=0.0)
    return folder / "shards"


def _listed(known: list[str]) -> Callable[[str], list[str]]:
    """An argparse type: names among `known`, separated by commas."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return text.split(",")

    return parse


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--sizes",
        type=_listed([*SIZES]),
        default="base",
        metavar="A,B",
        help=f"model sizes, among {', '.join(SIZES)}",
    )
    add(
        "--attention",
        type=_listed(["auto", *BACKENDS, DENSE]),
        default="auto,dense",
        metavar="A,B",
        help=f"backends, among auto, {', '.join(BACKENDS)}, and {DENSE}, the baseline model",
    )
    add(
        "--kind_rules",
        type=_listed([*KIND_RULES]),
        default=KIND_RULE,
        metavar="A,B",
        help=f"kind rules, among {', '.join(KIND_RULES)}; {DENSE} has none and is measured once",
    )
    add(
        "--lengths",
        type=lambda text: [cli.positive_int(part) for part in text.split(",")],
        default="24576",
        metavar="N,N",
        help="tokens per row",
    )
    add(
        "--inputs",
        type=_listed([inputs.ALL, inputs.TOKENS]),
        default=inputs.ALL,
        metavar="A,B",
        help="what the model reads: all, or of the tokens their ids and instruments alone; both show what "
        "input features and musical time cost",
    )
    add(
        "--checkpoint_activations",
        type=_listed([*RECOMPUTE]),
        default="none",
        metavar="A,B",
        help=f"what to recompute in the backward pass, among {', '.join(RECOMPUTE)}",
    )
    add(
        "--batch_size",
        type=cli.positive_int,
        default=4,
        help="rows per batch and GPU; halved while memory does not suffice (not on several GPUs)",
    )
    add("--gradient_accumulation_steps", type=cli.positive_int, default=1, help="batches per optimizer step")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", default="auto", choices=PRECISIONS, help="as of meloformer.train")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="default: as training does",
    )
    add(
        "--warmup",
        type=cli.positive_int,
        default=5,
        help="number of consecutive steps that compile nothing before measuring starts",
    )
    add("--steps", type=cli.positive_int, default=20, help="steps to measure")
    add(
        "--turns",
        type=cli.positive_int,
        default=1,
        help="measure all rows so many times, one after the other, and keep the fastest turn of each: what "
        "else the host does only adds time",
    )
    add("--data_dir", type=Path, help="shards from meloformer.preprocess; default: composed songs")
    add(
        "--songs_name",
        metavar="TEXT",
        help="what the page calls these songs; default: the name of the folder, or 'composed songs'",
    )
    add(
        "--songs",
        type=cli.positive_int,
        default=160,
        help="number of songs to compose; the more, the fuller the packed rows",
    )
    add("--keep_songs", type=Path, metavar="FOLDER", help="keep composed songs here, and reuse them")
    add(
        "--output",
        type=Path,
        default=Path("runs/training.md"),
        help="the page to write, with its JSON file beside it",
    )
    add("--readme", type=Path, metavar="FILE", help="also update the table between the markers of this file")
    add(
        "--from",
        nargs="+",
        type=Path,
        dest="sources",
        metavar="JSON",
        help="make the page from these results, of one collection of songs or of several",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.output.suffix != ".md":
        raise UserError(f"--output {args.output}: must end in .md")
    if args.sources:
        results = [load(source, FORMAT, "benchmarks.train") for source in args.sources]
        _publish(results, args.sources, args.output, args.readme)
        return
    job = start_job(args.device)
    try:
        _measure_and_publish(args, job)
    except BaseException as error:
        job.fail(error)
        raise
    job.leave()


def _measure_and_publish(args: argparse.Namespace, job: Job) -> None:
    path = args.output.with_suffix(".json")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data_dir
        if folder is None:  # process 0 composes for all processes, on one machine
            kept = args.keep_songs or Path(scratch)
            folder = Path(job.run_on_rank0(lambda: str(compose_shards(args.songs, kept))))
        result = measure_all(args, folder, job, path)
        job.run_on_rank0(lambda: _publish([result], [path], args.output, args.readme))


def _publish(results: list[dict], sources: list[Path], target: Path, readme_path: Path | None) -> None:
    names, gpu = [source.name for source in sources], results[0]["machine"]["gpu"]
    picture = draw(measured_rows(joined(results, names)), gpu or "CPU", target)
    text = page(results, names, picture)
    write(target, text)
    print(text)
    if readme_path is not None:
        update_section(
            readme_path, "training", sources, lambda seen: readme_body(results, names, seen(target))
        )


if __name__ == "__main__":
    cli.run(main)
