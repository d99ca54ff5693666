"""What `generate` tells of a song."""

import numpy as np
import pytest
from miditoolkit import Instrument, MidiFile, Note

from meloformer.composer.compose import compose
from meloformer.generation import report
from meloformer.generation.report import NewMusic, Progress, hints
from meloformer.midi.general_midi import PROGRAM_NAMES
from meloformer.stop import StopRequest
from meloformer.tokens import attributes
from meloformer.tokens.tokenizer import HIDTokenizer


@pytest.fixture(scope="module")
def ids():
    return HIDTokenizer().encode(compose(4, bars=6))


def test_the_new_music_is_counted_from_where_it_begins(ids):
    midi = HIDTokenizer().decode(ids)
    whole = NewMusic.of(ids, 0)
    assert whole.bars == 6
    assert whole.notes == sum(len(track.notes) for track in midi.instruments)
    names = {"Drums" if track.is_drum else PROGRAM_NAMES[track.program] for track in midi.instruments}
    assert set(whole.instruments) == names and len(whole.instruments) == len(names) > 1
    bars = attributes.scan_bars(ids)
    assert len(set(bars.bpm)) == 1  # then the playing time is a matter of one division
    assert whole.seconds == pytest.approx(bars.steps.sum() / 24 * 60 / bars.bpm[0])

    point = attributes.cut_points(ids)[4]
    rest, first = NewMusic.of(ids, int(point)), NewMusic.of(ids[:point], 0)
    assert (rest.bars, rest.notes) == (2, whole.notes - first.notes) and rest.notes > 0
    assert rest.seconds == pytest.approx(whole.seconds - first.seconds)


@pytest.mark.parametrize(
    "music, said",
    [
        (NewMusic(1, 1, ("Drums",), 2.04), "1 new bar, 1 new note by Drums, 2.0 seconds of music"),
        (
            NewMusic(32, 1204, ("Drums", "Flute", "Viola"), 70),
            "32 new bars, 1,204 new notes by Drums, Flute and Viola, 70.0 seconds of music",
        ),
        (NewMusic(2, 0, (), 4), "2 new bars, 0 new notes, 4.0 seconds of music"),
        (
            NewMusic(2, 9, ("Flute",), 4, "A minor"),
            "2 new bars, 9 new notes by Flute in A minor, 4.0 seconds of music",
        ),
    ],
)
def test_it_is_told_in_one_line(music, said):
    assert str(music) == said


@pytest.mark.parametrize("semitones", [0, 5])
def test_the_key_is_that_of_the_new_notes_but_for_the_drums(semitones):
    midi = MidiFile()
    bars = {"C major": (0, 4, 7, 5, 9, 0), "A minor": (9, 0, 4, 2, 5, 8)}
    for bar, chords in enumerate(bars.values()):
        scale = [Note(80, 60 + semitones + pitch, 240 * i, 240 * i + 240) for i, pitch in enumerate(chords)]
        for note in scale:
            note.start, note.end = note.start + 1920 * bar, note.end + 1920 * bar
        midi.instruments.append(Instrument(bar, notes=scale))
    midi.instruments.append(Instrument(0, True, notes=[Note(80, 42, 60 * i, 60 * i + 60) for i in range(64)]))
    ids = HIDTokenizer().encode(midi)
    (_, point), tonic = attributes.cut_points(ids), {0: ("C", "A"), 5: ("F", "D")}[semitones]
    assert NewMusic.of(ids[:point], 0).key == f"{tonic[0]} major"
    assert NewMusic.of(ids, int(point)).key == f"{tonic[1]} minor"


def test_long_notes_count_more_for_the_key_than_short_ones():
    long = [Note(80, pitch, 0, 1920) for pitch in (57, 60, 64)]  # A minor
    short = [
        Note(80, pitch, 60 * i, 60 * i + 60) for i, pitch in enumerate((72, 76, 79, 72, 76, 79))
    ]  # C major
    midi = MidiFile()
    midi.instruments += [Instrument(0, notes=long), Instrument(73, notes=short)]
    assert NewMusic.of(HIDTokenizer().encode(midi), 0).key == "A minor"


def test_drums_have_no_key():
    midi = MidiFile()
    midi.instruments.append(
        Instrument(0, True, notes=[Note(80, 36 + i, 60 * i, 60 * i + 60) for i in range(9)])
    )
    assert NewMusic.of(HIDTokenizer().encode(midi), 0).key is None


def test_nothing_new_is_nothing(ids):
    assert NewMusic.of(np.array([1, 2], dtype=np.uint16), 1) == NewMusic(0, 0, (), 0.0)


def shown(monkeypatch, wanted, calls, bars, limit=100, request=None):
    """The progress of a song whose loop made these calls, and how far its bar got."""
    at = []

    class Bar(report.tqdm):
        def close(self):
            at.append(self.n)
            super().close()

    monkeypatch.setattr(report, "tqdm", Bar)
    progress = Progress(wanted, limit, request or StopRequest("no promise"))
    for call in calls:
        progress.on_token(*call)
    assert progress.stop() == (request is not None)
    progress.close(bars)
    return progress, at[0]


def test_the_bar_of_a_whole_song_reaches_its_end(monkeypatch):
    progress, at = shown(monkeypatch, 2, [(1, 0), (2, 1), (3, 2)], bars=2)
    assert at == 2 and not hints(NewMusic(2, 9, ("Drums",), 4.0), progress, 2048)
    assert shown(monkeypatch, None, [(1, 0), (2, 1), (3, 2)], bars=2)[1] == 3


def test_a_last_bar_that_is_cut_is_not_shown_as_done_and_hinted_at(monkeypatch):
    progress, at = shown(monkeypatch, 8, [(99, 2), (100, 3)], bars=3)
    assert at == 2
    (hint,) = hints(NewMusic(3, 0, (), 4.0), progress, 2048)
    assert "--max_tokens 100 ended it in bar 3 of 8" in hint and "raise --max_tokens" in hint
    (hint,) = hints(NewMusic(3, 9, (), 4.0), shown(monkeypatch, None, [(100, 3)], bars=3)[0], 2048)
    assert "ended it in bar 3, " in hint


def test_a_bar_longer_than_the_rows_is_hinted_at(monkeypatch):
    progress, _ = shown(monkeypatch, 8, [(50, 3)], bars=3)
    (hint,) = hints(NewMusic(3, 9, ("Drums",), 4.0), progress, 2048)
    assert "after 3 of the 8 bars" in hint and "2,048 tokens" in hint


def test_rests_are_hinted_at(monkeypatch):
    progress, _ = shown(monkeypatch, 2, [(9, 2)], bars=2)
    (hint,) = hints(NewMusic(2, 0, (), 4.0), progress, 2048)
    assert "rests" in hint and "--seed" in hint


def test_a_stopped_song_says_what_is_kept(monkeypatch):
    class Asked(StopRequest):
        reason = "SIGTERM"

    progress, at = shown(monkeypatch, 8, [(100, 4)], bars=3, request=Asked("no promise"))
    assert at == 3 and not progress.cut
    (hint,) = hints(NewMusic(3, 9, ("Drums",), 4.0), progress, 2048)
    assert hint == "stopped by SIGTERM: kept 3 of the 8 bars, all that were complete"
