"""`python -m benchmarks.tune`: search how to launch the update kernels on this GPU; write the table.

Tries tiles (block_m x block_n), warps, stages and register limits for every kernel and pass on the given
songs, and takes what is fastest in total. Candidates are compiled in several processes first, then timed one
by one. With --write the result replaces the entry of this GPU, head_dim and dtype size in kernels/tuned.py;
--json keeps all times. Every entry is a correctness case of tests/kernels/test_triton.py.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common.machine import describe
from benchmarks.common.timing import FLUSH_BYTES
from benchmarks.songs.loading import read_songs
from benchmarks.songs.structures import pack
from meloformer import cli
from meloformer.errors import UserError
from meloformer.kernels import Structure, ops
from meloformer.kernels.launch import TABLE, Entry, Gpu, Launch, Launches, launches_on, override
from meloformer.kernels.plan import Plan

KERNELS = tuple(field.name for field in fields(Launches))
BLOCK_M, BLOCK_N, WARPS, STAGES, REGISTERS = (32, 64), (32, 64), (4, 8), (1, 2, 3, 4), (None, 128, 168)
FULL = BLOCK_M, BLOCK_N, WARPS, STAGES, REGISTERS
QUICK = (64,), (64,), WARPS, (2, 3), REGISTERS  # without limits of registers the best would be left out
FP32 = BLOCK_M, (32, 64), (4, 8, 16), (1, 2), (None,)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TUNED = Path(ops.__file__).with_name("tuned.py")
HEADER = (
    "Launches measured by `python -m benchmarks.tune --write`, which writes this file. See `launch.Entry`."
)


def candidates(dtype: torch.dtype, quick: bool) -> list[Launch]:
    space = FP32 if dtype == torch.float32 else QUICK if quick else FULL
    return [Launch(*values) for values in product(*space)]


class Row:
    """One row of tokens with all that the kernels of the update phase need."""

    def __init__(self, structure: Structure, heads: int, dim: int, dtype: torch.dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        n, m = structure.doc.shape[1], structure.summary_doc.shape[1]

        def draw(length: int) -> torch.Tensor:
            x = torch.randn(1, length, heads, dim, device="cuda", generator=generator)
            return x.to(dtype).transpose(1, 2)

        self.plan = Plan(structure.to("cuda")).finalize().tensors
        self.inputs = [draw(n), draw(m), draw(m), draw(n), draw(n)]
        self.do = draw(n)
        with override(Launches.all(Launch(block_m=32, block_n=32, num_stages=1))):
            self.o, self.lse = ops.update(*self.inputs, *self.plan)
            self.stats = self.lse.new_empty(*self.lse.shape, 2)
            self.gradients = [torch.zeros_like(x) for x in self.inputs]
            self.run("dq_local")

    def run(self, kernel: str) -> None:
        """The kernel `kernel`, a field of `Launches`, once."""
        name, same_inst = kernel.split("_")[0], kernel.endswith("same_inst")
        update = ops.Update(self.inputs, self.plan)
        if name == "forward":
            update.forward(self.o, self.lse, same_inst)
        elif name == "dq":
            update.query_gradient(self.gradients[0], self.o, self.lse, self.do, self.stats, same_inst)
        else:
            update.key_gradients(self.gradients[1:], self.do, self.stats, same_inst)


_rows: list[Row] = []  # of a process that compiles


def _row(ids: list[np.ndarray], length: int | None, shape: tuple) -> Row:
    if not _rows:
        _rows.append(Row(pack(ids, length), *shape))
    return _rows[0]


def _compile(
    ids: list[np.ndarray], length: int | None, shape: tuple, kernel: str, launch: Launch
) -> str | None:
    """Run one candidate once, to fill the compiler's cache; what is wrong with it, None if nothing is."""
    try:
        with override(replace(Launches(), **{kernel: launch})):
            _row(ids, length, shape).run(kernel)
        torch.cuda.synchronize()
    except Exception as error:  # too many registers, or too much shared memory
        return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return None


def search(
    rows: dict[str, tuple], tries: list[tuple[str, Launch]], shape: tuple, repeats: int, workers: int
) -> list[dict]:
    """Times in ms of every kernel and launch in `tries` on every row, or why there are none."""
    smallest = min(rows.values(), key=lambda row: row[1] or sum(map(len, row[0])))
    failed = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(_compile, *smallest, shape, *one): one for one in tries}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="compile", mininterval=10):
            reason = job.result()
            if reason:
                failed[jobs[job]] = reason
    placed = {name: Row(pack(*row), *shape) for name, row in rows.items()}
    results = []
    for kernel, launch in tqdm(tries, desc="time", mininterval=10):
        result = {"kernel": kernel, "launch": vars(launch)}
        if (kernel, launch) in failed:
            results.append(result | {"failed": failed[kernel, launch]})
            continue
        with override(replace(Launches(), **{kernel: launch})):
            ms = {name: _median_ms(partial(row.run, kernel), repeats) for name, row in placed.items()}
        results.append(result | {"ms": ms})
    return results


def _median_ms(run: Callable[[], None], repeats: int) -> float:
    """Milliseconds on the GPU, with a cold L2 cache and the host ahead."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    run()
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return float(np.median([start.elapsed_time(end) for start, end in events]))


def best(results: list[dict], kernel: str) -> tuple[Launch, float]:
    """The fastest launch of a kernel, by the sum over rows in ms."""
    own = [(sum(r["ms"].values()), r["launch"]) for r in results if r["kernel"] == kernel and "ms" in r]
    if not own:
        raise UserError(f"no launch of {kernel} works on this GPU")
    ms, launch = min(own, key=lambda pair: pair[0])
    return Launch(**launch), ms


def _quoted(value) -> str:
    """As Python source, strings as the formatter writes them."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def write_table(entry: Entry, path: Path = TUNED) -> None:
    """Put `entry` into the generated module `path`, in the place of one for the same GPU and operands."""

    def key(e: Entry) -> tuple:
        return e.vendor, e.capability, e.head_dim, e.itemsize

    entries = sorted([e for e in TABLE if key(e) != key(entry)] + [entry], key=key)
    lines = [f'"""{HEADER}"""', "", "ENTRIES = ("]
    for e in entries:
        fields = {name: value for name, value in vars(e).items() if name != "launches"}
        lines += ["    {", *(f"        {_quoted(name)}: {_quoted(value)}," for name, value in fields.items())]
        lines += ['        "launches": {']
        for name in KERNELS:
            launch = repr(getattr(e.launches, name)).removeprefix("Launch")
            lines.append(f"            {_quoted(name)}: dict{launch},")
        lines += ["        },", "    },"]
    path.write_text("\n".join([*lines, ")", ""]), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--midi", nargs="*", default=[], help="songs, or folders of them; composed ones if none are given")
    add("--length", type=cli.positive_int, help="also a row of so many tokens, of all songs packed")
    add("--head_dim", type=int, choices=(32, 64, 128), default=64, help="channels per head")
    add("--heads", type=cli.positive_int, default=8, help="heads")
    add("--dtype", choices=DTYPES, default="bf16", help="fp16 shares the entries of bf16")
    add("--kernels", nargs="*", choices=KERNELS, default=KERNELS, help="only these")
    add("--quick", action="store_true", help="try the likely ones only: much fewer in bf16 and fp16")
    add("--repeats", type=cli.positive_int, default=8, help="runs of each candidate")
    add("--workers", type=cli.positive_int, default=8, help="processes that compile")
    add("--json", type=Path, help="write all times here")
    add("--write", action="store_true", help="write the table")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("tuning needs a CUDA device: PyTorch sees none here")
    songs = read_songs(arguments.midi)
    rows = {name: ([ids], None) for name, ids in songs.items()}
    if arguments.length:
        rows = {f"packed to {arguments.length}": (list(songs.values()), arguments.length)} | (
            rows if len(rows) < 4 else {}
        )
    shape = (arguments.heads, arguments.head_dim, DTYPES[arguments.dtype])
    tries = list(product(arguments.kernels, candidates(shape[2], arguments.quick)))
    results = search(rows, tries, shape, arguments.repeats, arguments.workers)
    machine = describe()
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    found = {}
    for kernel in arguments.kernels:
        found[kernel], ms = best(results, kernel)
        print(f"{kernel:14} {ms:.3f} ms {found[kernel]}")
    if arguments.write:
        gpu, itemsize = Gpu.of(torch.device("cuda:0")), shape[2].itemsize
        launches = replace(launches_on(gpu, shape[1], itemsize), **found)
        name, date = torch.cuda.get_device_name(0), machine["date"]
        write_table(Entry(gpu.vendor, gpu.capability, shape[1], itemsize, launches, name, date))
        print(f"wrote {TUNED.name}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
