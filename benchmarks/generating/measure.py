"""The figures of `benchmarks.generate` for one model: rates, kernels, and how long one waits."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks.common import step_kernels
from benchmarks.generating.bandwidth import StepBytes, rows_of_song, steps_of_graphs, steps_of_loop
from benchmarks.generating.songs import SONGS, by_graphs, draft_of, song, whole_song, write_whole
from meloformer.generation.decoder import Decoder
from meloformer.generation.device.loop import CACHE_DTYPES
from meloformer.generation.device.step import BLOCK
from meloformer.generation.draft import Draft
from meloformer.generation.loop import MAX_CONTEXT, write
from meloformer.model.transformer import MeloFormer
from meloformer.tokens import vocab

METHODS = ("cache", "recompute", "dense")
GRAPHS = {"graphs": "cache", "fp8_graphs": "cache", "dense_graphs": "dense"}  # the same by CUDA graphs
_CACHE_DTYPES = {"fp8_graphs": CACHE_DTYPES["fp8"]}  # of keys and values, if not the model's
INT8 = "int8"  # a method for the CPU alone
_MORE, _BUDGET_S = 3, 10.0  # further runs of what is waited for, unless they take longer


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


def speed(
    model: MeloFormer, method: str, context: int, batch: int, tokens: int, peak: float
) -> dict[str, float | int | str | None]:
    """A row: so many tokens for each song of the batch, after the first of each.

    Args:
        peak: bytes a second that the device can read.
    """
    for seed in range(min(batch, SONGS)):
        song(seed, context, tokens + 1)
    run: Callable[[], Iterator[int]]
    if method in GRAPHS:
        drafts, slots = by_graphs(model, batch, context, tokens + 1, _CACHE_DTYPES.get(method))
        run = slots.write
    else:
        drafts = [draft_of(seed, context, tokens + 1) for seed in range(batch)]
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
        memory = slots.step.cache.keys.nbytes // len(slots.step.pending)
    else:
        memory = 0 if method == "recompute" else memory_per_song(model, drafts[0].ids)
    waiting = method in GRAPHS and len(slots.step.pending) < batch  # for others to end
    steps = [] if waiting else bytes_of_steps(model, method, context, batch, tokens)
    return {
        "method": method,
        "context": context,
        "prompt": sum(draft.begin for draft in drafts) // batch,
        "batch": batch,
        "tokens": count,
        "first_token_s": first,
        "tokens_per_s": count / wall,
        "tokens_per_cpu_s": count / cpu,
        "cache_bytes": memory,
        "step_bytes": sum(steps) / len(steps) if steps else None,
        "bandwidth_share": sum(steps) / wall / peak if steps else None,
    }


def bytes_of_steps(model: MeloFormer, method: str, context: int, batch: int, tokens: int) -> list[int]:
    """What each of the steps that `speed` times must read, see `StepBytes`.

    There are none where a pass over the whole song takes the place of a step, or a song outgrows what the
    model sees.
    """
    songs = [song(seed, context, tokens + 1) for seed in range(min(batch, SONGS))]
    if method == "recompute" or max(begin for _, begin in songs) + tokens + 1 >= MAX_CONTEXT:
        return []
    graphs = method in GRAPHS
    # A slot reads the last token of the prompt in its first step; the loop reads it with the prompt.
    firsts = [begin - 1 if graphs else begin for _, begin in songs]
    rows = [
        rows_of_song(ids, first, begin + tokens, model.config) for (ids, begin), first in zip(songs, firsts)
    ]
    of_batch = [rows[seed % SONGS] for seed in range(batch)]
    step = StepBytes(model, graphs, method == INT8, _CACHE_DTYPES.get(method))
    found = [step(mine) for mine in (steps_of_graphs if graphs else steps_of_loop)(of_batch)]
    return found[2 * BLOCK :] if graphs else found


def kernels(model: MeloFormer, method: str, context: int, batch: int) -> list[dict[str, float | str]]:
    """By kernel, what a step takes when such songs are written by a method of `GRAPHS`."""
    _, slots = by_graphs(model, batch, context, 6 * BLOCK, _CACHE_DTYPES.get(method))
    turns = slots.write()
    for _ in range(BLOCK * batch):
        next(turns)

    def two_blocks() -> None:
        for _ in range(2 * BLOCK * batch):
            next(turns)

    return step_kernels.profiled(two_blocks, once="draw_kernel")


def waits(model: MeloFormer, graphs: bool, prompts: list[int], bars: int) -> list[dict[str, float | str]]:
    """Seconds until the first token of a new song, until prompts are read, and of a whole song.

    Args:
        prompts: about so many tokens, up to a bar line.
        bars: of the whole song; 0 leaves it out.

    Returns:
        Rows of `what`, `tokens`, `first_s` (the first time) and `again_s` (the median of later times).
    """
    rows = [
        {"what": "first token of a new song", "tokens": 1, **_times(model, partial(_begin, model, graphs))}
    ]
    for length in prompts:
        ids, begin = song(0, length, BLOCK + 1)
        if graphs:
            (draft,), slots = by_graphs(model, 1, length, BLOCK + 1)
            read = partial(slots.step.begin, 0, draft.state(), ids[:begin])
        else:
            read = partial(Decoder(model).prefill, [0], ids[:begin])
        rows.append({"what": "reading a prompt", "tokens": begin, **_times(model, read)})
    if bars:
        ids = whole_song(bars)
        found = int(vocab.CHORD.mask(ids).sum())

        def whole() -> None:
            for _ in write_whole(model, bars, graphs):
                pass

        rows.append({"what": f"a whole song of {found} bars", "tokens": len(ids) - 2, **_times(model, whole)})
    return rows


def _begin(model: MeloFormer, graphs: bool) -> Iterator[int]:
    """Write the first token of a new song; returns what would write the others."""
    turns = write_whole(model, 8, graphs)
    next(turns)
    return turns


def _times(model: MeloFormer, run: Callable[[], object]) -> dict[str, float]:
    first, *more = [_seconds(model, run)]
    while len(more) < _MORE and (not more or sum(more) < _BUDGET_S):
        more.append(_seconds(model, run))
    return {"first_s": first, "again_s": median(more)}


def _seconds(model: MeloFormer, run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    kept = run()  # until the device is done with it
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    del kept
    return time.perf_counter() - begun
