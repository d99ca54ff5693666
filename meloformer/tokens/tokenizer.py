"""HIDTokenizer: MIDI files to token ids and back.

For every `ids = encode(song)` the decoded song encodes to the same ids.
"""

import os
from collections.abc import Iterable

import miditoolkit
import numpy as np

from ..midi.reader import read_notes
from . import attributes, grammar, score, vocab
from .chords import label_bars
from .score import Score


class HIDTokenizer:
    """The HID token language (see docs/tokens.md). It has no settings and no state."""

    vocab_size = vocab.VOCAB_SIZE

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, 64 hex digits; shards and checkpoints carry it."""
        return vocab.fingerprint()

    def encode(
        self, song: str | os.PathLike | miditoolkit.MidiFile, band: Iterable[int] | None = None
    ) -> np.ndarray:
        """Token ids of a song, uint16 [n], from BOS to EOS.

        Args:
            song: the path of a MIDI file, which is mended, or a parsed file, which is taken as it is.
            band: the instruments (programs, 128 for drums) in the order in which to list them and to write
                their groups; it may include some that do not play. None: those that play, in canonical order.

        Raises:
            MidiError: the file cannot become a song; `reason` says why.
            ValueError: `band` lists an instrument twice or one that does not exist, or leaves out one that
                plays; or a parsed file has values that MIDI does not allow.
        """
        return self.encode_with_mends(song, band)[0]

    def encode_with_mends(
        self,
        song: str | os.PathLike | miditoolkit.MidiFile,
        band: Iterable[int] | None = None,
        *,
        sustain: bool = False,
    ) -> tuple[np.ndarray, frozenset[str]]:
        """Like `encode`; also returns the codes (keys of `meloformer.midi.reader.MENDS`) of mends.

        Args:
            band: as for `encode`.
            sustain: whether notes of a file sound on while the sustain pedal (controller 64) is down.
        """
        if isinstance(song, miditoolkit.MidiFile):
            return encode_score(score.from_midi(song), band), frozenset()
        midi, notes, mends = read_notes(song, sustain=sustain)
        quantised = score.from_midi(midi, notes)
        return encode_score(quantised, band), frozenset([*mends, *score.losses(midi, notes, quantised)])

    def decode(self, ids: Iterable[int]) -> miditoolkit.MidiFile:
        """The song of token ids, int [n]: a whole song, or a fragment that ends where a bar may end.

        Each program that plays has a track of its own, in the order of the band list. More than 15 melodic
        programs must share channels in a file, and only `midi.writer.write_midi` writes them correctly.

        Raises:
            ValueError: the ids break the grammar (the message names the first bad token), hold no
                bar, or end inside a header or a note.
        """
        ids = np.asarray(ids)
        state = grammar.check(ids)
        if not (state.bar_complete or (len(ids) and ids[-1] == vocab.EOS)):
            raise ValueError("the token ids end inside a bar header or a note, or hold no bar")
        return score.to_midi(*decode_score(ids), attributes.band(ids))

    def token_name(self, token: int) -> str:
        """Name of an id, e.g. 'CHORD_A:min7'; IndexError if there is none."""
        if token < 0:
            raise IndexError(f"no token has the id {token}")
        return vocab.names()[token]

    def token_id(self, name: str) -> int:
        """Id of a name; KeyError if there is none."""
        return vocab.ids_by_name()[name]

    def to_json(self) -> dict:
        """The vocabulary and its fingerprint as plain JSON values."""
        return {**vocab.to_json(), "fingerprint": self.fingerprint}


def encode_score(song: Score, band: Iterable[int] | None = None) -> np.ndarray:
    """Token ids of a quantised song, uint16 [n], from BOS to EOS; `band` as for `HIDTokenizer.encode`."""
    ranks, place_of_rank = _band_list(np.unique(vocab.INSTRUMENT_RANK[song.inst]), band)
    bar_of_note = np.searchsorted(song.bar_start, song.start, side="right") - 1
    onset = song.start - song.bar_start[bar_of_note]
    rank = vocab.INSTRUMENT_RANK[song.inst]
    order = np.lexsort((song.pitch, onset, place_of_rank[rank], bar_of_note))
    bar_of_note, onset, rank = bar_of_note[order], onset[order], rank[order]
    length = vocab.length_to_index(song.length[order])
    velocity = song.velocity[order]

    def changes(*columns: np.ndarray) -> np.ndarray:
        """Which notes (or bars) differ from the one before in any of `columns`; the first always does."""
        different = np.ones(len(columns[0]), dtype=bool)
        different[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
        return different

    new_group = changes(bar_of_note, rank)
    note_slots = [
        (new_group, vocab.INST, rank),
        (new_group | changes(onset), vocab.T, onset),
        (np.ones(len(order), dtype=bool), vocab.P, song.pitch[order]),
        (new_group | changes(length), vocab.L, length),
        (new_group | changes(velocity), vocab.V, velocity),
    ]

    drums = song.inst == vocab.DRUMS
    chord = label_bars(song.start[~drums], song.length[~drums], song.pitch[~drums], song.bar_start)
    nominal = vocab.SIGNATURE_STEPS[song.signature] - song.part * vocab.MAX_BAR_STEPS
    cut = song.bar_steps < np.minimum(nominal, vocab.MAX_BAR_STEPS)
    # A bar line is early if the bar before it, or a part of that bar, was cut.
    early = np.append(False, (song.bar_steps < nominal)[:-1]) & (song.part == 0)
    bar_slots = [
        (np.ones(len(chord), dtype=bool), vocab.CHORD, chord),
        (changes(song.signature) | early, vocab.TS, song.signature),
        (cut, vocab.CUT, song.bar_steps - 1),
        (changes(song.bpm), vocab.BPM, song.bpm - vocab.MIN_BPM),
    ]

    # Merge bar headers and notes: the sort key of a header is below that of the notes of its bar.
    bar_ids, bar_rows = _flatten(bar_slots)
    note_ids, note_rows = _flatten(note_slots)
    keys = np.concatenate((2 * bar_rows, 2 * bar_of_note[note_rows] + 1))
    body = np.concatenate((bar_ids, note_ids))[np.argsort(keys, kind="stable")]
    return np.concatenate(([vocab.BOS], vocab.BAND.start + ranks, body, [vocab.EOS])).astype(np.uint16)


def _band_list(playing: np.ndarray, band: Iterable[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """The ranks to list, in order, and the place of each rank in that list (int64 [129]).

    Args:
        playing: ranks of the instruments that play, ascending.
        band: as for `HIDTokenizer.encode`.
    """
    ranks = playing
    if band is not None:
        band = list(band)
        if not all(0 <= inst <= vocab.DRUMS for inst in band) or len(set(band)) < len(band):
            raise ValueError(f"band must list instruments 0..{vocab.DRUMS}, each once, got {band}")
        ranks = vocab.INSTRUMENT_RANK[np.array(band, dtype=np.int64)]
        missing = vocab.INSTRUMENTS[np.setdiff1d(playing, ranks)]
        if len(missing):
            raise ValueError(f"band leaves out instruments that play: {missing.tolist()}")
    place = np.zeros(len(vocab.INSTRUMENTS), dtype=np.int64)
    place[ranks] = np.arange(len(ranks))
    return ranks, place


def _flatten(slots: list[tuple[np.ndarray, vocab.Family, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the slots that are present, row by row, and the row of each (a row is a bar or a note).

    Args:
        slots: (present, family, value) of each token that a row may have, in order; arrays of [rows].
    """
    present = np.stack([slot[0] for slot in slots], axis=1)  # [rows, slots]
    ids = np.stack([family.start + value for _, family, value in slots], axis=1)
    return ids[present], np.nonzero(present)[0]


def decode_score(ids: np.ndarray) -> tuple[Score, np.ndarray]:
    """The quantised song and the chord label of each bar, from ids that follow the grammar."""
    ids = np.asarray(ids).astype(np.int64)
    bars = attributes.scan_bars(ids)
    scanned = attributes.scan(ids)
    note = np.flatnonzero(vocab.P.mask(ids))

    padded = np.append(ids, [vocab.EOS, vocab.EOS])
    is_length, is_velocity = vocab.L.mask(padded), vocab.V.mask(padded)
    length_at = note + is_length[note + 1]  # a note's own L and V follow its P
    velocity_at = length_at + is_velocity[length_at + 1]
    onset = ids[attributes.last_index(vocab.T.mask(ids))[note]] - vocab.T.start
    length = vocab.LENGTHS[ids[attributes.last_index(vocab.L.mask(ids))[length_at]] - vocab.L.start]
    velocity = ids[attributes.last_index(vocab.V.mask(ids))[velocity_at]] - vocab.V.start

    bar_start = bars.start
    # In a generated song a note may sound into the next of its pitch; in an encoded one it never does.
    notes = score.resolve_overlaps(
        bar_start[scanned.bar[note]] + onset,
        length,
        ids[note] - vocab.P.start,
        velocity,
        scanned.inst[note].astype(np.int64),
    )
    return Score(*notes, bar_start, bars.steps, bars.signature, bars.part, bars.bpm), bars.chord
