"""Figures of one song that tell whether a band plays it, and of many songs their medians."""

from collections.abc import Iterable

import miditoolkit
import numpy as np

from meloformer.midi.general_midi import instrument_name
from meloformer.tokens import vocab
from meloformer.tokens.chords import label_bars
from meloformer.tokens.score import Score, from_midi
from meloformer.tokens.tokenizer import encode_score

BASSES = range(32, 40)
WANTED = 0.9  # of the bars with the drums and the bass of the band
PERIOD = 4  # bars after which a chord is looked for again
NO_CHORD = 0  # the label of a bar without a chord

# What each figure of a song is, as on the page.
MEANINGS = {
    "bars": "from the bar in which the first note begins to the one in which the last note begins, silent "
    "bars between them included",
    "notes": "notes that begin in these bars, as the tokenizer reads them: one player to a program",
    "tokens": "tokens of these bars, BOS, band list and EOS included",
    "drums": "share of the bars in which a drum is struck, if the song has drums",
    "bass": "share of the bars in which a note of programs 32 to 39 begins or sounds on, if the song has one",
    "band": "share of the song's programs that sound in a bar (as above), the mean over the bars",
    "chords": "distinct chord labels, N not counted; labels are found in the notes, as by the tokenizer",
    "repeated": f"of the bars with a chord from bar {PERIOD + 1} on, the share whose label equals that of "
    f"the bar {PERIOD} before",
    "notes_per_bar": "notes over bars",
}


def measure(midi: miditoolkit.MidiFile, most_bars: int | None = None) -> dict:
    """Figures of one song, by the names in `MEANINGS`, and its programs, tempi (BPM) and metres.

    A share is None where a song has no instrument or bar that it could count. Besides, of drums and bass
    alike: `drums_bars`, the count behind the share; `drums_enter`, the bar in which they are first heard
    (from 1); and `drums_from_there`, the share of the bars from that one on.

    Args:
        midi: the song.
        most_bars: how many bars are looked at from the first with a note on; None for all.

    Raises:
        MidiError: the file has no notes, or cannot be quantised.
    """
    song, bar_of_part = _sounding(from_midi(midi), most_bars)
    bars = int(bar_of_part[-1]) + 1
    present = np.unique(song.inst)
    sounds = _sounds(song, bar_of_part, present)  # [instruments, bars]
    drums = _part("drums", sounds[present == vocab.DRUMS].any(axis=0))
    bass = _part("bass", sounds[np.isin(present, BASSES)].any(axis=0))

    melodic = song.inst != vocab.DRUMS
    labels = label_bars(song.start[melodic], song.length[melodic], song.pitch[melodic], song.bar_start)
    labels = labels[song.part == 0]  # a long bar has the label of its first part
    later = labels[PERIOD:]
    named = later != NO_CHORD
    ranked = sorted(present.tolist(), key=lambda inst: vocab.INSTRUMENT_RANK[inst])
    return {
        "programs": [instrument_name(inst) for inst in ranked],
        "tempi": [int(song.bpm.min()), int(song.bpm.max())],
        "metres": ["{}/{}".format(*vocab.SIGNATURES[i]) for i in dict.fromkeys(song.signature.tolist())],
        "bars": bars,
        "notes": len(song.start),
        "tokens": len(encode_score(song)),
        **drums,
        **bass,
        "band": float(sounds.mean()),
        "chords": len(set(labels.tolist()) - {NO_CHORD}),
        "repeated": float((later == labels[:-PERIOD])[named].mean()) if named.any() else None,
        "notes_per_bar": len(song.start) / bars,
    }


def _part(name: str, sounding: np.ndarray) -> dict:
    """Figures of the drums or the bass from the bars in which they sound, bool [bars]; None if in none."""
    if not sounding.any():
        return dict.fromkeys((name, f"{name}_bars", f"{name}_enter", f"{name}_from_there"))
    enter = int(sounding.argmax())
    return {
        name: float(sounding.mean()),
        f"{name}_bars": int(sounding.sum()),
        f"{name}_enter": enter + 1,
        f"{name}_from_there": float(sounding[enter:].mean()),
    }


def total(songs: Iterable[dict]) -> dict:
    """The medians of `MEANINGS` over songs that have the figure (None if none has), and pooled shares.

    `pooled` has, for drums and bass: the songs that have them, their bars, in how many of these they sound,
    and in how many songs in at least `WANTED` of them; the latter also counted from where they enter.
    """
    songs = list(songs)
    medians = {}
    for name in MEANINGS:
        values = [song[name] for song in songs if song[name] is not None]
        medians[name] = float(np.median(values)) if values else None
    pooled = {}
    for name, counted in (("drums", "drums_bars"), ("bass", "bass_bars")):
        having = [song for song in songs if song[counted] is not None]
        pooled[name] = {
            "songs": len(having),
            "bars": sum(song["bars"] for song in having),
            "sounding": sum(song[counted] for song in having),
            "enough": sum(song[name] >= WANTED for song in having),
            "enough_from_there": sum(song[f"{name}_from_there"] >= WANTED for song in having),
        }
    return {"songs": len(songs), "medians": medians, "pooled": pooled}


def _sounding(song: Score, most_bars: int | None) -> tuple[Score, np.ndarray]:
    """The song between its first and last note, at most so many bars of it, and the bar of each bar part.

    Time counts from the first bar on. A note that reaches beyond the last bar is kept as it is.
    """
    bar_of_part = np.cumsum(song.part == 0) - 1
    part_of_note = np.searchsorted(song.bar_start, song.start, side="right") - 1
    bar_of_note = bar_of_part[part_of_note]
    first, last = bar_of_note.min(), bar_of_note.max()
    if most_bars is not None:
        last = min(last, first + most_bars - 1)
    parts = (bar_of_part >= first) & (bar_of_part <= last)
    notes = bar_of_note <= last
    offset = song.bar_start[parts][0]
    kept = Score(
        *(getattr(song, name)[notes] - offset * (name == "start") for name in _NOTE_FIELDS),
        *(getattr(song, name)[parts] - offset * (name == "bar_start") for name in _BAR_FIELDS),
    )
    return kept, bar_of_part[parts] - first


_NOTE_FIELDS = ("start", "length", "pitch", "velocity", "inst")
_BAR_FIELDS = ("bar_start", "bar_steps", "signature", "part", "bpm")


def _sounds(song: Score, bar_of_part: np.ndarray, instruments: np.ndarray) -> np.ndarray:
    """Whether an instrument sounds in a bar, bool [instruments, bars]. A drum sounds where it is struck."""
    # Drums have a length in MIDI, but nobody hears it.
    end = np.where(song.inst == vocab.DRUMS, song.start + 1, song.start + song.length)
    first = bar_of_part[np.searchsorted(song.bar_start, song.start, side="right") - 1]
    last = bar_of_part[np.searchsorted(song.bar_start, end, side="left") - 1]
    edges = np.zeros((len(instruments), bar_of_part[-1] + 2), dtype=np.int64)
    row = np.searchsorted(instruments, song.inst)
    np.add.at(edges, (row, first), 1)
    np.add.at(edges, (row, last + 1), -1)
    return np.cumsum(edges, axis=1)[:, :-1] > 0
