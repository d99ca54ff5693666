"""The number of visible pairs of tokens, of which the FLOPs of a batch's attention are computed.

Pairs are counted by sums over runs of tokens of one bar and instrument, not one by one, so that the loader
can do it when it first reads a sample. Tests compare the result with the rule in `kernels/structure.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from ..kernels.structure import DRUMS, KIND_RULES, NO_INSTRUMENT, Kind, kinds_seen

_ONE_HOT = np.eye(len(Kind), dtype=np.int64)
# By kind rule, [query, key]: whether a token of a kind sees one of another whatever their onsets.
_SEES = {
    name: np.array([[mask >> key & 1 for key in Kind] for mask in kinds_seen(name)], np.int64)
    for name in KIND_RULES
}
_INSTRUMENTS = max(DRUMS, NO_INSTRUMENT) + 1


@dataclass(frozen=True)
class Counts:
    """Counts over a document or a batch, without padding.

    tokens: regular tokens. summaries: summary tokens, one per bar.
    summary_pairs: visible pairs of the summarize phase (SS and SR).
    token_pairs: visible pairs of the update phase (RS and RR).
    causal_pairs: pairs of a token and one that is not after it, of one document.
    """

    tokens: int
    summaries: int
    summary_pairs: int
    token_pairs: int
    causal_pairs: int


def count_documents(
    first: np.ndarray,
    bar: np.ndarray,
    inst: np.ndarray,
    kind: np.ndarray,
    onset: np.ndarray,
    near_bars: tuple[int, ...],
    kind_rule: str,
) -> np.ndarray:
    """The fields of `Counts` of each document, int64 [documents, 5].

    Args:
        first: where each document begins in the others, which hold them back to back without padding.
        bar, inst, kind, onset: integers [n] as `Structure.build` takes them; so are near_bars, kind_rule.
    """
    if not len(first):
        return np.zeros((0, len(fields(Counts))), np.int64)
    bar, inst = bar.astype(np.int64), inst.astype(np.int64)
    lengths = np.diff(first, append=len(bar))
    doc = np.repeat(np.arange(len(first)), lengths)

    # Bars on one axis, with a gap before each document that no distance of `near_bars` spans.
    near_bars = sorted(set(near_bars))
    gap = max(near_bars, default=0)
    room = np.maximum.reduceat(bar, first) + 1 + gap
    place = bar + np.repeat(gap + np.cumsum(room) - room, lengths)
    bar_begins = np.append(True, np.diff(place) != 0)
    bars = np.add.reduceat(bar_begins, first, dtype=np.int64)
    earlier_bars = np.cumsum(bar_begins) - 1 - np.repeat(np.cumsum(bars) - bars, lengths)

    sees = _SEES[kind_rule]
    seen = sees[kind]
    one_hot = _ONE_HOT[kind]
    total = np.cumsum(one_hot, axis=0)
    run_begins = bar_begins | np.append(True, np.diff(inst) != 0)

    # Pairs inside a run: the bar rule holds, and the kind rule by kinds or else by the onset.
    run, has = _runs(one_hot, run_begins)
    looks = has @ sees  # queries of each run that see a kind
    pairs = _within(first, seen, total, run, looks, has)
    group, sharing = _runs(one_hot, run_begins | np.append(True, np.diff(onset) != 0))
    pairs += _within(first, 1 - seen, total, group, sharing @ (1 - sees), sharing)

    # Pairs of different runs: what the bar rule admits, by kind. Onsets do not reach beyond a run.
    doc, place, inst = doc[run], place[run], inst[run]
    globals_ = np.where((inst == NO_INSTRUMENT)[:, None], has * _ONE_HOT[Kind.STRUCTURAL], 0)
    local = has - globals_
    at = place * _INSTRUMENTS + inst
    admitted = _before(doc, globals_) + _before(doc * _INSTRUMENTS + inst, local)
    of_bar, of_instrument = _totals(place, local), _totals(at, local)
    for distance in near_bars:
        if distance:
            admitted += of_bar(place - distance) - of_instrument(at - distance * _INSTRUMENTS)
        else:
            admitted += _before(place, local) - _before(at, local)
    pairs += np.add.reduceat(_dot(looks, admitted), np.searchsorted(run, first))

    return np.stack(
        [
            lengths,
            bars,
            bars * (bars + 1) // 2 + lengths,
            np.add.reduceat(earlier_bars, first) + pairs,
            lengths * (lengths + 1) // 2,
        ],
        axis=1,
    )


def _runs(values: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first index of every run, and the sum of `values` [n, kinds] over it."""
    first = np.flatnonzero(begins)
    return first, np.add.reduceat(values, first)


def _within(
    first: np.ndarray,
    sees: np.ndarray,
    total: np.ndarray,
    run: np.ndarray,
    looks: np.ndarray,
    has: np.ndarray,
) -> np.ndarray:
    """Of each document, pairs of a token and one of a kind it sees (`sees` [n, kinds]), not after it in the
    same run.

    `total` [n, kinds] counts the kinds up to each token. `run` says where runs begin; `has`, `looks`
    [runs, kinds] are a run's own tokens of a kind, and those that see it.
    """
    before = np.cumsum(has, axis=0) - has
    of_tokens = np.add.reduceat(_dot(sees, total), first)
    return of_tokens - np.add.reduceat(_dot(looks, before), np.searchsorted(run, first))


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each row of x the product with that of y."""
    return np.einsum("ij,ij->i", x, y)


def _before(key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each i the sum of `values` [n, kinds] over j < i with an equal key."""
    order = np.argsort(key, kind="stable")
    moved = values[order]
    total = np.cumsum(moved, axis=0) - moved
    begins = np.flatnonzero(np.append(True, np.diff(key[order]) != 0))
    out = np.empty_like(total)
    out[order] = total - np.repeat(total[begins], np.diff(begins, append=len(key)), axis=0)
    return out


def _totals(key: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from keys to the sum of `values` [n, kinds] over those with that key, or 0."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first, sums = _runs(values[order], np.append(True, np.diff(ordered) != 0))
    known = ordered[first]

    def of(wanted: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where((known[at] == wanted)[:, None], sums[at], 0)

    return of
