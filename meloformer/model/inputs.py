"""What the model knows of a token besides its id and instrument: functions of the tokens up to it alone.

HID leaves out what does not change, and music repeats itself. So the input of a token also says which onset,
length, velocity and chord are in force; which token of its family came before; and what followed when the
same token stood at the same place of an earlier bar. Attention could find each of these, but a small model
needs many more songs to learn to. The labels of `ChordGuesses` are not read, but copied by the output.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.structure import NO_INSTRUMENT, Structure
from ..tokens import vocab

BAR_ENDS = len(vocab.INST) + 1  # in place of an instrument: the bar ended after this one


class InputFeatures(NamedTuple):
    """Indices into tables of embeddings, int64 [B, N] each; 0 stands for "none".

    onset, length, velocity: 1 + the value of the T, L or V token in force, in a group of notes.
    chord: 1 + the label of the bar.
    previous: id of the previous token of the same family; of T, P, L and V within the group, of INST within
        the bar.
    repeat: id of the token that followed when this token, with the same onset and instrument, stood in the
        document the last time.
    next_instrument: 1 + the rank of the instrument that followed the present one in the last bar that had it,
        or `BAR_ENDS`; before the first group of a bar, the one that began the bar before.
    """

    onset: Tensor
    length: Tensor
    velocity: Tensor
    chord: Tensor
    previous: Tensor
    repeat: Tensor
    next_instrument: Tensor


TABLE_SIZES = InputFeatures(
    onset=len(vocab.T) + 1,
    length=len(vocab.L) + 1,
    velocity=len(vocab.V) + 1,
    chord=len(vocab.CHORD) + 1,
    previous=vocab.VOCAB_SIZE,
    repeat=vocab.VOCAB_SIZE,
    next_instrument=BAR_ENDS + 1,
)


class ChordGuesses(NamedTuple):
    """Labels that the next bar may take over from an earlier bar of the song: ids of CHORD tokens, int64
    [B, N] each; 0 where the document has no such bar.

    one, two, four, eight: of the bar so many bars before the next one.
    after_one: what followed the label of this bar when it last stood in a bar before.
    after_two: what followed the labels of the bar before and of this one when they last stood so before.
    """

    one: Tensor
    two: Tensor
    four: Tensor
    eight: Tensor
    after_one: Tensor
    after_two: Tensor


def _ids(family: vocab.Family) -> range:
    return range(family.start, family.stop)


_BARS_BACK = (1, 2, 4, 8)  # from the next one, of the guesses that are labels of earlier bars
_IN_FORCE = (vocab.T, vocab.L, vocab.V, vocab.CHORD)
_SPECIAL = (vocab.PAD_FAMILY, vocab.BOS_FAMILY, vocab.EOS_FAMILY)
_FAMILIES = (*_IN_FORCE, *(family for family in vocab.FAMILIES if family not in (*_IN_FORCE, *_SPECIAL)))
# Kinds of tokens that are looked for: those of a family, those that the notes of a group come after, and
# those that begin a group or a bar.
_OUTSIDE, HEAD = "outside notes", "head"
_KINDS = {family.name: {*_ids(family)} for family in _FAMILIES} | {
    _OUTSIDE: {*range(vocab.VOCAB_SIZE)} - {*range(vocab.T.start, vocab.V.stop)},
    HEAD: {*_ids(vocab.INST), *_ids(vocab.CHORD)},
}
_PLACE = {kind: place for place, kind in enumerate(_KINDS)}
_KEY_BITS = 56  # of a key: more than documents, places in them and pairs of labels need


class _Tables(NamedTuple):
    """Constants: bool [kinds, VOCAB_SIZE] tokens of each kind; one less than the first id of the families in
    force, and `_BARS_BACK`, int64 [4, 1, 1] both."""

    is_of: Tensor
    before_ids: Tensor
    bars_back: Tensor


_TABLES = _Tables(
    torch.tensor([[token in tokens for token in range(vocab.VOCAB_SIZE)] for tokens in _KINDS.values()]),
    torch.tensor([family.start - 1 for family in _IN_FORCE])[:, None, None],
    torch.tensor(_BARS_BACK)[:, None, None],
)


def _tables(device: torch.device) -> _Tables:
    return _copied(device) if torch.compiler.is_compiling() else _copied_once(device)


def _copied(device: torch.device) -> _Tables:
    return _Tables(*(table.to(device) for table in _TABLES))


_copied_once = cache(_copied)  # each copy waits for the device


@torch.no_grad()
def read_context(ids_BN: Tensor, structure: Structure) -> tuple[InputFeatures, ChordGuesses]:
    """Of packed rows, on the device of `ids_BN`, which the host waits for only the first time.

    Args:
        ids_BN: token ids, integer [B, N].
        structure: of the same tokens; of it the positions and instruments count, and the number of summaries:
            no row has more bars.

    What a token gets follows from the tokens of its document up to it, so packing and padding change nothing.
    """
    return _ContextScan(ids_BN.long(), structure).read()


class Scan:
    """Where tokens of each kind stand in rows; every index tensor is [..., B, N] and holds -1 for "there is
    none"."""

    def __init__(self, ids: Tensor, structure: Structure):
        self.ids = ids
        self.index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.start = self.index - structure.position  # the document's first token; padding is its own
        self.tables = _tables(ids.device)
        self.marks = self.tables.is_of[:, ids]  # [kinds, B, N]

    def is_of(self, kind: str) -> Tensor:
        return self.marks[_PLACE[kind]]

    def last(self, marks: Tensor) -> Tensor:
        """The last index at or before each token where `marks` holds."""
        return torch.where(marks, self.index, -1).cummax(dim=-1).values


class _ContextScan(Scan):
    """What `read_context` is made of. All is looked for at once, since many small steps cost the host more
    than the device.

    Shape suffixes: B rows, N tokens, M bars of a row at most.
    """

    def __init__(self, ids: Tensor, structure: Structure):
        super().__init__(ids, structure)
        self._inst, room = structure.inst, structure.summary_doc.shape[1]
        self._bar = torch.arange(room, device=ids.device).expand(len(ids), -1)  # numbers of bars, [B, M]
        self._last = self.last(self.marks)
        self._first = torch.maximum(self._last[_PLACE[_OUTSIDE]] + 1, self.start)  # the group's first note
        self._number = torch.arange(ids.numel(), device=ids.device).view(ids.shape)  # in the batch
        self._document = self._number - structure.position  # the number of its first token

    def read(self) -> tuple[InputFeatures, ChordGuesses]:
        in_force = self._in_force()
        onset = in_force[0]
        bars_BN = self.is_of("CHORD").cumsum(dim=1)  # so far
        begin_BM, label_BM, keys_of_bars = self._bars(bars_BN)
        key_of_heads, follower_BN = self._followers()
        back = _back_to_alike(self._places(onset), key_of_heads, *keys_of_bars)
        features = InputFeatures(
            *in_force,
            previous=self._previous(),
            repeat=_one_later(self.ids, self.index, back[0]),
            next_instrument=self._next_instrument(back[1], follower_BN),
        )
        return features, self._guesses(bars_BN, begin_BM, label_BM, back[2:])

    def _in_force(self) -> Tensor:
        """1 + the value of the token of each of `_IN_FORCE` in the group, or the document for the chord;
        [4, B, N]."""
        at = self._last[: len(_IN_FORCE)]
        first = torch.stack([*[self._first] * (len(_IN_FORCE) - 1), self.start])
        value = self.ids.expand_as(at).gather(2, at.clamp(min=0)) - self.tables.before_ids
        return torch.where(at >= first, value, 0)

    def _previous(self) -> Tensor:
        families = slice(len(_FAMILIES))
        before = torch.nn.functional.pad(self._last[families], (1, -1), value=-1)
        before = torch.where(self.marks[families], before, -1).amax(dim=0)  # of each token's own family
        first = torch.where(
            self.is_of("INST"), torch.maximum(self._last[_PLACE["CHORD"]], self.start), self.start
        )
        first = torch.where(self.is_of(_OUTSIDE), first, self._first)
        return torch.where(before >= first, self.ids.gather(1, before.clamp(min=0)), 0)

    def _places(self, onset: Tensor) -> Tensor:
        """A key of the token, its onset, its instrument and its document."""
        place = self._document * (NO_INSTRUMENT + 1) + self._inst
        return (place * (len(vocab.T) + 1) + onset) * vocab.VOCAB_SIZE + self.ids

    def _followers(self) -> tuple[Tensor, Tensor]:
        """Of each token that begins a group or a bar: a key of its instrument and its document, and what
        follows it, as `next_instrument` says; of other tokens a key of their own, and what means nothing."""
        is_inst, is_head = self.is_of("INST"), self.is_of(HEAD)
        rank = torch.where(is_inst, self.ids - (vocab.INST.start - 1), 0)
        # The head after each head; past the last one in the row an index that is never asked for.
        end = self.ids.shape[1] - 1
        ahead = torch.where(is_head, self.index, end).flip(1).cummin(dim=1).values.flip(1)
        ahead = torch.nn.functional.pad(ahead[:, 1:], (0, 1), value=end)
        follower = torch.where(is_inst.gather(1, ahead), rank.gather(1, ahead), BAR_ENDS)
        return torch.where(is_head, self._document * BAR_ENDS + rank, ~self._number), follower

    def _next_instrument(self, back: Tensor, follower: Tensor) -> Tensor:
        followed = torch.where(back > 0, follower.gather(1, self.index - back), 0)
        head = self._last[_PLACE[HEAD]]
        return torch.where(head >= self.start, followed.gather(1, head.clamp(min=0)), 0)

    def _bars(self, bars_BN: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Of each bar: its first token, its label's id, a key of that and its document, and of the label
        before as well; [B, M] all. What comes after the last bar of a row means nothing."""
        begin = torch.searchsorted(bars_BN, self._bar + 1).clamp(max=self.ids.shape[1] - 1)
        label, document = self.ids.gather(1, begin), self._document.gather(1, begin)
        before = label[:, :-1].where(document[:, 1:] == document[:, :-1], 0)
        one = document * vocab.VOCAB_SIZE + label
        two = one * vocab.VOCAB_SIZE + torch.nn.functional.pad(before, (1, 0))
        return begin, label, [one, two]

    def _guesses(
        self, bars_BN: Tensor, begin_BM: Tensor, label_BM: Tensor, back: list[Tensor]
    ) -> ChordGuesses:
        followers = torch.stack([_one_later(label_BM, self._bar, of) for of in back])
        at = bars_BN - self.tables.bars_back  # [4, B, N]
        index = at.clamp(0, self._bar.shape[1] - 1)

        def of_bars(values_BM: Tensor) -> Tensor:
            return values_BM.expand(len(at), -1, -1).gather(2, index)

        there = (at >= 0) & (of_bars(begin_BM) >= self.start)
        labels = torch.where(there, of_bars(label_BM), 0)
        after = torch.where(there[:1], followers.gather(2, index[:1].expand(2, -1, -1)), 0)
        return ChordGuesses(*labels, *after)


def _back_to_alike(*keys: Tensor) -> list[Tensor]:
    """For keys [B, n] each: how far back in the row the last element of the same key is, 0 if there is none.

    Keys of two rows differ, those of two tensors need not; all are less than half of 1 << `_KEY_BITS` from 0.
    """
    flat = torch.cat([(key + (i << _KEY_BITS) if i else key).flatten() for i, key in enumerate(keys)])
    flat, order = flat.sort(stable=True)
    distance = (order[1:] - order[:-1]) * (flat[1:] == flat[:-1])
    back = torch.zeros_like(order).scatter_(0, order[1:], distance)
    return [part.view_as(key) for part, key in zip(back.split([key.numel() for key in keys]), keys)]


def _one_later(values: Tensor, index: Tensor, back: Tensor) -> Tensor:
    """Of each element the value that stood after the one so far back, 0 where there is none; [B, n] all."""
    there = back > 0
    return torch.where(there, values.gather(1, index - back + there), 0)
