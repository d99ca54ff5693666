"""`python -m benchmarks.train`: speed and memory of training by size, attention and length of the rows.

Takes the training loop's own steps, writes a JSON file after every row and a page of it; `--from` makes the
page of earlier files. See docs/benchmarks.md.
"""

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.machine import describe
from benchmarks.results_file import save
from benchmarks.train_page import page
from meloformer import cli
from meloformer.data import PackedSongs, State
from meloformer.device import pick_device
from meloformer.errors import UserError
from meloformer.estimate import is_out_of_memory
from meloformer.feed import feed
from meloformer.flops import peak_flops
from meloformer.job import Job
from meloformer.kernels import BACKENDS
from meloformer.metrics import Meter, StepFigures
from meloformer.model import DENSE, RECOMPUTE, SIZES
from meloformer.shards import ShardSet
from meloformer.stepper import Ready, Stepper
from meloformer.train_config import TrainConfig

FORMAT = "meloformer training 1"
COMPOSED_BARS = 150
PARTS = ("data", "prepare", "forward", "backward", "optimizer")


class Run:
    """One combination of settings: its steps, over batches without end."""

    def __init__(self, config: TrainConfig, shards: ShardSet):
        self.config, self.device = config, pick_device(config.device)
        model = SIZES[config.model_size]
        if config.attention == DENSE:
            model = model.as_dense()
        self.stepper = Stepper(config, model, Job(0, 1, self.device))
        self.meter = Meter(peak_flops(self.device))
        data = PackedSongs(shards, "train", max_seq_len=config.max_seq_len, max_bars=config.max_bars)
        self.batches = data.batches(State(), config.batch_size)
        self.fed = feed(self.batches, self.stepper.prepare, self.device, self.meter)

    def step(self, batches: Iterator[tuple[Ready, State]]) -> StepFigures:
        number = self.config.gradient_accumulation_steps
        for i in range(1, number + 1):
            self.stepper.accumulate(next(batches)[0], last=i == number)
        return self.stepper.update(self.config.learning_rate)[0]

    def steps(self, number: int) -> dict:
        """What the meter finds over so many steps, as if they were one."""
        self.meter.restart()
        figures = [self.step(self.fed) for _ in range(number)]
        whole = StepFigures(
            loss=figures[-1].loss,
            grad_norm=figures[-1].grad_norm,
            tokens=sum(f.tokens for f in figures),
            flops=sum(f.flops for f in figures),
            taken=all(f.taken for f in figures),
            spike=None,
        )
        return self.meter.step_record(number, 0, self.config.learning_rate, whole)

    def breakdown(self, number: int) -> dict[str, float]:
        """Milliseconds of each of `PARTS` per step, each of them waited for, over so many steps."""
        spent = dict.fromkeys(PARTS, 0.0)
        since = self._now()

        def done(part: str) -> None:
            nonlocal since
            now = self._now()
            spent[part] += (now - since) * 1e3 / number
            since = now

        def in_turn() -> Iterator[tuple[Ready, State]]:
            for batch, after in self.batches:  # made on the spot: this is all that the loader does
                done("data")
                ready = self.stepper.prepare(batch)
                ready.attention.settle()
                done("prepare")
                yield ready, after

        batches = in_turn()
        for _ in range(number):
            for i in range(1, self.config.gradient_accumulation_steps + 1):
                ready, _ = next(batches)
                self.stepper.accumulate(ready, i == self.config.gradient_accumulation_steps, done)
            self.stepper.update(self.config.learning_rate)
            done("optimizer")
        return spent

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(config: TrainConfig, shards: ShardSet, warmup: int, steps: int) -> dict:
    """The figures of one row, as JSON values."""
    cuda = pick_device(config.device).type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    run = Run(config, shards)
    run.steps(1)
    first = time.perf_counter() - begun
    run.steps(warmup)
    found = run.steps(steps)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    run.fed.close()
    return {
        "parameters": run.stepper.model.num_parameters(),
        "attention_used": run.stepper.attention,
        "precision": run.stepper.precision,
        "first_step_s": first,
        "tokens_per_s": found["tokens_per_s"],
        "mfu": found.get("mfu"),
        "data_wait": found["data_wait"],
        "step_ms": 1e3 * found["tokens"] / found["tokens_per_s"] / steps,
        "tokens_per_step": found["tokens"] / steps,
        "peak_gb": peak,
        "breakdown_ms": run.breakdown(steps),
        "loss": found["loss"],
    }


def attempt(config: TrainConfig, shards: ShardSet, args: argparse.Namespace) -> dict:
    """The figures, or why there are none: one row that fails must not take the others along."""
    try:
        return measure(config, shards, args.warmup, args.steps)
    except (UserError, RuntimeError, MemoryError, ValueError) as error:
        reason = "out of memory" if is_out_of_memory(error) else " ".join(str(error).split())[:200]
    gc.collect()  # the frames of the error held tensors
    return {"failed": reason}


def measure_all(args: argparse.Namespace, folder: Path, path: Path) -> dict:
    """Measures every row, writing all of them to `path` after each."""
    shards = ShardSet(folder)
    settings = {
        "batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "compile": args.compile,
        "checkpoint_activations": args.checkpoint_activations,
        "warmup": args.warmup,
        "steps": args.steps,
        "data": "composed songs" if args.data_dir is None else "a folder of shards",
    }
    result = {"format": FORMAT, "machine": describe(), "settings": settings, "rows": []}
    for size, attention, length in itertools.product(args.sizes, args.attention, args.lengths):
        config = TrainConfig(
            data_dir=str(folder),
            model_size=size,
            attention=attention,
            max_seq_len=length,
            batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            device=args.device,
            precision=args.precision,
            compile=args.compile,
            checkpoint_activations=args.checkpoint_activations,
        )
        row = {"size": size, "attention": attention, "tokens_per_row": length}
        row |= attempt(config, shards, args)
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        save(result, path)
    return result


def load(path: Path) -> dict:
    """Raises UserError if it cannot be read or is no such file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f"{path}: is not a result of benchmarks.train")
    return result


def compose_shards(count: int, folder: Path) -> Path:
    """Shards of composed songs, all for training."""
    from meloformer import preprocess
    from meloformer.compose import compose  # needs miditoolkit, shards do not

    (folder / "midi").mkdir()
    for seed in range(count):
        compose(seed, bars=COMPOSED_BARS).dump(folder / "midi" / f"{seed}.mid")
    preprocess.preprocess(
        str(folder / "midi"), str(folder / "shards"), num_workers=2, shard_size=1000, val_split=0.0
    )
    return folder / "shards"


def _listed(known: list[str]):
    """An argparse type: some of these names, with commas."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return text.split(",")

    return parse


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=_listed([*SIZES]), default="base", metavar="A,B")
    add("--attention", type=_listed(["auto", *BACKENDS, DENSE]), default="auto,dense", metavar="A,B")
    add(
        "--lengths",
        type=lambda text: [cli.positive_int(part) for part in text.split(",")],
        default="24576",
        metavar="N,N",
        help="tokens per row",
    )
    add("--batch_size", type=cli.positive_int, default=4, help="rows per batch")
    add("--gradient_accumulation_steps", type=cli.positive_int, default=1, help="batches per step")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    add("--compile", action=argparse.BooleanOptionalAction, help="by default as in training")
    add("--checkpoint_activations", default="none", choices=RECOMPUTE)
    add("--warmup", type=cli.positive_int, default=5, help="steps before those that count")
    add("--steps", type=cli.positive_int, default=20, help="steps that count")
    add("--data_dir", type=Path, help="shards by meloformer.preprocess; without it songs are composed")
    add("--songs", type=cli.positive_int, default=48, help="how many to compose")
    add("--output", type=Path, default=Path("runs/training.md"), help="the page; a JSON file goes beside it")
    add("--from", nargs="+", type=Path, dest="sources", metavar="JSON", help="make the page of these alone")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.output.suffix != ".md":
        raise UserError(f"--output {args.output}: must end in .md")
    sources, results = args.sources, []
    if sources:
        results = [load(source) for source in sources]
    else:
        sources = [args.output.with_suffix(".json")]
        pick_device(args.device)
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.data_dir or compose_shards(args.songs, Path(scratch))
            results = [measure_all(args, folder, sources[0])]
    text = page(results, [source.name for source in sources])
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from None
    print(text)


if __name__ == "__main__":
    cli.run(main)
