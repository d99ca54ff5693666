"""Decoding from caches against the model's full forward pass, at every position."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.generation import decoder as module
from meloformer.generation.decoder import Decoder, padded_batch
from meloformer.kernels.structure import KIND_RULES
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import attributes, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.model_cases import tiny_model

CONFIG = ModelConfig(layers=2, dim=32, heads=2, ffn=48)
DENSE = CONFIG.as_dense()
OF_RULES = [replace(CONFIG, kind_rule=rule) for rule in KIND_RULES]
FAR = replace(CONFIG, near_bars=(0, 2), kind_rule="alike")
ids_of = {config: config.kind_rule for config in OF_RULES} | {DENSE: "dense", FAR: "near bars 0, 2"}


def song(seed: int, bars: int = 6, tokens: int | None = None) -> np.ndarray:
    return HIDTokenizer().encode(compose(seed, bars=bars))[:tokens]


def later_part(ids: np.ndarray, bar: int) -> np.ndarray:
    """The sample of a song that begins at a bar line."""
    point = int(attributes.cut_points(ids)[bar])
    header, skip = attributes.restated(ids, point)
    return np.concatenate((header, ids[point + skip :]))


@torch.no_grad()
def full_forward(model: MeloFormer, ids: np.ndarray) -> torch.Tensor:
    """[n, VOCAB_SIZE]"""
    return model(*padded_batch(model, ids))[0, : len(ids), : vocab.VOCAB_SIZE]


def decoded(decoder: Decoder, ids: np.ndarray, prompt: int) -> torch.Tensor:
    """The same from position `prompt - 1` on."""
    logits = [decoder.prefill([0], ids[:prompt])]
    logits += [decoder.step([0], [token])[0] for token in ids[prompt:].tolist()]
    return torch.stack(logits)


def check_logits(model: MeloFormer, ids: np.ndarray, prompt: int) -> None:
    expected = full_forward(model, ids)[prompt - 1 :]
    # The tables of RoPE are float32 in both, all else is float64.
    allowed = 1e-10 * expected.abs().max().item()
    torch.testing.assert_close(decoded(Decoder(model), ids, prompt), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("config", ids_of, ids=ids_of.get)
def test_logits_are_those_of_the_full_forward_from_the_first_token(config):
    check_logits(tiny_model(config), song(0, tokens=180), prompt=1)


@pytest.mark.parametrize("config", ids_of, ids=ids_of.get)
def test_and_after_a_prompt_that_ends_anywhere(config):
    random = np.random.default_rng(len(ids_of[config]))
    for seed in (1, 2):
        ids = song(seed)
        prompt = int(random.integers(len(ids) // 2, len(ids) - 150))
        check_logits(tiny_model(config), ids[: prompt + 150], prompt)


@pytest.mark.parametrize("config", ids_of, ids=ids_of.get)
def test_and_in_a_sample_that_begins_later(config):
    ids = later_part(song(5, bars=9), 3)
    check_logits(tiny_model(config), ids, prompt=len(ids) - 100)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=ids_of.get)
def test_float32_agrees_to_four_digits(config):
    model, ids = tiny_model(config, torch.float32), song(4, tokens=200)
    expected = full_forward(model, ids)
    torch.testing.assert_close(decoded(Decoder(model), ids, 50), expected[49:], rtol=0, atol=1e-4)
    decoder = Decoder(model)
    decoder.prefill([0], ids[:50])
    torch.testing.assert_close(decoder.extend(0, ids[50:].tolist()), expected[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=ids_of.get)
def test_weights_of_8_bits_change_logits_by_a_hundredth_at_most(config):
    model, ids = tiny_model(config, torch.float32), song(3, tokens=200)
    expected, decoder = full_forward(model, ids)[49:], Decoder(model, int8=True)
    got = decoded(decoder, ids, 50)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error[0] < 1e-5  # the prompt is read as ever
    assert 1e-4 < error[1:].max() < 0.01
    decoder.prefill([0], ids[:50])
    assert (decoder.extend(0, ids[50:].tolist()) - got[-1]).norm() < 0.01 * expected[-1].norm()


def parts(begin: int, end: int, random: np.random.Generator) -> Iterator[slice]:
    """All from `begin` to `end`, in parts of few and of many tokens."""
    while begin < end:
        part = slice(begin, min(begin + int(random.geometric(random.choice([0.02, 0.5]))), end))
        yield part
        begin = part.stop


@pytest.mark.parametrize("config", ids_of, ids=ids_of.get)
def test_a_block_leaves_what_its_tokens_leave_one_by_one(config):
    """Blocks of any length, bars ending in them, between single tokens."""
    model, random = tiny_model(config), np.random.default_rng(0)
    for seed in (1, 3):
        ids = song(seed, bars=8, tokens=700)
        expected, decoder = full_forward(model, ids), Decoder(model)
        allowed = 1e-10 * expected.abs().max().item()
        decoder.prefill([0], ids[:20])
        for part in parts(20, len(ids), random):
            tokens = ids[part].tolist()
            got = decoder.step([0], tokens)[0] if len(tokens) == 1 else decoder.extend(0, tokens)
            torch.testing.assert_close(got, expected[part.stop - 1], rtol=0, atol=allowed)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=ids_of.get)
def test_songs_of_a_batch_take_blocks_between_their_steps(config):
    model, random = tiny_model(config), np.random.default_rng(0)
    everything = [song(seed, tokens=350) for seed in range(3)]
    expected = [full_forward(model, ids) for ids in everything]
    decoder, read = Decoder(model, songs=3), [30, 60, 90]
    for number, ids in enumerate(everything):
        decoder.prefill([number], ids[: read[number]])
    while turn := [number for number, ids in enumerate(everything) if read[number] < len(ids)]:
        number = int(random.choice(turn))
        part = next(parts(read[number], len(everything[number]), random))
        got = {number: decoder.extend(number, everything[number][part].tolist())}
        read[number] = part.stop
        turn = [number for number in turn if read[number] < len(everything[number])]
        if turn:
            logits = decoder.step(turn, [int(everything[number][read[number]]) for number in turn])
            for number in turn:
                read[number] += 1
            got |= zip(turn, logits)
        for number, logits in got.items():
            allowed = 1e-10 * expected[number].abs().max().item()
            torch.testing.assert_close(logits, expected[number][read[number] - 1], rtol=0, atol=allowed)


@pytest.mark.parametrize("config", [CONFIG, OF_RULES[0], DENSE], ids=ids_of.get)
def test_songs_of_a_batch_begin_and_end_independently(config):
    """Songs of different lengths in turn, in changing company; a place is taken over by another song."""
    model = tiny_model(config)
    everything = [song(seed, tokens=60 + 40 * seed) for seed in range(5)]
    prompts = [1, 50, 30, 100, 60]
    decoder, places, waiting = Decoder(model, songs=3), {0: 0, 1: 1, 2: 2}, [3, 4]
    got = {i: [decoder.prefill([i], everything[i][: prompts[i]])] for i in places}
    random = np.random.default_rng(0)
    while places:
        turn = [place for place in places if random.random() < 0.8]
        tokens = [int(everything[places[p]][prompts[places[p]] + len(got[places[p]]) - 1]) for p in turn]
        for place, logits in zip(turn, decoder.step(turn, tokens) if turn else ()):
            i = places[place]
            got[i].append(logits)
            if prompts[i] + len(got[i]) - 1 < len(everything[i]):
                continue
            del places[place]
            if waiting:
                places[place] = i = waiting.pop(0)
                got[i] = [decoder.prefill([place], everything[i][: prompts[i]])]
    for i, ids in enumerate(everything):
        expected = full_forward(model, ids)[prompts[i] - 1 :]
        allowed = 1e-10 * expected.abs().max().item()
        torch.testing.assert_close(torch.stack(got[i]), expected, rtol=0, atol=allowed)


def test_songs_may_share_a_prompt():
    model, ids = tiny_model(CONFIG), song(3, tokens=150)
    decoder, alone = Decoder(model, songs=3), Decoder(model)
    torch.testing.assert_close(decoder.prefill([0, 2], ids[:100]), alone.prefill([0], ids[:100]))
    other = vocab.CHORD.start + 3
    for token in ids[100:].tolist():
        both, expected = decoder.step([2, 0], [token, other]), alone.step([0], [token])
        torch.testing.assert_close(both[:1], expected)


def test_a_step_of_one_song_by_a_small_model_takes_one_thread(monkeypatch):
    threads, had = [], torch.get_num_threads()
    model, ids = tiny_model(CONFIG), song(3, tokens=40)
    torch.set_num_threads(2)
    try:
        for below, songs in ((1e9, 1), (1e9, 2), (10, 1)):
            monkeypatch.setattr(module, "ALONE_BELOW", below)
            decoder = Decoder(model, songs=2)
            through = decoder._through_layers

            def noting(*arguments, through=through):
                threads.append(torch.get_num_threads())
                return through(*arguments)

            decoder._through_layers = noting
            decoder.prefill([0, 1], ids[:30])
            decoder.step([*range(songs)], [int(ids[30])] * songs)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(had)
    assert threads == [1, 2, 2]
