"""Structures for attention tests, and the oracle that every backend is compared with.

Songs are lists of (bar, inst, kind, onset) made by a generator that follows the token grammar; a row
is a list of songs, a batch a list of rows. The oracle implements the visibility table pair by pair in Python,
and the attention formula; it uses none of the code under test. (For long structures, `dense_case` uses the
visibility rule of the code, which is tested against the oracle.)
"""

from collections.abc import Callable
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from meloformer.data.pairs import Counts, count_documents
from meloformer.kernels import Structure
from meloformer.kernels.structure import regular_sees, summary_sees

STRUCTURAL, T, P, L, V = range(5)
DRUMS, NONE = 128, 129
NEAR_BARS = (0, 1, 2, 4)
ORIGINAL = {"near_bars": NEAR_BARS, "kind_rule": "alike"}  # the rule of `structure`, for a model
NEAR_BARS_OF = {"alike": NEAR_BARS, "next": NEAR_BARS, "any": (0, 1)}
NOTE = {T, P, L, V}
SEES = {
    "alike": {T: {T, P}, P: {T, P}, L: set(), V: {V}},
    "next": {T: {T, P}, P: {T, P, L}, L: {V}, V: {T, P}},
    "any": {T: NOTE, P: NOTE, L: NOTE, V: NOTE},
}
NEW_RULES = ("next", "any")  # those other than `alike`, the default of the tests


class Token(NamedTuple):
    bar: int
    inst: int
    kind: int
    onset: int


Song = list[Token]
Batch = list[list[Song]]


def song(
    random: Random,
    bars: int,
    instruments: tuple[int, ...] = (DRUMS, 33, 0, 80),
    resting: float = 0.3,
) -> Song:
    """BOS, bars of CHORD [TS] [BPM] and groups of INST and notes, EOS.

    An instrument is silent in a bar with probability `resting`.
    """
    tokens = [Token(0, NONE, STRUCTURAL, -1)]
    onset = -1
    for bar in range(bars):
        header = 3 if bar == 0 else 1 + (random.random() < 0.1) + (random.random() < 0.1)
        tokens += [Token(bar, NONE, STRUCTURAL, -1)] * header
        for inst in instruments:
            if random.random() < resting:
                continue
            tokens.append(Token(bar, inst, STRUCTURAL, -1))
            for group in range(random.randint(1, 3)):
                onset += 1
                tokens.append(Token(bar, inst, T, onset))
                for note in range(random.randint(1, 3)):
                    first = group == note == 0
                    tokens.append(Token(bar, inst, P, onset))
                    tokens += [Token(bar, inst, L, onset)] * (first or random.random() < 0.5)
                    tokens += [Token(bar, inst, V, onset)] * (first or random.random() < 0.3)
    tokens.append(Token(bars - 1, NONE, STRUCTURAL, -1))
    return tokens


# Two bars of one instrument, far apart: query blocks of the later one see whole tiles of the earlier one.
FULL_COLUMNS: Batch = [[[Token(8 * (i >= 150), 0, P, i) for i in range(300)]]]


def of_length(random: Random, length: int) -> Song:
    """The first `length` tokens of a song, cut anywhere as a prompt may be."""
    return song(random, bars=2 + length // 4)[:length]


CASES: dict[str, Callable[[Random], Batch]] = {
    "1_token": lambda r: [[of_length(r, 1)]],
    "2_tokens": lambda r: [[of_length(r, 2)]],
    "one_bar": lambda r: [[song(r, 1, resting=0)]],
    "one_instrument": lambda r: [[song(r, 6, (0,))]],
    "drums_only": lambda r: [[song(r, 5, (DRUMS,), resting=0)]],
    "empty_bars": lambda r: [[song(r, 8, resting=0.9)]],
    "all_keys_visible": lambda r: [[song(r, 30, ())]],
    "one_visible_key": lambda r: [[of_length(r, 1) for _ in range(7)]],
    "near_bar_edges": lambda r: [[song(r, 8, (DRUMS, 0), resting=0.1)]],
    "documents": lambda r: [[song(r, 3), of_length(r, 1), song(r, 1, (0,)), of_length(r, 50)]],
    "rows": lambda r: [[song(r, 4)], [song(r, 2), song(r, 2)], [of_length(r, 5)]],
    "padding_row": lambda r: [[], [song(r, 2)]],
    "16_instruments": lambda r: [[song(r, 3, (DRUMS, *range(0, 120, 8)), resting=0.5)]],
    **{f"{n}_tokens": lambda r, n=n: [[of_length(r, n)]] for n in (63, 64, 65, 127, 128, 129, 257)},
}


def facts(batch: Batch, length: int | None = None) -> dict[str, Tensor]:
    """doc, bar, inst, kind, onset of the rows, int64 [B, length]; None pads to the longest row."""
    rows = [[(doc, *token) for doc, tokens in enumerate(row) for token in tokens] for row in batch]
    length = max(map(len, rows)) if length is None else length
    padded = [row + [(-1, 0, NONE, STRUCTURAL, -1)] * (length - len(row)) for row in rows]
    names = ("doc", "bar", "inst", "kind", "onset")
    return dict(zip(names, torch.tensor(padded, dtype=torch.int64).unbind(-1)))


def structure(
    batch: Batch, length: int | None = None, num_summaries: int | None = None, kind_rule: str = "alike"
) -> Structure:
    """A structure with the kind rule and the near bars that go with it (`NEAR_BARS_OF`)."""
    near_bars = NEAR_BARS_OF[kind_rule]
    return Structure.build(
        **facts(batch, length), num_summaries=num_summaries, near_bars=near_bars, kind_rule=kind_rule
    )


class Case(NamedTuple):
    structure: Structure
    summary_mask: Tensor  # bool [B, M, M + N]
    regular_mask: Tensor  # bool [B, N, M + N]


def dense_case(packed: Structure) -> Case:
    """The masks by the visibility rule of the code, for structures too long for the oracle in Python."""
    keys = packed.keys.at(slice(None), None)
    summaries, tokens = (x.at(slice(None), slice(None), None) for x in (packed.summaries, packed.tokens))
    regular_mask = regular_sees(tokens, keys, packed.near_bars, packed.kind_rule)
    return Case(packed, summary_sees(summaries, keys), regular_mask)


@cache
def case(name: str, seed: int = 0, kind_rule: str = "alike") -> Case:
    batch = CASES[name](Random(f"{name} {seed}"))
    return Case(structure(batch, kind_rule=kind_rule), *oracle_masks(batch, kind_rule=kind_rule))


def oracle_masks(
    batch: Batch, near_bars: tuple[int, ...] | None = None, kind_rule: str = "alike"
) -> tuple[Tensor, Tensor]:
    """Masks by the visibility table, near bars as in `structure`: bool [B, M, M + N], [B, N, M + N]."""
    near_bars = NEAR_BARS_OF[kind_rule] if near_bars is None else near_bars
    length = max(sum(map(len, row)) for row in batch)
    bars = [[(d, bar) for d, s in enumerate(row) for bar in sorted({t.bar for t in s})] for row in batch]
    num_summaries = max(1, *map(len, bars))
    summary_mask = torch.zeros(len(batch), num_summaries, num_summaries + length, dtype=torch.bool)
    regular_mask = torch.zeros(len(batch), length, num_summaries + length, dtype=torch.bool)
    for b, row in enumerate(batch):
        tokens = [(doc, token) for doc, tokens in enumerate(row) for token in tokens]
        for i, (doc_i, bar_i) in enumerate(bars[b]):
            for j, (doc_j, bar_j) in enumerate(bars[b]):
                summary_mask[b, i, j] = doc_i == doc_j and bar_j <= bar_i
            for u, (doc_u, token_u) in enumerate(tokens):
                summary_mask[b, i, num_summaries + u] = doc_i == doc_u and token_u.bar == bar_i
        for t, (doc_t, token_t) in enumerate(tokens):
            for j, (doc_j, bar_j) in enumerate(bars[b]):
                regular_mask[b, t, j] = doc_t == doc_j and bar_j < token_t.bar
            seen = [
                num_summaries + u
                for u, (doc_u, token_u) in enumerate(tokens[: t + 1])
                if doc_t == doc_u and _sees(token_t, token_u, near_bars, SEES[kind_rule])
            ]
            regular_mask[b, t, seen] = True
    return summary_mask, regular_mask


def _sees(t: Token, u: Token, near_bars: tuple[int, ...], sees: dict[int, set[int]]) -> bool:
    """Whether regular token t sees u, which is in the same document and not after t."""
    bar_rule = (u.kind == STRUCTURAL and u.inst == NONE) or t.inst == u.inst or t.bar - u.bar in near_bars
    kind_rule = t.kind == STRUCTURAL or u.kind == STRUCTURAL or t.onset == u.onset or u.kind in sees[t.kind]
    return bar_rule and kind_rule


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V over the keys in `mask` [B, Q, K]; 0 where there are none."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    fully_masked = ~mask.any(dim=-1)[:, None, :, None]
    return scores.masked_fill(fully_masked, 0).softmax(dim=-1).masked_fill(fully_masked, 0) @ v


PHASES = ("summarize", "update")
INPUTS = {"summarize": ("q_s", "k_s", "v_s", "k_r", "v_r"), "update": ("q_r", "k_r", "v_r", "k_s", "v_s")}


def random_inputs(
    phase: str, structure: Structure, dtype: torch.dtype, heads=2, dim=8, seed=0
) -> list[Tensor]:
    """Random q, k, v of one phase in the order of its arguments, and last a cotangent of its output."""
    generator = torch.Generator().manual_seed(seed)
    rows, num_summaries = structure.summary_doc.shape
    lengths = {"s": num_summaries, "r": structure.doc.shape[1]}
    names = (*INPUTS[phase], INPUTS[phase][0])  # the output has the shape of the query
    return [
        torch.randn(rows, heads, lengths[name[-1]], dim, generator=generator).to(dtype).to(structure.device)
        for name in names
    ]


def plain_phase(phase: str, masks: Case) -> Callable[..., Tensor]:
    """The oracle of `Attention.summarize` or `Attention.update`, with the same arguments."""
    mask = masks.summary_mask if phase == "summarize" else masks.regular_mask

    def attend(q: Tensor, k: Tensor, v: Tensor, k_other: Tensor, v_other: Tensor) -> Tensor:
        # Keys of both phases are summaries first; the arguments begin with the query's own stream.
        pairs = ((k, k_other), (v, v_other)) if phase == "summarize" else ((k_other, k), (v_other, v))
        return plain_attention(q, *(torch.cat(pair, dim=2) for pair in pairs), mask.to(q.device))

    return attend


def outputs_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output of `function` on all but the last of `inputs`, and the gradients under that cotangent."""
    *arguments, cotangent = inputs
    arguments = [x.detach().requires_grad_() for x in arguments]
    output = function(*arguments)
    return [output.detach(), *torch.autograd.grad(output, arguments, cotangent)]


def check_low_precision(function, plain, inputs, names):
    """The error against float64 is at most 2 times (output) or 3 times (gradients) that of plain PyTorch.

    One rounding of the largest value is allowed besides, since plain PyTorch may be exact. A gradient that is
    exactly 0, because only one key is seen, is computed as a key or query times the difference of two equal
    sums of D products: there the rounding of these sums in float32 is allowed.
    """
    gold = outputs_and_gradients(plain, [x.double() for x in inputs])
    dim, largest = inputs[0].shape[-1], max(x.abs().max().float() for x in inputs)
    roundings = torch.finfo(torch.float32).eps * dim * largest**3 / dim**0.5
    results = zip(names, gold, outputs_and_gradients(plain, inputs), outputs_and_gradients(function, inputs))
    for name, exact, low, got in results:
        assert got.dtype == inputs[0].dtype, name
        cancels = 0 if exact.any() else roundings
        check_error(name, got, low, exact, times=2 if name == "o" else 3, cancels=cancels)


def check_error(
    name: str, got: Tensor, low: Tensor, exact: Tensor, times: int, dtype=None, cancels: float = 0.0
) -> None:
    """The error of `got` is at most `times` that of `low`, which was computed in the same low precision, plus
    one rounding of the largest value and `cancels`, the error left by terms that cancel; `dtype` is the
    precision if the tensors have another."""
    assert got.isfinite().all(), name
    allowed = times * (low - exact).abs().max() + torch.finfo(dtype or got.dtype).eps * exact.abs().max()
    allowed += cancels
    error = (got - exact).abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_padding(function: Callable[..., Tensor], phase: str, structure: Structure, dim: int) -> None:
    """Outputs and gradients of padding are exactly 0, and its values do not affect other results."""
    padding = {"s": structure.summary_doc < 0, "r": structure.doc < 0}
    streams = [name[-1] for name in (*INPUTS[phase], INPUTS[phase][0])]
    inputs = random_inputs(phase, structure, torch.float32, dim=dim)
    other = [
        x.where(~padding[stream][:, None, :, None], torch.randn_like(x) * 10)
        for x, stream in zip(inputs, streams)
    ]
    results = zip(outputs_and_gradients(function, inputs), outputs_and_gradients(function, other))
    for (a, b), stream in zip(results, (streams[0], *streams)):
        assert torch.equal(a, b)
        assert a.transpose(1, 2)[padding[stream]].eq(0).all()


def count_pairs(structure: Structure) -> Counts:
    """The counts of visible pairs of all rows together; `structure` is on the CPU."""
    real = structure.doc.numpy() >= 0
    doc, bar, inst, kind, onset = (
        fact.numpy()[real]
        for fact in (structure.doc, structure.bar, structure.inst, structure.kind, structure.onset)
    )
    begins = (np.diff(doc) != 0) | (np.diff(np.nonzero(real)[0]) != 0)
    first = np.flatnonzero(np.append(len(doc) > 0, begins))
    each = count_documents(first, bar, inst, kind, onset, structure.near_bars, structure.kind_rule)
    return Counts(*each.sum(0).tolist())
