"""Speed of generation: decoding from caches against recomputing, and against a dense model with a cache.

Models have random weights. So that bars are as long as in songs, the tokens of composed songs follow the
prompt whatever the model draws; all else is as in generation: the grammar, draws, one token at a time.
"""

from meloformer import idle_threads  # noqa: F401

# isort: split
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import folder_report, step_kernels
from benchmarks.common.machine import describe, provenance
from benchmarks.common.markdown import table
from meloformer import cli
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.generation.decoder import Decoder
from meloformer.generation.device.loop import Slots, require_gpu
from meloformer.generation.device.step import BLOCK
from meloformer.generation.draft import Draft
from meloformer.generation.loop import MAX_CONTEXT, write
from meloformer.generation.rows import require_int8
from meloformer.generation.sampling import Sampling
from meloformer.model.device import pick_device
from meloformer.model.transformer import SIZES, MeloFormer
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer

METHODS = ("cache", "recompute", "dense")
GRAPHS = {"graphs": "cache", "dense_graphs": "dense"}  # the same by CUDA graphs
SONGS = 8  # different ones in a batch: they take long to compose
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INT8 = "int8"  # a method for the CPU alone


class Replayed:
    """In place of `Sampling`: draws, and then takes the next token of a song."""

    def __init__(self, ids: np.ndarray):
        self._sampling, self._ids = Sampling(top_p=0.95), iter(ids.tolist())

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        self._sampling.draw(logits, generator)
        return next(self._ids)


@cache
def song(seed: int, context: int, tokens: int) -> tuple[np.ndarray, int]:
    """Ids of a composed song that are more than `context + tokens`, and where its last bar line is before
    `context`."""
    bars = 8
    while len(ids := HIDTokenizer().encode(compose(seed, bars=bars))) < context + tokens:
        bars *= 2
    lines = np.flatnonzero(vocab.CHORD.mask(ids))
    return ids, int(lines[np.searchsorted(lines, context, side="right") - 1])


def draft(seed: int, context: int, tokens: int) -> Draft:
    """A composed song, of which about `context` tokens, up to a bar line, are the prompt."""
    ids, begin = song(seed % SONGS, context, tokens)
    return Draft(ids[:begin], max_tokens=tokens, sampling=Replayed(ids[begin:-1]))


def by_graphs(model: MeloFormer, batch: int, context: int, tokens: int) -> tuple[list[Draft], Slots]:
    """The same songs, which the device draws and then takes from a queue."""
    songs = [song(seed % SONGS, context, tokens) for seed in range(batch)]
    drafts = [Draft(ids[:begin], max_tokens=tokens, sampling=Sampling(top_p=0.95)) for ids, begin in songs]
    queues = [ids[begin : begin + tokens].tolist() for ids, begin in songs]
    return drafts, Slots(model, drafts, MAX_CONTEXT, slots=batch, queues=queues)


def recompute(model: MeloFormer, drafts: list[Draft]) -> Iterator[int]:
    """As `write` does, with a pass over the whole song for every token."""
    decoder = Decoder(model, len(drafts))
    while any(not draft.finished for draft in drafts):
        for number, draft in enumerate(drafts):
            draft.append_required()  # also finds what may come next
            draft.draw(decoder.prefill([number], np.array(draft.ids)).float().cpu())
            yield number


def memory_per_song(model: MeloFormer, ids: list[int]) -> int:
    """Bytes of the caches of a song that is so far."""
    decoder = Decoder(model)
    decoder.prefill([0], np.array(ids[:-1]))
    decoder.step([0], ids[-1:])
    return sum(tensor.nbytes for tensor in vars(decoder.cache).values())


def measure(
    model: MeloFormer, method: str, context: int, batch: int, tokens: int
) -> dict[str, float | int | str]:
    """A row: so many tokens for each song of the batch, after the first of each."""
    for seed in range(min(batch, SONGS)):
        song(seed, context, tokens + 1)
    run: Callable[[], Iterator[int]]
    if method in GRAPHS:
        drafts, slots = by_graphs(model, batch, context, tokens + 1)
        run = slots.write
    else:
        drafts = [draft(seed, context, tokens + 1) for seed in range(batch)]
        run = (
            (lambda: recompute(model, drafts))
            if method == "recompute"
            else (lambda: write(model, drafts, MAX_CONTEXT, "auto", method == INT8))
        )
    # Of graphs the clock starts when the second block of steps is done, and the tokens after it are counted.
    ahead = BLOCK * batch if method in GRAPHS else 0
    begun = time.perf_counter()
    turns = run()
    for _ in range(batch):
        next(turns)
    first = time.perf_counter() - begun
    for _ in range(ahead):
        next(turns)
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in turns) - ahead
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if method in GRAPHS:
        memory = slots.step.cache.keys.nbytes // batch
    else:
        memory = 0 if method == "recompute" else memory_per_song(model, drafts[0].ids)
    return {
        "method": method,
        "prompt": sum(draft.begin for draft in drafts) // batch,
        "batch": batch,
        "tokens": count,
        "first_token_s": first,
        "tokens_per_s": count / wall,
        "tokens_per_cpu_s": count / cpu,
        "cache_bytes": memory,
    }


def kernels_of(model: MeloFormer, context: int, batch: int) -> list[dict[str, float | str]]:
    """By kernel, what a step takes when such songs are written by graphs."""
    _, slots = by_graphs(model, batch, context, 6 * BLOCK)
    turns = slots.write()
    for _ in range(BLOCK * batch):
        next(turns)

    def two_blocks() -> None:
        for _ in range(2 * BLOCK * batch):
            next(turns)

    return step_kernels.profiled(two_blocks, once="draw_kernel")


def page(result: dict) -> str:
    """The figures as a Markdown page."""
    head = [
        "size",
        "method",
        "prompt",
        "songs",
        "first token, s",
        "tokens/s",
        "tokens per CPU second",
        "MB a song",
    ]
    rows = [
        [
            row["size"],
            row["method"],
            f"{row['prompt']:,}",
            f"{row['batch']}",
            f"{row['first_token_s']:.2f}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['tokens_per_cpu_s']:,.1f}",
            f"{row['cache_bytes'] / 1e6:,.1f}" if row["cache_bytes"] else "",
        ]
        for row in result["rows"]
    ]
    kernels = "".join(
        f"Of a step of {row['batch']} songs, {row['size']}, prompt of {row['prompt']:,}:\n\n"
        + table(
            ["kernel", "launches", "microseconds"],
            [[one["kernel"], f"{one['launches']:.1f}", f"{one['us']:.1f}"] for one in row["kernels"]],
        )
        + "\n"
        for row in result["rows"]
        if "kernels" in row
    )
    return (
        f"# Speed of generation\n\n{table(head, rows, left=2)}\n"
        "*cache*: as `generate` does it. *recompute*: a pass over the whole song for each token. *dense*: a "
        "dense model of as many parameters, with a cache. *graphs*, *dense_graphs*: by CUDA graphs, whose "
        f"tokens come {BLOCK} steps at a time, after what is recorded once for each batch size. *int8*: as "
        "`generate --int8` does it. Prompts end "
        "at a bar line; tokens are counted from the second on, over all songs of the batch; the first token "
        "includes reading the prompts. Weights are random, and the tokens of composed songs follow whatever "
        "is drawn, so that bars have the length of songs. "
        f"In {result['dtype']}, {result['threads']} CPU threads. CPU seconds are those of all threads: on a "
        "machine that other work shares they say more than the time that passed. The last column is the "
        "memory of the caches of one song, with the room they have to grow.\n\n"
        f"{kernels}Made by `python -m benchmarks.generate` on {provenance(result['machine'])}.\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", default="small", help="sizes of models, separated by commas")
    add("--methods", default=",".join(METHODS), help=f"some of {','.join([*METHODS, INT8, *GRAPHS])}")
    add("--contexts", default="2048,4096", help="tokens of the prompts, separated by commas")
    add("--batches", default="1", help="songs that are written side by side, separated by commas")
    add("--tokens", type=cli.positive_int, default=256, help="new tokens of each song")
    add("--recomputed", type=cli.positive_int, default=8, help="the same where each costs a whole pass")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="float32", choices=DTYPES, help="of weights and caches")
    add("--kernels", action="store_true", help="also what each kernel takes in a step of `graphs`")
    add("--threads", type=cli.positive_int, help="CPU threads; without it what PyTorch chooses")
    add("--json", type=Path, help="write the figures to this file, and a page beside it")
    args = parser.parse_args(argv)
    sizes, methods = args.sizes.split(","), args.methods.split(",")
    for flag, names, known in (("--sizes", sizes, SIZES), ("--methods", methods, (*METHODS, INT8, *GRAPHS))):
        if unknown := set(names) - set(known):
            raise UserError(f"{flag}: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    try:
        contexts, batches = ([int(n) for n in text.split(",")] for text in (args.contexts, args.batches))
    except ValueError:
        raise UserError("--contexts, --batches: take whole numbers, separated by commas") from None
    if min(contexts) < 512 or min(batches) < 1:
        raise UserError("--contexts must be 512 or more, --batches 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    device, rows = pick_device(args.device), []
    if set(methods) & set(GRAPHS):
        require_gpu(device)
        if args.tokens < 3 * BLOCK:
            raise UserError(f"--tokens must be {3 * BLOCK} or more for {', '.join(GRAPHS)}")
    if INT8 in methods:
        require_int8(device)
    cases = [(s, m, c, b) for s in sizes for m in methods for c in contexts for b in batches]
    for size, method, context, batch in tqdm(cases, unit="row"):
        torch.manual_seed(0)
        config = SIZES[size].as_dense() if GRAPHS.get(method, method) == "dense" else SIZES[size]
        model = MeloFormer(config).to(device, DTYPES[args.dtype]).eval()
        tokens = args.recomputed if method == "recompute" else args.tokens
        rows.append({"size": size, **measure(model, method, context, batch, tokens)})
        if args.kernels and method == "graphs":
            rows[-1]["kernels"] = kernels_of(model, context, batch)
    result = {"rows": rows, "dtype": args.dtype, "threads": torch.get_num_threads(), "machine": describe()}
    folder_report.publish(result, page(result), args.json)


if __name__ == "__main__":
    cli.run(main)
