"""Songs as token ids -> the `Structure` of packed rows, variants of it, and its visible pairs."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from meloformer.kernels import Structure
from meloformer.kernels.structure import (
    KIND_RULE,
    NEAR_BARS,
    Kind,
    TokenProperties,
    regular_sees,
    summary_room,
)
from meloformer.tokens import attributes

_PAIRS_AT_ONCE = 2**25
_KIND_CLASS = {Kind.STRUCTURAL: 0, Kind.T: 1, Kind.P: 1, Kind.L: 2, Kind.V: 3}


def pack(
    songs: list[np.ndarray],
    length: int | None = None,
    rows: int = 1,
    near_bars: tuple[int, ...] = NEAR_BARS,
    kind_rule: str = KIND_RULE,
) -> Structure:
    """Rows of songs back to back, on CPU: [rows, length]. Each row starts with another song.

    Songs are repeated until the row is full, and the last is cut. `length` None: every song once.
    """
    length = length or sum(map(len, songs))
    packed = [_row(songs[i % len(songs) :] + songs[: i % len(songs)], length) for i in range(rows)]
    return _build(TokenProperties(*(torch.stack(fact) for fact in zip(*packed))), near_bars, kind_rule)


def _row(songs: list[np.ndarray], length: int) -> TokenProperties:
    """The per-token attributes of one row, int64 [length] each; positions are not filled in."""
    songs = songs * -(-length // sum(map(len, songs)))
    lengths = np.array([len(song) for song in songs])
    scanned = attributes.scan(np.concatenate(songs), starts=np.cumsum(lengths) - lengths)
    doc = np.repeat(np.arange(len(songs)), lengths)
    columns = (doc, scanned.bar, scanned.inst, scanned.kind, scanned.onset, doc)
    return TokenProperties(*(torch.from_numpy(column[:length].astype(np.int64)) for column in columns))


def _build(tokens: TokenProperties, near_bars: tuple[int, ...], kind_rule: str) -> Structure:
    """The structure of rows; its number of summaries is rounded up to one of a few sizes, as in training."""
    bars = 1
    for doc, bar in zip(tokens.doc, tokens.bar):
        bars = max(bars, len(torch.unique(torch.stack([doc, bar])[:, doc >= 0], dim=1)[0]))
    return Structure.build(
        *tokens[:5], num_summaries=summary_room(bars), near_bars=near_bars, kind_rule=kind_rule
    )


def cut(structure: Structure, length: int) -> Structure:
    """The first `length` tokens of every row."""
    return _build(structure.tokens.at(slice(None), slice(length)), structure.near_bars, structure.kind_rule)


def padded(structure: Structure, multiple: int) -> Structure:
    """The same rows, padded to a length that is a multiple of `multiple`."""
    missing = -structure.doc.shape[1] % multiple
    doc, *rest = (pad(fact, (0, missing), value=-1) for fact in structure.tokens[:5])
    room = structure.summary_doc.shape[1]
    return Structure.build(
        doc, *rest, num_summaries=room, near_bars=structure.near_bars, kind_rule=structure.kind_rule
    )


def instrument_order(structure: Structure) -> Tensor:
    """Token indices [B, N] sorted by document, instrument, kind class and position; padding last.

    Kind classes: structural; T and P; L; V. Global tokens form a group of their own: they have no instrument.
    """
    tokens = structure.tokens
    classes = torch.tensor([_KIND_CLASS[kind] for kind in sorted(Kind)], device=structure.device)
    kind_class = classes[tokens.kind.long()]
    documents = torch.where(tokens.doc >= 0, tokens.doc, 2**31 - 1).long()
    order = tokens.position.long().argsort(dim=1, stable=True)
    for fact in (kind_class, tokens.inst, documents):
        order = order.gather(1, fact.gather(1, order).argsort(dim=1, stable=True))
    return order


def reordered(structure: Structure, order: Tensor) -> Structure:
    """The same rows with their tokens in the order `order`, int64 [B, N].

    Documents and bars need not ascend in it, unlike in what `Structure.build` returns: it is only for
    backends that evaluate the mask for each pair, `reference` and `flex`.
    """
    moved = TokenProperties(*(fact.gather(1, order) for fact in structure.tokens))
    return replace(structure, **moved._asdict())


def visible_pairs(structure: Structure) -> int:
    """Number of visible pairs (query, key) in the update phase, over all rows."""
    tokens, keys = structure.tokens, structure.keys.at(slice(None), None)
    rows, length = structure.doc.shape
    chunk = max(1, _PAIRS_AT_ONCE // (rows * keys.doc.shape[2]))
    total = torch.zeros((), dtype=torch.int64, device=structure.device)
    for start in range(0, length, chunk):
        queries = tokens.at(slice(None), slice(start, start + chunk), None)
        total += regular_sees(queries, keys, structure.near_bars, structure.kind_rule).sum()
    return int(total)


def causal_pairs(structure: Structure) -> int:
    """Number of pairs in dense causal attention over the same rows."""
    rows, length = structure.doc.shape
    return rows * length * (length + 1) // 2


def document_lengths(structure: Structure) -> list[int]:
    """Tokens of each document, row after row; the padding of a row counts as one."""
    return [n for row in structure.doc for n in torch.unique_consecutive(row, return_counts=True)[1].tolist()]


def document_pairs(structure: Structure) -> int:
    """Number of pairs in dense causal attention inside each document."""
    return sum(n * (n + 1) // 2 for n in document_lengths(structure))
