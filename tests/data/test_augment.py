"""Augmentation on token ids does what the same change of the song would have done."""

import itertools

import miditoolkit
import numpy as np
import pytest

from meloformer.composer.compose import compose
from meloformer.data import batches as data
from meloformer.data.augment import (
    MAX_BINS,
    MAX_PERCENT,
    MAX_SEMITONES,
    OFF,
    Augmentation,
    augment,
    find_room,
    room_dtype,
    seeds_of_epoch,
)
from meloformer.data.batches import State
from meloformer.data.splitmix import splitmix64
from meloformer.tokens import attributes, grammar, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.attention_cases import count_pairs
from helpers.packed_songs import packed
from helpers.songs import example, song

TOKENIZER = HIDTokenizer()
ALL = Augmentation(transpose=6, velocity=2, tempo=10, band_order=True)
TRANSPOSE = Augmentation(transpose=6, velocity=0, tempo=0, band_order=False)
VELOCITY = Augmentation(transpose=0, velocity=3, tempo=0, band_order=False)
TEMPO = Augmentation(transpose=0, velocity=0, tempo=10, band_order=False)
BAND = Augmentation(transpose=0, velocity=0, tempo=0, band_order=True)

SONGS = {
    "example": example(),
    "composed": compose(1, bars=10),
    "changing metres": compose(4, bars=12),
    "cut bars, changing tempo": song(
        [(0, 60, 0, 24), (128, 36, 0, 12, 20), (0, 64, 30, 70), (40, 72, 120, 200, 100), (128, 38, 130, 140)],
        signatures=[(4, 4, 0), (3, 4, 100), (9, 1, 172)],
        tempi=[(90, 0), (140, 100), (139, 172)],
    ),
    "drums alone": song([(128, 36, 0, 10), (128, 127, 96, 100), (128, 0, 200, 220)]),
    "one note": song([(0, 60, 0, 24)]),
}


@pytest.fixture(params=SONGS)
def midi(request) -> miditoolkit.MidiFile:
    return SONGS[request.param]


def room_of(ids: np.ndarray, starts: np.ndarray, settings: Augmentation) -> np.ndarray:
    return find_room(ids, starts, attributes.scan(ids, starts), settings)


def outcomes(ids: np.ndarray, settings: Augmentation, count: int = 60) -> list[np.ndarray]:
    """What many seeds make of a document; each has its length."""
    found, start = [], np.array([0])
    room = room_of(ids, start, settings)
    for seed in seeds_of_epoch(0, 0, count):
        out, scanned = augment(ids, start, np.array([seed]), room, settings)
        assert out.dtype == np.uint16 and len(out) == len(ids)
        for name, column in vars(attributes.scan(out)).items():
            np.testing.assert_array_equal(getattr(scanned, name), column)
        found.append(out)
    return found


def distinct(found: list[np.ndarray]) -> set[tuple[int, ...]]:
    return {tuple(ids.tolist()) for ids in found}


def altered(midi: miditoolkit.MidiFile, semitones: int = 0, velocity: int = 0) -> np.ndarray:
    """The tokens of a song whose notes were changed."""
    notes = [
        (
            vocab.DRUMS if track.is_drum else int(track.program),
            note.pitch + (0 if track.is_drum else semitones),
            note.start,
            note.end,
            note.velocity + velocity,
        )
        for track in midi.instruments
        for note in track.notes
    ]
    other = song(
        notes,
        [(s.numerator, s.denominator, s.time) for s in midi.time_signature_changes],
        [(t.tempo, t.time) for t in midi.tempo_changes],
        midi.ticks_per_beat,
    )
    return TOKENIZER.encode(other)


def melodic_pitches(ids: np.ndarray) -> np.ndarray:
    return ids[vocab.P.mask(ids) & (attributes.scan(ids).inst != vocab.DRUMS)].astype(int) - vocab.P.start


# --- each change is that of the song ---------------------------------------------------------------


def test_transposed_ids_are_those_of_the_transposed_song(midi):
    ids = TOKENIZER.encode(midi)
    expected = {tuple(altered(midi, semitones=shift).tolist()) for shift in range(-5, 7)}
    assert distinct(outcomes(ids, TRANSPOSE, 150)) == expected
    assert len(expected) == (12 if len(melodic_pitches(ids)) else 1)


@pytest.mark.parametrize("most", range(1, MAX_SEMITONES + 1))
def test_shifts_go_no_further_than_asked_for(most):
    ids = TOKENIZER.encode(SONGS["one note"])
    found = outcomes(ids, Augmentation(most, 0, 0, False), 150)
    assert {int(melodic_pitches(out)[0]) - 60 for out in found} == set(range(-min(most, 5), most + 1))


@pytest.mark.parametrize(
    "pitches, shifts", [((3, 60), range(-3, 7)), ((60, 126), range(-5, 2)), ((0, 127), [0])]
)
def test_no_pitch_leaves_its_range(pitches, shifts):
    """Drums, whose pitches stay, do not count."""
    notes = [(0, pitch, 0, 24) for pitch in pitches] + [(128, 0, 0, 24), (128, 127, 0, 24)]
    ids = TOKENIZER.encode(song(notes))
    found = outcomes(ids, TRANSPOSE, 150)
    assert {int(melodic_pitches(out)[0]) - pitches[0] for out in found} == set(shifts)
    drums = attributes.scan(ids).inst == vocab.DRUMS
    assert all((out[drums] == ids[drums]).all() for out in found)


def test_velocities_are_those_of_the_song_played_louder(midi):
    ids = TOKENIZER.encode(midi)
    bins = ids[vocab.V.mask(ids)].astype(int) - vocab.V.start
    shifts = range(max(-3, -bins.min()), min(3, MAX_BINS - bins.max()) + 1)
    expected = {tuple(altered(midi, velocity=4 * shift).tolist()) for shift in shifts}
    assert distinct(outcomes(ids, VELOCITY, 150)) == expected


def test_no_velocity_is_clipped():
    ids = TOKENIZER.encode(song([(0, 60, 0, 24, 1), (128, 62, 24, 48, 123)]))
    bins = [set(out[vocab.V.mask(out)].astype(int) - vocab.V.start) for out in outcomes(ids, VELOCITY, 100)]
    assert set(map(frozenset, bins)) == {frozenset({0, 30}), frozenset({1, 31})}


def test_groups_move_as_if_encoded_in_that_order(midi):
    ids = TOKENIZER.encode(midi)
    bands = set()
    for out in outcomes(ids, BAND):
        band = attributes.band(out).tolist()
        np.testing.assert_array_equal(out, TOKENIZER.encode(midi, band=band))
        bands.add(tuple(band))
    orders = list(itertools.permutations(attributes.band(ids).tolist()))
    assert len(bands) > 15 if len(orders) > 6 else bands == set(orders)


def test_every_order_of_a_band_is_as_likely():
    ids = TOKENIZER.encode(song([(inst, 60, 0, 24) for inst in (0, 40, 128)]))
    found = [tuple(attributes.band(out).tolist()) for out in outcomes(ids, BAND, 1200)]
    counts = [found.count(order) for order in itertools.permutations((0, 40, 128))]
    assert min(counts) > 150 and max(counts) < 250  # 200 each, standard deviation 13


def tempi_of(ids: np.ndarray) -> tuple[int, ...]:
    return tuple((ids[vocab.BPM.mask(ids)].astype(int) - vocab.BPM.start + vocab.MIN_BPM).tolist())


def by_one_factor(tempi: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The tempi at -10 to +10 percent, where all are in range and no two in a row have become equal."""
    scaled = [tuple((bpm * percent + 50) // 100 for bpm in tempi) for percent in range(90, 111)]
    return {
        found
        for found in scaled
        if min(found) >= 4 and max(found) <= 480 and all(a != b for a, b in itertools.pairwise(found))
    }


def test_tempi_change_by_one_factor(midi):
    ids = TOKENIZER.encode(midi)
    others = ~vocab.BPM.mask(ids)
    found = outcomes(ids, TEMPO, 200)
    assert all((out[others] == ids[others]).all() for out in found)
    assert {tempi_of(out) for out in found} == by_one_factor(tempi_of(ids))


@pytest.mark.parametrize(
    "tempi, percents",
    [
        ((120,), range(-10, 11)),
        ((4, 480), range(-10, 1)),
        ((81, 82, 81), [-10, -9, -7, -6, -5, -4, -3, -2, -1, *range(11)]),
        (tuple(range(120, 60, -1)), range(-1, 11)),
    ],
    ids=["one", "slowest and fastest", "a whole number of 81.5", "ritardando"],
)
def test_tempi_stay_in_range_and_changes_of_tempo_remain(tempi, percents):
    notes = [(0, 60, 96 * bar, 96 * bar + 24) for bar in range(len(tempi))]
    ids = TOKENIZER.encode(song(notes, tempi=[(bpm, 96 * bar) for bar, bpm in enumerate(tempi)]))
    assert tempi_of(ids) == tempi
    expected = {tuple((bpm * (100 + percent) + 50) // 100 for bpm in tempi) for percent in percents}
    assert {tempi_of(out) for out in outcomes(ids, TEMPO, 200)} == expected


# --- all of them together ---------------------------------------------------------------------------


def test_changed_songs_are_canonical(midi):
    ids = TOKENIZER.encode(midi)
    for out in outcomes(ids, ALL, 20):
        grammar.check(out)
        np.testing.assert_array_equal(TOKENIZER.encode(TOKENIZER.decode(out), attributes.band(out)), out)


def test_documents_do_not_depend_on_their_neighbours(songs):
    documents = [*songs[:6], TOKENIZER.encode(SONGS["drums alone"]), *songs[6:9]]
    documents += [np.concatenate((header, ids[point + skip :])) for ids, point, header, skip in cuts(songs)]
    lengths = np.array([len(ids) for ids in documents])
    starts = np.cumsum(lengths) - lengths
    seeds = seeds_of_epoch(7, 3, len(documents))
    row = np.concatenate(documents)
    room = room_of(row, starts, ALL)
    together, scanned = augment(row, starts, seeds, room, ALL)
    for i, (start, ids) in enumerate(zip(starts, documents)):
        of_one = room_of(ids, np.array([0]), ALL)
        assert of_one.tobytes() == room[i : i + 1].tobytes()
        alone, _ = augment(ids, np.array([0]), seeds[i : i + 1], of_one, ALL)
        np.testing.assert_array_equal(together[start : start + len(ids)], alone)
        grammar.check(alone)
    for name, column in vars(attributes.scan(together, starts)).items():
        np.testing.assert_array_equal(getattr(scanned, name), column)


def cuts(songs):
    """Samples that begin inside songs: song, bar line, header and what of the song the header replaces."""
    for ids in songs[10:14]:
        points = attributes.cut_points(ids)
        point = points[len(points) // 2]
        yield ids, point, *attributes.restated(ids, point)


def changed_slowly(ids: np.ndarray, seed: int, settings: Augmentation) -> list[int]:
    """What `augment` makes of one document, token by token: slow, but easy to read."""
    ids = ids.tolist()
    numbers = splitmix64(np.arange(3 + len(vocab.BAND), dtype=np.uint64)).tolist()
    random = [(seed * (number | 1)) % 2**64 >> 32 for number in numbers]

    def drawn(which: int, values: list[int]) -> int:
        return values[random[which] * len(values) >> 32]

    playing, groups = vocab.NO_INSTRUMENT, []  # (part, place in it, tokens of a run)
    pitches, velocities, tempi, part = [], [], [], 0
    for token in ids:
        if not vocab.T.start <= token < vocab.V.stop:
            playing, place = vocab.NO_INSTRUMENT, 0
            for family in (vocab.BAND, vocab.INST):
                if token in family:
                    place = 1 + (random[3 + token - family.start] >> 17)
            if token in vocab.INST:
                playing = vocab.INSTRUMENTS[token - vocab.INST.start]
            part += token in vocab.CHORD
            groups.append((part, 2**16 if token == vocab.EOS else place, []))
        groups[-1][2].append((token, playing))
        pitches += [token - vocab.P.start] if token in vocab.P and playing != vocab.DRUMS else []
        velocities += [token - vocab.V.start] if token in vocab.V else []
        tempi += [token - vocab.BPM.start + 4] if token in vocab.BPM else []

    def fits(percent: int) -> bool:
        new = [(bpm * (100 + percent) + 50) // 100 for bpm in tempi]
        return all(4 <= bpm <= 480 for bpm in new) and all(a != b for a, b in itertools.pairwise(new))

    up = settings.transpose
    key = drawn(0, [k for k in range(-min(up, 5), up + 1) if all(0 <= p + k < 128 for p in pitches)])
    up = settings.velocity
    louder = drawn(1, [k for k in range(-up, up + 1) if all(0 <= v + k < 32 for v in velocities)])
    percent = drawn(2, [k for k in range(-settings.tempo, settings.tempo + 1) if fits(k)])

    def becomes(token: int, playing: int) -> int:
        if token in vocab.P and playing != vocab.DRUMS:
            return token + key
        if token in vocab.V:
            return token + louder
        if token in vocab.BPM:
            return ((token - vocab.BPM.start + 4) * (100 + percent) + 50) // 100 - 4 + vocab.BPM.start
        if token in vocab.CHORD and token != vocab.CHORD.start:
            root, quality = divmod(token - vocab.CHORD.start - 1, len(vocab.QUALITIES))
            return vocab.CHORD.start + 1 + (root + key) % 12 * len(vocab.QUALITIES) + quality
        return token

    if settings.band_order:
        groups.sort(key=lambda group: group[:2])  # stable
    return [becomes(*token) for _, _, tokens in groups for token in tokens]


@pytest.mark.parametrize(
    "settings", [ALL, TRANSPOSE, BAND, OFF, Augmentation(3, MAX_BINS, MAX_PERCENT, True)], ids=str
)
def test_the_arrays_do_what_a_loop_over_tokens_does(songs, settings):
    """For whole songs and for samples cut from songs, which begin with a header and have no BOS or EOS."""
    documents = [TOKENIZER.encode(midi) for midi in SONGS.values()] + songs[:12]
    documents += [np.concatenate((header, ids[point + skip :])) for ids, point, header, skip in cuts(songs)]
    documents += [ids[:point] for ids, point, _, _ in cuts(songs)]
    starts = np.cumsum([0, *map(len, documents[:-1])])
    row = np.concatenate(documents)
    room = room_of(row, starts, settings)
    for epoch in range(2):
        seeds = seeds_of_epoch(3, epoch, len(documents))
        out, _ = augment(row, starts, seeds, room, settings)
        for ids, seed, found in zip(documents, seeds.tolist(), np.split(out, starts[1:])):
            assert found.tolist() == changed_slowly(ids, seed, settings)


def test_the_ids_given_stay_as_they_are(midi):
    ids = TOKENIZER.encode(midi)
    before = ids.copy()
    ids.flags.writeable = False
    for settings in (ALL, TRANSPOSE, BAND):
        (out,) = outcomes(ids, settings, 1)
        assert not np.shares_memory(out, ids)
    np.testing.assert_array_equal(ids, before)
    assert sorted(out.tolist()) == sorted(ids.tolist()), "another order of the same"


@pytest.mark.parametrize(
    "wrong",
    [(MAX_SEMITONES + 1, 0, 0), (-1, 0, 0), (0, MAX_BINS + 1, 0), (0, -1, 0), (0, 0, MAX_PERCENT + 1)],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be from 0 to"):
        Augmentation(*wrong, band_order=False)


# --- in the loader ----------------------------------------------------------------------------------


def read(songs, epoch: int, **where) -> dict[int, list[int]]:
    """The documents of an epoch by the number of their sample."""
    found = {}
    rows = songs.rows(epoch)
    for number, row in enumerate(rows):
        batch = songs.batch(epoch, [number])
        for place, sample in enumerate(row):
            found[int(sample)] = batch.ids[0][batch.structure.doc[0] == place].tolist()
    return found


def test_off_means_off(shards):
    plain, off = packed(shards), packed(shards, augmentation=OFF)
    stored = {i: plain.samples.read(shards, i).tolist() for i in range(len(plain.samples))}
    assert read(plain, 0) == read(off, 1) == stored


def test_samples_differ_by_epoch_and_seed_and_by_nothing_else(shards):
    songs = packed(shards, augmentation=ALL)
    first, second = read(songs, 0), read(songs, 1)
    assert sum(first[i] != second[i] for i in first) > 0.9 * len(first)
    assert read(songs, 0) == first, "an epoch read again"
    assert read(packed(shards, augmentation=ALL), 1) == second, "an epoch that a run began with"
    other = read(packed(shards, augmentation=ALL, seed=1), 0)
    assert sum(first[i] != other[i] for i in first) > 0.9 * len(first)
    for i, ids in first.items():
        assert len(ids) == songs.samples.length[i]
        grammar.check(np.array(ids))


def test_what_fits_a_sample_is_found_once_and_kept_in_a_few_bytes(shards, monkeypatch):
    found = []

    def find(*args):
        room = find_room(*args)
        found.append(room.nbytes)
        return room

    monkeypatch.setattr(data, "find_room", find)
    songs = packed(shards, augmentation=ALL)
    for epoch in range(3):
        read(songs, epoch)
    assert sum(found) == 26 * len(songs.samples)
    assert room_dtype(Augmentation(MAX_SEMITONES, MAX_BINS, MAX_PERCENT, True)).itemsize == 106


def test_batches_depend_on_neither_the_processes_nor_a_resume(shards):
    def rows(songs, state, batch_size, world):
        ranks = [
            songs.batches(state, batch_size, rank=rank, world=world, stop_epoch=2) for rank in range(world)
        ]
        steps = zip(*ranks)
        return [sorted(row for batch, _ in step for row in batch.ids.tolist()) for step in steps]

    whole = rows(packed(shards, augmentation=ALL), State(), 4, 1)
    assert rows(packed(shards, augmentation=ALL), State(), 2, 2) == whole
    assert rows(packed(shards, augmentation=ALL), State(0, 4), 4, 1) == whole[1:]


def test_validation_is_never_augmented(shards):
    with pytest.raises(ValueError, match="'val' must stay"):
        packed(shards, "val", augmentation=ALL)


@pytest.mark.parametrize("kind_rule", ["alike", "any"])
def test_pairs_do_not_depend_on_the_changes(shards, kind_rule):
    songs = packed(shards, augmentation=ALL, kind_rule=kind_rule)
    for epoch in (0, 1):
        batch = songs.batch(epoch, range(songs.rows_per_epoch(epoch)))
        assert batch.counts == count_pairs(batch.structure)


def test_pairs_of_the_next_rule_are_those_of_the_stored_order(shards):
    songs, plain = (packed(shards, kind_rule="next", augmentation=a) for a in (ALL, OFF))
    rows = range(songs.rows_per_epoch(1))
    batch, stored = songs.batch(1, rows), plain.batch(1, rows)
    assert batch.counts == stored.counts
    exact = count_pairs(batch.structure)
    assert exact.token_pairs != batch.counts.token_pairs
    assert exact.token_pairs == pytest.approx(batch.counts.token_pairs, rel=0.003)
    assert (exact.tokens, exact.causal_pairs) == (batch.counts.tokens, batch.counts.causal_pairs)


def test_a_sample_of_another_length_is_refused(shards, monkeypatch):
    monkeypatch.setattr(data, "augment", lambda ids, *_: (ids[:-1], attributes.scan(ids[:-1])))
    with pytest.raises(AssertionError, match="packed by the lengths"):
        packed(shards, augmentation=ALL).batch(0, range(1))
