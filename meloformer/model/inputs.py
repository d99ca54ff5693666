"""What the model knows of a token besides its id and instrument: functions of the tokens up to it alone.

HID leaves out what does not change, and music repeats itself. So the input of a token also says which onset,
length, velocity and chord are in force; which token of its family came before; and what followed when the
same token stood at the same place of an earlier bar. Attention could find each of these, but a small model
needs many more songs to learn to. The labels of `ChordGuesses` are not read, but copied by the output.
"""

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


_BARS_BACK = (1, 2, 4, 8)  # from the next one, of the guesses that are labels of earlier bars
_SPECIAL = (vocab.PAD_FAMILY, vocab.BOS_FAMILY, vocab.EOS_FAMILY)
_FAMILIES = tuple(family for family in vocab.FAMILIES if family not in _SPECIAL)
_PLACE = {family.name: place for place, family in enumerate(_FAMILIES)}


Context = tuple[InputFeatures, ChordGuesses]


@torch.no_grad()
def read_context(ids_BN: Tensor, structure: Structure) -> Context:
    """Of packed rows, on the device of `ids_BN`; it never synchronizes with the host.

    Args:
        ids_BN: token ids, integer [B, N].
        structure: of the same tokens; of it the documents, positions and instruments count.

    What a token gets follows from the tokens of its document up to it, so packing and padding change nothing.
    """
    scan = _ContextScan(ids_BN.long(), structure)
    onset = scan.in_force(vocab.T)
    features = InputFeatures(
        onset=onset,
        length=scan.in_force(vocab.L),
        velocity=scan.in_force(vocab.V),
        chord=scan.value_at(scan.bar, vocab.CHORD, scan.start),
        previous=scan.previous_of_family(),
        repeat=scan.repeat(onset),
        next_instrument=scan.next_instrument(),
    )
    return features, scan.chord_guesses(structure.summary_doc.shape[1])


class Scan:
    """Scans along rows; every index tensor is [..., B, N] and holds -1 for "there is none"."""

    def __init__(self, ids: Tensor, structure: Structure):
        self.ids, self.doc, self.inst = ids, structure.doc.long(), structure.inst.long()
        self.index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.start = self.index - structure.position  # the document's first token; padding is its own

    def is_of(self, family: vocab.Family) -> Tensor:
        return (self.ids >= family.start) & (self.ids < family.stop)

    def last(self, marks: Tensor) -> Tensor:
        """The last index at or before each token where `marks` holds."""
        return torch.where(marks, self.index, -1).cummax(dim=-1).values


class _ContextScan(Scan):
    """What `read_context` is made of. All families are looked for at once, since many steps cost the host
    more than the device."""

    def __init__(self, ids: Tensor, structure: Structure):
        super().__init__(ids, structure)
        self._marks = torch.stack([Scan.is_of(self, family) for family in _FAMILIES])  # [families, B, N]
        self._last = self.last(self._marks)
        self._in_note = (ids >= vocab.T.start) & (ids < vocab.V.stop)
        self.bar = self.last_of(vocab.CHORD)
        # The token that the notes of a group come after, or the one before the document.
        self.group = torch.maximum(self.last(~self._in_note), self.start - 1)

    def is_of(self, family: vocab.Family) -> Tensor:
        return self._marks[_PLACE[family.name]]

    def last_of(self, family: vocab.Family) -> Tensor:
        return self._last[_PLACE[family.name]]

    def value_at(self, at: Tensor, family: vocab.Family, first: Tensor) -> Tensor:
        """1 + the value of the family's token at index `at`, 0 where that is before `first`."""
        value = self.ids.gather(1, at.clamp(min=0)) - family.start + 1
        return torch.where(at >= first, value, 0)

    def in_force(self, family: vocab.Family) -> Tensor:
        return self.value_at(self.last_of(family), family, self.group + 1)

    def previous_of_family(self) -> Tensor:
        before = torch.nn.functional.pad(self._last, (1, -1), value=-1)
        before = torch.where(self._marks, before, -1).amax(dim=0)  # of each token's own family
        first = torch.where(self.is_of(vocab.INST), torch.maximum(self.bar, self.start), self.start)
        first = torch.where(self._in_note, self.group + 1, first)
        return torch.where(before >= first, self.ids.gather(1, before.clamp(min=0)), 0)

    def repeat(self, onset: Tensor) -> Tensor:
        place = (self.doc + 1) * (NO_INSTRUMENT + 1) + self.inst
        key = (place * (len(vocab.T) + 1) + onset) * vocab.VOCAB_SIZE + self.ids
        earlier = self._last_with_same(key)
        return torch.where(earlier >= 0, self.ids.gather(1, earlier + 1), 0)

    def chord_guesses(self, room: int) -> ChordGuesses:
        """`room`: no row has more bars; most of the work is done by bar, [B, room], since they are few."""
        bars_so_far = self.is_of(vocab.CHORD).cumsum(dim=1)
        number = torch.arange(room, device=self.ids.device).expand(len(self.ids), room)
        exists = number < bars_so_far[:, -1:]
        begin = torch.searchsorted(bars_so_far, number + 1).clamp(max=self.ids.shape[1] - 1)
        label, doc = self.ids.gather(1, begin), self.doc.gather(1, begin)
        before = torch.nn.functional.pad(label[:, :-1].where(doc[:, 1:] == doc[:, :-1], 0), (1, 0))
        one = (doc + 1) * vocab.VOCAB_SIZE + label
        followers = []
        for key in (one, one * vocab.VOCAB_SIZE + before):
            earlier = self._last_with_same(torch.where(exists, key, -1 - number))
            followers.append(label.gather(1, (earlier + 1).clamp(max=room - 1)).where(earlier >= 0, 0))

        at = torch.stack([bars_so_far - back for back in _BARS_BACK])  # [4, B, N]
        index = at.clamp(0, room - 1)

        def of_bars(values: Tensor) -> Tensor:
            return values.expand(len(at), -1, -1).gather(2, index)

        there = (at >= 0) & (of_bars(begin) >= self.start)
        labels = of_bars(label).where(there, 0)
        after = torch.stack(followers).gather(2, index[:1].expand(2, -1, -1)).where(there[:1], 0)
        return ChordGuesses(*labels, *after)

    def next_instrument(self) -> Tensor:
        is_inst = self.is_of(vocab.INST)
        heads = is_inst | self.is_of(vocab.CHORD)  # where groups begin, and bars
        rank = torch.where(is_inst, self.ids - vocab.INST.start + 1, 0)
        # The head after each head; past the last one in the row an index that is never asked for.
        ahead = torch.where(heads, self.index, self.ids.shape[1] - 1).flip(1).cummin(dim=1).values.flip(1)
        ahead = torch.nn.functional.pad(ahead[:, 1:], (0, 1), value=self.ids.shape[1] - 1)
        follower = torch.where(is_inst.gather(1, ahead), rank.gather(1, ahead), BAR_ENDS)
        key = (self.doc + 1) * BAR_ENDS + rank
        earlier = self._last_with_same(torch.where(heads, key, -1 - self.index))
        followed = torch.where(earlier >= 0, follower.gather(1, earlier.clamp(min=0)), 0)
        head = self.last(heads)
        return torch.where(head >= self.start, followed.gather(1, head.clamp(min=0)), 0)

    def _last_with_same(self, key: Tensor) -> Tensor:
        """Index of the last earlier token of the same key, -1 if there is none."""
        key, order = key.sort(dim=1, stable=True)
        same = torch.nn.functional.pad(key[:, 1:] == key[:, :-1], (1, 0))
        before = torch.where(same, torch.nn.functional.pad(order[:, :-1], (1, 0)), -1)
        return torch.empty_like(before).scatter_(1, order, before)
