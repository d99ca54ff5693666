"""The instruments that the loss leaves out, against the grammar, and what this does to loss and gradients."""

import numpy as np
import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.data.augment import Augmentation, augment, find_room, seeds_of_epoch
from meloformer.data.batches import State
from meloformer.kernels.structure import Structure
from meloformer.model.instrument_mask import forbidden_instruments
from meloformer.tokens import attributes, vocab
from meloformer.tokens.grammar import Grammar
from meloformer.tokens.tokenizer import HIDTokenizer
from meloformer.tokens.vocab import CHORD, INST
from meloformer.training.distributed import start_job
from meloformer.training.trainer import Trainer

from helpers import compiled_layers, random_batches
from helpers.tiny_train import TINY
from helpers.training import config


def in_other_order(song: np.ndarray, seed: int) -> np.ndarray:
    settings, start = Augmentation(0, 0, 0, True), np.array([0])
    room = find_room(song, start, attributes.scan(song), settings)
    return augment(song, start, seeds_of_epoch(seed, 0, 1), room, settings)[0]


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    """Beginnings and middles of songs, with their bands in random order."""
    songs = [HIDTokenizer().encode(compose(seed)) for seed in range(4)]
    songs = [in_other_order(song, seed) for seed, song in enumerate(songs)]
    point = int(attributes.cut_points(songs[0])[2])
    header, skip = attributes.restated(songs[0], point)
    return [songs[1][:1500], np.concatenate((header, songs[0][point + skip :])), *songs[2:]]


def packed(documents: list[np.ndarray], padding: int) -> tuple[torch.Tensor, Structure]:
    row, lengths = np.concatenate(documents), [len(document) for document in documents]
    scanned = attributes.scan(row, starts=np.cumsum(lengths) - lengths)

    def padded(values, fill):
        return torch.from_numpy(np.pad(values.astype(np.int64), (0, padding), constant_values=fill))[None]

    doc = padded(np.repeat(np.arange(len(documents)), lengths), -1)
    facts = (scanned.bar, scanned.inst, scanned.kind, scanned.onset)
    return padded(row, vocab.PAD), Structure.build(doc, *(padded(fact, 0) for fact in facts))


def test_what_is_left_out_is_what_the_grammar_forbids_after_a_group(documents):
    """And in the middle of a group what no later token can make legal again in this bar."""
    found = forbidden_instruments(*packed(documents, padding=70))[0].numpy()
    assert 0.5 < found.mean() < 1
    start, compared = 0, 0
    for document in documents:
        grammar = Grammar()
        for place, token in enumerate(document.tolist(), start):
            grammar.push(token)
            allowed = grammar.allowed()
            legal = allowed[INST.start : INST.stop]
            assert not (legal & found[place]).any()
            if allowed[CHORD.start] and token not in vocab.BAND:  # a group, or the bar, may end here
                np.testing.assert_array_equal(found[place], ~legal)
                compared += 1
        start += len(document)
    assert compared > 2000


def test_rows_and_padding_change_nothing(documents):
    alone = [forbidden_instruments(*packed([document], padding=0))[0] for document in documents]
    together = forbidden_instruments(*packed(documents, padding=33))[0]
    assert torch.equal(torch.cat(alone), together[:-33])


def test_the_loss_is_over_the_other_instruments_alone(data, tmp_path):
    """Its logits, so that validation leaves out the same; and its gradients are those of the other logits."""
    trainer = Trainer(config(data, tmp_path, family_weights=""), TINY, start_job("cpu"))
    stepper, batch = trainer.stepper, next(trainer.data.batches(State(), 2))[0]
    forbidden = forbidden_instruments(batch.ids, batch.structure)
    logits = stepper.model(batch.ids, batch.structure, stepper.attention)
    is_real = batch.targets >= 0
    masked = torch.nn.functional.pad(forbidden, (INST.start, logits.shape[-1] - INST.stop))
    expected = torch.nn.functional.cross_entropy(
        logits.masked_fill(masked, -torch.inf)[is_real], batch.targets[is_real], reduction="sum"
    )
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in stepper.model.parameters()]
    stepper.model.zero_grad()
    stepper.accumulate(stepper.prepare(batch), last=True)
    for parameter, gradient in zip(stepper.model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    figures, _ = stepper.update(0.0)()
    assert figures.loss == pytest.approx(expected.item() / batch.num_targets, rel=1e-5)
    assert torch.equal(stepper.logits(batch).isneginf(), masked)


def batches_of_random_tokens():
    """(ids, targets, structure) as tests of training on GPUs and of compiled layers make them."""
    full = random_batches.make_batch(0, random_batches.LENGTH, random_batches.SUMMARIES, (0, 33, 128))
    for batch in [full, *random_batches.varied(53)]:
        yield batch.ids, batch.targets, batch.structure
    for structure, ids in compiled_layers.batches(20):
        yield ids, torch.nn.functional.pad(ids[:, 1:], (0, 1)).where(structure.doc >= 0, -100), structure


def test_random_tokens_of_tests_are_never_what_the_loss_leaves_out():
    """Their loss would be infinite."""
    instruments, left_out = 0, []
    for ids, targets, structure in batches_of_random_tokens():
        forbidden = forbidden_instruments(ids, structure)
        is_inst = torch.from_numpy(INST.mask(targets.numpy()))
        assert not forbidden[is_inst].gather(1, targets[is_inst][:, None] - INST.start).any()
        instruments += int(is_inst.sum())
        left_out.append(forbidden[structure.doc >= 0].float().mean().item())
        # A GPU would take any of two places of an instrument in the list.
        is_band = torch.from_numpy(vocab.BAND.mask(ids.numpy()))
        rows = torch.arange(len(ids))[:, None].expand_as(ids)
        listed = torch.stack([rows[is_band], structure.doc[is_band], ids[is_band]])
        assert listed.unique(dim=1).shape == listed.shape and (listed[1] >= 0).all()
    assert instruments > 5000 and 0.9 < min(left_out) <= max(left_out) < 1
