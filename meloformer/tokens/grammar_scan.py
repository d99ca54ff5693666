"""The grammar of whole songs, checked by array operations: `grammar.check` for millions of tokens.

Most rules compare a token with the one before it among the tokens of its kind and those that reset them: such
a sequence is picked out of the ids, and neighbours in it are compared. Rules about bars look at the few
tokens that are not of notes.
"""

from collections.abc import Callable

import numpy as np

from . import vocab
from .attributes import last_index
from .vocab import BAND, BOS_FAMILY, BPM, CHORD, CUT, EOS_FAMILY, INST, TS, L, P, T, V

_FOLLOWS = {  # which families may stand directly after which; the rules below restrict it further
    BOS_FAMILY: (BAND,),
    BAND: (BAND, CHORD),
    CHORD: (TS, CUT, BPM, INST, CHORD, EOS_FAMILY),
    TS: (CUT, BPM, INST, CHORD, EOS_FAMILY),
    CUT: (BPM, INST, CHORD, EOS_FAMILY),
    BPM: (INST, CHORD, EOS_FAMILY),
    INST: (T,),
    T: (P,),
    P: (L, V, T, P, INST, CHORD, EOS_FAMILY),
    L: (V, T, P, INST, CHORD, EOS_FAMILY),
    V: (T, P, INST, CHORD, EOS_FAMILY),
}
_FAMILY_OF = np.repeat(np.arange(len(vocab.FAMILIES), dtype=np.uint8), [len(f) for f in vocab.FAMILIES])
_MAY_FOLLOW = np.zeros((16, 16), bool)  # [family, family after it]
for _family, _next in _FOLLOWS.items():
    for _other in _next:
        _MAY_FOLLOW[vocab.FAMILIES.index(_family), vocab.FAMILIES.index(_other)] = True
_MAY_FOLLOW = _MAY_FOLLOW.ravel()

# The sequences, one bit each, and the families they are picked of.
_ONSETS, _PITCHES, _LENGTHS, _VELOCITIES, _HEADS = (1 << bit for bit in range(5))
_IN = np.zeros(vocab.VOCAB_SIZE, np.uint8)
for _bit, _members in (
    (_ONSETS, (T, INST, BOS_FAMILY)),
    (_PITCHES, (P, T)),
    (_LENGTHS, (L, INST)),
    (_VELOCITIES, (V, INST)),
    (_HEADS, vocab.FAMILIES[: vocab.FAMILIES.index(T)]),
):
    for _family in _members:
        _IN[_family.start : _family.stop] |= _bit

_PARTS = -(-vocab.SIGNATURE_STEPS // vocab.MAX_BAR_STEPS)  # bars, or parts of a bar, of each signature


def broken_songs(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Which songs break the grammar, or do not run from BOS to EOS: bool [D].

    Args:
        ids: token ids, uint16 [n], of D songs back to back; any numbers.
        starts: ascending indices at which the songs begin, int64 [D]; the first is 0. No song is empty.
    """
    ends = np.append(starts[1:], len(ids))
    broken = (ids[starts] != vocab.BOS) | (ids[ends - 1] != vocab.EOS)

    def mark(places: np.ndarray) -> None:
        broken[np.searchsorted(starts, places, side="right") - 1] = True

    # What follows needs ids of the vocabulary, and BOS to part the songs. PAD may stand nowhere.
    ids = np.where(ids < vocab.VOCAB_SIZE, ids, np.uint16(vocab.PAD))
    ids[starts] = vocab.BOS
    family, member = _FAMILY_OF.take(ids), _IN.take(ids)
    follows = _MAY_FOLLOW.take((family[:-1] << 4) | family[1:])
    follows[starts[1:] - 1] = True  # neighbours in two songs
    if not follows.all():
        mark(np.flatnonzero(~follows) + 1)

    def mark_in(chosen: np.ndarray, wrong: np.ndarray) -> None:
        if wrong.any():
            mark(np.flatnonzero(chosen)[1:][wrong])

    for sequence, kind in ((_LENGTHS, L), (_VELOCITIES, V)):  # left out where they repeat
        chosen = (member & sequence) != 0
        values = ids.compress(chosen)  # faster than an index
        mark_in(chosen, (values[1:] == values[:-1]) & (values[1:] >= kind.start))
    chosen = (member & _PITCHES) != 0
    values = ids.compress(chosen)
    mark_in(chosen, (values[1:] <= values[:-1]) & (values[1:] >= P.start))
    chosen = (member & _ONSETS) != 0
    onsets = ids.compress(chosen)
    mark_in(chosen, (onsets[1:] <= onsets[:-1]) & (onsets[1:] >= T.start))

    at = np.flatnonzero((member & _HEADS) != 0)
    is_group = ids[at] >= INST.start
    groups, steps = at[is_group], _mark_bars(ids, at[~is_group], at[is_group], starts, mark)
    # The first note of a group states everything: INST T P L V. The first three follow from `_FOLLOWS`.
    for offset, kind in ((3, L), (4, V)):
        place = np.minimum(groups + offset, len(ids) - 1)
        mark(groups[family[place] != vocab.FAMILIES.index(kind)])
    # Onsets rise in a group, so the last one says whether they lie inside the bar.
    begins = np.flatnonzero(onsets < T.start)
    last = onsets[np.append(begins[1:], len(onsets)) - 1][onsets[begins] >= INST.start]
    mark(groups[(last >= T.start) & (last.astype(np.int64) - T.start >= steps)])
    return broken


def _mark_bars(
    ids: np.ndarray,
    at: np.ndarray,
    groups: np.ndarray,
    starts: np.ndarray,
    mark: Callable[[np.ndarray], None],
) -> np.ndarray:
    """Mark the places that break the rules of band lists, bar headers and the order of groups.

    Args:
        at: ascending places of all tokens from PAD to BPM, in the order of ids.
        groups: ascending places of INST tokens.
        mark: called with places.

    Returns:
        For each group the steps of its bar, int64.
    """
    head = ids[at].astype(np.int64)
    is_bos, is_chord = head == vocab.BOS, CHORD.mask(head)
    bounds = np.flatnonzero(is_bos | is_chord)  # BOS and the band list count as a bar, too
    bar = np.cumsum(is_bos | is_chord) - 1
    is_bar = is_chord[bounds]

    def stated(family: vocab.Family) -> tuple[np.ndarray, np.ndarray]:
        """Value of the family's token in each bar, and whether there is one."""
        value, present = np.zeros(len(bounds), np.int64), np.zeros(len(bounds), bool)
        found = np.flatnonzero(family.mask(head))
        value[bar[found]], present[bar[found]] = head[found] - family.start, True
        return value, present

    signature, has_signature = stated(TS)
    cut_value, has_cut = stated(CUT)
    _, has_bpm = stated(BPM)
    first = np.append(False, ~is_bar[:-1]) & is_bar
    since = last_index(has_signature)  # of the song before at most where a first bar is broken anyway
    in_force = signature[since]
    part = (np.arange(len(bounds)) - since) % _PARTS[in_force]
    before = np.roll(in_force, 1)
    part_before = (np.roll(part, 1) + 1) % _PARTS[before]  # of this bar, had it no signature
    anew = first | np.append(False, has_cut[:-1])
    wrong = anew & ~has_signature
    wrong |= has_signature & ~anew & (part_before == 0) & (signature == before)
    wrong |= first & ~has_bpm
    rest = vocab.SIGNATURE_STEPS[in_force] - part * vocab.MAX_BAR_STEPS
    whole = np.minimum(rest, vocab.MAX_BAR_STEPS)
    wrong |= has_cut & (cut_value + 1 >= whole)
    mark(at[bounds[wrong & is_bar]])

    tempi = np.flatnonzero(is_bos | BPM.mask(head))
    mark(at[tempi[1:][(head[tempi][1:] == head[tempi][:-1]) & ~is_bos[tempi[1:]]]])

    listed = np.flatnonzero(BAND.mask(head))
    rows = np.searchsorted(starts, at[listed], side="right") - 1  # of `places`, one a song
    key = rows * len(BAND) + head[listed] - BAND.start
    order = np.arange(1, len(listed) + 1)
    places = np.zeros(len(starts) * len(BAND), np.int64)
    places[key] = order
    mark(at[listed[places[key] != order]])  # of two equal ones, the last has the place

    row = np.repeat(np.arange(len(starts)), _counts(groups, starts))
    place = places[row * len(BAND) + ids[groups] - INST.start]
    of_bar = np.repeat(np.arange(len(bounds)), _counts(groups, at[bounds]))
    wrong = place == 0
    wrong[1:] |= (of_bar[1:] == of_bar[:-1]) & (place[1:] <= place[:-1])
    mark(groups[wrong])
    return np.where(has_cut, cut_value + 1, whole)[of_bar]


def _counts(at: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """How many of the ascending places `at` lie between each of the ascending `begins` and the next."""
    return np.diff(np.searchsorted(at, begins), append=len(at))
