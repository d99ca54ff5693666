import numpy as np
import pytest

from benchmarks.fidelity import bar_lines, notes_by_key, seconds_at
from meloformer.errors import MidiError
from meloformer.tokens import score, vocab

from helpers.songs import song

NOTE = (0, 60, 0, 24)


def bars_of(midi):
    found = score.from_midi(midi)
    return list(zip(found.bar_start.tolist(), found.bar_steps.tolist(), found.part.tolist()))


def long_song(end_quarters, signatures, tpq=24):
    return song([(0, 60, 0, tpq), (0, 60, end_quarters * tpq - 1, end_quarters * tpq)], signatures, tpq=tpq)


def test_no_time_signature_means_four_quarters():
    assert bars_of(long_song(9, [])) == [(0, 96, 0), (96, 96, 0), (192, 96, 0)]


def test_the_last_of_several_signatures_at_one_time_wins():
    assert bars_of(long_song(5, [(4, 4, 0), (3, 4, 0)])) == [(0, 72, 0), (72, 72, 0)]


def test_a_change_inside_a_bar_cuts_the_bar_short():
    midi = long_song(9, [(4, 4, 0), (3, 4, 24 * 5)])
    assert bars_of(midi) == [(0, 96, 0), (96, 24, 0), (120, 72, 0), (192, 72, 0)]


def test_a_cut_off_the_grid_keeps_the_nearest_step():
    midi = long_song(9, [(4, 4, 0), (2, 4, 2489)], tpq=480)
    assert bars_of(midi)[1:3] == [(96, 28, 0), (124, 48, 0)]


def test_signatures_before_and_after_the_notes_do_no_harm():
    midi = long_song(3, [(3, 4, 24), (2, 4, 24 * 50)])
    assert bars_of(midi) == [(0, 24, 0), (24, 72, 0)]


def test_a_bar_over_eight_quarters_stands_in_parts():
    assert bars_of(long_song(15, [(10, 4, 0)])) == [(0, 192, 0), (192, 48, 1), (240, 192, 0)]


@pytest.mark.parametrize(
    "n, d, starts",
    [
        (25, 8, [0, 192, 300, 492, 600]),
        (6, 64, [0, 9, 18, 27]),
        (7, 128, [0, 5, 10, 16, 21]),
        (32, 4, [0, 192, 384, 576, 768]),
        (5, 3, [0, 160, 320, 480]),
    ],
)
def test_signatures_outside_the_vocabulary_keep_their_bar_lines(n, d, starts):
    midi = song([NOTE, (0, 60, starts[-1], starts[-1] + 1)], [(n, d, 0)])
    found = score.from_midi(midi)
    assert found.bar_start[: len(starts)].tolist() == starts
    again = score.from_midi(score.to_midi(found, np.zeros(len(found.bar_start), dtype=np.int64)))
    assert again.bar_start.tolist() == found.bar_start.tolist()
    assert again.bar_steps.tolist() == found.bar_steps.tolist()


def test_a_song_of_too_many_bars_is_refused():
    with pytest.raises(MidiError) as caught:
        score.from_midi(song([NOTE, (0, 60, 24 * 5000, 24 * 5001)], [(1, 32, 0)]))
    assert caught.value.reason == "too_long"


def test_a_song_without_notes_is_refused():
    with pytest.raises(MidiError) as caught:
        score.from_midi(song([]))
    assert caught.value.reason == "no_notes"


def test_objects_that_no_file_could_hold_are_refused():
    with pytest.raises(ValueError, match="tempo at tick 7"):
        score.from_midi(song([NOTE], tempi=[(float("nan"), 7)]))
    with pytest.raises(MidiError, match="too_long"):
        score.from_midi(song([(0, 60, 10**18, 10**18 + 1)]))


@pytest.mark.parametrize("bad", [(0, 128, 0, 1), (0, 60, -5, 1)], ids=["pitch", "time"])
def test_notes_outside_midi_are_a_programming_error(bad):
    with pytest.raises(ValueError, match="outside 0"):
        score.from_midi(song([bad]))


@pytest.mark.parametrize(
    "notes, expected",
    [
        ([(0, 60, 0, 48), (0, 60, 24, 48)], [(0, 1), (1, 2)]),
        ([(0, 60, 0, 48), (0, 60, 0, 24)], [(0, 2)]),
        ([(0, 60, 0, 0)], [(0, 1 / 24)]),
        ([(0, 60, 0, 24 * 88)], [(0, 64), (64, 88)]),
        ([(0, 60, 0, 24 * 150), (0, 60, 24 * 129, 24 * 130)], [(0, 64), (64, 128), (128, 129), (129, 130)]),
        ([(0, 60, 0, 37), (0, 60, 37, 50)], [(0, 36 / 24), (37 / 24, 50 / 24)]),
    ],
    ids=[
        "restruck",
        "unison",
        "zero length",
        "beyond the longest",
        "beyond the longest, restruck",
        "rounded length would overlap",
    ],
)
def test_notes_of_one_pitch_are_made_sayable(notes, expected):
    found = score.from_midi(song(notes))
    midi = score.to_midi(found, np.zeros(len(found.bar_start), dtype=np.int64))
    assert notes_by_key(midi)[0, 60] == [pytest.approx(times) for times in expected]


def test_long_notes_that_would_become_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(score, "MAX_PIECES", 3)
    assert len(score.from_midi(song([(0, 60, 0, 24 * 64 * 4)])).start) == 4
    with pytest.raises(MidiError, match="too_long"):
        score.from_midi(song([(0, 60, 0, 24 * 64 * 5)]))


def test_tempo_is_the_mean_of_the_bar_so_that_time_is_kept():
    tempi = [(120.0, 0), (60.0, 48), (100.0, 96), (173.4, 200), (20.5, 250)]
    midi = song([NOTE, (0, 60, 24 * 20, 24 * 21)], tempi=tempi)
    found = score.from_midi(midi)
    back = score.to_midi(found, np.zeros(len(found.bar_start), dtype=np.int64))
    assert found.bpm[0] == 80  # two quarters at 120 and two at 60 last three seconds
    for low, steps, bpm in zip(found.bar_start / 24, found.bar_steps / 24, found.bpm):
        lasted = seconds_at(midi, low + steps) - seconds_at(midi, low)
        assert abs(60 * steps / lasted - bpm) < 1
    assert bar_lines(back, 21) == bar_lines(midi, 21)


def test_a_fermata_within_a_bar_is_spread_over_the_bar():
    midi = song([NOTE, (0, 60, 96, 97)], tempi=[(120.0, 0), (15.0, 72), (120.0, 96)])
    assert score.from_midi(midi).bpm.tolist() == [44, 120]  # the example of docs/tokens.md


@pytest.mark.parametrize("bpm", [57.5, 81.5, 100.4, 150.5])
def test_a_tempo_between_two_numbers_does_not_drift(bpm):
    midi = song([NOTE, (0, 60, 24 * 900, 24 * 901)], tempi=[(bpm, 0)])
    found = score.from_midi(midi)
    back = score.to_midi(found, np.zeros(len(found.bar_start), dtype=np.int64))
    drift = [seconds_at(midi, at) - seconds_at(back, at) for at in range(0, 901, 20)]
    assert np.abs(drift).max() < 0.1
    assert np.abs(found.bpm - bpm).max() < 1
    assert np.count_nonzero(np.diff(found.bpm)) < len(found.bpm) / 2


@pytest.mark.parametrize("bpm, expected", [(1e9, 480), (0.0, 4), (float("inf"), 480), (4.0, 4), (480.0, 480)])
def test_absurd_tempi_are_clipped(bpm, expected):
    assert score.from_midi(song([NOTE], tempi=[(bpm, 0)])).bpm[0] == expected


@pytest.mark.parametrize("tpq", [1, 5, 24, 96, 120, 480, 960, 32767])
def test_onsets_move_half_a_step_at_most(tpq):
    rng = np.random.default_rng(tpq)
    starts = np.cumsum(rng.integers(1, 3 * tpq + 2, size=50))
    found = score.from_midi(song([(0, 60, int(t), int(t) + 1) for t in starts], tpq=tpq))
    nearest = np.abs(found.start[:, None] - starts * vocab.STEPS_PER_QUARTER / tpq).min(axis=0)
    assert nearest.max() <= 0.5
