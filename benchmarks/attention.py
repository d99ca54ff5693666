"""`python -m benchmarks.attention --midi SONGS`: the attention backends on real songs, on one GPU.

Checks the errors of `triton` first; then times each phase of each backend, forward and backward
apart, beside dense causal attention, and says how far from the limit that is: the time of dense
attention (cuDNN) times the share of the causal pairs that are visible. With `--sweep`, times every
kernel of a pass over tile sizes and launches instead.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.machine import describe
from meloformer import cli, facts
from meloformer.errors import UserError
from meloformer.kernels import Structure, make_attention
from meloformer.kernels.plan import Pass, Plan, make_plan
from meloformer.kernels.sparse import (
    add_key_gradients,
    add_query_gradient,
    forward,
    row_stats,
)
from meloformer.kernels.tiling import Launch, PassTiles, Tiles

REPEATS = 30
FLUSH_BYTES = 2**30  # more than any L2 cache, and long enough to write for the host to get ahead
CHECKED_TOKENS = 4096
SWEEP_BLOCKS = ((64, 64), (128, 64), (64, 128), (128, 128), (32, 64))
SWEEP_LAUNCHES = tuple(Launch(warps, stages) for warps in (4, 8) for stages in (2, 3, 4))

DENSE = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION}


def read_songs(sources: list[str], composed: int) -> dict[str, np.ndarray]:
    """Token ids by name: of MIDI files, of .npy files of token ids, and of composed songs."""
    songs = {}
    for source in sources:
        path = Path(source)
        files = (
            sorted(f for f in path.rglob("*") if f.suffix in (".mid", ".npy")) if path.is_dir() else [path]
        )
        for file in files:
            if file.suffix == ".npy":
                songs[file.stem] = np.load(file)
            else:
                from meloformer.tokenizer import HIDTokenizer  # needs miditoolkit, the rest does not

                songs[file.stem] = HIDTokenizer().encode(file)
    for seed in range(composed):
        from meloformer.compose import compose
        from meloformer.tokenizer import HIDTokenizer

        songs[f"composed {seed}"] = HIDTokenizer().encode(compose(seed, bars=150))
    if not songs:
        raise UserError("no songs: give --midi or --composed")
    return songs


def pack(songs: list[np.ndarray], length: int | None) -> Structure:
    """One row of these songs back to back, as often as it takes to fill `length` (None: once)."""
    total = sum(map(len, songs))
    repeated = songs * (1 if length is None else -(-length // total))
    ends = np.cumsum([len(song) for song in repeated])
    starts = ends - [len(song) for song in repeated]
    ids = np.concatenate(repeated)
    scanned = facts.scan(ids, starts=starts)
    doc = np.repeat(np.arange(len(repeated)), [len(song) for song in repeated])
    columns = (doc, scanned.bar, scanned.inst, scanned.kind, scanned.onset)
    columns = [torch.from_numpy(np.ascontiguousarray(x[:length]))[None].long() for x in columns]
    bars = len(torch.unique(columns[0] * 10**6 + columns[1]))
    return Structure.build(*columns, num_summaries=max(128, 1 << (bars - 1).bit_length())).to("cuda")


class Timer:
    """Milliseconds on the GPU, with a cold L2 cache: median, 20th and 80th percentile."""

    def __init__(self):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
        for _ in range(3):
            run()
        events = []
        for _ in range(repeats):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        ms = [start.elapsed_time(end) for start, end in events]
        return [float(np.percentile(ms, p)) for p in (50, 20, 80)]


def inputs_of(structure: Structure, phase: str, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of one phase in the order of its arguments, laid out as the model does, and a cotangent."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(length: int) -> Tensor:
        x = torch.randn(1, length, heads, dim, device="cuda", generator=generator)
        return x.to(dtype).transpose(1, 2).requires_grad_()

    s, r = structure.summary_doc.shape[1], structure.doc.shape[1]
    own, other = (s, r) if phase == "summarize" else (r, s)
    return [draw(own), draw(own), draw(own), draw(other), draw(other), draw(own).detach()]


def kernel_inputs(phase: str, inputs: list[Tensor]) -> list[Tensor]:
    """q, k_s, v_s, k_r, v_r."""
    q, k, v, k_other, v_other = (x.detach() for x in inputs[:5])
    return [q, k, v, k_other, v_other] if phase == "summarize" else [q, k_other, v_other, k, v]


def check_errors(structure: Structure, heads: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Largest error against float64, as a multiple of the largest error of the reference in `dtype`."""
    cut = [fact[:, :CHECKED_TOKENS] for fact in structure.tokens[:5]]
    structure = Structure.build(*cut, num_summaries=structure.summary_doc.shape[1])
    ratios = {}
    for phase in ("summarize", "update"):
        inputs = inputs_of(structure, phase, heads, dim, dtype)

        def results(backend: str, dtype: torch.dtype, phase=phase, inputs=inputs) -> list[Tensor]:
            *arguments, cotangent = (x.detach().to(dtype) for x in inputs)
            arguments = [x.requires_grad_() for x in arguments]
            out = getattr(make_attention(structure, backend), phase)(*arguments)
            return [out, *torch.autograd.grad(out, arguments, cotangent)]

        exact = results("reference", torch.float64)
        plain, got = results("reference", dtype), results("triton", dtype)
        names = ("o", "dq", "dk", "dv", "dk_other", "dv_other")
        for name, gold, low, ours in zip(names, exact, plain, got):
            floor = torch.finfo(dtype).eps * gold.abs().max()
            error = (ours - gold).abs().max() / ((low - gold).abs().max() + floor)
            ratios[f"{phase} {name}"] = float(error.detach())
    return ratios


def pairs(plan: Plan) -> dict[str, int]:
    """Visible and computed pairs of the update phase, and of its passes."""
    out = {}
    for name, p in zip(("near", "far"), plan.update):
        area = p.tiles.block_m * p.tiles.block_n
        full = int((p.queries.total - p.queries.partial).sum())
        bits = sum(int(((p.queries.bits >> i) & 1).sum()) for i in range(32))
        out[f"visible_{name}"] = full * area + bits
        out[f"computed_{name}"] = int(p.queries.total.sum()) * area
        out[f"full_{name}"] = full * area
    return out


def plan_bytes(plan: Plan) -> int:
    """Bytes of the tensors of a plan, shared storages once."""
    storages = {}
    for p in (*plan.summarize, *plan.update):
        for x in (*vars(p).values(), *vars(p.queries).values(), *vars(p.keys).values()):
            if isinstance(x, Tensor):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def measure(structure: Structure, backends: list[str], heads: int, dim: int, dtype: torch.dtype) -> dict:
    """Times in ms [median, p20, p80] of one row."""
    timer, result = Timer(), {"tokens": structure.doc.shape[1], "summaries": structure.summary_doc.shape[1]}
    n = result["tokens"]
    for name in DENSE:
        if name in backends:
            q, k, v, cotangent = (
                torch.randn(1, n, heads, dim, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
                for _ in range(4)
            )
            with sdpa_kernel(DENSE[name]):

                def attend(q=q, k=k, v=v):
                    return scaled_dot_product_attention(q, k, v, is_causal=True)

                result[name] = _both(timer, attend, (q, k, v), cotangent.detach())
    for backend in (b for b in backends if b not in DENSE):
        begun = time.perf_counter()
        attention = make_attention(structure, backend)
        torch.cuda.synchronize()
        result[backend] = {"first_setup_s": time.perf_counter() - begun}
        result[backend]["setup"] = timer(lambda b=backend: make_attention(structure, b))
        for phase in ("summarize", "update"):
            *arguments, cotangent = inputs_of(structure, phase, heads, dim, dtype)

            def attend(phase=phase, arguments=arguments, attention=attention):
                return getattr(attention, phase)(*arguments)

            result[backend][phase] = _both(timer, attend, arguments, cotangent)
    if "triton" in backends:
        plan = make_plan(structure, Tiles())
        result["plan_mb"] = plan_bytes(plan) / 1e6
        result["pairs"] = pairs(plan)
        result["visible_share"] = sum(result["pairs"][f"visible_{p}"] for p in ("near", "far")) / (
            n * (n + 1) / 2
        )
        result["kernels"] = _by_kernel(timer, plan, structure, heads, dim, dtype)
    if "triton" in backends and "dense_cudnn" in backends:
        limit = result["visible_share"] * (
            result["dense_cudnn"]["forward"][0] + result["dense_cudnn"]["backward"][0]
        )
        update = result["triton"]["update"]
        result["limit_ms"] = limit
        result["times_limit"] = (update["forward"][0] + update["backward"][0]) / limit
    return result


def _both(timer: Timer, attend: Callable[[], Tensor], arguments, cotangent: Tensor) -> dict:
    with torch.no_grad():
        forward_ms = timer(attend)
        forward_host_ms = _host_ms(attend)
    out = attend()

    def grad():
        return torch.autograd.grad(out, arguments, cotangent, retain_graph=True)

    backward_ms, backward_host_ms = timer(grad), _host_ms(grad)
    del out, grad
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend()
    gradients = torch.autograd.grad(out, arguments, cotangent)
    own = sum(x.nbytes for x in (out, *gradients))
    peak = torch.cuda.max_memory_allocated() - before - own
    return {
        "forward": forward_ms,
        "backward": backward_ms,
        "host": [forward_host_ms, backward_host_ms],
        "extra_mb": peak / 1e6,
    }


def _host_ms(run: Callable[[], object]) -> float:
    """Milliseconds until the host has launched everything, the GPU being idle; median."""
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        times.append((time.perf_counter() - begun) * 1000)
    return float(np.median(times))


def _by_kernel(
    timer: Timer, plan: Plan, structure: Structure, heads: int, dim: int, dtype: torch.dtype
) -> dict:
    out = {}
    for phase, passes in (("summarize", plan.summarize), ("update", plan.update)):
        inputs = inputs_of(structure, phase, heads, dim, dtype)
        names = ("summarize",) if phase == "summarize" else ("near", "far")
        for name, p in zip(names, passes):
            out |= {f"{name} {k}": ms for k, ms in _time_pass(timer, p, passes, phase, inputs).items()}
    return out


def _time_pass(timer: Timer, p: Pass, passes: tuple[Pass, ...], phase: str, inputs: list[Tensor]) -> dict:
    """Each kernel of one pass by itself, with a warm plan."""
    arguments, do = kernel_inputs(phase, inputs), inputs[5]
    o, lse = forward(*arguments, passes)
    stats = row_stats(o, lse, do)
    gradients = [torch.zeros_like(x) for x in arguments]
    return {
        "forward": timer(lambda: forward(*arguments, (p,))),
        "dq": timer(lambda: add_query_gradient(gradients[0], *arguments, do, stats, p)),
        "dkv": timer(lambda: add_key_gradients(_key_gradients(arguments), *arguments, do, stats, p)),
    }


def _key_gradients(arguments: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in arguments[1:]]


def sweep(structure: Structure, name: str, heads: int, dim: int, dtype: torch.dtype) -> list[dict]:
    """Times of the kernels of one pass over tile sizes and launches; prints them as they come."""
    timer, rows = Timer(), []
    phase = "summarize" if name == "summarize" else "update"
    inputs = inputs_of(structure, phase, heads, dim, dtype)
    blocks = ((16, 64), (16, 128), (32, 64), (64, 64)) if name == "summarize" else SWEEP_BLOCKS
    for block_m, block_n in blocks:
        tiles = PassTiles(block_m, block_n)
        plan = make_plan(structure, replace(Tiles(), **{name: tiles}))
        passes = getattr(plan, phase)
        p = passes[1 if name == "far" else 0]
        for launch in SWEEP_LAUNCHES:
            tuned = replace(p, tiles=PassTiles(block_m, block_n, launch, launch, launch))
            try:
                ms = _time_pass(timer, tuned, passes, phase, inputs)
            except Exception as error:  # too many registers or too much shared memory: not a candidate
                print(f"{name} {block_m}x{block_n} {launch}: {str(error).splitlines()[0][:100]}", flush=True)
                continue
            row = {"pass": name, "block": [block_m, block_n], "warps": launch.warps, "stages": launch.stages}
            rows.append(row | {kernel: times[0] for kernel, times in ms.items()})
            print(
                " ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in rows[-1].values()),
                flush=True,
            )
    return rows


def show(name: str, result: dict) -> None:
    print(f"\n{name}: {result['tokens']} tokens, {result['summaries']} summary slots")
    for backend in ("dense_cudnn", "dense_flash"):
        if backend in result:
            _line(backend, result[backend])
    for backend in ("triton", "flex", "reference"):
        if backend in result:
            for phase in ("summarize", "update"):
                _line(f"{backend} {phase}", result[backend][phase])
            setup = result[backend]["setup"]
            print(f"  {backend + ' setup':24}{setup[0]:9.3f} ms ({setup[1]:.3f} to {setup[2]:.3f})")
    for kernel, (median, low, high) in result.get("kernels", {}).items():
        print(f"  {kernel:24}{median:9.3f} ms ({low:.3f} to {high:.3f})")
    if "pairs" in result:
        causal = result["tokens"] * (result["tokens"] + 1) / 2
        print("  " + ", ".join(f"{key} {value / causal:.1%}" for key, value in result["pairs"].items()))
        print(f"  plan {result['plan_mb']:.1f} MB")
    if "limit_ms" in result:
        print(f"  limit {result['limit_ms']:.3f} ms; update takes {result['times_limit']:.2f} times that")


def _line(name: str, times: dict) -> None:
    forward_ms, backward_ms = times["forward"], times["backward"]
    print(
        f"  {name:24}{forward_ms[0]:9.3f} + {backward_ms[0]:.3f} ms "
        f"({forward_ms[1]:.3f} to {forward_ms[2]:.3f}, {backward_ms[1]:.3f} to {backward_ms[2]:.3f}), "
        f"extra {times['extra_mb']:.0f} MB, host {times['host'][0]:.2f} + {times['host'][1]:.2f} ms"
    )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--midi", nargs="*", default=[], help="MIDI files, .npy files of token ids, folders")
    parser.add_argument("--composed", type=int, default=0, help="songs to compose")
    parser.add_argument("--length", type=cli.positive_int, help="pack the songs into one row of that length")
    parser.add_argument("--heads", type=cli.positive_int, default=8)
    parser.add_argument("--dim", type=cli.positive_int, default=64, help="channels per head")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--backends", default="triton,dense_cudnn,dense_flash", help="comma-separated")
    parser.add_argument("--sweep", default="", help="passes to tune: summarize, near, far, comma-separated")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device")
    dtype = getattr(torch, args.dtype)
    songs = read_songs(args.midi, args.composed)
    rows = {name: [ids] for name, ids in songs.items()}
    if args.length:
        rows = {f"packed to {args.length}": list(songs.values())}
    output: dict[str, object] = {"machine": describe(), "arguments": vars(args) | {"json": None}, "rows": {}}
    for name, documents in rows.items():
        structure = pack(documents, args.length)
        if args.sweep:
            output["rows"][name] = [
                row for p in args.sweep.split(",") for row in sweep(structure, p, args.heads, args.dim, dtype)
            ]
        else:
            errors = check_errors(structure, args.heads, args.dim, dtype)
            print(
                f"{name}: errors, as multiples of the reference's: ",
                {k: round(v, 2) for k, v in errors.items()},
            )
            if any(not v <= (2 if k.endswith(" o") else 3) for k, v in errors.items()):
                raise UserError("wrong results are not timed")
            result = measure(structure, args.backends.split(","), args.heads, args.dim, dtype)
            output["rows"][name] = result | {"errors": errors}
            show(name, result)
        if args.json:
            args.json.write_text(json.dumps(output, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
