import json

import pytest
from miditoolkit import Instrument, MidiFile, Note, TimeSignature

from benchmarks.generated import __main__ as command
from benchmarks.generated.statistics import MEANINGS, measure, total
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.midi.writer import write_midi
from meloformer.tokens.tokenizer import HIDTokenizer

BAR = 1920


def song(*parts: tuple[int, list[tuple[float, float, int]]], metre: tuple[int, int] = (4, 4)) -> MidiFile:
    """Parts (program, 128 for drums; notes as start and end in quarters, pitch)."""
    midi = MidiFile(ticks_per_beat=480)
    midi.time_signature_changes = [TimeSignature(*metre, 0)]
    for program, notes in parts:
        notes = [Note(90, pitch, int(480 * start), int(480 * end)) for start, end, pitch in notes]
        midi.instruments.append(Instrument(program % 128, program == 128, notes=notes))
    return midi


def chord(bar: int, *pitches: int) -> list[tuple[float, float, int]]:
    return [(4 * bar, 4 * bar + 4, pitch) for pitch in pitches]


def test_bars_run_from_the_first_note_to_the_last_onset():
    bass = [(8, 12, 40), (20, 30, 43)]  # bars 3 and 6, held into 8; the first ends on the line of bar 4
    figures = measure(song((33, bass), (0, [(21, 22, 60)])))
    assert figures["bars"] == 4 and figures["notes"] == 3
    assert figures["bass_bars"] == 2 and figures["bass"] == 0.5
    assert figures["band"] == (1 + 0 + 0 + 2) / (4 * 2)
    assert figures["drums"] is None and figures["drums_bars"] is None


def test_a_held_bass_sounds_on_and_a_drum_does_not():
    held = [(0, 12, 40)]
    figures = measure(song((39, held), (128, held), (40, [(12, 13, 60)])))
    assert (figures["bars"], figures["bass_bars"], figures["drums_bars"]) == (4, 3, 1)
    assert figures["programs"] == ["Drums", "Synth Bass 2", "Violin"]


def test_only_programs_32_to_39_are_a_bass():
    figures = measure(song((31, [(0, 4, 30)]), (40, [(0, 4, 30)])))
    assert figures["bass"] is None


def test_chords_that_come_again_after_four_bars():
    turn = [(60, 64, 67), (57, 60, 64), (65, 69, 72), (67, 71, 74)]
    again = measure(song((0, [note for bar in range(8) for note in chord(bar, *turn[bar % 4])])))
    assert again["chords"] == 4 and again["repeated"] == 1
    order = [0, 1, 2, 3, 0, 2, 1, 3]  # of the bars 5 to 8 the first and the last return
    other = measure(song((0, [note for bar in range(8) for note in chord(bar, *turn[order[bar]])])))
    assert other["chords"] == 4 and other["repeated"] == 0.5
    drums = measure(song((128, [(4 * bar, 4 * bar + 1, 36) for bar in range(8)])))
    assert drums["chords"] == 0 and drums["repeated"] is None


def test_a_bar_longer_than_eight_quarters_is_one_bar():
    figures = measure(song((0, [(0, 1, 60), (12, 13, 60)]), metre=(12, 4)))
    assert figures["bars"] == 2 and figures["band"] == 1 and figures["metres"] == ["12/4"]


@pytest.mark.parametrize("seed", range(3))
def test_of_composed_songs(seed):
    midi = compose(seed, bars=12, signature=(4, 4), tempo=100)
    figures = measure(midi)
    assert figures["bars"] == 12 and figures["tempi"] == [100, 100] and figures["metres"] == ["4/4"]
    assert figures["tokens"] == len(HIDTokenizer().encode(midi))
    notes = sum(len(track.notes) for track in midi.instruments)
    assert figures["notes"] == notes and figures["notes_per_bar"] == notes / 12
    struck = [
        {note.start // BAR for track in midi.instruments if track.is_drum for note in track.notes},
        {note.start // BAR for track in midi.instruments for note in track.notes},
    ]
    assert figures["drums_bars"] == (len(struck[0]) or None)
    # A bar later nothing has changed.
    for track in midi.instruments:
        for note in track.notes:
            note.start, note.end = note.start + BAR, note.end + BAR
    assert measure(midi) == figures


@pytest.mark.parametrize("seed", range(2))
def test_a_cut_song_is_the_song_up_to_there(seed):
    midi = compose(seed, bars=12, signature=(3, 4))
    cut = measure(midi, 5)
    for track in midi.instruments:
        track.notes = [note for note in track.notes if note.start < 5 * 1440]
    assert cut["bars"] == 5 and cut["notes"] == sum(len(track.notes) for track in midi.instruments)
    assert cut["drums_bars"] == measure(midi)["drums_bars"]
    assert cut == measure(midi, 5)


def test_totals_count_songs_that_have_the_instrument():
    one = measure(song((33, [(0, 4, 40), (12, 16, 40)])))
    two = measure(song((33, [(0, 4, 40)]), (0, [(4, 8, 60)])))
    none = measure(song((0, [(0, 4, 60)])))
    result = total([one, two, none])
    late = measure(song((33, [(36, 40, 40)]), (0, [(0, 4, 60)])))
    assert late["bass"] == 0.1 and late["bass_enter"] == 10 and late["bass_from_there"] == 1
    assert (one["bass_enter"], one["bass_from_there"]) == (1, 0.5)
    counts = {"songs": 2, "bars": 6, "sounding": 3, "enough": 0, "enough_from_there": 0}
    assert result["pooled"]["bass"] == counts
    assert total([late])["pooled"]["bass"]["enough_from_there"] == 1
    assert set(result["pooled"]["drums"].values()) == {0}
    assert result["medians"]["bass"] == 0.5 and result["medians"]["drums"] is None
    assert result["medians"]["bars"] == 2 and set(result["medians"]) == set(MEANINGS)


@pytest.fixture
def folder(tmp_path):
    songs = tmp_path / "songs"
    songs.mkdir()
    for seed in range(2):
        write_midi(compose(seed, bars=6), songs / f"song-{seed}.mid")
    return songs


def test_the_command_writes_page_figures_and_picture(folder, tmp_path, capsys):
    real = tmp_path / "real"
    real.mkdir()
    write_midi(compose(3, bars=9), real / "long.mid")
    (real / "damaged.mid").write_bytes(b"no MIDI file")
    page = tmp_path / "out" / "my_songs.md"
    command.main([str(folder), "--real", str(real), "--made_by", "by a_test", "--output", str(page)])
    result = json.loads(page.with_suffix(".json").read_text())
    assert list(result["songs"]) == ["song-0", "song-1"] and result["made_by"] == "by a_test"
    assert result["real"]["total"]["songs"] == 1 and sum(result["real"]["refused"].values()) == 1
    assert result["real"]["total"]["medians"]["bars"] == result["real"]["most_bars"] == 6
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert "(my_songs.png)" in text and "by a\\_test" in text and "median of 1 real song" in text
    for song in result["songs"].values():
        assert f"| {', '.join(song['programs'])} |" in text


def test_a_song_that_cannot_be_read_is_not_left_out(folder, tmp_path):
    (folder / "song-2.mid").write_bytes(b"no MIDI file")
    with pytest.raises(UserError, match=r"song-2\.mid"):
        command.main([str(folder), "--output", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()


def test_songs_of_one_name_are_told_apart(folder, tmp_path):
    (folder / "other").mkdir()
    write_midi(compose(2, bars=2), folder / "other" / "song-0.mid")
    command.main([str(folder), "--output", str(tmp_path / "page.md")])
    songs = json.loads((tmp_path / "page.json").read_text())["songs"]
    assert len(songs) == 3 and str(folder / "other" / "song-0.mid") in songs


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.md"):
        command.main([str(folder), "--output", str(tmp_path / "page.txt")])
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "damaged.mid").write_bytes(b"no MIDI file")
    with pytest.raises(UserError, match="no file could be read"):
        command.main([str(folder), "--real", str(tmp_path / "real"), "--output", str(tmp_path / "page.md")])
