"""Songs written side by side and with a window, against recomputing everything for each token."""

import numpy as np
import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.generation.decoder import Decoder
from meloformer.generation.draft import Draft
from meloformer.generation.loop import Window, context, write
from meloformer.generation.sampling import Sampling
from meloformer.model.transformer import ModelConfig
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.model_cases import tiny_model

CONFIG = ModelConfig(layers=2, dim=32, heads=2, ffn=48)


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG).eval()


def drafts() -> list[Draft]:
    """A new song, one with a prompt, and one that ends early."""
    prompt = HIDTokenizer().encode(compose(1, bars=2))
    flat = Sampling(temperature=30.0)
    return [
        Draft(bars=2, max_tokens=70, sampling=flat, seed=1),
        Draft(prompt, max_tokens=40, sampling=flat, seed=2),
        Draft(prompt, max_tokens=15, sampling=flat, seed=3),
    ]


def recomputed(model, draft: Draft) -> np.ndarray:
    """The song, with a pass over all of its tokens for each."""
    decoder = Decoder(model)
    while not draft.finished:
        if not draft.append_required():
            draft.draw(decoder.prefill([0], np.array(draft.ids)).float())
    return draft.song()


def test_songs_are_those_of_recomputing_alone_and_side_by_side(model):
    expected = [recomputed(model, draft) for draft in drafts()]
    alone, together = drafts(), drafts()
    for draft in alone:
        assert list(write(model, [draft], 10_000, "auto")) == [0] * draft.new_tokens
    turns = list(write(model, together, 10_000, "auto"))
    for number, ids in enumerate(expected):
        np.testing.assert_array_equal(alone[number].song(), ids)
        np.testing.assert_array_equal(together[number].song(), ids)
        assert turns.count(number) == together[number].new_tokens


def test_a_song_that_outgrows_its_window_is_read_anew_now_and_then(model, monkeypatch):
    begun = []
    prefill = Decoder.prefill
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, songs, ids: (begun.append(ids), prefill(self, songs, ids))[1]
    )
    ids = HIDTokenizer().encode(compose(2, bars=12))[:-1].tolist()
    limit = len(ids) // 2
    window = Window(model, 1, limit)
    for length in range(limit - 50, len(ids)):
        (logits,) = window.logits([0], [ids[:length]])
        if length % 60 == 0 or len(begun[-1]) > limit - 5:
            # What was read when the window began last, and all that came since.
            seen = np.concatenate((begun[-1], ids[length - window._seen[0] + len(begun[-1]) : length]))
            expected = prefill(Decoder(model), [0], seen).float()
            assert len(seen) <= limit
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert 3 <= len(begun) <= 8
    for window_ids in begun[1:]:
        assert limit // 2 < len(window_ids) <= limit * 3 // 4


def test_prompts_that_are_the_same_are_read_once(model, monkeypatch):
    begun = []
    prefill = Decoder.prefill
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, songs, ids: (begun.append(songs), prefill(self, songs, ids))[1]
    )
    ids = HIDTokenizer().encode(compose(2, bars=3))[:-1].tolist()
    window = Window(model, 3, 10_000)
    first, _, third = window.logits([0, 1, 2], [ids, ids[:50], ids])
    assert begun == [[0, 2], [1]] and torch.equal(first, third)
    # Forced tokens come several at once; other songs go on by one meanwhile.
    got = window.logits([1, 0], [ids[:60], [*ids, ids[0] + 3]])
    expected = prefill(Decoder(model), [0], np.array(ids[:60])).float()
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert len(begun) == 2


def test_a_bar_that_is_longer_than_the_window_has_no_logits(model):
    ids = HIDTokenizer().encode(compose(1, bars=4))[:-1]
    assert context(ids, 10) is None
    assert Window(model, 1, 10).logits([0], [ids]) == [None]
