"""`python -m benchmarks.generate`: decoding from caches against recomputing, and against a dense model.

Writes a JSON file after every row, and a page with a chart from it; `--from` makes the page from earlier
files. Models have random weights. See docs/benchmarks.md.
"""

from meloformer import idle_threads  # noqa: F401

# isort: split
import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.machine import describe
from benchmarks.common.results_file import load, save, write
from benchmarks.generating.bandwidth import peak
from benchmarks.generating.measure import GRAPHS, INT8, METHODS, kernels, speed, waits
from benchmarks.generating.page import device_of, joined, page
from meloformer import cli
from meloformer.errors import UserError
from meloformer.generation.device.loop import pick_cache_dtype, require_gpu
from meloformer.generation.device.step import BLOCK
from meloformer.generation.loop import MAX_CONTEXT
from meloformer.generation.rows import require_int8
from meloformer.model.device import pick_device
from meloformer.model.transformer import SIZES, MeloFormer

FORMAT = "meloformer generation 1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_PROMPT = 512
KERNELS_OF = ("graphs", "fp8_graphs")


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", default="small", help="sizes of models, separated by commas")
    add("--methods", default=",".join(METHODS), help=f"some of {','.join([*METHODS, INT8, *GRAPHS])}")
    add("--contexts", default="2048,4096", help="tokens of the prompts, separated by commas")
    add("--batches", default="1", help="songs that are written side by side, separated by commas")
    add("--tokens", type=cli.positive_int, default=256, help="new tokens of each song")
    add("--recomputed", type=cli.positive_int, default=8, help="the same where each costs a whole pass")
    add("--prompts", default="20000", help="also the time to read prompts of so many tokens; 0: none")
    add("--song_bars", type=int, default=64, help="also the time of a whole song of so many bars; 0: none")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="float32", choices=DTYPES, help="of weights and caches")
    add(
        "--kernels",
        action="store_true",
        help="also what each kernel takes in a step by CUDA graphs",
    )
    add("--threads", type=cli.positive_int, help="CPU threads; without it what PyTorch chooses")
    add("--json", type=Path, help="write the figures to this file, and a page with a chart beside it")
    sources = "make the page from these results of one device instead of measuring"
    add("--from", nargs="+", type=Path, dest="sources", metavar="JSON", help=sources)
    add("--output", type=Path, metavar="PAGE.md", help="the page of --from, with its chart beside it")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.sources:
        if args.output is None or args.output.suffix != ".md":
            raise UserError("--from: needs --output PAGE.md, the page to write")
        results = [load(source, FORMAT, "benchmarks.generate") for source in args.sources]
        publish(results, args.sources, args.output)
        return
    if args.output is not None:
        raise UserError("--output: is for --from; --json FILE writes its page beside FILE")
    result = measure_all(args)
    publish([result], [args.json or Path("this run")], args.json and args.json.with_suffix(".md"))


def measure_all(args: argparse.Namespace) -> dict:
    """Measures every row; after each, all figures so far are written to `--json`.

    Raises:
        UserError: an option is wrong, or cannot be measured on the device.
    """
    sizes, methods = args.sizes.split(","), args.methods.split(",")
    for flag, names, known in (("--sizes", sizes, SIZES), ("--methods", methods, (*METHODS, INT8, *GRAPHS))):
        if unknown := set(names) - set(known):
            raise UserError(f"{flag}: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    contexts, batches = _numbers("--contexts", args.contexts), _numbers("--batches", args.batches)
    prompts = [] if args.prompts == "0" else _numbers("--prompts", args.prompts)
    if min(contexts) < LEAST_PROMPT or min(batches) < 1:
        raise UserError(f"--contexts must be {LEAST_PROMPT} or more, --batches 1 or more")
    if not all(LEAST_PROMPT <= length <= MAX_CONTEXT - 2 * BLOCK for length in prompts):
        raise UserError(f"--prompts must be {LEAST_PROMPT} to {MAX_CONTEXT - 2 * BLOCK}, or 0 for none")
    if args.song_bars < 0:
        raise UserError("--song_bars must be 0 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    if set(methods) & set(GRAPHS):
        require_gpu(device)
        if "fp8_graphs" in methods:
            pick_cache_dtype("fp8", True, device)
        if args.tokens < 3 * BLOCK:
            raise UserError(f"--tokens must be {3 * BLOCK} or more for {', '.join(GRAPHS)}")
    if INT8 in methods:
        require_int8(device)

    def model_of(size: str, dense: bool) -> MeloFormer:
        torch.manual_seed(0)
        config = SIZES[size].as_dense() if dense else SIZES[size]
        return MeloFormer(config).to(device, DTYPES[args.dtype]).eval()

    result: dict = {
        "format": FORMAT,
        "machine": describe(),
        "device": device.type,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "rows": [],
        "waits": [],
    }
    waited = next((name for name in ("graphs", "cache") if name in methods), None)
    for size in sizes if waited else ():  # before all else: the first time is one
        rows = waits(model_of(size, dense=False), waited == "graphs", prompts, args.song_bars)
        result["waits"].append({"size": size, "method": waited, "rows": rows})
    result["peak"] = peak(device)
    cases = [(s, m, c, b) for s in sizes for m in methods for c in contexts for b in batches]
    for size, method, context, batch in tqdm(cases, unit="row"):
        model = model_of(size, GRAPHS.get(method, method) == "dense")
        tokens = args.recomputed if method == "recompute" else args.tokens
        row = speed(model, method, context, batch, tokens, max(result["peak"].values()))
        result["rows"].append({"size": size, **row})
        if args.kernels and method in KERNELS_OF:
            result["rows"][-1]["kernels"] = kernels(model, method, context, batch)
        if args.json:
            save(result, args.json)
    return result


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}: takes whole numbers, separated by commas") from None


def publish(results: list[dict], sources: list[Path], target: Path | None) -> None:
    """Prints the page; with `target`, writes it there and its chart beside it."""
    names, picture = [source.name for source in sources], None
    result = joined(results, names)
    if target is not None and find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed; --from makes the page with it elsewhere")
    elif target is not None:
        from benchmarks.generating.chart import draw

        target.parent.mkdir(parents=True, exist_ok=True)
        picture = draw(result["rows"], f"{device_of(result)} · {result['dtype']}", target)
    text = page(results, names, picture, BLOCK)
    print(text)
    if target is not None:
        write(target, text)


if __name__ == "__main__":
    cli.run(main)
