"""Accompaniment, and bars written anew: what stays is what was there, and only what was asked for is new."""

import copy

import numpy as np
import pytest

from meloformer.composer.compose import compose
from meloformer.generation.constraints import Constraints
from meloformer.generation.decoder import Decoder
from meloformer.generation.draft import OutlinedDraft
from meloformer.generation.harmony import parse_chords
from meloformer.generation.loop import write
from meloformer.generation.outline import Outline
from meloformer.generation.sampling import Sampling
from meloformer.tokens import attributes, vocab
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.untrained import untrained

NEW = (48, 73)


@pytest.fixture(scope="module")
def song():
    return compose(5, bars=6)


@pytest.fixture(scope="module")
def model():
    return untrained()


def notes(midi) -> set[tuple]:
    return {
        (vocab.DRUMS if track.is_drum else track.program, n.start, n.end, n.pitch, n.velocity)
        for track in midi.instruments
        for n in track.notes
    }


def instruments(midi) -> set[int]:
    return {note[0] for note in notes(midi)}


def written(model, outline, stop_after=None) -> np.ndarray:
    # Of all CHORD tokens one alone ends a bar, or the model without training would write no group.
    wishes = Constraints(densities=dict.fromkeys(outline.written, 4.0), chords=parse_chords("C"))
    draft = OutlinedDraft(
        outline,
        constraints=wishes,
        sampling=Sampling(temperature=3.0),
        max_tokens=4000,
    )
    for count, _ in enumerate(write(model, [draft], 2048, "auto")):
        if count == stop_after:
            draft.stop()
    ids = draft.song()
    check(ids)
    return ids


def bars_of(midi) -> np.ndarray:
    """Where the bars of a song of one time signature begin, in ticks."""
    (signature,) = midi.time_signature_changes
    return np.arange(0, midi.max_tick, 4 * midi.ticks_per_beat * signature.numerator // signature.denominator)


def test_an_accompaniment_is_added_to_a_song_that_stays(model, song):
    ids = written(model, Outline.of(song, NEW))
    after = copy.deepcopy(song)
    count = Outline.of(song, NEW).put_into(after, ids)
    added = notes(after) - notes(song)
    assert notes(song) <= notes(after) and len(added) == count > 1
    assert {note[0] for note in added} <= set(NEW)


def test_what_stays_is_heard_before_what_is_written(model, song):
    ids = written(model, Outline.of(song, NEW))
    assert attributes.band(ids).tolist()[-2:] == list(NEW)
    kept = ids[~np.isin(attributes.scan(ids).inst, NEW)]
    whole = HIDTokenizer().encode(song, band=attributes.band(ids))
    np.testing.assert_array_equal(kept, whole)


def test_bars_are_written_anew_and_the_others_stay(model, song):
    bass = 33 if 33 in instruments(song) else min(instruments(song))
    outline = Outline.of(song, [bass], bars=(3, 4))
    after = copy.deepcopy(song)
    outline.put_into(after, written(model, outline))
    low, high = bars_of(song)[[2, 4]]
    stay = {note for note in notes(song) if note[0] != bass or not low <= note[1] < high}
    assert stay <= notes(after) and stay < notes(song)
    new = notes(after) - stay
    assert new and all(note[0] == bass and low <= note[1] < high for note in new)


def test_the_chords_can_be_given(model, song):
    chords = parse_chords("E A")
    ids = written(model, Outline.of(song, NEW, bars=(2, 4), chords=chords))
    found = ids[vocab.CHORD.mask(ids)].tolist()
    assert found[1:4] == [chords[0], chords[1], chords[0]]
    heard = HIDTokenizer().encode(song)
    assert found[:1] + found[4:] == [
        label for i, label in enumerate(heard[vocab.CHORD.mask(heard)]) if i not in (1, 2, 3)
    ]


def test_tokens_of_another_writer_are_taken_if_what_is_given_is_there(song):
    outline = Outline.of(song, NEW, bars=(2, 2))
    given = [token for bar in outline.bars for token in bar.tokens]
    last = len(outline.bars[0].tokens) + len(outline.bars[1].tokens)
    draft = OutlinedDraft(outline)
    assert all(draft.take(token) for token in given[:last])
    assert not draft.take(vocab.CHORD.start) and draft.finished  # nothing is added
    assert draft.song().tolist() == [*outline.header, *given, vocab.EOS]
    draft = OutlinedDraft(outline)
    with pytest.raises(ValueError, match=f"where {given[0]} is given"):
        draft.take(vocab.CHORD.stop)


@pytest.mark.parametrize("stop_after", [0, 1, 40, 150])
def test_a_stop_keeps_the_given_song(model, song, stop_after):
    outline = Outline.of(song, NEW)
    after = copy.deepcopy(song)
    outline.put_into(after, written(model, outline, stop_after))
    assert notes(song) <= notes(after)


def test_a_song_that_tokens_would_round_stays_as_it_is(model, song):
    rough = copy.deepcopy(song)
    for track in rough.instruments:
        for number, note in enumerate(track.notes):
            note.start, note.velocity = note.start + number % 3, max(1, note.velocity - number % 2)
    before = notes(rough)
    outline = Outline.of(rough, NEW, bars=(2, 3))
    outline.put_into(rough, written(model, outline))
    assert before <= notes(rough)


@pytest.mark.parametrize("bars", [(0, 1), (3, 2), (6, 7)])
def test_bars_that_there_are_not_are_refused(song, bars):
    with pytest.raises(ValueError, match="there are no bars"):
        Outline.of(song, NEW, bars)


def test_what_stays_costs_a_pass_a_bar_and_not_one_a_token(model, song, monkeypatch):
    passes, prefills = [], []
    through_layers, prefill = Decoder._through_layers, Decoder.prefill
    monkeypatch.setattr(
        Decoder,
        "_through_layers",
        lambda self, facts, attend: (passes.append(len(facts)), through_layers(self, facts, attend))[1],
    )
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, songs, ids: (prefills.append(len(ids)), prefill(self, songs, ids))[1]
    )
    outline = Outline.of(song, NEW)
    ids = written(model, outline)
    given = sum(len(bar.tokens) for bar in outline.bars)
    new = len(ids) - given - len(outline.header) - 1  # of which EOS is the last
    assert new > 20 and given > 20 * len(outline.bars)  # or there was nothing to see
    assert len(prefills) == 1 and sum(passes) + sum(prefills) == len(ids) - 1
    assert len(passes) <= new + 2 * len(outline.bars)
