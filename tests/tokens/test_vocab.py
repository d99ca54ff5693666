import numpy as np
import pytest

from meloformer.kernels import structure
from meloformer.tokens import vocab


def test_every_id_has_one_name_and_back():
    names = vocab.names()
    assert len(names) == len(set(names)) == vocab.VOCAB_SIZE < 2**16
    assert all(vocab.ids_by_name()[name] == i for i, name in enumerate(names))
    assert [vocab.family_of(i).name for i in (0, vocab.T.start, vocab.V.stop - 1)] == ["PAD", "T", "V"]


def test_the_families_hold_what_the_design_lists():
    assert len(vocab.CHORD) == 1 + 12 * 13
    assert set(vocab.SIGNATURES) == {(n, d) for n in range(1, 25) for d in (1, 2, 4, 8, 16, 32)}
    assert vocab.names()[vocab.BPM.start] == "BPM_4" and vocab.names()[vocab.BPM.stop - 1] == "BPM_480"
    assert vocab.BAND.labels == vocab.INST.labels and len(vocab.RESERVED) == 8
    assert len(vocab.T) == 192 and len(vocab.P) == 128 and len(vocab.V) == 32


def test_instruments_stand_drums_first_then_bass():
    assert vocab.INSTRUMENTS[0] == vocab.DRUMS
    assert set(vocab.INSTRUMENTS[1:9]) == set(range(32, 40))
    assert sorted(vocab.INSTRUMENTS) == list(range(129))
    assert (vocab.INSTRUMENTS[vocab.INSTRUMENT_RANK] == np.arange(129)).all()


def test_old_data_is_told_its_version():
    (first,) = (name for name, version in vocab.EARLIER_VERSIONS.items() if version == 1)
    assert vocab.mismatch(first) == "in version 1 of the token format, and this program reads version 2"
    assert vocab.mismatch("0" * 64) == "with another tokenizer"
    assert vocab.fingerprint() not in vocab.EARLIER_VERSIONS


def test_the_kernels_number_instruments_alike():
    """They must not import the tokens, and the tokens must not import PyTorch, as `meloformer.kernels`
    does."""
    assert (vocab.DRUMS, vocab.NO_INSTRUMENT) == (structure.DRUMS, structure.NO_INSTRUMENT)


def test_lengths_are_exact_to_a_quarter_then_within_three_percent():
    steps = np.arange(1, vocab.MAX_NOTE_STEPS + 1)
    found = vocab.LENGTHS[vocab.length_to_index(steps)]
    assert (found[:24] == steps[:24]).all()
    assert (np.abs(found - steps) / steps).max() <= 0.03
    below = vocab.LENGTHS[vocab.length_to_index_at_most(steps)]
    assert (below <= steps).all() and ((steps - below) / steps).max() <= 0.03
    assert (vocab.length_to_index(vocab.LENGTHS) == np.arange(len(vocab.LENGTHS))).all()
    for quarters in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        assert 24 * quarters in vocab.LENGTHS


@pytest.mark.parametrize("steps", [1, 2, 24, 25, 34, 383, 384])
def test_the_longest_length_that_fits_never_exceeds(steps):
    index = vocab.length_to_index_at_most(np.array(steps))
    assert vocab.LENGTHS[index] <= steps
    assert index + 1 == len(vocab.LENGTHS) or vocab.LENGTHS[index + 1] > steps


def test_velocity_bins_keep_their_middle():
    bins = np.arange(vocab.VELOCITY_BINS)
    assert (vocab.velocity_to_bin(vocab.bin_to_velocity(bins)) == bins).all()
    velocities = np.arange(1, 128)
    error = vocab.bin_to_velocity(vocab.velocity_to_bin(velocities)) - velocities
    assert np.abs(error).max() <= 2


def test_the_fingerprint_changes_with_any_name(monkeypatch):
    before = vocab.fingerprint()
    vocab.fingerprint.cache_clear()
    monkeypatch.setattr(vocab, "names", lambda: ("PAD", "other"))
    try:
        assert vocab.fingerprint() != before
    finally:
        vocab.fingerprint.cache_clear()
