"""A song quantised to steps: the form between a MIDI file and token ids, with what tokens can express.

`from_midi` quantises; `to_midi` writes a score as MIDI. For every score made by `from_midi`,
`from_midi(to_midi(score))` equals it.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import miditoolkit
import numpy as np

from ..errors import MidiError
from . import vocab

TICKS_PER_QUARTER = 480
TICKS_PER_STEP = TICKS_PER_QUARTER // vocab.STEPS_PER_QUARTER
MAX_TICK = 2**40  # keeps the arithmetic of steps inside 64 bits
MAX_DRIFT = 0.05  # seconds; more may be heard between two players
MAX_TEMPO_ERROR = 0.95  # BPM by which a bar's tempo may differ from its mean to remove drift
MAX_EMPTY_BARS = 8  # a longer silence is counted as the mend `long_silence`
MAX_PIECES = 1_000_000  # further notes that long notes are split into; bounds memory
MAX_BARS = 20_000  # more than any music has; bounds the memory that a malicious file can take


@dataclass(frozen=True)
class Score:
    """A quantised song. All arrays are int64.

    Notes [n], no two of one instrument and pitch sounding at once:
        start, length: steps (24 to the quarter), `length` being one of `vocab.LENGTHS`.
        pitch: 0..127. velocity: bin 0..31. inst: 0..127 program, 128 drums.
    Bars [bars], gapless from step 0:
        bar_start: first step. bar_steps: length in steps; a bar over 8 quarters has an entry for each part.
        signature: index into `vocab.SIGNATURES`. part: number of the part in its bar, 0 at a bar line.
        bpm: mean tempo, in whole quarter notes a minute.
    """

    start: np.ndarray
    length: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    inst: np.ndarray
    bar_start: np.ndarray
    bar_steps: np.ndarray
    signature: np.ndarray
    part: np.ndarray
    bpm: np.ndarray


def from_midi(midi: miditoolkit.MidiFile, notes: np.ndarray | None = None) -> Score:
    """Quantise a MIDI file.

    Args:
        midi: the song.
        notes: its notes from `meloformer.midi.reader.read_notes`, int64 [n, 5]; None for those of the
            instruments of `midi`.

    Raises:
        MidiError: `no_notes`; `too_long` for more than MAX_BARS bars, a note after MAX_TICK, or too many long
            notes.
        ValueError: a pitch, program, time or resolution outside what MIDI allows.
    """
    tpq = midi.ticks_per_beat
    _check(midi)
    if notes is None:
        notes = notes_of(midi)
    if len(notes) == 0:
        raise MidiError("no_notes", "the file has no notes")
    start, end, pitch, velocity, inst = notes.T
    if min(start.min(), pitch.min(), inst.min()) < 0 or pitch.max() > 127 or inst.max() > vocab.DRUMS:
        raise ValueError("a note has a negative time, or a pitch or program outside 0..127")
    if max(start.max(), end.max()) > MAX_TICK:
        raise MidiError("too_long", f"a note lies beyond tick {MAX_TICK}")

    start, end = to_steps(start, tpq), to_steps(end, tpq)
    velocity = vocab.velocity_to_bin(np.clip(velocity, 1, 127))
    start, length, pitch, velocity, inst = resolve_overlaps(start, end - start, pitch, velocity, inst)
    bar_start, bar_steps, signature, part = _bar_lines(midi, int((start + length).max()))
    bpm = _bar_tempo(midi, bar_start, bar_steps)
    return Score(start, length, pitch, velocity, inst, bar_start, bar_steps, signature, part, bpm)


def instrument_of(track: miditoolkit.Instrument) -> int:
    """The track's program, or `vocab.DRUMS`."""
    return vocab.DRUMS if track.is_drum else track.program


def notes_of(midi: miditoolkit.MidiFile) -> np.ndarray:
    """Start, end (ticks), pitch, velocity and instrument (128 for drums) of all notes, int64 [n, 5]."""
    rows = [
        (note.start, note.end, note.pitch, note.velocity, instrument_of(track))
        for track in midi.instruments
        for note in track.notes
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def losses(midi: miditoolkit.MidiFile, notes: np.ndarray, song: Score) -> list[str]:
    """Codes (keys of `meloformer.midi.reader.MENDS`) of what tokens cannot express, and of long silences.

    Args:
        midi, notes: the arguments of `from_midi`.
        song: its result.
    """
    codes = []
    longest = vocab.MAX_NOTE_STEPS * midi.ticks_per_beat / vocab.STEPS_PER_QUARTER
    if any(not vocab.MIN_BPM - 0.5 <= t.tempo <= vocab.MAX_BPM + 0.5 for t in midi.tempo_changes):
        codes.append("tempo_clipped")
    if (notes[:, 1] - notes[:, 0] > longest).any():
        codes.append("note_struck_on")
    edges = np.zeros(len(song.bar_start) + 1, dtype=np.int64)
    np.add.at(edges, np.searchsorted(song.bar_start, song.start, side="right") - 1, 1)
    np.add.at(edges, np.searchsorted(song.bar_start, song.start + song.length, side="left"), -1)
    sounding = np.flatnonzero(np.cumsum(edges[:-1]))  # bars in which a note sounds
    if (np.diff(sounding, prepend=-1) - 1 > MAX_EMPTY_BARS).any():
        codes.append("long_silence")
    return codes


def _check(midi: miditoolkit.MidiFile) -> None:
    """Raise ValueError for values that a MIDI file cannot hold but a MidiFile object can."""
    if midi.ticks_per_beat < 1:
        raise ValueError(f"ticks_per_beat is {midi.ticks_per_beat}, must be at least 1")
    for change in midi.tempo_changes:
        if math.isnan(change.tempo):
            raise ValueError(f"the tempo at tick {change.time} is not a number")
    for ts in midi.time_signature_changes:
        if ts.numerator != int(ts.numerator) or ts.denominator != int(ts.denominator):
            raise ValueError(f"the time signature at tick {ts.time} is not made of integers")


def resolve_overlaps(
    start: np.ndarray, length: np.ndarray, pitch: np.ndarray, velocity: np.ndarray, inst: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Notes as tokens can express them: one per instrument, pitch and start, none sounding into the next.

    Of notes that begin together the longest is kept (the loudest of equally long ones); a note that sounds
    into the next of its pitch is cut there. A note longer than the longest length becomes several notes, a
    new one each time that length is over. Lengths become the nearest of `vocab.LENGTHS` that fits.

    Args:
        start, length: steps, int64 [n].
        pitch, velocity, inst: int64 [n].

    Returns:
        The same five, ordered by instrument, pitch and start; their number may be smaller or larger than n.

    Raises:
        MidiError: `too_long`, if long notes would become more than MAX_PIECES notes.
    """
    if len(start) == 0:
        return start, length, pitch, velocity, inst
    key = inst * 128 + pitch
    order = np.lexsort((-velocity, -length, start, key))
    key, start, length = key[order], start[order], np.maximum(length[order], 1)
    first = np.append(True, (np.diff(key) != 0) | (np.diff(start) != 0))
    order, key, start, length = order[first], key[first], start[first], length[first]

    gap = np.full(len(start), np.iinfo(np.int64).max)
    same = key[1:] == key[:-1]
    gap[:-1][same] = np.diff(start)[same]
    length = np.minimum(length, gap)

    pieces = -(-length // vocab.MAX_NOTE_STEPS)
    if pieces.sum() - len(pieces) > MAX_PIECES:
        raise MidiError("too_long", f"long notes would become more than {MAX_PIECES} notes")
    note = np.repeat(np.arange(len(start)), pieces)
    passed = (np.arange(len(note)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * vocab.MAX_NOTE_STEPS
    order, start, gap = order[note], start[note] + passed, gap[note] - passed
    length = np.minimum(length[note] - passed, vocab.MAX_NOTE_STEPS)
    nearest = vocab.LENGTHS[vocab.length_to_index(length)]
    fitting = vocab.LENGTHS[vocab.length_to_index_at_most(np.minimum(gap, vocab.MAX_NOTE_STEPS))]
    return start, np.minimum(nearest, fitting), pitch[order], velocity[order], inst[order]


def to_steps(ticks: np.ndarray, tpq: int) -> np.ndarray:
    """Nearest step (halves up), in integers: floats could round differently when a song is encoded again."""
    return (2 * vocab.STEPS_PER_QUARTER * ticks + tpq) // (2 * tpq)


def _last_per_time(events: list[tuple], default: tuple) -> list[tuple]:
    """Events (time, ...) in time order, of each time the last; `default` at time 0 if there is none."""
    by_time = {}
    for event in sorted(events, key=lambda e: e[0]):
        by_time[max(event[0], 0)] = event[1:]
    by_time.setdefault(0, default)
    return [(time, *by_time[time]) for time in sorted(by_time)]


def _bar_lines(midi: miditoolkit.MidiFile, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bars up to the one that holds step `end` - 1, as (start, steps, signature, part)."""
    tpq = midi.ticks_per_beat
    changes = _last_per_time(
        [
            (int(to_steps(np.int64(ts.time), tpq)), ts.numerator, ts.denominator)
            for ts in midi.time_signature_changes
        ],
        default=(4, 4),
    )
    changes = [change for change in changes if change[0] < end]
    rows: list[tuple[int, int, int, int]] = []
    for (begin, n, d), following in itertools.zip_longest(changes, changes[1:]):
        stop = following[0] if following else math.inf
        signature, true_steps = _signature_in_vocab(n, d)
        nominal = int(vocab.SIGNATURE_STEPS[signature])
        for bar in itertools.count():
            low = begin + round(bar * true_steps)
            if low >= min(stop, end):
                break
            high = min(begin + round((bar + 1) * true_steps), stop)
            if high >= end:  # no bar line follows that could cut the last bar
                high = low + nominal
            for part, part_low in enumerate(range(low, min(high, end), vocab.MAX_BAR_STEPS)):
                rows.append((part_low, min(vocab.MAX_BAR_STEPS, high - part_low), signature, part))
            if len(rows) > MAX_BARS:
                raise MidiError("too_long", f"more than {MAX_BARS} bars")
    return tuple(np.array(rows, dtype=np.int64).T)


def _signature_in_vocab(n: int, d: int) -> tuple[int, Fraction]:
    """Index of the signature to write for n/d, and the bar's true length in steps.

    A signature outside the vocabulary is written as the shortest one that is not shorter, and each of its
    bars is then cut to the true length, so that bar lines stay where they are. (Bars shorter than a step, or
    longer than every signature, change their length.)
    """
    steps = Fraction(4 * vocab.STEPS_PER_QUARTER * n, d)
    if (n, d) in vocab.SIGNATURE_INDEX:
        return vocab.SIGNATURE_INDEX[n, d], steps
    steps = min(max(steps, Fraction(1)), Fraction(int(vocab.SIGNATURE_STEPS.max())))
    longer = [i for i, length in enumerate(vocab.SIGNATURE_STEPS) if length >= steps]
    return min(longer, key=lambda i: (vocab.SIGNATURE_STEPS[i], vocab.SIGNATURES[i][1] != d)), steps


def _bar_tempo(midi: miditoolkit.MidiFile, bar_start: np.ndarray, bar_steps: np.ndarray) -> np.ndarray:
    """Tempo of each bar in whole BPM: the mean that makes the bar last as long as it does in the file.

    Rounding alone would make a song at 81.5 BPM drift by seconds. Once it is off by `MAX_DRIFT`, bars are
    rounded the other way until it is on time again. A decoded song never drifts: its tempi are whole
    numbers and change at bar lines.
    """
    changes = _last_per_time([(t.time, t.tempo) for t in midi.tempo_changes], default=(120.0,))
    change_at = np.array([time for time, _ in changes]) / midi.ticks_per_beat  # quarters
    bpm = np.clip([tempo for _, tempo in changes], 1e-3, 1e6)
    seconds_per_quarter = 60.0 / bpm
    elapsed = np.concatenate(([0.0], np.cumsum(np.diff(change_at) * seconds_per_quarter[:-1])))

    edges = np.append(bar_start, bar_start[-1] + bar_steps[-1]) / vocab.STEPS_PER_QUARTER  # quarters
    at = np.searchsorted(change_at, edges, side="right") - 1
    seconds = np.diff(elapsed[at] + (edges - change_at[at]) * seconds_per_quarter[at])
    quarters = np.diff(edges)
    mean = np.clip(60.0 * quarters / seconds, vocab.MIN_BPM, vocab.MAX_BPM)
    rounded = np.rint(mean)
    drift, catching_up = 0.0, 0  # seconds behind the file; 1 or -1 while bars are rounded up or down
    for bar in range(len(mean)):
        if abs(drift) > MAX_DRIFT:
            catching_up = 1 if drift > 0 else -1
        elif drift * catching_up <= 0:
            catching_up = 0
        other = np.ceil(mean[bar]) if catching_up > 0 else np.floor(mean[bar])
        if catching_up and abs(other - mean[bar]) < MAX_TEMPO_ERROR:
            rounded[bar] = other
        drift += 60.0 * quarters[bar] * (1 / rounded[bar] - 1 / mean[bar])
    return rounded.astype(np.int64)


def to_midi(score: Score, chords: np.ndarray, band: Iterable[int] = ()) -> miditoolkit.MidiFile:
    """The score as a MidiFile with one track per instrument and chord labels as markers.

    Args:
        score: the song.
        chords: chord label of each bar, int64 [bars].
        band: instruments whose tracks come first, in this order; the others follow in canonical order.
    """
    midi = miditoolkit.MidiFile(ticks_per_beat=TICKS_PER_QUARTER)
    labels = vocab.CHORD.labels
    previous_signature, previous_bpm, bar_end = None, None, None
    bars = zip(score.bar_start, score.signature, score.part, score.bpm, chords)
    for at, signature, part, bpm, chord in bars:
        tick = int(at) * TICKS_PER_STEP
        # A bar line earlier than the signature would place it is written by stating the signature again.
        if part == 0 and (signature != previous_signature or at != bar_end):
            n, d = vocab.SIGNATURES[signature]
            midi.time_signature_changes.append(miditoolkit.TimeSignature(n, d, tick))
        if part == 0:
            bar_end = at + vocab.SIGNATURE_STEPS[signature]
            previous_signature = signature
        if bpm != previous_bpm:
            midi.tempo_changes.append(miditoolkit.TempoChange(float(bpm), tick))
            previous_bpm = bpm
        midi.markers.append(miditoolkit.Marker(labels[chord], tick))
    end = int(score.bar_start[-1] + score.bar_steps[-1])

    band = list(band)
    place = len(band) + vocab.INSTRUMENT_RANK
    place[band] = np.arange(len(band))
    order = np.lexsort((score.pitch, score.start, place[score.inst]))
    for inst, indices in itertools.groupby(order, key=lambda i: int(score.inst[i])):
        drums = inst == vocab.DRUMS
        track = miditoolkit.Instrument(
            program=0 if drums else inst, is_drum=drums, name="Drums" if drums else f"Program {inst}"
        )
        for i in indices:
            low = int(score.start[i]) * TICKS_PER_STEP
            high = low + int(score.length[i]) * TICKS_PER_STEP
            end = max(end, int(score.start[i] + score.length[i]))
            velocity = int(vocab.bin_to_velocity(score.velocity[i]))
            track.notes.append(miditoolkit.Note(velocity, int(score.pitch[i]), low, high))
        midi.instruments.append(track)
    midi.max_tick = end * TICKS_PER_STEP + 1
    return midi
